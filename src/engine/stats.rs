//! Counters of one engine: written by its thread, read by anyone.

use super::live::Live;
use super::scheduler::{Load, Plan};
use parking_lot::Mutex;
use std::time::Duration;

/// Counters since the engine started.
#[derive(Default)]
pub struct Stats(Mutex<Snapshot>);

/// The counters at one moment.
#[derive(Clone, Copy, Default, Debug)]
pub struct Snapshot {
    /// Queue, blocks and preemptions.
    pub load: Load,
    /// Steps finished: a heartbeat.
    pub steps: u64,
    /// When the last step finished, by the engine's clock.
    pub last_step_at: Duration,
    /// Time spent in steps.
    pub busy: Duration,
    /// Prompt tokens computed.
    pub prefill_tokens: u64,
    /// Tokens generated.
    pub decode_tokens: u64,
    /// Prompt tokens of ended requests.
    pub prompt_tokens: u64,
    /// Of those, found in the prefix cache.
    pub cached_tokens: u64,
    /// Requests that ended by themselves.
    pub finished: u64,
    /// Requests whose caller went away.
    pub aborted: u64,
    /// Requests that failed inside the engine.
    pub faults: u64,
}

impl Stats {
    /// The counters now.
    pub fn snapshot(&self) -> Snapshot {
        *self.0.lock()
    }

    pub(super) fn record_load(&self, load: Load) {
        self.0.lock().load = load;
    }

    pub(super) fn record_step(&self, plan: &Plan, started: Duration, ended: Duration) {
        let mut s = self.0.lock();
        s.steps += 1;
        s.last_step_at = ended;
        s.busy += ended.saturating_sub(started);
        let decoded = plan.slices.iter().filter(|s| s.tokens.len() == 1 && s.is_last).count();
        s.decode_tokens += decoded as u64;
        s.prefill_tokens += (plan.rows() - decoded) as u64;
    }

    pub(super) fn record_end(&self, live: &Live) {
        let mut s = self.0.lock();
        s.finished += 1;
        s.prompt_tokens += live.request.prompt.len() as u64;
        s.cached_tokens += live.cached_tokens as u64;
    }

    pub(super) fn record_abort(&self) {
        self.0.lock().aborted += 1;
    }

    pub(super) fn record_fault(&self) {
        self.0.lock().faults += 1;
    }
}
