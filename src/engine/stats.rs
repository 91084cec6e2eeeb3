//! Counts and times the work of one engine: its own thread writes the figures, and anyone may read
//! them.

use super::hot::HotPrefix;
use super::scheduler::{Plan, SchedulerLoad, Slice};
use crate::models::hosted::HostedRows;
use parking_lot::Mutex;
use prometheus_client::metrics::histogram::Histogram;
use std::time::Duration;

/// Upper bounds of times to a first token, in seconds.
const FIRST_TOKEN_SECONDS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Upper bounds of times between tokens, in seconds.
const TOKEN_SECONDS: [f64; 22] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// Upper bounds of times of whole requests, in seconds.
const REQUEST_SECONDS: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
/// Upper bounds of token counts.
const TOKEN_COUNTS: [f64; 16] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5];

/// Counters and timings since the engine started.
#[derive(Default)]
pub struct Stats {
    counters: Mutex<EngineSnapshot>,
    timings: Timings,
    hot: Mutex<Option<Vec<HotPrefix>>>, // where somebody keeps them
}

/// The counters at one moment.
#[derive(Clone, Copy, Default, Debug)]
pub struct EngineSnapshot {
    /// Queue, blocks and preemptions.
    pub load: SchedulerLoad,
    /// Steps finished: a heartbeat.
    pub steps: u64,
    /// When the last step finished, by the engine's clock.
    pub last_step_at: Duration,
    /// When the engine last went from idle to busy, by its clock.
    pub busy_since: Duration,
    /// Time spent in steps.
    pub busy: Duration,
    /// Prompt tokens that were computed, not found in the prefix cache.
    pub prefill_tokens: u64,
    /// Output tokens that were generated.
    pub decode_tokens: u64,
    /// Prompt tokens of ended requests.
    pub prompt_tokens: u64,
    /// Of those, found in the prefix cache.
    pub cached_tokens: u64,
    /// Requests that ended by themselves.
    pub finished: u64,
    /// Of those, by their limit of tokens.
    pub finished_by_length: u64,
    /// Requests whose caller went away.
    pub aborted: u64,
    /// Requests that failed inside the engine.
    pub faults: u64,
    /// Rows whose logits came from a card to the host.
    pub hosted: HostedRows,
}

/// Distributions over requests and steps; times in seconds.
pub struct Timings {
    /// From submission to the first token.
    pub first_token: Histogram,
    /// Between two tokens of a request.
    pub inter_token: Histogram,
    /// From submission to the end.
    pub request: Histogram,
    /// From submission to the first step.
    pub queue: Histogram,
    /// From the first step to the first token.
    pub prefill: Histogram,
    /// From the first token to the end.
    pub decode: Histogram,
    /// Requests by the tokens of their prompts.
    pub prompt_tokens: Histogram,
    /// Requests by the tokens of their outputs.
    pub output_tokens: Histogram,
    /// Rows of a step.
    pub step_tokens: Histogram,
}

impl Default for Timings {
    fn default() -> Self {
        let requests = || Histogram::new(REQUEST_SECONDS);
        let counts = || Histogram::new(TOKEN_COUNTS);
        Self {
            first_token: Histogram::new(FIRST_TOKEN_SECONDS),
            inter_token: Histogram::new(TOKEN_SECONDS),
            request: requests(),
            queue: requests(),
            prefill: requests(),
            decode: requests(),
            prompt_tokens: counts(),
            output_tokens: counts(),
            step_tokens: counts(),
        }
    }
}

/// When things happened to a request, by the engine's clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timeline {
    submitted: Duration,
    scheduled: Option<Duration>,
    first_token: Option<Duration>,
    last_token: Duration,
    is_counted: bool,
}

/// Rows of a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct StepRows {
    pub(super) all: usize,
    /// Those of sequences that decode.
    pub(super) decoded: usize,
}

impl StepRows {
    pub(super) fn of(plan: &Plan) -> Self {
        let is_decoded = |s: &&Slice| s.tokens.len() == 1 + s.drafts && s.is_last;
        let decoding = plan.slices.iter().filter(is_decoded);
        Self { all: plan.rows(), decoded: decoding.map(|s| s.tokens.len()).sum() }
    }
}

/// A request that has ended by itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct EndedRequest {
    pub(super) timeline: Timeline,
    pub(super) prompt_tokens: usize,
    /// Of those, found in the prefix cache.
    pub(super) cached_tokens: usize,
    pub(super) output_tokens: usize,
    /// Whether it ended by its limit of tokens.
    pub(super) by_length: bool,
}

impl Timeline {
    /// Of a request whose times and tokens are counted, or of one that warms the prefix cache up.
    pub(super) fn new(submitted: Duration, is_counted: bool) -> Self {
        Self { submitted, scheduled: None, first_token: None, last_token: submitted, is_counted }
    }

    /// Notes the first step.
    pub(super) fn schedule(&mut self, at: Duration) {
        self.scheduled.get_or_insert(at);
    }
}

impl Stats {
    /// A copy of all counters at this moment.
    pub fn snapshot(&self) -> EngineSnapshot {
        *self.counters.lock()
    }

    /// The distributions, which go on changing.
    pub fn timings(&self) -> &Timings {
        &self.timings
    }

    /// From now on the prefixes that requests often begin with are noted.
    pub fn keep_hot_prefixes(&self) {
        self.hot.lock().get_or_insert_default();
    }

    /// The prefixes that requests often begin with, as of the last request that ended.
    pub fn hot_prefixes(&self) -> Vec<HotPrefix> {
        self.hot.lock().clone().unwrap_or_default()
    }

    /// Notes hot prefixes, where they are kept and `find` has new ones.
    pub(super) fn record_hot(&self, find: impl FnOnce() -> Option<Vec<HotPrefix>>) {
        let mut hot = self.hot.lock();
        if let Some(known) = hot.as_mut()
            && let Some(found) = find()
        {
            *known = found;
        }
    }

    pub(super) fn record_load(&self, load: SchedulerLoad) {
        self.counters.lock().load = load;
    }

    /// The engine takes up work at `now`.
    pub(super) fn record_wake(&self, now: Duration) {
        self.counters.lock().busy_since = now;
    }

    pub(super) fn record_step(&self, rows: StepRows, started: Duration, ended: Duration) {
        self.timings.step_tokens.observe(rows.all as f64);
        let mut s = self.counters.lock();
        s.steps += 1;
        s.last_step_at = ended;
        s.busy += ended.saturating_sub(started);
        s.prefill_tokens += (rows.all - rows.decoded) as u64;
    }

    /// A token of a request was computed at `now`.
    pub(super) fn record_token(&self, timeline: &mut Timeline, now: Duration) {
        if !timeline.is_counted {
            return;
        }
        let seconds = |since: Duration| now.saturating_sub(since).as_secs_f64();
        match timeline.first_token {
            Some(_) => self.timings.inter_token.observe(seconds(timeline.last_token)),
            None => {
                timeline.first_token = Some(now);
                self.timings.first_token.observe(seconds(timeline.submitted));
            }
        }
        timeline.last_token = now;
        self.counters.lock().decode_tokens += 1;
    }

    pub(super) fn record_end(&self, ended: &EndedRequest, now: Duration) {
        let (t, line) = (&self.timings, ended.timeline);
        if !line.is_counted {
            return;
        }
        let seconds = |from: Duration, to: Duration| to.saturating_sub(from).as_secs_f64();
        let scheduled = line.scheduled.unwrap_or(now);
        let first_token = line.first_token.unwrap_or(now);
        t.request.observe(seconds(line.submitted, now));
        t.queue.observe(seconds(line.submitted, scheduled));
        t.prefill.observe(seconds(scheduled, first_token));
        t.decode.observe(seconds(first_token, now));
        t.prompt_tokens.observe(ended.prompt_tokens as f64);
        t.output_tokens.observe(ended.output_tokens as f64);
        let mut s = self.counters.lock();
        s.finished += 1;
        s.finished_by_length += u64::from(ended.by_length);
        s.prompt_tokens += ended.prompt_tokens as u64;
        s.cached_tokens += ended.cached_tokens as u64;
    }

    pub(super) fn record_hosted(&self, hosted: HostedRows) {
        self.counters.lock().hosted = hosted;
    }

    pub(super) fn record_abort(&self) {
        self.counters.lock().aborted += 1;
    }

    pub(super) fn record_fault(&self) {
        self.counters.lock().faults += 1;
    }
}
