//! Runs a validator: it executes rounds, follows the chain, and sets weights.
//!
//! One task owns all state ([`Driver`]). Queries, verifications and the work of an epoch run in
//! other tasks and report to it over one bounded channel. A round that only waits for verdicts does
//! not delay the queries of the next one. A finished round is stored before it is used. While the
//! records cannot be written, finished rounds stay in memory, and after a few of them no new round
//! begins.

mod checking;
mod emission;
mod epoch_work;
pub mod epochs;
pub mod hub;
mod inbox;
pub mod keeping;
mod live;
pub mod ports;
pub mod progress;
pub mod reading;
pub mod resident;
pub mod residents;
pub mod rewriting;
pub mod spill;
pub mod subnet;
pub mod view;
pub mod world;

use crate::chain::Head;
use crate::chain::error::ChainError;
use crate::chain::pace::{LAG_MAX, Pace};
use crate::chance::Chance;
use crate::clock::Clock;
use crate::store::record::Round;
use crate::validator::round::{RoundEvent, RoundMachine, RoundPhase, RoundSettings, Scene};
use anyhow::anyhow;
pub use emission::Settled;
use emission::When;
use epochs::{Epoch, EpochRule};
use futures_util::FutureExt;
use inbox::{BROKE, DriverMessage, LiveRound};
use parking_lot::Mutex;
use ports::Ports;
use progress::RunProgress;
use reading::{ReadingTerms, SubnetError};
use std::collections::{BTreeMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use subnet::Subnet;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use view::Publisher;

/// Rounds at once: one that asks, and others that wait for verdicts.
const ROUNDS_MAX: usize = 3;
/// Rounds that are over and not remembered yet; with more, no new one begins.
const UNSAVED_MAX: usize = 4;
/// Reports that may wait for the owner.
const INBOX_MAX: usize = 256;
/// Answers that are checked at once, by default.
pub const CHECKS_DEFAULT: usize = 2;
/// Blocks until the subnet is read anew where nobody serves anything: a minute.
const IDLE_BLOCKS: u64 = 5;
/// How long to wait if there is no model to ask for or no miner to ask, and after a round without
/// an answer: it is over at once, and miners that only restart would miss a whole window of rounds.
const PAUSE: Duration = Duration::from_secs(5);
/// How long one try of storing a round may take, and the first and longest wait between two tries.
const SAVE_TIME: Duration = Duration::from_secs(20);
const SAVE_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Blocks between two questions for users' requests (protocol 5.13).
const ORGANICS_EVERY: u64 = 20;
/// Reports of rounds that are under way at once; with more, a round is not reported.
const REPORTS_MAX: usize = 4;

/// How a validator runs.
#[derive(Clone, PartialEq, Debug)]
pub struct RunOptions {
    /// How rounds are held.
    pub round: RoundSettings,
    /// How the subnet is read.
    pub reading: ReadingTerms,
    /// Where the subnet is read and weights are set.
    pub epochs: EpochRule,
    /// Answers that are checked at once: each has a KV cache of its own, and they share all cores.
    pub checks: usize,
    /// After so many rounds it ends, with weights; `None` never ends it.
    pub rounds: Option<u64>,
    /// Decide weights and send none.
    pub is_dry: bool,
    /// How long what runs may go on after a stop.
    pub stop_time: Duration,
    /// Waits between two tries of sending weights or looking them up.
    pub weights_wait: Duration,
    /// Where rounds go that cannot be remembered when the program ends, and are read from when it
    /// starts.
    pub spill: Option<PathBuf>,
}

/// Why a validator cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// There is no subnet to validate on.
    #[error(transparent)]
    Subnet(#[from] SubnetError),
    /// The chain turns out to be another one.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// Rounds could not be remembered.
    #[error("{0}")]
    Records(anyhow::Error),
    /// No model can be verified with.
    #[error("{0}")]
    Models(anyhow::Error),
}

/// The result of a run.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Summary {
    /// Rounds that ended.
    pub rounds: u64,
    /// The weights with which a run of some rounds ends.
    pub weights: Option<Settled>,
}

/// The owner of a validator's state.
pub struct Driver<P: Ports> {
    ports: Arc<P>,
    options: RunOptions,
    settings: Arc<RoundSettings>,
    clock: Clock,
    chance: Chance,
    pace: Arc<Mutex<Pace>>,
    progress: Arc<RunProgress>,
    subnet: Arc<Subnet>,
    heads: watch::Sender<Head>,
    heard: Duration, // when the newest block came
    inbox: (mpsc::Sender<DriverMessage>, mpsc::Receiver<DriverMessage>),
    checks: Arc<Semaphore>,
    live: BTreeMap<u64, LiveRound>,
    begun: u64,
    not_before: Duration,
    unsaved: VecDeque<Round>,
    save_at: (Duration, Duration), // next try, wait after it
    epoch: Epoch,
    /// The turn in which users' requests were last asked for, and whether they are.
    pulled: u64,
    is_pulling: bool,
    reports: Arc<Semaphore>,
    is_tidying: bool,
    is_rotating: bool,
    stopping: Option<Duration>, // until when
    retirement: CancellationToken,
    publisher: Publisher,
    /// Whether the last reading says that this validator may not validate.
    is_doubted: bool,
}

impl<P: Ports> Driver<P> {
    /// Reads the subnet and checks that this validator may validate.
    ///
    /// # Errors
    /// When it may not, or the chain cannot be asked or is not believed.
    pub async fn new(
        ports: Arc<P>,
        options: RunOptions,
        clock: Clock,
        chance: Chance,
    ) -> Result<Self, RunError> {
        let pace = Arc::new(Mutex::new(Pace::default()));
        let subnet = reading::read_first(&*ports, options.reading, &pace, &clock).await?;
        ports.rotate().await.map_err(RunError::Models)?;
        let block = subnet.metagraph.block;
        let epoch = Epoch::of(options.epochs, &subnet.metagraph);
        tracing::info!(uid = subnet.own, block, miners = subnet.members.len(), "validator");
        let progress = RunProgress::default();
        progress.see_block(block, clock.unix_ms());
        progress.set_members(subnet.members.len());
        if let Some(block) = emission::confirmed_at(&*ports).await {
            progress.set_confirmed(block);
        }
        let heard = clock.elapsed();
        Ok(Self {
            ports,
            settings: Arc::new(options.round.clone()),
            checks: Arc::new(Semaphore::new(options.checks.max(1))),
            options,
            clock,
            chance,
            pace,
            progress: Arc::new(progress),
            subnet: Arc::new(subnet),
            heads: watch::Sender::new(Head { block }),
            heard,
            inbox: mpsc::channel(INBOX_MAX),
            live: BTreeMap::new(),
            begun: 0,
            not_before: Duration::ZERO,
            unsaved: VecDeque::new(),
            save_at: (Duration::ZERO, SAVE_AGAIN.0),
            epoch,
            pulled: block / ORGANICS_EVERY,
            is_pulling: false,
            reports: Arc::new(Semaphore::new(REPORTS_MAX)),
            is_tidying: false,
            is_rotating: false,
            stopping: None,
            retirement: CancellationToken::new(),
            publisher: Publisher::default(),
            is_doubted: false,
        })
    }

    /// What an operator watches.
    pub fn progress(&self) -> Arc<RunProgress> {
        Arc::clone(&self.progress)
    }

    /// Once cancelled, the run ends at the next moment without a round, after the weights of the
    /// epoch are settled.
    pub fn retirement(&self) -> CancellationToken {
        self.retirement.clone()
    }

    /// Whether no new round is to begin because the run is to end.
    fn is_retiring(&self) -> bool {
        self.retirement.is_cancelled() && self.epoch.is_settled
    }

    /// Runs until the rounds that were asked for are over, or `stop` says so. Every round that ends
    /// is given to `on_round` once it is remembered.
    ///
    /// # Errors
    /// When the chain is another one, this validator may not validate any more, or rounds could not
    /// be remembered.
    pub async fn run(
        mut self,
        stop: CancellationToken,
        on_round: &(dyn Fn(&Round) + Sync),
    ) -> Result<Summary, RunError> {
        let (progress, beats) = (self.progress(), self.clock.clone());
        progress.beating(&beats, self.recover()).await?;
        let (ports, pace, clock) =
            (Arc::clone(&self.ports), Arc::clone(&self.pace), self.clock.clone());
        let heads = self.heads.clone();
        let on_head = move |head: Head| {
            if let Err(doubt) = pace.lock().head(head.block, clock.unix_ms()) {
                tracing::warn!("{doubt}; following another endpoint");
                return false;
            }
            heads.send_replace(head);
            true
        };
        let ended = tokio::select! {
            followed = ports.follow(&on_head) => followed.map_err(RunError::from),
            ended = self.drive(&stop, on_round) => ended,
        };
        // Finished rounds are stored whatever ended the run.
        self.save_all(on_round).await?;
        ended?;
        let mut summary = Summary { rounds: self.progress.rounds(), weights: None };
        if self.options.rounds.is_some() && !stop.is_cancelled() {
            summary.weights = Some(progress.beating(&beats, self.last_weights()).await?);
        }
        Ok(summary)
    }

    async fn drive(
        &mut self,
        stop: &CancellationToken,
        on_round: &(dyn Fn(&Round) + Sync),
    ) -> Result<(), RunError> {
        let mut heads = self.heads.subscribe();
        loop {
            self.progress.beat(self.clock.unix_ms(), self.live.len());
            self.save(on_round).await;
            self.begin_rounds();
            self.begin_epoch_work();
            if self.is_over() {
                return Ok(());
            }
            self.publish();
            let wait = self.next_wait();
            tokio::select! {
                Some(message) = self.inbox.1.recv() => self.take(message)?,
                changed = heads.changed() => {
                    // The sender belongs to this validator, so it exists.
                    let _ = changed;
                    let block = heads.borrow_and_update().block;
                    self.on_block(block);
                }
                () = tokio::time::sleep(wait) => self.tick(),
                () = stop.cancelled(), if self.stopping.is_none() => self.stop(),
            }
        }
    }

    /// Whether nothing is left to be done.
    fn is_over(&self) -> bool {
        let is_enough = self.options.rounds.is_some_and(|rounds| self.begun >= rounds);
        let is_last = is_enough || self.stopping.is_some() || self.is_retiring();
        let has_ended = self.live.is_empty() && is_last;
        // Weights that are on their way are waited for.
        let is_settling = self.epoch.is_settling
            && self.stopping.is_none_or(|until| self.clock.elapsed() < until);
        has_ended && !is_settling
    }

    /// Until the next deadline of a round, of remembering, or of the end.
    fn next_wait(&self) -> Duration {
        let now = self.clock.elapsed();
        let rounds = self.live.values().map(|live| live.machine.deadline());
        let save = (!self.unsaved.is_empty()).then_some(self.save_at.0);
        let next = rounds.chain(save).chain(self.stopping).chain([now + PAUSE]).min();
        next.unwrap_or(now).saturating_sub(now).max(Duration::from_millis(1))
    }

    fn begin_rounds(&mut self) {
        let is_asking = |live: &LiveRound| live.machine.phase() != RoundPhase::Checking;
        let is_enough = self.options.rounds.is_some_and(|rounds| self.begun >= rounds);
        let is_full = self.live.len() >= ROUNDS_MAX || self.unsaved.len() >= UNSAVED_MAX;
        let is_early = self.clock.elapsed() < self.not_before;
        if is_enough || is_full || is_early || self.stopping.is_some() || self.is_retiring() {
            return;
        }
        if self.live.values().any(is_asking) {
            return;
        }
        let block = self.heads.borrow().block;
        let (models, miners) = (self.ports.offers(), self.subnet.miners());
        let scene = Scene { block, heard: self.heard, models, miners };
        let chance = self.chance.fork();
        let settings = Arc::clone(&self.settings);
        let Some((machine, actions)) =
            RoundMachine::start(scene, settings, self.clock.clone(), chance)
        else {
            tracing::info!(block, "no round: there is no model that a miner lists");
            self.not_before = self.clock.elapsed() + PAUSE;
            return;
        };
        self.begun += 1;
        tracing::info!(round = machine.id(), block, "a round begins");
        let key = self.begun;
        let hold = self.ports.hold(&machine.name().1);
        self.live.insert(key, LiveRound::new(machine, block, &self.subnet.members, hold));
        self.perform(key, actions);
    }

    /// Gives every round whose deadline has passed a tick.
    fn tick(&mut self) {
        let now = self.clock.elapsed();
        if self.stopping.is_some_and(|until| now >= until) {
            let keys: Vec<u64> = self.live.keys().copied().collect();
            self.tell_all(keys, || RoundEvent::Stop);
        }
        let due = self.live.iter().filter(|(_, live)| now >= live.machine.deadline());
        let keys: Vec<u64> = due.map(|(key, _)| *key).collect();
        self.tell_all(keys, || RoundEvent::Tick);
    }

    /// Begins no new round and cancels queries. Rounds that only wait for verdicts may continue.
    fn stop(&mut self) {
        self.progress.stop();
        self.stopping = Some(self.clock.elapsed() + self.options.stop_time);
        let is_asking = |live: &LiveRound| live.machine.phase() != RoundPhase::Checking;
        let asking = self.live.iter().filter(|(_, live)| is_asking(live)).map(|(key, _)| *key);
        let keys: Vec<u64> = asking.collect();
        tracing::info!(rounds = self.live.len(), given_up = keys.len(), "stopping");
        self.tell_all(keys, || RoundEvent::Stop);
    }

    /// Handles a new block: an epoch may begin with it.
    fn on_block(&mut self, block: u64) {
        self.heard = self.clock.elapsed();
        let before = self.progress.see_block(block, self.clock.unix_ms());
        if block.saturating_add(LAG_MAX) < before {
            // The number before was believed, and wrong: what waits for a later one never comes.
            let known = Epoch::of(self.options.epochs, &self.subnet.metagraph);
            self.epoch = known.after(&self.epoch);
            self.pulled = block / ORGANICS_EVERY;
        }
        self.epoch.on_block(self.options.epochs, block);
        let keys: Vec<u64> = self.live.keys().copied().collect();
        self.tell_all(keys, || RoundEvent::Block);
        let turn = block / ORGANICS_EVERY;
        if turn > self.pulled && !self.is_pulling && self.stopping.is_none() {
            (self.pulled, self.is_pulling) = (turn, true);
            let (ports, subnet) = (Arc::clone(&self.ports), Arc::clone(&self.subnet));
            let broke = DriverMessage::Pulled(Err(anyhow!(BROKE)));
            self.beside(broke, async move { DriverMessage::Pulled(ports.pull(&subnet).await) });
        }
    }

    /// Where and when weights are settled that are decided at `block`.
    pub(in crate::validator::run) fn when(&self, block: u64) -> When {
        let (epoch, wait, is_dry) =
            (self.epoch.began, self.options.weights_wait, self.options.is_dry);
        When { epoch, block, wait, is_dry }
    }

    /// Runs work beside the owner, to whom its message is sent: `broke` where it panics, so that
    /// nothing waits for it for ever.
    pub(in crate::validator::run) fn beside(
        &self,
        broke: DriverMessage,
        work: impl Future<Output = DriverMessage> + Send + 'static,
    ) {
        let sender = self.inbox.0.clone();
        tokio::spawn(async move {
            let message = AssertUnwindSafe(work).catch_unwind().await.unwrap_or(broke);
            // Without a receiver the program ends.
            let _ = sender.send(message).await;
        });
    }

    /// The weights at the end of a run of some rounds.
    async fn last_weights(&self) -> Result<Settled, RunError> {
        let block = self.heads.borrow().block;
        let settled = emission::settle_in_time(&*self.ports, &self.subnet, self.when(block)).await;
        settled.map_err(RunError::Records)
    }
}

#[cfg(test)]
mod tests;
