//! Simulates a world without a network, and runs the driver in it.

use super::super::ports::{AnswerToCheck, Decided, MinerQuery, NotSent, Stand};
use super::super::residents::Hold;
use super::super::view::View;
use super::super::*;
use crate::chain::keys::Hotkey;
use crate::chain::metagraph::{AXON_PROTOCOL, Axon, Hyperparameters, Metagraph, Neuron, Rao};
use crate::store::Removed;
use crate::store::record::{EpochWeights, WeightsState};
use crate::validator::eligible::{Member, MinerRules};
use crate::validator::query::Arrival;
use crate::validator::round::ask::{Endpoint, QueryContent, QueryPrompt};
use crate::validator::round::{AnswerReport, AnswerVerdict, Answered, Ending, Keep, Offer, Times};
use anyhow::anyhow;
use serde_json::{Value, json};
use std::future::pending;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use tokio::task::JoinHandle;

/// An epoch, and the weights that were sent for it.
type Sent = (u64, Vec<(u16, u16)>);

/// A world without a network: miners are numbers, the records are lists.
pub(super) struct Fake {
    pub(super) heads: watch::Sender<u64>,
    pub(super) permit: bool,
    /// Whether the chain's endpoint of now says that nobody may validate.
    pub(super) lies: AtomicBool,
    /// Whether the records answer.
    pub(super) records: AtomicBool,
    /// Whether checking never ends, or breaks.
    pub(super) hangs: AtomicBool,
    pub(super) panics: AtomicBool,
    /// Whether the chain answers.
    pub(super) chain: AtomicBool,
    pub(super) checking: AtomicUsize,
    pub(super) checking_max: AtomicUsize,
    pub(super) saved: Mutex<Vec<Round>>,
    pub(super) weights: Mutex<BTreeMap<u64, EpochWeights>>,
    pub(super) sends: Mutex<Vec<Sent>>,
    /// What becomes of the next sendings, and what stands on the chain then.
    pub(super) fates: Mutex<VecDeque<NotSent>>,
    pub(super) stand: Mutex<Stand>,
    pub(super) readings: AtomicU64,
    /// Blocks that the chain's final state is behind its newest block.
    pub(super) behind: AtomicU64,
    /// Decisions that break before one does not.
    pub(super) breaks: AtomicU64,
    /// The subnet's last epoch, as the chain counts.
    pub(super) last_step: AtomicU64,
    pub(super) tidied: AtomicU64,
    pub(super) rotations: AtomicU64,
    pub(super) serves: AtomicBool,
    pub(super) answers: AtomicBool,
    pub(super) pulls: AtomicU64,
    pub(super) reported: Mutex<Vec<String>>,
}

impl Fake {
    pub(super) fn new() -> Self {
        Self {
            heads: watch::Sender::new(10),
            permit: true,
            lies: false.into(),
            records: true.into(),
            hangs: false.into(),
            panics: false.into(),
            chain: true.into(),
            checking: 0.into(),
            checking_max: 0.into(),
            saved: Mutex::default(),
            weights: Mutex::default(),
            sends: Mutex::default(),
            fates: Mutex::default(),
            stand: Mutex::new(Stand::Confirmed),
            readings: 0.into(),
            behind: 0.into(),
            breaks: 0.into(),
            last_step: 0.into(),
            tidied: 0.into(),
            rotations: 0.into(),
            serves: true.into(),
            answers: true.into(),
            pulls: 0.into(),
            reported: Mutex::default(),
        }
    }

    /// The weights of an epoch stand on the chain already.
    pub(super) fn settled(self, epoch: u64) -> Self {
        let weights = EpochWeights {
            netuid: 4,
            epoch,
            block: epoch + 3,
            values: vec![(1, u16::MAX)],
            explanation: Value::Null,
            state: WeightsState::Confirmed,
        };
        self.weights.lock().insert(epoch, weights);
        self
    }

    fn records(&self) -> anyhow::Result<()> {
        match self.records.load(SeqCst) {
            true => Ok(()),
            false => Err(anyhow!("the database is gone")),
        }
    }
}

impl Ports for Fake {
    async fn metagraph(&self) -> Result<Metagraph, ChainError> {
        self.readings.fetch_add(1, SeqCst);
        if !self.chain.load(SeqCst) {
            return Err(ChainError::Unreachable("gone".into()));
        }
        let neuron = |uid: u16| Neuron {
            coldkey: Hotkey([9; 32]),
            permit: uid == 0 && self.permit && !self.lies.load(SeqCst),
            axon: self.serves.load(SeqCst).then_some(Axon {
                address: ([8, 8, 8, 8], 1000 + uid).into(),
                version: 1,
                protocol: AXON_PROTOCOL,
            }),
            ..Neuron::new(uid, Hotkey([uid as u8; 32]), Rao(0))
        };
        let neurons = (0..6).map(neuron).collect();
        let hyperparameters = Hyperparameters { tempo: 100, ..Hyperparameters::default() };
        let block = *self.heads.borrow() - self.behind.load(SeqCst);
        let metagraph = Metagraph::new(4, block, hyperparameters, neurons);
        Ok(metagraph.stepped_at(self.last_step.load(SeqCst)))
    }

    async fn follow(&self, on_head: &(dyn Fn(Head) -> bool + Sync)) -> Result<(), ChainError> {
        let mut heads = self.heads.subscribe();
        loop {
            let block = *heads.borrow_and_update();
            on_head(Head { block });
            if heads.changed().await.is_err() {
                return pending().await;
            }
        }
    }

    async fn doubt(&self) {
        // Another endpoint tells the truth.
        self.lies.store(false, SeqCst);
    }

    async fn send(&self, weights: &EpochWeights) -> Result<WeightsState, NotSent> {
        if let Some(fate) = self.fates.lock().pop_front() {
            return Err(fate);
        }
        self.sends.lock().push((weights.epoch, weights.values.clone()));
        Ok(sent_as(format!("0x{}", weights.epoch)))
    }

    async fn look_up(&self, _: &EpochWeights) -> anyhow::Result<Stand> {
        Ok(self.stand.lock().clone())
    }

    async fn list(&self) -> anyhow::Result<()> {
        Ok(())
    }

    async fn models(&self, member: &Member) -> anyhow::Result<Vec<String>> {
        match member.uid {
            5 => Err(anyhow!("no answer")),
            _ => Ok(vec!["m".into(), "m".into()]),
        }
    }

    async fn ask(&self, query: MinerQuery) -> Answered {
        let chunk = |i| Arrival {
            at: Duration::from_millis(i),
            chunk: json!({"choices": [{"text": "x"}]}),
        };
        let ended = Duration::from_millis(100);
        match query.member.uid {
            1 | 2 if self.answers.load(SeqCst) => {
                Answered { arrivals: (0..10).map(chunk).collect(), ended, ending: Ending::Whole }
            }
            4 if self.answers.load(SeqCst) => panic!("a part breaks"),
            _ => {
                let ending = Ending::Fault { cause: "STATUS", what: "too busy".into() };
                Answered { arrivals: vec![], ended, ending }
            }
        }
    }

    fn offers(&self) -> Vec<Offer> {
        let endpoints = vec![Endpoint::Completion];
        vec![Offer { name: "m".into(), endpoints, context_max: 512 }]
    }

    async fn prompt(&self, _: &str, _: Endpoint) -> anyhow::Result<QueryPrompt> {
        Ok(QueryPrompt { content: QueryContent::Text("hello".into()), tokens: 2 })
    }

    async fn verify(&self, case: AnswerToCheck) -> AnswerReport {
        let now = self.checking.fetch_add(1, SeqCst) + 1;
        self.checking_max.fetch_max(now, SeqCst);
        tokio::time::sleep(Duration::from_millis(5)).await;
        while self.hangs.load(SeqCst) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.checking.fetch_sub(1, SeqCst);
        assert!(!self.panics.load(SeqCst), "a part breaks");
        let verdict = match case.member.uid {
            1 => AnswerVerdict::Pass,
            _ => AnswerVerdict::Reject { cause: "SAMPLER_MARGIN".into(), what: "token 3".into() },
        };
        AnswerReport { tokens: 10, ..AnswerReport::bare(verdict) }
    }

    async fn save(&self, round: &Round) -> anyhow::Result<()> {
        self.records()?;
        self.saved.lock().push(round.clone());
        Ok(())
    }

    async fn rotate(&self) -> anyhow::Result<()> {
        self.rotations.fetch_add(1, SeqCst);
        Ok(())
    }

    fn hold(&self, _: &str) -> Hold {
        Hold::NOTHING
    }

    async fn pull(&self, _: &Subnet) -> anyhow::Result<usize> {
        self.pulls.fetch_add(1, SeqCst);
        Err(anyhow!("the hub is gone"))
    }

    fn wants_reports(&self) -> bool {
        true
    }

    async fn report(&self, round: &Round) -> anyhow::Result<()> {
        self.reported.lock().push(round.id.clone());
        Err(anyhow!("the hub is gone"))
    }

    async fn tidy(&self) -> anyhow::Result<Removed> {
        self.tidied.fetch_add(1, SeqCst);
        self.records()?;
        Ok(Removed::default())
    }

    async fn decide(&self, _: &Subnet) -> anyhow::Result<Decided> {
        self.records()?;
        let more = self.breaks.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1));
        assert!(more.is_err(), "a part breaks");
        let values = vec![(1, u16::MAX)];
        Ok(Decided { values, none: None, explanation: Value::Null })
    }

    async fn planned(&self, epoch: u64) -> anyhow::Result<Option<EpochWeights>> {
        self.records()?;
        Ok(self.weights.lock().get(&epoch).cloned())
    }

    async fn unfinished(&self) -> anyhow::Result<Vec<EpochWeights>> {
        self.records()?;
        let is_open = |weights: &&EpochWeights| {
            matches!(weights.state, WeightsState::Sent { .. } | WeightsState::Committed { .. })
        };
        Ok(self.weights.lock().values().filter(is_open).cloned().collect())
    }

    async fn confirmed(&self) -> anyhow::Result<Option<EpochWeights>> {
        self.records()?;
        let is_there = |weights: &&EpochWeights| weights.state == WeightsState::Confirmed;
        Ok(self.weights.lock().values().rev().find(is_there).cloned())
    }

    async fn plan(&self, weights: &EpochWeights) -> anyhow::Result<Option<WeightsState>> {
        self.records()?;
        self.weights.lock().insert(weights.epoch, weights.clone());
        Ok(None)
    }

    async fn mark(&self, epoch: u64, state: &WeightsState) -> anyhow::Result<()> {
        self.records()?;
        self.weights.lock().get_mut(&epoch).unwrap().state = state.clone();
        Ok(())
    }
}

/// Weights that were sent, in no block that is known.
pub(super) fn sent_as(hash: String) -> WeightsState {
    WeightsState::Sent { hash, blocks: None, reveal_round: None }
}

pub(super) fn options(rounds: Option<u64>) -> RunOptions {
    let round = RoundSettings {
        netuid: 4,
        profile: "default".into(),
        asked_max: 37,
        lengths: 20..=20,
        proof: None,
        slow_share: 0.0,
        keep: Keep::Nothing,
        times: Times {
            prompt: Duration::from_secs(5),
            answers: Duration::from_secs(5),
            verdicts: Duration::from_millis(700),
        },
    };
    let rules =
        MinerRules { own: Hotkey([0; 32]), vpermit_tao_limit: 4096.0, private_axons: false };
    RunOptions {
        round,
        reading: ReadingTerms { rules, is_permit_needed: true },
        epochs: EpochRule::Every(100),
        checks: CHECKS_DEFAULT,
        rounds,
        is_dry: false,
        stop_time: Duration::from_millis(300),
        weights_wait: Duration::from_millis(1),
        spill: None,
    }
}

pub(super) async fn driver(world: &Arc<Fake>, options: RunOptions) -> Driver<Fake> {
    let (clock, chance) = (Clock::system(), Chance::seeded(1));
    Driver::new(Arc::clone(world), options, clock, chance).await.unwrap()
}

/// A driver that runs beside its test.
pub(super) struct Running {
    pub(super) progress: Arc<RunProgress>,
    pub(super) views: watch::Receiver<Arc<View>>,
    pub(super) retirement: CancellationToken,
    stop: CancellationToken,
    run: JoinHandle<Result<Summary, RunError>>,
}

impl Running {
    pub(super) async fn start(world: &Arc<Fake>, options: RunOptions) -> Self {
        let driver = driver(world, options).await;
        let (progress, views, retirement) =
            (driver.progress(), driver.watch(), driver.retirement());
        let stop = CancellationToken::new();
        let token = stop.clone();
        let run = tokio::spawn(async move { driver.run(token, &|_| {}).await });
        Self { progress, views, retirement, stop, run }
    }

    pub(super) fn is_finished(&self) -> bool {
        self.run.is_finished()
    }

    /// Tells the driver to stop, and waits for it.
    pub(super) async fn stop(self) -> Result<Summary, RunError> {
        self.stop.cancel();
        self.end().await
    }

    /// Waits for a driver that ends by itself.
    pub(super) async fn end(self) -> Result<Summary, RunError> {
        tokio::time::timeout(Duration::from_secs(5), self.run).await.unwrap().unwrap()
    }
}

/// Waits until something is so; tests fail where it never is.
pub(super) async fn until(what: &str, is_so: impl Fn() -> bool) {
    for _ in 0..2_000 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never: {what}");
}
