//! Runs a round as a pure state machine: events go in, actions come out.
//!
//! [`RoundMachine::start`] chooses a model, an endpoint and the miners, and asks for a prompt. When
//! it has the prompt it asks all miners at once. Each answer is timed ([`measure`]) and verified.
//! When the last verdict is known, or its deadline has passed, the round ends as a
//! [`record::Round`]. Clock and chance are parameters; nothing here waits, reads or sends.
//!
//! A miner's failure counts against the miner. A failure of the validator itself (no prompt, no
//! verdict, a network that is away, the program ends) is [`Outcome::Unscored`] and adds no
//! sample. Every phase has a deadline, so a round always ends.

pub mod ask;
pub mod measure;
mod slot;
mod terms;

use crate::chance::Chance;
use crate::clock::Clock;
use crate::store::record::{self, Outcome, Timing};
use crate::validator::query::Arrival;
use ask::{Endpoint, QueryPrompt, QuerySampling};
use serde_json::{Value, json};
use slot::{Found, SILENCE_MAX, Slot, State, limit_captures, response};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
pub use terms::{
    Action, AnswerReport, AnswerVerdict, Answered, Candidate, Ending, Keep, Offer, RoundEvent,
    RoundSettings, Scene, Times,
};

/// The cause of a miner that nobody could connect to.
pub const UNREACHABLE: &str = "UNREACHABLE";
/// The cause of an answer that did not come, or not in time.
pub const LATE: &str = "LATE";
/// The cause of a connection that broke.
pub const BROKEN_OFF: &str = "BROKEN_OFF";
/// Causes that a network which is away has too.
const OF_NETWORK: [&str; 3] = [UNREACHABLE, LATE, BROKEN_OFF];
/// The cause of a response that has no answer.
pub const BAD_STREAM: &str = "BAD_STREAM";

/// Where a round is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RoundPhase {
    /// It waits for a prompt.
    Prompting,
    /// It waits for answers.
    Asking,
    /// It waits for verdicts only: the next round may ask.
    Checking,
    /// It is over.
    Ended,
}

/// Where a miner is in a round.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum MinerState {
    /// It does not serve the model.
    NotServed,
    /// It is to be asked, or was asked.
    Asked,
    /// Its answer is being checked.
    Checking(Timing),
    /// It is done with.
    Done(Timing, Outcome),
}

/// A round that has begun, as a pure state machine.
pub struct RoundMachine {
    settings: Arc<RoundSettings>,
    clock: Clock,
    chance: Chance,
    phase: RoundPhase,
    deadline: Duration,
    heard: Duration, // when the chain's last block came
    endpoint: Endpoint,
    sampling: QuerySampling,
    context_max: usize,
    record: record::Round,
    slots: BTreeMap<u16, Slot>,
}

impl RoundMachine {
    /// Starts a round about one of the models that somebody lists, unless there is none or nobody
    /// to ask. The second part is to be done now.
    ///
    /// A model that nobody lists is not asked for, and costs nobody a sample: while the only miners
    /// of a model restart, the next rounds would otherwise fill their windows with misses. Whoever
    /// does not list a model that others list does miss it.
    pub fn start(
        scene: Scene,
        settings: Arc<RoundSettings>,
        clock: Clock,
        mut chance: Chance,
    ) -> Option<(Self, Vec<Action>)> {
        let is_listed =
            |offer: &&Offer| scene.miners.iter().any(|m| m.models.contains(&offer.name));
        let offers: Vec<&Offer> = scene.models.iter().filter(is_listed).collect();
        let offer = (*chance.pick(&offers)?).clone();
        let endpoint = *chance.pick(&offer.endpoints)?;
        let sampling = QuerySampling::draw(&mut chance, &settings.lengths);
        let slots = choose(scene.miners, &offer.name, settings.asked_max, &mut chance);
        if slots.is_empty() {
            return None;
        }
        let record = record::Round {
            id: chance.hex::<16>(),
            netuid: settings.netuid,
            block: scene.block,
            started_ms: clock.unix_ms(),
            ended_ms: 0,
            model: offer.name,
            endpoint: endpoint.path().to_owned(),
            request: Value::Null,
            profile: settings.profile.clone(),
            responses: Vec::new(),
        };
        let deadline = clock.elapsed() + settings.times.prompt;
        let (phase, context_max) = (RoundPhase::Prompting, offer.context_max);
        let machine = Self {
            settings,
            clock,
            chance,
            phase,
            deadline,
            heard: scene.heard,
            endpoint,
            sampling,
            context_max,
            record,
            slots,
        };
        let model = machine.record.model.clone();
        Some((machine, vec![Action::Prompt { model, endpoint }]))
    }

    /// The id of the round: 32 hexadecimal digits.
    pub fn id(&self) -> &str {
        &self.record.id
    }

    /// Its own and its model's name.
    pub fn name(&self) -> (String, String) {
        (self.record.id.clone(), self.record.model.clone())
    }

    /// What the round waits for.
    pub fn phase(&self) -> RoundPhase {
        self.phase
    }

    /// Where everyone is whom it asks, by ascending uid.
    pub fn miner_states(&self) -> impl Iterator<Item = (u16, MinerState)> {
        let state = |slot: &Slot| match &slot.state {
            State::NotServed => MinerState::NotServed,
            State::Open => MinerState::Asked,
            State::Checking(timing, _) => MinerState::Checking(*timing),
            State::Doubted(found, _) | State::Closed(found) => {
                MinerState::Done(found.timing, found.outcome)
            }
        };
        self.slots.iter().map(move |(uid, slot)| (*uid, state(slot)))
    }

    /// When it must be told that time has passed, on its clock.
    pub fn deadline(&self) -> Duration {
        let silences = self.slots.values().filter_map(|slot| match slot.state {
            State::Doubted(_, at) => Some(at + SILENCE_MAX),
            _ => None,
        });
        silences.chain([self.deadline]).min().unwrap_or(self.deadline)
    }

    /// Takes what happened and says what is to be done. What comes too late changes nothing.
    pub fn handle(&mut self, event: RoundEvent) -> Vec<Action> {
        if self.phase == RoundPhase::Ended {
            return Vec::new();
        }
        let actions = match event {
            RoundEvent::Prompted(prompt) => self.prompted(prompt),
            RoundEvent::Answered { uid, answer } => self.answered(uid, answer),
            RoundEvent::Checked { uid, checked_answer } => {
                self.checked(uid, checked_answer);
                Vec::new()
            }
            RoundEvent::Block => {
                self.hear();
                Vec::new()
            }
            RoundEvent::Tick => Vec::new(),
            RoundEvent::Stop => {
                self.give_up("the validator was stopped");
                Vec::new()
            }
        };
        self.settle(actions)
    }

    fn prompted(&mut self, prompt: anyhow::Result<QueryPrompt>) -> Vec<Action> {
        if self.phase != RoundPhase::Prompting {
            return Vec::new();
        }
        let model = &self.record.model;
        let made = prompt.and_then(|prompt| {
            ask::body(model, self.endpoint, self.sampling, prompt, self.context_max)
        });
        let (mut body, sampling) = match made {
            Ok(made) => made,
            Err(why) => {
                self.give_up(&format!("there is no prompt: {why}"));
                return Vec::new();
            }
        };
        if let Some(scheme) = self.settings.proof {
            body = ask::with_proof(body, scheme);
        }
        (self.sampling, self.phase) = (sampling, RoundPhase::Asking);
        self.deadline = self.clock.elapsed() + self.settings.times.answers;
        let mut actions = Vec::new();
        for (uid, slot) in &mut self.slots {
            if matches!(slot.state, State::Open) {
                slot.body = ask::with_nonce(&body, &mut self.chance);
                let (path, max_tokens) = (self.endpoint.path(), sampling.max_tokens);
                actions.push(Action::Ask { uid: *uid, path, body: slot.body.clone(), max_tokens });
            }
        }
        self.record.request = body;
        actions
    }

    fn answered(&mut self, uid: u16, answer: Answered) -> Vec<Action> {
        let Some(slot) = self.slots.get_mut(&uid) else { return Vec::new() };
        if self.phase != RoundPhase::Asking || !matches!(slot.state, State::Open) {
            return Vec::new();
        }
        let Answered { arrivals, ended, ending } = answer;
        let timing = measure::timing(&arrivals, ended, self.sampling.max_tokens);
        let fault = match ending {
            Ending::Ours(why) => {
                slot.state = State::Closed(Box::new(Found::unscored(timing, &why)));
                return Vec::new();
            }
            Ending::Fault { cause, what } => Some((cause, what)),
            Ending::Whole => measure::said_error(&arrivals)
                .map(|said| (BAD_STREAM, format!("the miner reports an error: {said}"))),
        };
        let fault = fault.or_else(|| {
            let is_late = measure::is_not_streamed(&arrivals, ended);
            is_late.then(|| (BAD_STREAM, "Likely non-streamed response".to_owned()))
        });
        let is_empty = arrivals.is_empty();
        let capture =
            Arc::new(capture(&slot.miner.hotkey, std::mem::take(&mut slot.body), arrivals));
        match fault {
            Some((cause, what)) => {
                let capture = Some(capture).filter(|_| !is_empty);
                let found = Box::new(Found { capture, ..Found::failed(timing, cause, what) });
                slot.state = match OF_NETWORK.contains(&cause) {
                    true => State::Doubted(found, self.clock.elapsed()),
                    false => State::Closed(found),
                };
                Vec::new()
            }
            None => {
                slot.state = State::Checking(timing, Arc::clone(&capture));
                let is_slow = self.chance.share() < self.settings.slow_share;
                vec![Action::Check { uid, capture, is_slow }]
            }
        }
    }

    fn checked(&mut self, uid: u16, checked_answer: AnswerReport) {
        let Some(slot) = self.slots.get_mut(&uid) else { return };
        let State::Checking(timing, capture) = &slot.state else { return };
        let (timing, capture) = (*timing, Some(Arc::clone(capture)));
        let AnswerReport { verdict, report, statistics, tokens } = checked_answer;
        let found = match verdict {
            AnswerVerdict::Pass => {
                let most = tokens.min(self.sampling.max_tokens);
                let timing = measure::counted(timing, most);
                let (outcome, cause, error) = (Outcome::Verified, None, None);
                Found { timing, outcome, cause, error, capture, report, statistics }
            }
            AnswerVerdict::Reject { cause, what } => {
                let outcome = Outcome::Rejected;
                let failed = Found::failed(timing, &cause, what);
                Found { outcome, capture, report, statistics, ..failed }
            }
            AnswerVerdict::Unscored(why) => {
                Found { capture, report, statistics, ..Found::unscored(timing, &why) }
            }
        };
        slot.state = State::Closed(Box::new(found));
    }

    /// Closes what is open, unscored.
    fn give_up(&mut self, why: &str) {
        for slot in self.slots.values_mut() {
            let timing = match slot.state {
                State::Open => Timing::default(),
                State::Checking(timing, _) => timing,
                State::Doubted(ref found, _) => found.timing,
                State::NotServed | State::Closed(_) => continue,
            };
            slot.state = State::Closed(Box::new(Found::unscored(timing, why)));
        }
    }

    /// Goes on to the phase that the slots are in, and ends the round with the last of them.
    fn settle(&mut self, mut actions: Vec<Action>) -> Vec<Action> {
        let now = self.clock.elapsed();
        if now >= self.deadline {
            let why = match self.phase {
                RoundPhase::Prompting => "there is no prompt: it was not made in time",
                RoundPhase::Asking => "the query did not end in time",
                RoundPhase::Checking | RoundPhase::Ended => "the answer was not verified in time",
            };
            self.give_up_phase(why);
        }
        self.excuse(now);
        let has = |is: fn(&State) -> bool| self.slots.values().any(|slot| is(&slot.state));
        let is_open = has(|state| matches!(state, State::Open));
        let is_checking = has(|state| matches!(state, State::Checking(..) | State::Doubted(..)));
        if self.phase == RoundPhase::Asking && !is_open && is_checking {
            (self.phase, self.deadline) =
                (RoundPhase::Checking, now + self.settings.times.verdicts);
        }
        if !is_open && !is_checking {
            actions.push(Action::End(Box::new(self.end())));
        }
        actions
    }

    /// Closes what this phase waits for.
    fn give_up_phase(&mut self, why: &str) {
        if self.phase != RoundPhase::Asking {
            return self.give_up(why);
        }
        for slot in self.slots.values_mut() {
            if matches!(slot.state, State::Open) {
                slot.state = State::Closed(Box::new(Found::unscored(Timing::default(), why)));
            }
        }
    }

    fn end(&mut self) -> record::Round {
        let was_asked = self.phase != RoundPhase::Prompting;
        self.phase = RoundPhase::Ended;
        let keep = self.settings.keep;
        let slots = std::mem::take(&mut self.slots);
        let responses = slots.into_values().map(|slot| response(slot, keep, was_asked));
        self.record.responses = responses.collect();
        if keep == Keep::Faults {
            limit_captures(&mut self.record.responses);
        }
        self.record.ended_ms = self.clock.unix_ms();
        self.record.clone()
    }

    /// A block of the chain has come. If none came for long before, the network was away, and
    /// what it broke meanwhile is nobody's fault; else whoever failed by the network did.
    fn hear(&mut self) {
        let now = self.clock.elapsed();
        let was_away = now.saturating_sub(std::mem::replace(&mut self.heard, now)) > SILENCE_MAX;
        for slot in self.slots.values_mut() {
            slot.state = match std::mem::replace(&mut slot.state, State::NotServed) {
                State::Doubted(found, _) if was_away => State::Closed(Box::new(found.excused())),
                State::Doubted(found, _) => State::Closed(found),
                other => other,
            };
        }
    }

    /// Closes what failed by the network and was followed by no block.
    fn excuse(&mut self, now: Duration) {
        for slot in self.slots.values_mut() {
            if let State::Doubted(found, at) = &slot.state
                && now >= *at + SILENCE_MAX
            {
                slot.state = State::Closed(Box::new(found.excused()));
            }
        }
    }
}

/// The miners of a round: in random order until enough of them serve the model.
fn choose(
    mut miners: Vec<Candidate>,
    model: &str,
    asked_max: usize,
    chance: &mut Chance,
) -> BTreeMap<u16, Slot> {
    chance.shuffle(&mut miners);
    let (mut slots, mut asked) = (BTreeMap::new(), 0);
    for miner in miners {
        if asked == asked_max {
            break;
        }
        let serves = miner.models.contains(model);
        asked += usize::from(serves);
        let state = if serves { State::Open } else { State::NotServed };
        slots.insert(miner.uid, Slot { miner, body: Value::Null, state });
    }
    slots
}

/// Request and answer as `query --save` writes them.
fn capture(hotkey: &str, body: Value, arrivals: Vec<Arrival>) -> Value {
    let times: Vec<u64> = arrivals.iter().map(|a| a.at.as_millis() as u64).collect();
    let chunks: Vec<Value> = arrivals.into_iter().map(|arrival| arrival.chunk).collect();
    let mut capture = json!({"hotkey": hotkey, "at_ms": times});
    (capture["request"], capture["chunks"]) = (body, Value::Array(chunks));
    capture
}

#[cfg(test)]
mod tests;
