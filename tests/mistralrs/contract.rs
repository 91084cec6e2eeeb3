//! Requests and events: the same of both engines.

use crate::pair::{QUESTIONS, ids, pair, request, run};
use std::time::{Duration, Instant};
use targon_engine::engine::SubmitError;
use targon_engine::engine::output::{Ended, Event, FinishReason};
use targon_engine::models::pass::LogprobMode;

/// How far log-probabilities of the two may lie apart: bf16 rows on one side, f32 on the other.
const LOGPROB_BOUND: f64 = 0.25;
/// How far on average.
const LOGPROB_MEAN_BOUND: f64 = 0.05;

/// Outputs are equal up to a place where two tokens are nearly as likely as each other.
#[test]
fn greedy_outputs_are_equal_and_their_log_probabilities_are_close() {
    let (mut worst, mut sum, mut count, mut whole) = (0.0_f64, 0.0, 0, 0);
    for question in QUESTIONS {
        let mut asked = request(question, 0.0, 24);
        asked.top_logprobs = 3;
        let (native, native_end) = run(&pair().native, &asked);
        let (other, other_end) = run(&pair().other, &asked);
        for (a, b) in native.iter().zip(&other) {
            assert_eq!((a.rank, b.rank, b.top.len(), b.top[0].token), (1, 1, 3, b.token));
            assert!(b.logprob <= 0.0, "normalised: {}", b.logprob);
        }
        let equal = native.iter().zip(&other).take_while(|(a, b)| a.token == b.token).count();
        if equal == native.len() {
            assert_eq!((ids(&other), &other_end), (ids(&native), &native_end), "{question}");
            whole += 1;
        } else {
            let (best, second) = (&native[equal].top[0], &native[equal].top[1]);
            let apart = best.logprob - second.logprob;
            println!(
                "{question} differs at token {equal}, where native has {apart:.3} nats between two"
            );
            assert_eq!(second.token, other[equal].token, "{question}");
            assert!(apart < LOGPROB_BOUND, "{question}: {apart}");
        }
        for (a, b) in native.iter().zip(&other).take(equal) {
            assert_eq!((a.powv, &a.text), (b.powv, &b.text), "{question}");
            let apart = (a.logprob - b.logprob).abs();
            (worst, sum, count) = (worst.max(apart), sum + apart, count + 1);
        }
    }
    let mean = sum / f64::from(count);
    println!(
        "greedy outputs: {whole} of {} equal; log-probabilities of {count} tokens: mean {mean:.5}, \
         worst {worst:.5} nats apart",
        QUESTIONS.len()
    );
    assert!(whole * 4 >= QUESTIONS.len() * 3, "{whole}");
    assert!(worst < LOGPROB_BOUND && mean < LOGPROB_MEAN_BOUND, "mean {mean}, worst {worst}");
}

#[test]
fn both_say_the_same_of_an_end_a_stop_string_a_limit_and_a_ban() {
    for (name, served) in pair().both() {
        let (steps, end) = run(served, &request(QUESTIONS[0], 0.0, 200));
        let stops = &served.engine.text().stop_ids;
        assert!(
            matches!(end, FinishReason::EndToken(id) if stops.contains(&id)),
            "{name}: {end:?}"
        );
        assert_eq!(steps.last().unwrap().text, "", "{name}: an end token is not text");
        let mut stopped = request(QUESTIONS[0], 0.0, 200);
        stopped.stop.strings = vec!["Paris".into()];
        let (_, end) = run(served, &stopped);
        assert_eq!(end, FinishReason::StopString("Paris".into()), "{name}");
        let (steps, end) = run(served, &request(QUESTIONS[0], 0.0, 3));
        assert_eq!((steps.len(), end), (3, FinishReason::Length), "{name}");
        let mut banned = request(QUESTIONS[0], 0.0, 1);
        banned.sampling.logit_bias = vec![(steps[0].token, -100.0)];
        assert_ne!(run(served, &banned).0[0].token, steps[0].token, "{name}");
        let mut held = request("Say yes.", 0.0, 40);
        held.min_tokens = 40;
        assert_eq!(run(served, &held).0.len(), 40, "{name}: no end before min_tokens");
    }
}

#[test]
fn draws_follow_the_noise_of_the_request_and_the_mode_is_reported() {
    let mut asked = request(QUESTIONS[2], 0.8, 24);
    asked.logprob_mode = LogprobMode::Scaled;
    asked.sampling.top_p = 0.95;
    let other = &pair().other;
    let (first, _) = run(other, &asked);
    assert_eq!(ids(&first), ids(&run(other, &asked).0), "the same key draws the same tokens");
    asked.sampling.noise_key = 6;
    assert_ne!(ids(&first), ids(&run(other, &asked).0), "another key draws others");
    // With the same noise both draw the same tokens, but where two nearly tie.
    let mut agreed = 0;
    for (key, question) in (10..).zip(QUESTIONS) {
        let mut asked = request(question, 0.8, 16);
        asked.sampling.noise_key = key;
        let (a, b) = (run(&pair().native, &asked).0, run(other, &asked).0);
        agreed += usize::from(ids(&a) == ids(&b));
    }
    println!("drawn outputs: {agreed} of {} equal", QUESTIONS.len());
    assert!(agreed * 2 > QUESTIONS.len(), "{agreed}");
}

#[test]
fn eight_streams_at_once_say_what_each_says_alone() {
    let requests: Vec<_> = QUESTIONS.iter().map(|q| request(q, 0.0, 12)).collect();
    for (name, served) in pair().both() {
        let alone: Vec<_> = requests.iter().map(|r| ids(&run(served, r).0)).collect();
        let (since, mut tokens) = (Instant::now(), 0);
        let running: Vec<_> =
            requests.iter().map(|r| served.engine.submit(r.clone()).unwrap()).collect();
        for ((generation, want), question) in running.into_iter().zip(alone).zip(QUESTIONS) {
            let Ended { steps, finish, .. } = generation.collect_blocking().unwrap();
            assert_eq!(ids(&steps), want, "{name}: {question}");
            assert_eq!(finish.completion_tokens, steps.len(), "{name}");
            tokens += steps.len();
        }
        let seconds = since.elapsed().as_secs_f64();
        println!("{name}: {tokens} tokens of eight streams in {seconds:.2} s, prefill included");
    }
}

#[test]
fn more_requests_than_places_wait_and_are_all_answered() {
    let served = &pair().other;
    let running: Vec<_> =
        (0..20).map(|i| served.engine.submit(request(QUESTIONS[i % 8], 0.0, 4)).unwrap()).collect();
    for generation in running {
        assert_eq!(generation.collect_blocking().unwrap().steps.len(), 4);
    }
}

#[test]
fn a_request_that_nobody_listens_to_ends_within_a_step() {
    for (name, served) in pair().both() {
        let stats = served.engine.stats();
        let before = stats.snapshot();
        let mut asked = request(QUESTIONS[4], 0.0, 400);
        asked.stop.ignore_eos = true;
        let mut generation = served.engine.submit(asked).unwrap();
        for _ in 0..3 {
            assert!(matches!(generation.next_blocking(), Some(Event::Step(_))), "{name}");
        }
        drop(generation);
        let since = Instant::now();
        while stats.snapshot().aborted == before.aborted {
            assert!(since.elapsed() < Duration::from_secs(20), "{name}: it goes on");
            std::thread::sleep(Duration::from_millis(1));
        }
        let after = stats.snapshot();
        // Three that were read, those that came before it was left, and none after the next step.
        let drawn = after.decode_tokens - before.decode_tokens;
        assert!(drawn < 20, "{name}: {drawn} tokens");
        std::thread::sleep(Duration::from_millis(300));
        let later = stats.snapshot();
        assert_eq!(later.decode_tokens, after.decode_tokens, "{name}: nothing was computed since");
        assert_eq!(later.load.running, 0, "{name}");
        assert_eq!(later.load.blocks_used, 0, "{name}");
    }
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    let mut asked = request(QUESTIONS[0], 0.0, 4);
    asked.prompt_logprobs = Some(1);
    let Err(SubmitError::Invalid(refused)) = pair().other.engine.submit(asked) else {
        panic!("it was taken")
    };
    assert_eq!(refused.field, "prompt_logprobs");
    assert!(refused.to_string().contains("mistral.rs"), "{refused}");
}
