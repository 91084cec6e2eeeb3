//! Guessed tokens change how many steps an answer takes, and nothing else: tokens, text,
//! log-probabilities, ranks, proofs and ends are those of an engine that guesses nothing.

use crate::common::{self, Noise};
use targon_engine::engine::output::Ended;
use targon_engine::engine::request::Request;
use targon_engine::engine::{Engine, Options};
use targon_engine::intake::proof::Prover;
use targon_engine::models::grammar::Constraint;
use targon_engine::models::sampler::Sampling;
use targon_engine::proof::Scheme;
use targon_engine::server::registry::Served;

const OUTPUT: usize = 90;

/// Prompts that repeat themselves, drawn in all the ways that look at earlier tokens.
fn requests() -> Vec<Request> {
    let mut noise = Noise(11);
    let mut requests = Vec::new();
    for index in 0..24 {
        let phrase: Vec<u32> = (0..6 + index).map(|_| noise.below(256) as u32).collect();
        let mut request = Request::greedy(phrase.repeat(3), OUTPUT);
        request.stop.ignore_eos = index % 5 != 0;
        request.top_logprobs = index % 4;
        request.min_tokens = 7 * (index % 3);
        let plain = Sampling { temperature: [0.0, 0.05, 1.0][index % 3], ..Sampling::greedy() };
        request.sampling = match index % 4 {
            1 => Sampling { repetition_penalty: 1.05, presence_penalty: 0.1, ..plain },
            2 => Sampling { frequency_penalty: 0.05, logit_bias: vec![(3, 1.0)], ..plain },
            _ => plain,
        };
        requests.push(request);
    }
    requests
}

fn proved(request: &Request, served: &Served, index: usize) -> Request {
    let mut request = request.clone();
    let scheme = Scheme::ALL[index % Scheme::ALL.len()];
    let prover = Prover { scheme, nonce: [index as u8; 32], signer: None };
    prover.bind(&mut request, &served.identity, None, 0);
    request
}

/// The answers to all at once.
fn answers(engine: &Engine, requests: &[Request]) -> Vec<Ended> {
    let running: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    running.into_iter().map(|generation| generation.collect_blocking().unwrap()).collect()
}

#[test]
fn drafts_change_nothing_but_the_number_of_steps() {
    for drafts_max in [3, 15] {
        for sequences_max in [1, 4] {
            let plain = Options { sequences_max, ..common::options() };
            let (without, with) = (
                common::tiny_served(7, plain),
                common::tiny_served(7, Options { drafts_max, ..plain }),
            );
            let requests: Vec<Request> = (requests().iter().enumerate())
                .map(|(index, request)| proved(request, &without, index))
                .collect();
            let (want, got) =
                (answers(&without.engine, &requests), answers(&with.engine, &requests));
            for (index, (want, got)) in want.iter().zip(&got).enumerate() {
                assert_eq!(format!("{:?}", want.steps), format!("{:?}", got.steps), "{index}");
                let end = |ended: &Ended| (ended.finish.reason.clone(), ended.finish.digest);
                assert_eq!(end(got), end(want), "request {index}");
            }
            let (before, after) =
                (without.engine.stats().snapshot(), with.engine.stats().snapshot());
            assert_eq!((before.load.drafted, before.decode_tokens), (0, after.decode_tokens));
            let load = after.load;
            println!("{drafts_max} drafts, {sequences_max} sequences: {load:?}");
            println!("{} steps, {} without", after.steps, before.steps);
            assert!(load.accepted > 100, "too few drafts came true");
            assert!(load.drafted > load.accepted + 20, "too few did not");
            assert!(after.steps < before.steps, "drafts saved no step");
        }
    }
}

#[test]
fn a_grammar_gets_no_drafts() {
    let served = common::tiny_served(7, Options { drafts_max: 4, ..common::options() });
    let mut request = requests()[0].clone();
    let text = Constraint::Regex("[ab]{40}".into());
    request.grammar = Some(served.engine.text().grammar(text).unwrap());
    let steps = served.engine.submit(request).unwrap().collect_blocking().unwrap().steps;
    assert_eq!(steps.len(), 41, "40 characters and an end token");
    assert_eq!(served.engine.stats().snapshot().load.drafted, 0);
}
