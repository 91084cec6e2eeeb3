//! Runs the owner thread: it takes commands, runs one step after another, and hands out tokens.
//!
//! `schedule, run, record` is the whole loop. Between steps it takes new requests and drops those
//! that nobody listens to any more; while nothing runs it sleeps in the channel. A panic ends what
//! it happened in: one request, the requests of the step, or, where the scheduler's own state may
//! be broken, all requests; then the loop goes on with an empty scheduler.

use super::asks::{RowAt, ask, lay_out, row};
use super::backend::{Backend, Command, Submission};
use super::guard::{Stage, Watch};
use super::live::{Live, ScoredRow};
use super::output::{Event, Fault, FinishReason};
use super::scheduler::{NewSequence, Plan, Scheduler, SequenceId};
use super::stats::{Stats, StepRows};
use crate::clock::Clock;
use crate::models::Model;
use crate::models::pass::Pass;
use crate::ops::pool::Pool;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

/// Panics without a whole step between them, after which the engine is given up.
const PANICS_MAX: u32 = 3;

/// A row and what is known of it.
type Reported = (RowAt, Result<ScoredRow, Fault>);

/// The state of the owner thread.
pub(super) struct Core {
    pub(super) model: Arc<Model>,
    pub(super) pool: Pool,
    pub(super) scheduler: Scheduler,
    pub(super) pass: Box<dyn Pass>,
    pub(super) stats: Arc<Stats>,
    pub(super) clock: Clock,
    pub(super) live: HashMap<SequenceId, Live>,
    pub(super) next_id: u64,
    pub(super) watch: Watch,
    pub(super) panics: u32,   // since the last whole step
    pub(super) is_lost: bool, // its device does not work any more
}

impl Backend for Core {
    /// False when it gave up: after too many panics, or without its device.
    fn run(mut self: Box<Self>, commands: Receiver<Command>) -> bool {
        loop {
            let round = catch_unwind(AssertUnwindSafe(|| self.round(&commands)));
            match round {
                Ok(true) if self.is_lost => {
                    self.lose();
                    return false;
                }
                Ok(true) => {}
                Ok(false) => return true,
                Err(_) if self.panics == PANICS_MAX => return false,
                Err(_) => self.recover(),
            }
        }
    }
}

impl Core {
    /// One turn of the loop; false when no handle is left.
    fn round(&mut self, commands: &Receiver<Command>) -> bool {
        if !self.take_commands(commands) {
            return false;
        }
        self.drop_abandoned();
        self.stats.record_load(self.scheduler.load());
        self.step();
        self.stats.record_load(self.scheduler.load());
        true
    }

    /// Starts anew after a panic that may have left the scheduler half-changed. Its requests end;
    /// blocks of the KV cache are written again before anything reads them.
    fn recover(&mut self) {
        self.panics += 1;
        tracing::error!(requests = self.live.len(), "a step of the engine failed; it starts anew");
        self.end_all(&Fault::Panicked(Stage::Schedule));
    }

    /// Ends the requests that still wait for a device that is lost.
    fn lose(&mut self) {
        tracing::error!(requests = self.live.len(), "the device is lost; the engine is given up");
        let why = "an earlier step reported that the device is lost";
        self.end_all(&Fault::Lost(why.into()));
    }

    fn end_all(&mut self, fault: &Fault) {
        self.scheduler = self.scheduler.emptied();
        self.stats.record_load(self.scheduler.load());
        for (_, live) in self.live.drain() {
            self.stats.record_fault();
            live.close(Event::Fault(fault.clone()));
        }
    }

    /// Takes what has arrived, or waits for something while idle; false when no handle is left.
    fn take_commands(&mut self, commands: &Receiver<Command>) -> bool {
        if self.live.is_empty() {
            match commands.recv() {
                Ok(command) => {
                    self.stats.record_wake(self.clock.elapsed());
                    self.take(command);
                }
                Err(_) => return false,
            }
        }
        loop {
            match commands.try_recv() {
                Ok(command) => self.take(command),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return !self.live.is_empty(),
            }
        }
    }

    fn take(&mut self, command: Command) {
        let Command::Submit(submission) = command;
        let Submission { request, events, place, submitted } = *submission;
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let new = NewSequence {
            id,
            owner: request.owner,
            tokens: request.prompt.clone(),
            growth_max: request.max_tokens,
            salt: request.cache_salt,
            reads_cache: request.reads_cache && request.prompt_logprobs.is_none(),
            // A grammar would have to be copied and moved on for every draft.
            is_drafted: request.grammar.is_none(),
            is_warmup: request.is_warmup,
        };
        let failing = events.clone();
        let made = self.watch.guard(Stage::Take, || {
            Ok(Live::new(request, &self.model.text, events, place, submitted))
        });
        let live = match made {
            Ok(live) => live,
            Err(fault) => {
                self.stats.record_fault();
                // A request whose receiver is gone need not be told.
                return drop(failing.try_send(Event::Fault(fault)));
            }
        };
        if live.request.prompt.len() == 1 && live.request.prompt_logprobs.is_some() {
            // The first token follows nothing: there is no row to compute.
            live.send(Event::Prompt(Vec::new()));
            if live.request.max_tokens == 0 {
                return self.finish_scored(live, self.clock.elapsed());
            }
        }
        match self.scheduler.submit(new) {
            Ok(()) => {
                self.live.insert(id, live);
            }
            // Handles check the same limits, so this is a disagreement of ours.
            Err(refusal) => {
                self.stats.record_fault();
                live.close(Event::Fault(Fault::Refused(refusal.to_string())));
            }
        }
    }

    fn drop_abandoned(&mut self) {
        let gone: Vec<SequenceId> =
            self.live.iter().filter(|(_, l)| l.is_abandoned()).map(|(id, _)| *id).collect();
        for id in gone {
            self.stats.record_abort();
            drop(self.end(id));
        }
    }

    /// Takes a request out; `None` where it has ended before.
    fn end(&mut self, id: SequenceId) -> Option<Live> {
        self.scheduler.remove(id);
        self.stats.record_load(self.scheduler.load());
        self.stats.record_hot(|| self.scheduler.hot_prefixes());
        self.live.remove(&id)
    }

    fn step(&mut self) {
        self.watch.enter(Stage::Schedule);
        let plan = self.scheduler.schedule();
        if plan.slices.is_empty() {
            return;
        }
        let started = self.clock.elapsed();
        for slice in &plan.slices {
            if let Some(live) = self.live.get_mut(&slice.id) {
                live.timeline.schedule(started);
            }
        }
        let outcome = self.compute(&plan);
        let ended = self.clock.elapsed();
        self.stats.record_step(StepRows::of(&plan), started, ended);
        let rows = match outcome {
            Ok(rows) => rows,
            // Blocks of a pass that failed half-way must not reach the prefix cache.
            Err(fault) => {
                self.is_lost = matches!(fault, Fault::Lost(_));
                return self.fail_all(&plan, &fault);
            }
        };
        self.watch.enter(Stage::Commit);
        self.scheduler.commit(&plan);
        for slice in &plan.slices {
            let cached = self.scheduler.cached_tokens(slice.id);
            if let Some(live) = self.live.get_mut(&slice.id) {
                live.cached_tokens = live.cached_tokens.max(cached.min(live.request.prompt.len()));
            }
        }
        for (at, row) in rows {
            let (watch, id) = (self.watch.clone(), plan.slices[at.slice].id);
            let recorded = watch.guard(Stage::Record, || {
                self.record(id, at, row, ended);
                Ok(())
            });
            if let Err(fault) = recorded {
                self.fail(id, fault);
            }
        }
        self.panics = 0;
    }

    fn fail_all(&mut self, plan: &Plan, fault: &Fault) {
        for slice in &plan.slices {
            self.fail(slice.id, fault.clone());
        }
    }

    fn compute(&mut self, plan: &Plan) -> Result<Vec<Reported>, Fault> {
        let live: Vec<&Live> = plan.slices.iter().map(|s| &self.live[&s.id]).collect();
        let (batch, rows) = lay_out(plan, &live);
        let asked = ask(&rows, &plan.slices, &live, &self.watch, &self.pool);
        let (mut asks, mut refused) = (Vec::with_capacity(rows.len()), Vec::new());
        for asked in asked {
            refused.push(asked.map(|ask| asks.push(ask)).err());
        }
        let pass = &mut self.pass;
        let results =
            self.watch.guard(Stage::Forward, || pass.step(&batch, &asks).map_err(Fault::from))?;
        self.stats.record_hosted(self.pass.hosted());
        let mut results = results.into_iter();
        let answered = |(at, refused): (RowAt, Option<Fault>)| {
            let row = match refused {
                Some(fault) => Err(fault),
                None => row(at.position, results.next()),
            };
            (at, row)
        };
        Ok(rows.into_iter().zip(refused).map(answered).collect())
    }

    /// What a row led to; rows of one sequence come in ascending position.
    fn record(&mut self, id: SequenceId, at: RowAt, row: Result<ScoredRow, Fault>, now: Duration) {
        if at.draft.is_some_and(|token| !self.scheduler.accept(id, at.position, token)) {
            return;
        }
        // A sequence that failed at an earlier row of this step is gone.
        let Some(live) = self.live.get_mut(&id) else { return };
        let row = match row {
            Ok(row) => row,
            Err(fault) => return self.fail(id, fault),
        };
        live.next_row = at.position + 1;
        if live.target(at.position).is_some() {
            live.push_prompt_row(row.scored);
            let is_whole = at.position + 2 == live.request.prompt.len();
            if is_whole
                && live.request.max_tokens == 0
                && let Some(live) = self.end(id)
            {
                self.finish_scored(live, now);
            }
            return;
        }
        self.stats.record_token(&mut live.timeline, now);
        let step = match live.push_token(&self.model, row) {
            Ok(step) => step,
            Err(fault) => return self.fail(id, fault),
        };
        let Some(finish) = &step.finish else {
            self.scheduler.push(id, step.token);
            return live.send(Event::Step(step));
        };
        self.stats.record_end(&live.ended(&finish.reason), now);
        if let Some(live) = self.end(id) {
            live.close(Event::Step(step));
        }
    }

    /// Ends a request that only scores its prompt, and that was taken out.
    fn finish_scored(&self, live: Live, now: Duration) {
        self.stats.record_end(&live.ended(&FinishReason::Length), now);
        let finish = live.finish(FinishReason::Length);
        live.close(Event::Finish(finish));
    }

    fn fail(&mut self, id: SequenceId, fault: Fault) {
        if let Some(live) = self.end(id) {
            self.stats.record_fault();
            live.close(Event::Fault(fault));
        }
    }
}
