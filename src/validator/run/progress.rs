//! Holds the state that operators see of a running validator. The driver writes it; others only
//! read it.

use crate::clock::Clock;
use crate::store::record::{EpochWeights, Outcome, Round, WeightsState};
use parking_lot::Mutex;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// How often a run says that it goes on while it waits for one thing only.
const BEAT: Duration = Duration::from_secs(10);

/// How a validator is at one moment, counted since the program started.
#[derive(Clone, Default, PartialEq, Debug, Serialize)]
pub struct RunSnapshot {
    /// When the owner of the state last went round its loop, in milliseconds since 1970; 0 before
    /// it first did. It does not change while the loop hangs.
    pub beat_ms: u64,
    /// The number of the newest block that is known.
    pub block: u64,
    /// When it came, in milliseconds since 1970.
    pub block_ms: u64,
    /// Miners that can be asked.
    pub members: u64,
    /// Rounds that have ended.
    pub rounds: u64,
    /// Rounds that run.
    pub rounds_running: u64,
    /// Rounds that are over and not remembered yet.
    pub rounds_unsaved: u64,
    /// Answers by the name of their outcome.
    pub answers: BTreeMap<&'static str, u64>,
    /// Answers that were not verified, by the name of their cause.
    pub causes: BTreeMap<String, u64>,
    /// The newest weights of this run, and how far they are.
    pub weights: Option<WeightsAt>,
    /// The block at which the newest weights were decided that were read back from the chain, by
    /// this run or by one before it.
    pub confirmed_block: Option<u64>,
    /// Whether it was told to stop.
    pub is_stopping: bool,
}

/// Weights, without who gets what.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct WeightsAt {
    /// The epoch that they were decided for.
    pub epoch: u64,
    /// The block at which they were decided.
    pub block: u64,
    /// How far they are.
    pub state: WeightsState,
}

impl RunSnapshot {
    /// Answers with this outcome.
    pub fn answered(&self, outcome: Outcome) -> u64 {
        self.answers.get(outcome.name()).copied().unwrap_or(0)
    }

    /// Blocks since the newest weights were decided that were read back from the chain. A commit
    /// counts once it is revealed and its weights were read back.
    pub fn weights_age(&self) -> Option<u64> {
        self.confirmed_block.map(|block| self.block.saturating_sub(block))
    }
}

/// The state that the driver writes and others read.
#[derive(Default, Debug)]
pub struct RunProgress(Mutex<RunSnapshot>);

impl RunProgress {
    /// How it is now.
    pub fn snapshot(&self) -> RunSnapshot {
        self.0.lock().clone()
    }

    /// Rounds that have ended.
    pub fn rounds(&self) -> u64 {
        self.0.lock().rounds
    }

    /// When the owner of the state last went round its loop, in milliseconds since 1970.
    pub fn beat_ms(&self) -> u64 {
        self.0.lock().beat_ms
    }

    pub(crate) fn beat(&self, now_ms: u64, rounds_running: usize) {
        let mut known = self.0.lock();
        known.beat_ms = now_ms;
        known.rounds_running = rounds_running as u64;
    }

    /// Does work that may take long, and says meanwhile that the program goes on.
    pub(crate) async fn beating<T>(&self, clock: &Clock, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            self.beat(clock.unix_ms(), 0);
            tokio::select! {
                done = &mut work => return done,
                () = tokio::time::sleep(BEAT) => {}
            }
        }
    }

    /// Returns the block that was seen before.
    pub(crate) fn see_block(&self, block: u64, now_ms: u64) -> u64 {
        let mut known = self.0.lock();
        known.block_ms = now_ms;
        std::mem::replace(&mut known.block, block)
    }

    pub(crate) fn set_members(&self, count: usize) {
        self.0.lock().members = count as u64;
    }

    pub(crate) fn end_round(&self, round: &Round) {
        let mut known = self.0.lock();
        known.rounds += 1;
        for response in &round.responses {
            *known.answers.entry(response.outcome.name()).or_default() += 1;
            if let Some(cause) = &response.cause {
                *known.causes.entry(cause.clone()).or_default() += 1;
            }
        }
    }

    pub(crate) fn set_unsaved(&self, count: usize) {
        self.0.lock().rounds_unsaved = count as u64;
    }

    /// The last weights, of this run or of one before it.
    pub fn set_weights(&self, weights: &EpochWeights) {
        let EpochWeights { epoch, block, state, .. } = weights;
        let weights = WeightsAt { epoch: *epoch, block: *block, state: state.clone() };
        self.0.lock().weights = Some(weights);
    }

    /// Weights that were decided at `block` were read back from the chain.
    pub fn set_confirmed(&self, block: u64) {
        let mut known = self.0.lock();
        known.confirmed_block = known.confirmed_block.max(Some(block));
    }

    pub(crate) fn stop(&self) {
        self.0.lock().is_stopping = true;
    }
}
