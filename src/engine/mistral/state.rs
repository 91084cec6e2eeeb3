//! Holds what the engine's thread and the taps of running sequences share: who waits, who runs, and
//! what is counted.

use crate::clock::Clock;
use crate::engine::Options;
use crate::engine::live::Live;
use crate::engine::output::{Event, Fault};
use crate::engine::scheduler::{Owner, SchedulerLoad};
use crate::engine::stats::{Stats, StepRows};
use crate::models::Model;
use crate::models::pass::blocks_of;
use crate::models::tapped::Tapped;
use crate::ops::lanes::Isa;
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Requests in a row that mistral.rs dropped, after which its engine is given up.
const DROPPED_MAX: usize = 3;

/// Tokens by which mistral.rs lets the cache of a sequence grow.
const CACHE_TOKENS: usize = 512;

/// The state of one engine.
pub(super) struct Shared {
    pub(super) tapped: Tapped,
    pub(super) model: Arc<Model>,
    pub(super) options: Options,
    pub(super) stats: Arc<Stats>,
    pub(super) clock: Clock,
    pub(super) isa: Isa,
    pub(super) queue: Mutex<Queue>,
}

/// Who waits, and what those who run hold.
#[derive(Default)]
pub(super) struct Queue {
    waiting: VecDeque<Live>,
    running: HashMap<Owner, usize>,
    blocks: usize,
    dropped: usize,
    last_step_at: Duration,
}

impl Queue {
    fn running(&self) -> usize {
        self.running.values().sum()
    }

    /// Who is next: the first of those whose owner runs least.
    fn next(&self) -> Option<usize> {
        let held = |live: &Live| self.running.get(&live.request.owner).copied().unwrap_or(0);
        let waiting = self.waiting.iter().enumerate();
        waiting.min_by_key(|(place, live)| (held(live), *place)).map(|(place, _)| place)
    }
}

/// What a running sequence holds of its engine.
#[derive(Clone, Copy)]
pub(super) struct Held {
    owner: Owner,
    blocks: usize,
}

impl Shared {
    pub(super) fn is_idle(&self) -> bool {
        let queue = self.queue.lock();
        queue.waiting.is_empty() && queue.running.is_empty()
    }

    /// Whether somebody waits.
    pub(super) fn has_waiting(&self) -> bool {
        !self.queue.lock().waiting.is_empty()
    }

    pub(super) fn is_given_up(&self) -> bool {
        self.queue.lock().dropped >= DROPPED_MAX
    }

    pub(super) fn push(&self, live: Live) {
        self.queue.lock().waiting.push_back(live);
    }

    pub(super) fn record_load(&self) {
        let queue = self.queue.lock();
        self.stats.record_load(SchedulerLoad {
            running: queue.running(),
            waiting: queue.waiting.len(),
            blocks_used: queue.blocks,
            blocks_total: self.options.blocks,
            preemptions: 0,
            drafted: 0,
            accepted: 0,
        });
    }

    /// Drops those who wait for nothing any more; the next of the others, where it has room.
    pub(super) fn pop(&self) -> Option<(Live, Held)> {
        let mut queue = self.queue.lock();
        let before = queue.waiting.len();
        queue.waiting.retain(|live| !live.is_abandoned());
        (queue.waiting.len()..before).for_each(|_| self.stats.record_abort());
        if queue.dropped >= DROPPED_MAX || queue.running() >= self.options.sequences_max {
            return None;
        }
        let place = queue.next()?;
        let request = &queue.waiting[place].request;
        let tokens = (request.prompt.len() + request.max_tokens).next_multiple_of(CACHE_TOKENS);
        let held = Held { owner: request.owner, blocks: blocks_of(tokens) };
        if !queue.running.is_empty() && queue.blocks + held.blocks > self.options.blocks {
            return None;
        }
        let live = queue.waiting.remove(place)?;
        queue.blocks += held.blocks;
        *queue.running.entry(held.owner).or_default() += 1;
        Some((live, held))
    }

    /// A sequence has ended; `is_dropped` when mistral.rs gave it up.
    pub(super) fn ended(&self, held: Held, is_dropped: bool) {
        let mut queue = self.queue.lock();
        queue.blocks -= held.blocks;
        if let Some(count) = queue.running.get_mut(&held.owner) {
            *count -= 1;
            if *count == 0 {
                queue.running.remove(&held.owner);
            }
        }
        queue.dropped = if is_dropped { queue.dropped + 1 } else { 0 };
        let mut given_up = VecDeque::new();
        if queue.dropped >= DROPPED_MAX {
            tracing::error!("mistral.rs dropped {DROPPED_MAX} requests in a row; it is given up");
            given_up = std::mem::take(&mut queue.waiting);
        }
        drop(queue);
        self.record_load();
        for live in given_up {
            self.stats.record_fault();
            live.close(Event::Fault(Fault::Stopped));
        }
    }

    /// Counts the rows of one sequence's step. Steps of several sequences overlap; the time of a
    /// step begins where the one before it ended, so that no time counts twice.
    pub(super) fn record_step(&self, rows: StepRows, began: Duration, now: Duration) {
        let mut queue = self.queue.lock();
        let began = began.max(queue.last_step_at).min(now);
        queue.last_step_at = now;
        drop(queue);
        self.stats.record_step(rows, began, now);
    }
}
