//! The machine, event by event. Thousands of rounds with a whole subnet are in the simulation.

use super::slot::{CAPTURE_MAX, CAPTURES_MAX};
use super::*;
use crate::proof::Scheme;
use crate::store::record::{MinerResponse, Sampled, Statistics};
use crate::validator::round::ask::QueryContent;
use RoundPhase::{Asking, Checking, Ended, Prompting};
use std::collections::BTreeSet;

fn settings() -> RoundSettings {
    RoundSettings {
        netuid: 4,
        profile: "default".into(),
        asked_max: 3,
        lengths: 20..=20,
        proof: Some(Scheme::Residue),
        slow_share: 0.0,
        keep: Keep::Faults,
        times: Times {
            prompt: Duration::from_secs(10),
            answers: Duration::from_secs(100),
            verdicts: Duration::from_secs(1000),
        },
    }
}

fn miner(uid: u16, model: &str) -> Candidate {
    let models = BTreeSet::from([model.to_owned()]);
    Candidate { uid, hotkey: format!("hot{uid}"), coldkey: format!("cold{uid}"), models }
}

struct Test {
    machine: RoundMachine,
    clock: Clock,
    actions: Vec<Action>,
}

impl Test {
    fn new(miners: Vec<Candidate>) -> Self {
        let clock = Clock::manual(1_000);
        let offer =
            Offer { name: "m".into(), endpoints: vec![Endpoint::Completion], context_max: 512 };
        let scene = Scene { block: 7, heard: Duration::ZERO, models: vec![offer], miners };
        let started =
            RoundMachine::start(scene, Arc::new(settings()), clock.clone(), Chance::seeded(3));
        let (machine, actions) = started.unwrap();
        Self { machine, clock, actions }
    }

    /// Four miners, of which three are asked, after the prompt.
    fn asking() -> Self {
        let mut test = Self::new((0..4).map(|uid| miner(uid, "m")).collect());
        test.give(RoundEvent::Prompted(Ok(prompt())));
        test
    }

    fn give(&mut self, event: RoundEvent) {
        self.actions = self.machine.handle(event);
    }

    fn asked(&self) -> Vec<u16> {
        let uid = |action: &Action| match action {
            Action::Ask { uid, .. } => Some(*uid),
            _ => None,
        };
        self.actions.iter().filter_map(uid).collect()
    }

    fn pass(&mut self, seconds: u64) {
        self.clock.advance(Duration::from_secs(seconds));
        self.give(RoundEvent::Tick);
    }

    fn ended(&self) -> &record::Round {
        match self.actions.as_slice() {
            [Action::End(round)] => round,
            other => panic!("not the end: {other:?}"),
        }
    }
}

fn prompt() -> QueryPrompt {
    QueryPrompt { content: QueryContent::Text("hello".into()), tokens: 2 }
}

fn answer(tokens: u64, ending: Ending) -> Answered {
    let chunk = |i: u64| Arrival {
        at: Duration::from_millis(100 * (i + 1)),
        chunk: json!({"choices": [{"text": "x"}]}),
    };
    let ended = Duration::from_millis(100 * tokens.max(1));
    Answered { arrivals: (0..tokens).map(chunk).collect(), ended, ending }
}

fn fault(cause: &'static str) -> Ending {
    Ending::Fault { cause, what: "a reason".into() }
}

fn checked(uid: u16, verdict: AnswerVerdict) -> RoundEvent {
    RoundEvent::Checked {
        uid,
        checked_answer: AnswerReport {
            verdict,
            report: Some(json!({"rows": 1})),
            statistics: Statistics { rows: Some(33), ..Statistics::default() },
            tokens: 10,
        },
    }
}

#[test]
fn a_round_goes_from_prompt_to_verdicts() {
    let mut test = Test::asking();
    let asked = test.asked();
    assert_eq!((asked.len(), test.machine.phase()), (3, Asking));
    let nonces: BTreeSet<String> = test
        .actions
        .iter()
        .map(|action| match action {
            Action::Ask { body, max_tokens: 20, path: "/v1/completions", .. } => {
                body["proof"]["nonce"].as_str().unwrap().to_owned()
            }
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(nonces.len(), 3, "each miner has a nonce of its own");
    for uid in &asked {
        test.give(RoundEvent::Answered { uid: *uid, answer: answer(10, Ending::Whole) });
        let [Action::Check { uid: checked, capture, is_slow: false }] = test.actions.as_slice()
        else {
            panic!("{:?}", test.actions)
        };
        assert_eq!(checked, uid);
        assert_eq!(capture["chunks"].as_array().unwrap().len(), 10);
        assert_eq!(capture["hotkey"], format!("hot{uid}"));
        assert!(nonces.contains(capture["request"]["proof"]["nonce"].as_str().unwrap()));
    }
    assert_eq!(test.machine.phase(), Checking);
    test.give(checked(asked[0], AnswerVerdict::Pass));
    let reject = AnswerVerdict::Reject { cause: "SAMPLER_MARGIN".into(), what: "token 3".into() };
    test.give(checked(asked[1], reject));
    test.give(checked(asked[2], AnswerVerdict::Unscored("out of memory".into())));
    let round = test.ended();
    assert_eq!((round.block, round.model.as_str(), round.started_ms), (7, "m", 1_000));
    assert!(round.request["proof"]["nonce"].is_null(), "{}", round.request);
    let of = |uid| round.responses.iter().find(|r| r.uid == uid).unwrap();
    let [good, bad, unknown] = [of(asked[0]), of(asked[1]), of(asked[2])];
    assert_eq!((good.outcome, good.sample), (Outcome::Verified, Sampled::Tps(10.0)));
    assert_eq!((bad.outcome, bad.sample), (Outcome::Rejected, Sampled::Miss));
    assert_eq!(bad.cause.as_deref(), Some("SAMPLER_MARGIN"));
    assert_eq!((unknown.outcome, unknown.sample), (Outcome::Unscored, Sampled::Nothing));
    assert_eq!([good, bad, unknown].map(|r| r.capture.is_some()), [false, true, true]);
    assert_eq!(good.report, Some(json!({"rows": 1})));
    assert_eq!([good, bad, unknown].map(|r| r.statistics.rows), [Some(33); 3]);
    // Nothing changes what is over.
    assert_eq!(test.machine.phase(), Ended);
    test.give(checked(asked[1], AnswerVerdict::Pass));
    assert_eq!(test.actions, []);
}

#[test]
fn a_miner_that_does_not_list_the_model_misses_it() {
    let mut test = Test::new(vec![miner(0, "other"), miner(1, "m")]);
    test.give(RoundEvent::Prompted(Ok(prompt())));
    assert_eq!(test.asked(), [1]);
    test.give(RoundEvent::Answered { uid: 1, answer: answer(0, fault(BAD_STREAM)) });
    let found: Vec<_> = test.ended().responses.iter().map(|r| (r.outcome, r.sample)).collect();
    assert_eq!(found, [(Outcome::NotServed, Sampled::Miss), (Outcome::Failed, Sampled::Miss)]);
}

#[test]
fn a_model_that_nobody_lists_costs_nobody_a_sample() {
    let offer = |name: &str| Offer {
        name: name.into(),
        endpoints: vec![Endpoint::Completion],
        context_max: 512,
    };
    let start = |seed, miners| {
        let scene =
            Scene { block: 7, heard: Duration::ZERO, models: vec![offer("m"), offer("n")], miners };
        let chance = Chance::seeded(seed);
        RoundMachine::start(scene, Arc::new(settings()), Clock::manual(0), chance)
    };
    for seed in 0..20 {
        assert!(start(seed, vec![miner(0, "other"), miner(1, "another")]).is_none());
        // Of two models only one is listed: no round is about the other.
        let (machine, actions) = start(seed, vec![miner(0, "other"), miner(1, "n")]).unwrap();
        assert_eq!(machine.name().1, "n");
        assert!(matches!(actions.as_slice(), [Action::Prompt { .. }]), "{actions:?}");
    }
}

#[test]
fn without_a_prompt_nobody_misses() {
    let ways: [fn(&mut Test); 4] = [
        |test| test.pass(10),
        |test| test.give(RoundEvent::Stop),
        |test| test.give(RoundEvent::Prompted(Err(anyhow::anyhow!("the engine has stopped")))),
        |test| test.give(RoundEvent::Prompted(Ok(QueryPrompt { tokens: 510, ..prompt() }))),
    ];
    for way in ways {
        let mut test = Test::new(vec![miner(0, "other"), miner(1, "m")]);
        test.pass(9);
        assert_eq!((test.machine.phase(), test.actions.len()), (Prompting, 0));
        way(&mut test);
        let round = test.ended();
        assert!(round.responses.iter().all(|r| r.sample == Sampled::Nothing), "{round:?}");
        assert_eq!(round.responses[1].outcome, Outcome::Unscored);
    }
}

#[test]
fn every_phase_ends_at_its_deadline_and_what_came_is_kept() {
    let mut test = Test::asking();
    let asked = test.asked();
    test.give(RoundEvent::Answered { uid: asked[0], answer: answer(10, Ending::Whole) });
    test.give(RoundEvent::Answered { uid: asked[1], answer: answer(10, fault(LATE)) });
    test.give(RoundEvent::Block);
    test.pass(99);
    assert_eq!(test.machine.phase(), Asking);
    test.pass(1);
    assert_eq!(test.machine.phase(), Checking);
    assert_eq!(test.machine.deadline(), Duration::from_secs(1100));
    // Too late.
    test.give(RoundEvent::Answered { uid: asked[2], answer: answer(10, Ending::Whole) });
    assert_eq!(test.actions, []);
    test.pass(1000);
    let round = test.ended();
    let of = |uid| round.responses.iter().find(|r| r.uid == uid).unwrap();
    let error = |uid| of(uid).error.clone().unwrap();
    assert_eq!(error(asked[0]), "the answer was not verified in time");
    assert_eq!(
        (of(asked[1]).outcome, of(asked[1]).cause.as_deref()),
        (Outcome::Failed, Some(LATE))
    );
    assert_eq!(error(asked[2]), "the query did not end in time");
    let missed = round.responses.iter().filter(|r| r.sample == Sampled::Miss);
    assert_eq!(missed.count(), 1);
}

#[test]
fn what_was_not_streamed_or_reports_an_error_failed() {
    let mut test = Test::asking();
    let asked = test.asked();
    let mut late = answer(61, Ending::Whole);
    late.arrivals.iter_mut().for_each(|arrival| arrival.at = late.ended);
    test.give(RoundEvent::Answered { uid: asked[0], answer: late });
    let mut sorry = answer(1, Ending::Whole);
    sorry.arrivals[0].chunk = json!({"error": {"message": "overloaded"}});
    test.give(RoundEvent::Answered { uid: asked[1], answer: sorry });
    test.give(RoundEvent::Answered {
        uid: asked[2],
        answer: answer(1, Ending::Ours("no files".into())),
    });
    let mut found: Vec<_> =
        test.ended().responses.iter().map(|r| (r.outcome, r.error.clone().unwrap())).collect();
    found.sort_by(|a, b| a.1.cmp(&b.1));
    assert_eq!(
        found,
        [
            (Outcome::Failed, "Likely non-streamed response".to_owned()),
            (Outcome::Unscored, "no files".to_owned()),
            (Outcome::Failed, "the miner reports an error: overloaded".to_owned()),
        ]
    );
}

#[test]
fn junk_is_not_kept_beyond_a_limit() {
    let mut test = Test::asking();
    let asked = test.asked();
    for (uid, bytes) in asked.iter().zip([CAPTURE_MAX + 1, 100_000, CAPTURE_MAX - 1_000]) {
        let mut junk = answer(1, fault(BAD_STREAM));
        junk.arrivals[0].chunk = json!({"choices": [{"text": "x".repeat(bytes)}]});
        test.give(RoundEvent::Answered { uid: *uid, answer: junk });
    }
    let of = |i: usize| test.ended().responses.iter().find(|r| r.uid == asked[i]).unwrap();
    assert!(of(0).capture.is_none() && of(1).capture.is_some() && of(2).capture.is_some());
    let error = of(0).error.as_deref().unwrap();
    assert!(error == "a reason; the answer is not kept: it has more than 2097152 bytes", "{error}");
    let mut many: Vec<MinerResponse> = vec![of(2).clone(); 30];
    limit_captures(&mut many);
    let kept: usize =
        many.iter().filter_map(|r| r.capture.as_ref()).map(|c| c.to_string().len()).sum();
    assert!(kept <= CAPTURES_MAX && kept > CAPTURES_MAX - CAPTURE_MAX, "{kept}");
    let error = many.iter().find(|r| r.capture.is_none()).and_then(|r| r.error.as_deref()).unwrap();
    assert!(error.ends_with("those of the round have more than 8388608 bytes"), "{error}");
}

/// What is said of miners that fail by the network, where blocks come after so many seconds.
fn misses(cause: &'static str, blocks: &[u64]) -> (usize, u64) {
    let mut test = Test::asking();
    for uid in test.asked() {
        test.give(RoundEvent::Answered { uid, answer: answer(0, fault(cause)) });
    }
    let mut seconds = 0;
    while !matches!(test.actions.as_slice(), [Action::End(_)]) {
        seconds += 1;
        test.clock.advance(Duration::from_secs(1));
        let is_block = blocks.contains(&seconds);
        test.give(if is_block { RoundEvent::Block } else { RoundEvent::Tick });
    }
    let missed = |response: &&MinerResponse| response.sample == Sampled::Miss;
    (test.ended().responses.iter().filter(missed).count(), seconds)
}

#[test]
fn a_network_is_ours_where_the_chain_is_silent_too() {
    for cause in [UNREACHABLE, LATE, BROKEN_OFF] {
        // The next block says that the network was there: whoever did not answer is at fault, also
        // where that is everybody.
        assert_eq!(misses(cause, &[9]), (3, 9), "{cause}");
        assert_eq!(misses(cause, &[36]), (3, 36), "{cause}");
        // Three blocks of finney are missing.
        assert_eq!(misses(cause, &[40]), (0, 36), "{cause}");
        assert_eq!(misses(cause, &[]), (0, 36), "{cause}");
    }
    // Who answers wrongly was reached.
    assert_eq!(misses("STATUS", &[]), (3, 0));
}

#[test]
fn a_block_after_a_long_silence_excuses_what_broke_in_it() {
    let mut test = Test::asking();
    let [first, second, third] = test.asked()[..] else { panic!() };
    test.pass(30);
    test.give(RoundEvent::Answered { uid: first, answer: answer(0, fault(LATE)) });
    test.pass(10);
    assert_eq!(test.machine.deadline(), Duration::from_secs(66));
    test.give(RoundEvent::Block);
    test.give(RoundEvent::Answered { uid: second, answer: answer(0, fault(LATE)) });
    test.pass(5);
    test.give(RoundEvent::Block);
    test.give(RoundEvent::Answered { uid: third, answer: answer(10, Ending::Whole) });
    test.give(checked(third, AnswerVerdict::Pass));
    let of = |uid| test.ended().responses.iter().find(|r| r.uid == uid).unwrap();
    assert_eq!((of(first).outcome, of(first).sample), (Outcome::Unscored, Sampled::Nothing));
    let why = of(first).error.as_deref().unwrap();
    assert!(why.contains("LATE, while no block of the chain came for 36 s"), "{why}");
    assert_eq!((of(second).cause.as_deref(), of(second).sample), (Some(LATE), Sampled::Miss));
}

#[test]
fn without_models_or_miners_there_is_no_round() {
    let start = |models: Vec<Offer>, miners| {
        let scene = Scene { block: 7, heard: Duration::ZERO, models, miners };
        let clock = Clock::manual(0);
        RoundMachine::start(scene, Arc::new(settings()), clock, Chance::seeded(1)).is_some()
    };
    let offer = Offer { name: "m".into(), endpoints: vec![Endpoint::Chat], context_max: 512 };
    assert!(!start(vec![], vec![miner(0, "m")]));
    assert!(!start(vec![offer.clone()], vec![]));
    assert!(start(vec![offer], vec![miner(0, "m")]));
}

#[test]
fn a_date_that_jumps_moves_no_deadline_and_changes_no_sample() {
    let mut test = Test::asking();
    let asked = test.asked();
    for unix_ms in [1, 32_503_680_000_000, u64::MAX] {
        test.clock.set_unix_ms(unix_ms);
        test.pass(1);
        assert_eq!(test.machine.phase(), Asking, "{unix_ms}");
    }
    test.clock.set_unix_ms(500);
    for uid in &asked {
        test.give(RoundEvent::Answered { uid: *uid, answer: answer(10, Ending::Whole) });
        test.give(checked(*uid, AnswerVerdict::Pass));
    }
    let round = test.ended();
    assert!(round.responses.iter().filter(|r| asked.contains(&r.uid)).all(|r| {
        (r.outcome, r.sample) == (Outcome::Verified, Sampled::Tps(10.0)) && r.timing.total == 1.0
    }));
    // It says what the clock said, even where that is before the start.
    assert_eq!((round.started_ms, round.ended_ms), (1_000, 500));
    let mut late = Test::asking();
    late.clock.set_unix_ms(1);
    late.pass(100);
    assert_eq!(late.machine.phase(), Ended);
}

#[test]
fn a_verified_answer_that_ends_before_its_first_text_is_no_miss() {
    let mut test = Test::asking();
    let asked = test.asked();
    let end = json!({"choices": [{"text": "", "finish_reason": "stop"}]});
    let silent = |ending| {
        let arrivals = vec![Arrival { at: Duration::from_secs(1), chunk: end.clone() }];
        Answered { arrivals, ended: Duration::from_secs(1), ending }
    };
    test.give(RoundEvent::Answered { uid: asked[0], answer: silent(Ending::Whole) });
    test.give(RoundEvent::Answered { uid: asked[1], answer: silent(Ending::Whole) });
    test.give(RoundEvent::Answered { uid: asked[2], answer: silent(fault(LATE)) });
    test.give(RoundEvent::Block);
    test.give(checked(asked[0], AnswerVerdict::Pass));
    let reject = AnswerVerdict::Reject { cause: "SAMPLER_MARGIN".into(), what: "token 0".into() };
    test.give(checked(asked[1], reject));
    let round = test.ended();
    let of = |uid| round.responses.iter().find(|r| r.uid == uid).unwrap();
    assert_eq!((of(asked[0]).outcome, of(asked[0]).timing.tokens), (Outcome::Verified, 0));
    let samples = asked.iter().map(|uid| of(*uid).sample).collect::<Vec<_>>();
    assert_eq!(samples, [Sampled::Nothing, Sampled::Miss, Sampled::Miss]);
}

#[test]
fn chunks_beyond_the_verified_tokens_are_not_paid() {
    let paid = |chunks: u64, tokens: u32| {
        let mut test = Test::asking();
        let asked = test.asked();
        let Answered { arrivals, .. } = answer(chunks, Ending::Whole);
        let answer = Answered { arrivals, ended: Duration::from_secs(2), ending: Ending::Whole };
        test.give(RoundEvent::Answered { uid: asked[0], answer });
        let checked_answer = AnswerReport { tokens, ..AnswerReport::bare(AnswerVerdict::Pass) };
        test.give(RoundEvent::Checked { uid: asked[0], checked_answer });
        test.pass(100);
        let response = test.ended().responses.iter().find(|r| r.uid == asked[0]).unwrap().clone();
        (response.sample, response.timing.tps, response.timing.tokens)
    };
    assert_eq!(paid(10, 10), (Sampled::Tps(5.0), 5.0, 10));
    // Five tokens in twenty chunks are five, and ten in five chunks are five as well.
    assert_eq!(paid(20, 5), (Sampled::Tps(2.5), 2.5, 20));
    assert_eq!(paid(5, 10), (Sampled::Tps(2.5), 2.5, 5));
    // No more than were asked for, and nothing where nothing was verified.
    assert_eq!(paid(30, 30), (Sampled::Tps(10.0), 10.0, 30));
    assert_eq!(paid(20, 0), (Sampled::Nothing, 0.0, 20));
}
