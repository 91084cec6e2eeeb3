//! Proofs across the two engines: honest ones pass limits, others do not.

use crate::common;
use crate::pair::{QUESTIONS, entry, pair, request, run, start};
use targon_engine::engine::backend::BackendKind;
use targon_engine::engine::output::{FinishReason, Step};
use targon_engine::engine::request::Request;
use targon_engine::intake::proof::{ProofHead, Prover};
use targon_engine::proof::commit::ResidueChunk;
use targon_engine::proof::residue::{ResidueBits, row_energy};
use targon_engine::proof::{CHUNK_ROWS, Scheme};
use targon_engine::server::registry::Served;
use targon_engine::verify::answer::Answer;
use targon_engine::verify::scrutiny::{Scrutiny, TwinPolicy};
use targon_engine::verify::{Challenge, Claim, Depth, Limits, Profile, Reason, Report, Verdict};

const NONCE: [u8; 32] = [7; 32];
/// Energy of a chunk that an honest stack in f32 stays below (docs/verification.md).
const F32_ENERGY_MAX: f64 = 60.0;

/// A proved answer, with the request as its server bound it.
pub(crate) fn proved(served: &Served, mut asked: Request) -> (Request, Answer) {
    let head = bind(served, &mut asked);
    let (steps, reason) = run(served, &asked);
    let answer = answer(&head, &steps, &reason);
    (asked, answer)
}

fn bind(served: &Served, asked: &mut Request) -> ProofHead {
    let prover = Prover { scheme: Scheme::Residue, nonce: NONCE, signer: None };
    prover.bind(asked, &served.identity, None, 0)
}

fn answer(head: &ProofHead, steps: &[Step], reason: &FinishReason) -> Answer {
    let digest = steps.iter().rev().find_map(|s| s.proof.as_ref()).map(|p| p.digest);
    Answer::of_steps(steps, Some(head.end(digest, steps.len(), reason)))
}

/// What a verifier of `served` finds of an answer at every row, under the default limits.
pub(crate) fn checked(served: &Served, asked: &Request, answer: &Answer) -> Report {
    let proof = Some(Challenge { scheme: Scheme::Residue, nonce: Some(NONCE), hotkey: None });
    let claim = Claim { proof, ..Claim::new(asked, answer) };
    let scrutiny = Scrutiny { twin: TwinPolicy::Always, ..Scrutiny::default() };
    let verifier = common::verifier(served).with_scrutiny(scrutiny);
    verifier.verify(Profile::Proof, 3).depth(Depth::Slow).answer(&claim)
}

#[test]
fn the_native_verifier_passes_honest_answers_of_mistralrs_under_the_default_limits() {
    let (mut energies, mut margins) = (Vec::new(), Vec::new());
    let (mut trimmed, mut twins) = (Vec::new(), Vec::new());
    for (temperature, question) in [0.0, 0.7, 1.0].iter().cycle().zip(QUESTIONS) {
        let mut asked = request(question, *temperature, 40);
        asked.stop.ignore_eos = true;
        let (asked, answer) = proved(&pair().other, asked);
        assert_eq!(answer.end.as_ref().unwrap().canon, "mistralrs-0-8-1");
        let report = checked(&pair().native, &asked, &answer);
        assert_eq!(report.verdict, Verdict::Pass, "{question} at {temperature}");
        assert!(report.chunks.iter().all(|c| !c.is_exact), "rows of another canon");
        energies.extend(report.chunks.iter().filter_map(|c| c.energy));
        margins.extend(report.rows.iter().filter_map(|r| r.margin));
        let (limits, scheme) = (Limits::default(), Scheme::Residue);
        for (values, statistic) in [
            (&mut trimmed, limits.statistic(scheme, &report)),
            (&mut twins, limits.twin_statistic(scheme, &report)),
        ] {
            let statistic = statistic.unwrap();
            assert!(!statistic.is_over(), "{question} is suspicious: {statistic:?}");
            values.push(statistic.value);
        }
    }
    energies.sort_by(f64::total_cmp);
    let (count, rows) = (energies.len(), margins.len());
    let largest = margins.iter().fold(0.0_f64, |m, x| m.max(*x));
    let mean = margins.iter().sum::<f64>() / rows as f64;
    println!(
        "mistralrs checked by native: {count} chunks, energy median {:.1}, most {:.1} (limit {}); \
         {rows} rows, margin mean {mean:.5}, most {largest:.4}",
        energies[count / 2],
        energies[count - 1],
        Limits::default().energy_u8,
    );
    let spread = |values: &[f64]| {
        let largest = values.iter().fold(0.0_f64, |m, x| m.max(*x));
        (values.iter().sum::<f64>() / values.len() as f64, largest)
    };
    let (trimmed, twin) = (spread(&trimmed), spread(&twins));
    println!(
        "of whole answers: trimmed mean {:.1} on average, at most {:.1}; twin {:.2}, at most {:.2}",
        trimmed.0, trimmed.1, twin.0, twin.1
    );
    assert!(energies[0] > 0.0, "rows of two stacks differ");
    assert!(energies[count - 1] < F32_ENERGY_MAX, "{energies:?}");
}

/// mistral.rs cannot be shown an output and asked for its rows; it can be asked for the token
/// after each part of one, under the keys of the other's proof.
#[test]
fn rows_of_mistralrs_are_close_to_those_that_the_native_engine_proved() {
    let mut asked = request(QUESTIONS[4], 0.7, CHUNK_ROWS);
    asked.stop.ignore_eos = true;
    bind(&pair().native, &mut asked);
    let (steps, _) = run(&pair().native, &asked);
    let theirs = steps.last().unwrap().proof.clone().unwrap();
    let theirs = ResidueChunk::from_bytes(&theirs.data, CHUNK_ROWS).unwrap();
    let mut energies = Vec::new();
    for (place, sketch) in theirs.sketches.iter().enumerate() {
        let mut next = asked.clone();
        next.prompt.extend(steps[..place].iter().map(|s| s.token));
        next.max_tokens = 1;
        let (own, _) = run(&pair().other, &next);
        let own = ResidueChunk::from_bytes(&own[0].proof.as_ref().unwrap().data, 1).unwrap();
        energies.push(row_energy(ResidueBits::U8, &own.sketches[0], sketch));
    }
    let mean = energies.iter().sum::<f64>() / energies.len() as f64;
    println!("native checked by rows of mistralrs: {} rows, energy {mean:.1}", energies.len());
    assert!(mean > 0.0 && mean < Limits::default().energy_u8, "{mean}");
}

#[test]
fn an_answer_to_another_question_is_rejected() {
    let mut asked = request(QUESTIONS[0], 0.7, 40);
    asked.stop.ignore_eos = true;
    let (asked, honest) = proved(&pair().other, asked);
    let mut moved = asked.clone();
    moved.prompt[5] += 1;
    let report = checked(&pair().native, &moved, &honest);
    let Verdict::Reject(rejection) = report.verdict else { panic!("{:?}", report.verdict) };
    assert_eq!(rejection.reason, Reason::BadPowv, "powv counts the prompt's tokens");
    // Rows of this request under the tokens of another.
    let mut swapped = honest.clone();
    swapped.ids.swap(3, 20);
    let report = checked(&pair().native, &asked, &swapped);
    assert!(matches!(report.verdict, Verdict::Reject(_)), "{:?}", report.verdict);
}

#[test]
fn a_quantised_model_has_an_identity_of_its_own_and_is_never_taken_for_the_other() {
    let registry = start(vec![entry("int8", BackendKind::Mistralrs, Some("q8_0"))]);
    let served = registry.route(Some("int8"), None).unwrap().served;
    let plain = &pair().other.identity;
    assert_eq!(served.identity.weights_root, plain.weights_root);
    assert_eq!(served.identity.type_name(), "bf16+isq-q8_0");
    assert_ne!(served.identity.model_hash, plain.model_hash);
    assert!(served.fingerprint.contains("isq-q8_0"), "{}", served.fingerprint);
    let mut asked = request(QUESTIONS[1], 0.0, 40);
    asked.stop.ignore_eos = true;
    let logprob = |served| run(served, &asked).0[0].logprob;
    let apart = (logprob(&served) - logprob(&pair().other)).abs();
    assert!(apart > 1e-6, "the weights were not quantised: {apart}");
    let (asked, honest) = proved(&served, asked);
    let Verdict::Reject(rejection) = checked(&pair().native, &asked, &honest).verdict else {
        panic!("it passed")
    };
    assert_eq!(rejection.reason, Reason::WrongRoot);
}

/// The control of the energies: rows of 4-bit weights under the name of the model that they were
/// made of. Nothing but the rows is wrong.
#[test]
fn four_bit_rows_under_the_name_of_the_model_are_rejected_by_their_energy() {
    let registry = start(vec![entry("int4", BackendKind::Mistralrs, Some("q4_0"))]);
    let mut served = registry.route(Some("int4"), None).unwrap().served;
    served.identity = pair().other.identity.clone();
    let mut asked = request(QUESTIONS[4], 0.0, CHUNK_ROWS);
    asked.stop.ignore_eos = true;
    let (asked, lie) = proved(&served, asked);
    let report = checked(&pair().native, &asked, &lie);
    let energies: Vec<f64> = report.chunks.iter().filter_map(|c| c.energy).collect();
    println!("4-bit rows checked by native: energies {energies:.0?}");
    let Verdict::Reject(rejection) = report.verdict else { panic!("{:?}", report.verdict) };
    assert_eq!(rejection.reason, Reason::SketchEnergy);
}
