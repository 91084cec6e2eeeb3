//! Simulates a subnet of 256 miners of every kind, with rounds and scores under virtual time.
//! Honest miners must rank above cheating ones, no round may hang, and no number may be NaN.

use super::query::Arrival;
use super::round::ask::{Endpoint, QueryContent, QueryPrompt};
use super::round::{
    Action, AnswerReport, AnswerVerdict, Answered, BAD_STREAM, Candidate, Ending, Keep, Offer,
    RoundEvent, RoundMachine, RoundPhase, RoundSettings, Scene, Times, UNREACHABLE,
};
use super::scores::emission::ChainLimits;
use super::scores::gate::HotkeyState;
use super::scores::rules::{ScoringProfile, ScoringRules};
use super::scores::{self, Input, Seat};
use crate::chance::Chance;
use crate::clock::Clock;
use crate::store::record::{Outcome, Round, Sample, Sampled};
use crate::verify::evidence::{Calibrated, Observed, Side};
use serde_json::json;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

const MODEL: &str = "m";
const MINERS: u16 = 256;
/// Rounds that ask while others wait for verdicts, as the driver has them.
const ROUNDS_MAX: usize = 3;
/// Virtual time in which every round must be over.
const ROUND_TIME: Duration = Duration::from_secs(10 + 130 + 600);
const ROUNDS: u64 = 500;

/// What a miner is like.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Kind {
    /// Honest, at 80 tokens a second.
    Honest,
    /// Honest, at 20.
    Slow,
    /// Honest, and away for twenty of every thirty rounds.
    Flapping,
    /// Takes requests and never answers.
    Silent,
    /// Does not list the model.
    Absent,
    /// Smaller weights at twice the speed: found out nineteen times of twenty.
    Quantised,
    /// Another model, five times as fast: always found out.
    OtherModel,
    /// Nothing single shows; many answers do.
    Mild,
    /// Computes all, then sends all.
    Burst,
    /// Sends something else than a stream.
    Malformed,
    /// Whole answers in no time at all; their tokens do not verify.
    Instant,
    /// Ends after a few tokens.
    Short,
    /// As bad as quantised, and every fourth time it reports an error instead.
    Sorry,
    /// A hundred times the tokens that were asked for.
    Flood,
}

const BLOCK_TIME: Duration = Duration::from_secs(12);
const KINDS: [Kind; 14] = [
    Kind::Honest,
    Kind::Slow,
    Kind::Flapping,
    Kind::Silent,
    Kind::Absent,
    Kind::Quantised,
    Kind::OtherModel,
    Kind::Mild,
    Kind::Burst,
    Kind::Malformed,
    Kind::Instant,
    Kind::Short,
    Kind::Sorry,
    Kind::Flood,
];

impl Kind {
    fn of(uid: u16) -> Self {
        KINDS[usize::from(uid) % KINDS.len()]
    }

    fn is_honest(self) -> bool {
        matches!(self, Kind::Honest | Kind::Slow | Kind::Flapping)
    }

    /// What a query of it brings in.
    fn answer(self, number: u64, max_tokens: u32, chance: &mut Chance) -> Answered {
        let (count, tps) = match self {
            Kind::Honest | Kind::Flapping | Kind::Mild | Kind::Burst | Kind::Sorry => {
                (max_tokens, 75.0 + 10.0 * chance.share())
            }
            Kind::Slow => (max_tokens, 19.0 + 2.0 * chance.share()),
            Kind::Quantised => (max_tokens, 160.0),
            Kind::OtherModel => (max_tokens, 400.0),
            Kind::Instant => (max_tokens, 1e6),
            Kind::Short => (2, 400.0),
            // As many as the limit of a query lets through.
            Kind::Flood => (max_tokens + 16, 5000.0),
            Kind::Silent | Kind::Absent | Kind::Malformed => (0, 1.0),
        };
        let ended = Duration::from_secs_f64(f64::from(count) / tps);
        let fault = |cause, seconds| Answered {
            arrivals: Vec::new(),
            ended: Duration::from_secs(seconds),
            ending: Ending::Fault { cause, what: "as it is".into() },
        };
        match self {
            Kind::Silent => return fault("LATE", 5),
            Kind::Malformed => return fault(BAD_STREAM, 1),
            Kind::Flapping if !(number / 10).is_multiple_of(3) => return fault(UNREACHABLE, 5),
            _ => {}
        }
        let at = |i: u32| match self {
            Kind::Burst => ended,
            _ => ended.mul_f64(f64::from(i + 1) / f64::from(count)),
        };
        let mut arrivals: Vec<Arrival> = (0..count)
            .map(|i| Arrival { at: at(i), chunk: json!({"choices": [{"text": "x"}]}) })
            .collect();
        if self == Kind::Sorry && chance.below(4) == 0 {
            arrivals.truncate(3);
            let chunk = json!({"error": {"message": "overloaded"}});
            arrivals.push(Arrival { at: ended, chunk });
        }
        Answered { arrivals, ended, ending: Ending::Whole }
    }

    fn verdict(self, chance: &mut Chance) -> AnswerVerdict {
        let is_found = match self {
            Kind::Quantised => chance.below(20) > 0,
            Kind::OtherModel | Kind::Instant | Kind::Short | Kind::Flood => true,
            Kind::Sorry => chance.below(20) > 0,
            _ => false,
        };
        match is_found {
            true => {
                AnswerVerdict::Reject { cause: "SAMPLER_MARGIN".into(), what: "a token".into() }
            }
            // The verifier fails now and then.
            false if chance.below(100) == 0 => AnswerVerdict::Unscored("out of memory".into()),
            false => AnswerVerdict::Pass,
        }
    }

    /// What its answer adds to the evidence.
    fn observed(self, chance: &mut Chance) -> Observed {
        let rates = Calibrated::default();
        let Side { mismatch, margin, energy } = match self {
            Kind::Mild => Side { mismatch: 0.1, margin: 0.02, energy: 1.2 },
            _ => Side {
                mismatch: rates.honest.mismatch / 2.0,
                margin: rates.honest.margin / 2.0,
                energy: rates.honest.energy,
            },
        };
        let mut one = |_| match chance.share() < mismatch {
            true => margin / mismatch * (0.5 + chance.share()),
            false => 0.0,
        };
        let margins = (0..33).map(&mut one).collect();
        let energies = vec![energy * (0.6 + 0.4 * chance.share())];
        Observed { margins, energies, twin: None }
    }
}

fn settings() -> RoundSettings {
    RoundSettings {
        netuid: 4,
        profile: "default".into(),
        asked_max: 37,
        lengths: 61..=70,
        proof: None,
        slow_share: 0.1,
        keep: Keep::Nothing,
        times: Times {
            prompt: Duration::from_secs(10),
            answers: Duration::from_secs(130),
            verdicts: Duration::from_secs(600),
        },
    }
}

/// The world: time, what is under way, and what is remembered.
struct World {
    clock: Clock,
    chance: Chance,
    number: u64,
    heard: Duration, // when the chain's last block came
    live: BTreeMap<u64, (RoundMachine, Duration)>,
    coming: BinaryHeap<Reverse<(Duration, u64)>>,
    events: BTreeMap<u64, (u64, RoundEvent)>,
    numbered: u64,
    samples: BTreeMap<u16, VecDeque<Sample>>,
    states: BTreeMap<u16, HotkeyState>,
    outcomes: BTreeMap<(Kind, &'static str), u64>,
    ended: u64,
    events_max: usize,
    /// Miners whose hotkey was replaced.
    replaced: BTreeSet<u16>,
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            clock: Clock::manual(1_700_000_000_000),
            chance: Chance::seeded(seed),
            number: 0,
            heard: Duration::ZERO,
            live: BTreeMap::new(),
            coming: BinaryHeap::new(),
            events: BTreeMap::new(),
            numbered: 0,
            samples: BTreeMap::new(),
            states: BTreeMap::new(),
            outcomes: BTreeMap::new(),
            ended: 0,
            events_max: 0,
            replaced: BTreeSet::new(),
        }
    }

    fn hotkey(&self, uid: u16) -> String {
        let word = if self.replaced.contains(&uid) { "new" } else { "old" };
        format!("{word}{uid}")
    }

    fn miners(&self) -> Vec<Candidate> {
        let miner = |uid| {
            let lists = Kind::of(uid) != Kind::Absent;
            let models = lists.then(|| MODEL.to_owned()).into_iter().collect();
            Candidate { uid, hotkey: self.hotkey(uid), coldkey: String::new(), models }
        };
        (0..MINERS).map(miner).collect()
    }

    fn begin(&mut self) {
        let endpoints = vec![Endpoint::Completion, Endpoint::Chat];
        let offer = Offer { name: MODEL.into(), endpoints, context_max: 4096 };
        let scene = Scene {
            block: self.number,
            heard: self.heard,
            models: vec![offer],
            miners: self.miners(),
        };
        let (clock, chance) = (self.clock.clone(), self.chance.fork());
        let started = RoundMachine::start(scene, Arc::new(settings()), clock, chance);
        let (machine, actions) = started.unwrap();
        self.number += 1;
        self.live.insert(self.number, (machine, self.clock.elapsed()));
        self.perform(self.number, actions);
    }

    fn later(&mut self, after: Duration, key: u64, event: RoundEvent) {
        self.numbered += 1;
        self.coming.push(Reverse((self.clock.elapsed() + after, self.numbered)));
        self.events.insert(self.numbered, (key, event));
        self.events_max = self.events_max.max(self.events.len());
    }

    fn perform(&mut self, key: u64, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Prompt { endpoint, .. } => {
                    let content = match endpoint {
                        Endpoint::Chat => QueryContent::Messages(json!([])),
                        Endpoint::Completion => QueryContent::Text("hello".into()),
                    };
                    // The engine is stuck now and then.
                    let lost = self.chance.below(50) == 0;
                    let prompt = Ok(QueryPrompt { content, tokens: 20 });
                    let wait = Duration::from_secs(if lost { 100 } else { 1 });
                    self.later(wait, key, RoundEvent::Prompted(prompt));
                }
                Action::Ask { uid, max_tokens, .. } => {
                    let answer = Kind::of(uid).answer(key, max_tokens, &mut self.chance);
                    // Our own report is lost now and then.
                    if self.chance.below(500) > 0 {
                        self.later(answer.ended, key, RoundEvent::Answered { uid, answer });
                    }
                }
                Action::Check { uid, capture, .. } => {
                    let verdict = Kind::of(uid).verdict(&mut self.chance);
                    let tokens = capture["chunks"].as_array().map_or(0, Vec::len) as u32;
                    let checked_answer = AnswerReport { tokens, ..AnswerReport::bare(verdict) };
                    let lost = self.chance.below(500) == 0;
                    let wait = Duration::from_secs(if lost { 10_000 } else { 20 });
                    self.later(wait, key, RoundEvent::Checked { uid, checked_answer });
                }
                Action::End(round) => self.end(key, *round),
            }
        }
    }

    fn end(&mut self, key: u64, round: Round) {
        let (machine, began) = self.live.remove(&key).expect("a round ends once");
        assert_eq!(machine.phase(), RoundPhase::Ended);
        assert!(self.clock.elapsed() - began <= ROUND_TIME, "a round took too long");
        self.ended += 1;
        for response in round.responses {
            let kind = Kind::of(response.uid);
            *self.outcomes.entry((kind, response.outcome.name())).or_default() += 1;
            let tps = match response.sample {
                Sampled::Tps(tps) => Some(tps),
                Sampled::Miss => None,
                Sampled::Nothing => continue,
            };
            assert!(tps.is_none_or(f64::is_finite));
            let sample = Sample {
                round: round.id.clone(),
                uid: response.uid,
                hotkey: response.hotkey,
                model: MODEL.into(),
                block: round.block,
                tps,
            };
            let samples = self.samples.entry(response.uid).or_default();
            samples.push_back(sample);
            if samples.len() > 30 {
                samples.pop_front();
            }
            if response.outcome == Outcome::Verified {
                let observed = kind.observed(&mut self.chance);
                let state = self.states.remove(&response.uid).unwrap_or_default();
                let mut evidence = state.evidence;
                evidence.add(&Calibrated::default(), &observed);
                let state = state.after(evidence, &round.id, round.block);
                self.states.insert(response.uid, state);
            }
        }
    }

    /// To the next event or deadline.
    fn step(&mut self) {
        let is_asking =
            |(machine, _): &(RoundMachine, Duration)| machine.phase() != RoundPhase::Checking;
        if self.live.len() < ROUNDS_MAX && !self.live.values().any(is_asking) {
            self.begin();
            return;
        }
        let next_event = self.coming.peek().map(|Reverse((at, _))| *at);
        let deadline = self.live.values().map(|(machine, _)| machine.deadline()).min();
        let block = self.heard + BLOCK_TIME;
        let next = next_event.into_iter().chain(deadline).chain([block]).min().unwrap_or(block);
        // Whole milliseconds, which is how a manual clock counts; never short of the time.
        let wait = next.saturating_sub(self.clock.elapsed()) + Duration::from_millis(1);
        self.clock.advance(wait);
        while let Some(Reverse((at, number))) = self.coming.peek().copied() {
            if at > self.clock.elapsed() {
                break;
            }
            self.coming.pop();
            let (key, event) = self.events.remove(&number).expect("an event comes once");
            self.tell(key, event);
        }
        let has_block = self.clock.elapsed() >= block;
        if has_block {
            self.heard = self.clock.elapsed();
        }
        for key in self.live.keys().copied().collect::<Vec<u64>>() {
            self.tell(key, if has_block { RoundEvent::Block } else { RoundEvent::Tick });
        }
    }

    fn tell(&mut self, key: u64, event: RoundEvent) {
        let Some((machine, _)) = self.live.get_mut(&key) else { return };
        let actions = machine.handle(event);
        self.perform(key, actions);
    }

    fn decide(&self, profile: ScoringProfile) -> BTreeMap<u16, f64> {
        let seat = |uid: u16| {
            let models = match Kind::of(uid) {
                Kind::Absent => Vec::new(),
                _ => vec![MODEL.to_owned()],
            };
            let state = self.states.get(&uid).cloned().unwrap_or_default();
            (uid, Seat { hotkey: self.hotkey(uid), models, organics: None, state })
        };
        let seats: BTreeMap<u16, Seat> = (0..MINERS).map(seat).collect();
        let samples: Vec<Sample> = self.samples.values().flatten().cloned().collect();
        let input = Input {
            seats: &seats,
            models: &[MODEL.to_owned()],
            samples: &samples,
            findings: &[],
            limits: ChainLimits { min_allowed: 8, max_weight: u16::MAX },
        };
        let decision = scores::decide(&ScoringRules::of(profile), &input);
        let scores = decision.miners.iter().map(|miner| {
            let numbers = [miner.sum, miner.score, miner.normalised];
            assert!(numbers.iter().all(|n| n.is_finite() && *n >= 0.0), "{miner:?}");
            (miner.uid, miner.score)
        });
        scores.collect()
    }
}

/// The smallest and the largest score of each kind, without the miners in `but`.
fn range(scores: &BTreeMap<u16, f64>, but: &BTreeSet<u16>) -> BTreeMap<Kind, (f64, f64)> {
    let mut ranges: BTreeMap<Kind, (f64, f64)> = BTreeMap::new();
    for (uid, score) in scores.iter().filter(|(uid, _)| !but.contains(uid)) {
        let range = ranges.entry(Kind::of(*uid)).or_insert((*score, *score));
        *range = (range.0.min(*score), range.1.max(*score));
    }
    ranges
}

#[test]
fn honest_miners_rank_above_every_cheat_over_thousands_of_rounds() {
    for seed in 1..=4 {
        let mut world = World::new(seed);
        while world.ended < ROUNDS {
            world.step();
            if world.ended % 100 == 50 {
                world.decide(ScoringProfile::Default);
                world.decide(ScoringProfile::Targon44);
            }
        }
        assert!(world.live.len() <= ROUNDS_MAX);
        // What is late stays in the heap for a while, and no longer.
        assert!(world.events_max < 2_000, "{} events at once", world.events_max);
        for (profile, sees_mild) in
            [(ScoringProfile::Default, true), (ScoringProfile::Targon44, false)]
        {
            let ranges = range(&world.decide(profile), &BTreeSet::new());
            // In Targon's arithmetic a quick cheat that passes a third of its window is ahead of an
            // honest miner at a quarter of its speed; so there only the quick ones are compared.
            let honest = match profile {
                ScoringProfile::Default => ranges[&Kind::Honest].0.min(ranges[&Kind::Slow].0),
                ScoringProfile::Targon44 => ranges[&Kind::Honest].0,
            };
            let cheats = ranges.iter().filter(|(kind, _)| !kind.is_honest());
            for (kind, (_, best)) in cheats.filter(|(kind, _)| sees_mild || **kind != Kind::Mild) {
                assert!(*best < honest, "seed {seed} {profile}: {kind:?} {best}, honest {honest}");
            }
            // The control: what nothing sees is paid as if it were honest.
            let mild = ranges[&Kind::Mild];
            assert_eq!(sees_mild, mild.1 < honest, "{profile}: {mild:?}");
            assert!(ranges[&Kind::Honest].0 > ranges[&Kind::Slow].1, "{profile}: {ranges:?}");
            assert!(ranges[&Kind::Honest].0 > ranges[&Kind::Flapping].1, "{profile}: {ranges:?}");
        }
        let count = |kind, outcome| world.outcomes.get(&(kind, outcome)).copied().unwrap_or(0);
        assert_eq!(count(Kind::Honest, "rejected") + count(Kind::Honest, "failed"), 0);
        assert_eq!(count(Kind::Burst, "verified") + count(Kind::OtherModel, "verified"), 0);
        assert!(count(Kind::Honest, "unscored") > 0 && count(Kind::Absent, "not_served") > 0);
    }
}

#[test]
fn a_place_with_a_new_hotkey_starts_from_nothing() {
    let mut world = World::new(9);
    while world.ended < 200 {
        world.step();
    }
    let uid = 0;
    let before = world.decide(ScoringProfile::Default);
    assert!(before[&uid] > 0.0 && Kind::of(uid) == Kind::Honest);
    world.replaced.insert(uid);
    world.states.remove(&uid);
    let after = world.decide(ScoringProfile::Default);
    assert!(after[&uid] == 0.0 && after[&(uid + 14)] > 0.0, "{after:?}");
    // The control: version 4.4 passes samples on to the next hotkey.
    assert!(world.decide(ScoringProfile::Targon44)[&uid] > 0.0);
    // And earns its own.
    while world.ended < 600 {
        world.step();
    }
    assert!(world.decide(ScoringProfile::Default)[&uid] > 0.0);
}
