//! The driver against a world that a test has in its hands.

use super::ports::{AnswerToCheck, Decided, MinerQuery, NotSent, Stand};
use super::residents::Hold;
use super::*;
use crate::chain::keys::Hotkey;
use crate::chain::metagraph::{AXON_PROTOCOL, Axon, Hyperparameters, Metagraph, Neuron, Rao};
use crate::store::Removed;
use crate::store::record::{Outcome, Sampled, Weights, WeightsState};
use crate::validator::eligible::{Member, MinerRules};
use crate::validator::query::Arrival;
use crate::validator::round::ask::{Endpoint, QueryContent, QueryPrompt};
use crate::validator::round::{
    AnswerReport, AnswerVerdict, Answered, Ending, Keep, MinerState, Offer, Times,
};
use anyhow::anyhow;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::future::pending;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};

/// An epoch, and the weights that were sent for it.
type Sent = (u64, Vec<(u16, u16)>);

/// A world without a network: miners are numbers, the records are lists.
struct Fake {
    heads: watch::Sender<u64>,
    permit: bool,
    /// Whether the records answer.
    records: AtomicBool,
    /// Whether checking never ends, or breaks.
    hangs: AtomicBool,
    panics: AtomicBool,
    /// Whether the chain answers.
    chain: AtomicBool,
    checking: AtomicUsize,
    checking_max: AtomicUsize,
    saved: Mutex<Vec<Round>>,
    weights: Mutex<BTreeMap<u64, Weights>>,
    sends: Mutex<Vec<Sent>>,
    /// What becomes of the next sendings, and what stands on the chain then.
    fates: Mutex<VecDeque<NotSent>>,
    stand: Mutex<Stand>,
    readings: AtomicU64,
    /// The subnet's last epoch, as the chain counts.
    last_step: AtomicU64,
    tidied: AtomicU64,
    rotations: AtomicU64,
    serves: AtomicBool,
    pulls: AtomicU64,
    reported: Mutex<Vec<String>>,
}

impl Fake {
    fn new() -> Self {
        Self {
            heads: watch::Sender::new(10),
            permit: true,
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
            last_step: 0.into(),
            tidied: 0.into(),
            rotations: 0.into(),
            serves: true.into(),
            pulls: 0.into(),
            reported: Mutex::default(),
        }
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
            permit: uid == 0 && self.permit,
            axon: self.serves.load(SeqCst).then_some(Axon {
                address: ([8, 8, 8, 8], 1000 + uid).into(),
                version: 1,
                protocol: AXON_PROTOCOL,
            }),
            ..Neuron::new(uid, Hotkey([uid as u8; 32]), Rao(0))
        };
        let neurons = (0..6).map(neuron).collect();
        let hyperparameters = Hyperparameters { tempo: 100, ..Hyperparameters::default() };
        let metagraph = Metagraph::new(4, *self.heads.borrow(), hyperparameters, neurons);
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

    async fn doubt(&self) {}

    async fn send(&self, weights: &Weights) -> Result<WeightsState, NotSent> {
        if let Some(fate) = self.fates.lock().pop_front() {
            return Err(fate);
        }
        self.sends.lock().push((weights.epoch, weights.values.clone()));
        Ok(WeightsState::Sent { hash: format!("0x{}", weights.epoch) })
    }

    async fn look_up(&self, _: &Weights) -> anyhow::Result<Stand> {
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
            1 | 2 => {
                Answered { arrivals: (0..10).map(chunk).collect(), ended, ending: Ending::Whole }
            }
            3 => {
                let ending = Ending::Fault { cause: "LATE", what: "too slow".into() };
                Answered { arrivals: vec![], ended, ending }
            }
            _ => panic!("a part breaks"),
        }
    }

    fn offers(&self) -> Vec<Offer> {
        let endpoints = vec![Endpoint::Completion];
        vec![Offer { name: "m".into(), endpoints, context_max: 512 }]
    }

    async fn prompt(&self, _: &str, _: Endpoint, _: u64) -> anyhow::Result<QueryPrompt> {
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
        AnswerReport::bare(verdict)
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
        let values = vec![(1, u16::MAX)];
        Ok(Decided { values, none: None, explanation: Value::Null })
    }

    async fn planned(&self, epoch: u64) -> anyhow::Result<Option<Weights>> {
        self.records()?;
        Ok(self.weights.lock().get(&epoch).cloned())
    }

    async fn plan(&self, weights: &Weights) -> anyhow::Result<Option<WeightsState>> {
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

fn options(rounds: Option<u64>) -> RunOptions {
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
        reading: Reading { rules, is_permit_needed: true },
        epochs: EpochRule::Every(100),
        checks: CHECKS_DEFAULT,
        rounds,
        is_dry: false,
        stop_time: Duration::from_millis(300),
        weights_wait: Duration::from_millis(1),
        spill: None,
    }
}

async fn driver(world: &Arc<Fake>, options: RunOptions) -> Driver<Fake> {
    let (clock, chance) = (Clock::system(), Chance::seeded(1));
    Driver::new(Arc::clone(world), options, clock, chance).await.unwrap()
}

/// Waits until something is so; tests fail where it never is.
async fn until(what: &str, is_so: impl Fn() -> bool) {
    for _ in 0..2_000 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never: {what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rounds_end_in_records_and_weights() {
    let world = Arc::new(Fake::new());
    let seen = AtomicUsize::new(0);
    let running = driver(&world, options(Some(3))).await;
    let on_round = |_: &Round| {
        seen.fetch_add(1, SeqCst);
    };
    let summary = running.run(CancellationToken::new(), &on_round).await.unwrap();
    assert_eq!((summary.rounds, seen.load(SeqCst)), (3, 3));
    let saved = world.saved.lock();
    assert_eq!(saved.iter().map(|r| r.id.clone()).collect::<BTreeSet<_>>().len(), 3);
    for round in saved.iter() {
        let found: Vec<_> =
            round.responses.iter().map(|r| (r.uid, r.outcome, r.cause.as_deref())).collect();
        assert_eq!(
            found,
            [
                (1, Outcome::Verified, None),
                (2, Outcome::Rejected, Some("SAMPLER_MARGIN")),
                (3, Outcome::Failed, Some("LATE")),
                (4, Outcome::Unscored, Some("UNSCORED")), // its query broke
                (5, Outcome::NotServed, Some("NOT_SERVED")),
            ]
        );
        assert_eq!(round.responses[0].sample, Sampled::Tps(100.0));
        assert_eq!(round.responses[3].sample, Sampled::Nothing);
    }
    assert_eq!(world.checking_max.load(SeqCst), CHECKS_DEFAULT);
    assert_eq!(*world.sends.lock(), [(0, vec![(1, u16::MAX)])]);
    let Some(Settled::Weights(weights)) = summary.weights else { panic!("{summary:?}") };
    assert_eq!((weights.state, weights.block), (WeightsState::Confirmed, 10));
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_are_set_where_an_epoch_begins_and_once() {
    let world = Arc::new(Fake::new());
    let running = driver(&world, options(None)).await;
    let progress = running.progress();
    let stop = CancellationToken::new();
    let token = stop.clone();
    let run = tokio::spawn(async move { running.run(token, &|_| {}).await });
    until("a round", || progress.rounds() > 0).await;
    world.heads.send_replace(99);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!((world.sends.lock().len(), world.readings.load(SeqCst)), (0, 1));
    // The block itself was missed; and the chain says no once for what passes.
    world.fates.lock().push_back(NotSent::Later("the rate limit".into()));
    world.heads.send_replace(103);
    until("the subnet read anew", || world.readings.load(SeqCst) == 2).await;
    until("a refusal", || world.fates.lock().is_empty()).await;
    assert_eq!(world.sends.lock().len(), 0);
    for block in [104, 105, 150, 199] {
        world.heads.send_replace(block);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    until("weights", || world.sends.lock().len() == 1).await;
    assert_eq!(world.weights.lock()[&100].state, WeightsState::Confirmed);
    // The chain is gone where the next epoch begins: the members of before are asked on.
    world.chain.store(false, SeqCst);
    world.heads.send_replace(200);
    until("a try", || world.readings.load(SeqCst) > 2).await;
    let before = progress.rounds();
    until("rounds without a chain", || progress.rounds() > before + 2).await;
    world.chain.store(true, SeqCst);
    world.heads.send_replace(205);
    until("weights of the next epoch", || world.sends.lock().len() == 2).await;
    assert_eq!(world.sends.lock()[1].0, 200);
    stop.cancel();
    let summary = run.await.unwrap().unwrap();
    assert_eq!(summary.weights, None);
    assert_eq!(summary.rounds, world.saved.lock().len() as u64);
    let seen = progress.snapshot();
    let weights = seen.weights.clone().unwrap();
    assert_eq!((weights.epoch, weights.state), (200, WeightsState::Confirmed));
    assert_eq!((seen.block, seen.members, seen.weights_age()), (205, 5, Some(0)));
    assert!(seen.beat_ms > 0 && seen.block_ms > 0 && seen.is_stopping);
}

#[tokio::test(flavor = "multi_thread")]
async fn epochs_of_the_chain_are_found_where_the_chain_runs_them() {
    let world = Arc::new(Fake::new());
    world.last_step.store(7, SeqCst);
    let options = RunOptions { epochs: EpochRule::Chain, ..options(None) };
    let running = driver(&world, options).await;
    let stop = CancellationToken::new();
    let token = stop.clone();
    let run = tokio::spawn(async move { running.run(token, &|_| {}).await });
    // A multiple of any length is nothing; the epoch is due at 107 and is late.
    for block in [100, 106] {
        world.heads.send_replace(block);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    assert_eq!(world.readings.load(SeqCst), 1);
    for (block, readings) in [(107, 2), (108, 3), (110, 4)] {
        world.heads.send_replace(block);
        until("a look", || world.readings.load(SeqCst) == readings).await;
    }
    assert!(world.sends.lock().is_empty());
    world.last_step.store(112, SeqCst);
    world.heads.send_replace(114);
    until("weights", || world.sends.lock().len() == 1).await;
    assert_eq!(world.sends.lock()[0].0, 112);
    // One of the owner's own, noticed where the next one would be due.
    world.last_step.store(150, SeqCst);
    world.heads.send_replace(212);
    until("weights of the next epoch", || world.sends.lock().len() == 2).await;
    assert_eq!(world.sends.lock()[1].0, 150);
    assert_eq!(world.rotations.load(SeqCst), 3);
    // Blocks 100, 120 and so on were passed by 100, 108 and 212 only; a hub that is gone costs no
    // round.
    until("questions for users' requests", || world.pulls.load(SeqCst) >= 2).await;
    until("a report of a round", || !world.reported.lock().is_empty()).await;
    until("a look at old records in each epoch", || world.tidied.load(SeqCst) == 3).await;
    stop.cancel();
    run.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn where_nobody_serves_the_subnet_is_read_again_before_the_next_epoch() {
    for epochs in [EpochRule::Chain, EpochRule::Every(1_000)] {
        let world = Arc::new(Fake::new());
        world.serves.store(false, SeqCst);
        world.last_step.store(*world.heads.borrow(), SeqCst);
        let options = RunOptions { epochs, ..options(None) };
        let running = driver(&world, options).await;
        let (progress, stop) = (running.progress(), CancellationToken::new());
        let token = stop.clone();
        let run = tokio::spawn(async move { running.run(token, &|_| {}).await });
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(progress.rounds(), 0);
        world.serves.store(true, SeqCst);
        let first = *world.heads.borrow();
        for block in first + 1..=first + IDLE_BLOCKS {
            world.heads.send_replace(block);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        until("a round", || progress.rounds() > 0).await;
        stop.cancel();
        run.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_gone_costs_no_round() {
    let world = Arc::new(Fake::new());
    let dir = tempfile::tempdir().unwrap();
    let spill = dir.path().join("rounds.jsonl");
    let options = RunOptions { spill: Some(spill.clone()), ..options(None) };
    let running = driver(&world, options.clone()).await;
    let progress = running.progress();
    let stop = CancellationToken::new();
    let token = stop.clone();
    let run = tokio::spawn(async move { running.run(token, &|_| {}).await });
    until("a round", || !world.saved.lock().is_empty()).await;
    world.records.store(false, SeqCst);
    let at = world.saved.lock().len() as u64;
    until("all places taken", || progress.rounds() >= at + UNSAVED_MAX as u64).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let held = progress.rounds() - world.saved.lock().len() as u64;
    assert!(held <= (UNSAVED_MAX + ROUNDS_MAX) as u64, "{held} rounds are held in memory");
    stop.cancel();
    let error = run.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("could not be remembered; they are in"), "{error}");
    // The next start takes them over, in order and each once.
    world.records.store(true, SeqCst);
    let options = RunOptions { rounds: Some(1), ..options };
    let (clock, chance) = (Clock::system(), Chance::seeded(2));
    let next = Driver::new(Arc::clone(&world), options, clock, chance).await.unwrap();
    next.run(CancellationToken::new(), &|_| {}).await.unwrap();
    assert!(!spill.exists());
    let ids: Vec<String> = world.saved.lock().iter().map(|r| r.id.clone()).collect();
    assert_eq!(ids.len() as u64, progress.rounds() + 1);
    assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_are_gone_where_weights_are_due_delay_them_and_no_more() {
    let world = Arc::new(Fake::new());
    let running = driver(&world, options(None)).await;
    let stop = CancellationToken::new();
    let token = stop.clone();
    let run = tokio::spawn(async move { running.run(token, &|_| {}).await });
    world.records.store(false, SeqCst);
    for block in [100, 101, 102] {
        world.heads.send_replace(block);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    assert!(world.sends.lock().is_empty());
    world.records.store(true, SeqCst);
    world.heads.send_replace(103);
    until("weights", || !world.sends.lock().is_empty()).await;
    // The chain is gone in the middle of the next epoch's: said no, later, and sent once.
    world.fates.lock().push_back(NotSent::Later("no endpoint answers".into()));
    for block in [200, 201, 202, 203] {
        world.heads.send_replace(block);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    until("the next weights", || world.sends.lock().len() == 2).await;
    let epochs: Vec<u64> = world.sends.lock().iter().map(|(epoch, _)| *epoch).collect();
    assert_eq!(epochs, [100, 200]);
    stop.cancel();
    run.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verification_that_hangs_or_breaks_holds_up_nothing_and_blames_nobody() {
    for is_hanging in [true, false] {
        let world = Arc::new(Fake::new());
        world.hangs.store(is_hanging, SeqCst);
        world.panics.store(!is_hanging, SeqCst);
        let running = driver(&world, options(Some(2))).await;
        running.run(CancellationToken::new(), &|_| {}).await.unwrap();
        for round in world.saved.lock().iter() {
            let of = |uid| round.responses.iter().find(|r| r.uid == uid).unwrap();
            assert_eq!(of(1).outcome, Outcome::Unscored);
            assert_eq!((of(2).sample, of(3).sample), (Sampled::Nothing, Sampled::Miss));
            let why = of(1).error.clone().unwrap();
            let expected = if is_hanging { "not verified in time" } else { "validator broke" };
            assert!(why.contains(expected), "{why}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_ends_in_time_with_everything_remembered() {
    let world = Arc::new(Fake::new());
    world.hangs.store(true, SeqCst);
    let mut options = options(None);
    options.round.times.verdicts = Duration::from_secs(600);
    let running = driver(&world, options).await;
    let stop = CancellationToken::new();
    let token = stop.clone();
    let run = tokio::spawn(async move { running.run(token, &|_| {}).await });
    until("verifications", || world.checking.load(SeqCst) == CHECKS_DEFAULT).await;
    stop.cancel();
    let summary = tokio::time::timeout(Duration::from_secs(5), run).await.unwrap().unwrap();
    let saved = world.saved.lock();
    assert_eq!(summary.unwrap().rounds, saved.len() as u64);
    assert!(!saved.is_empty());
    let stopped = saved.iter().flat_map(|round| &round.responses);
    let why = |r: &crate::store::record::Response| r.error.clone().unwrap_or_default();
    assert!(stopped.filter(|r| r.uid == 1).all(|r| why(r).contains("was stopped")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retirement_waits_for_verdicts_and_for_the_weights_of_the_epoch() {
    let world = Arc::new(Fake::new());
    let mut options = options(None);
    options.round.times.verdicts = Duration::from_secs(600);
    let running = driver(&world, options).await;
    let (progress, retirement) = (running.progress(), running.retirement());
    let run = tokio::spawn(async move { running.run(CancellationToken::new(), &|_| {}).await });
    until("a round", || progress.rounds() > 0).await;
    // An epoch begins, and its weights cannot be set yet.
    world.fates.lock().push_back(NotSent::Later("the rate limit".into()));
    world.heads.send_replace(100);
    until("a refusal", || world.fates.lock().is_empty()).await;
    retirement.cancel();
    let before = progress.rounds();
    until("rounds while weights are missing", || progress.rounds() > before + 2).await;
    world.hangs.store(true, SeqCst);
    until("verifications", || world.checking.load(SeqCst) == CHECKS_DEFAULT).await;
    world.heads.send_replace(101);
    until("weights", || world.sends.lock().len() == 1).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!run.is_finished(), "a round waits for verdicts");
    world.hangs.store(false, SeqCst);
    let summary = tokio::time::timeout(Duration::from_secs(5), run).await.unwrap().unwrap();
    let saved = world.saved.lock();
    assert_eq!(summary.unwrap().rounds, saved.len() as u64);
    // Nothing was given up.
    let first = |round: &Round| round.responses[0].outcome;
    assert!(saved.iter().all(|round| first(round) == Outcome::Verified));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_watches_sees_rounds_miners_verdicts_and_weights_to_come() {
    let world = Arc::new(Fake::new());
    world.hangs.store(true, SeqCst);
    let mut options = options(None);
    options.round.times.verdicts = Duration::from_secs(600);
    let running = driver(&world, options).await;
    let (views, stop) = (running.watch(), CancellationToken::new());
    let token = stop.clone();
    let run = tokio::spawn(async move { running.run(token, &|_| {}).await });
    let standing = |uid: u16| views.borrow().miners.get(&uid).and_then(|m| m.standing);
    until("a verification", || matches!(standing(1), Some(MinerState::Checking(_)))).await;
    let is_checking = || views.borrow().rounds.iter().any(|r| r.phase == RoundPhase::Checking);
    until("a round that waits for verdicts", is_checking).await;
    let view = Arc::clone(&views.borrow());
    assert_eq!((view.netuid, view.block, view.epoch), (4, 10, (0, 100)));
    assert_eq!(view.miners.keys().copied().collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    assert_eq!(standing(5), Some(MinerState::NotServed));
    assert!(view.rounds.iter().all(|round| round.model == "m"));
    assert_eq!(view.miners[&1].last, None);
    world.hangs.store(false, SeqCst);
    let last = |uid: u16| views.borrow().miners[&uid].last.clone();
    until("a verdict", || last(1).is_some_and(|l| l.outcome == Outcome::Verified)).await;
    assert_eq!(last(2).unwrap().cause.as_deref(), Some("SAMPLER_MARGIN"));
    assert!(views.borrow().miners[&1].counts["verified"] > 0);
    until("weights to come", || views.borrow().to_come.get(&1) == Some(&u16::MAX)).await;
    stop.cancel();
    run.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_permit_nothing_begins() {
    let world = Arc::new(Fake { permit: false, ..Fake::new() });
    let (clock, chance) = (Clock::system(), Chance::seeded(1));
    let refused = Driver::new(Arc::clone(&world), options(None), clock.clone(), chance.clone());
    let error = refused.await.map(drop).unwrap_err().to_string();
    assert!(error.contains("uid 0") && error.contains("no validator permit"), "{error}");
    let mut options = options(Some(1));
    options.reading.is_permit_needed = false;
    assert!(Driver::new(world, options, clock, chance).await.is_ok());
}

/// Weights of epoch 0 in a state, as an earlier run has left them.
fn left(state: WeightsState) -> Arc<Fake> {
    let world = Arc::new(Fake::new());
    let weights = Weights {
        netuid: 4,
        epoch: 0,
        block: 3,
        values: vec![(2, u16::MAX)],
        explanation: Value::Null,
        state,
    };
    world.weights.lock().insert(0, weights);
    world
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_at_any_step_never_sends_twice() {
    let sent = || WeightsState::Sent { hash: "0x1".into() };
    let failed = |why: &str| WeightsState::Failed { why: why.into() };
    let gone = || Stand::NotThere("nothing".into());
    for (state, stand, block, sends, expected) in [
        // Planned is not sent.
        (WeightsState::Planned, Stand::Confirmed, 10, 1, WeightsState::Confirmed),
        (sent(), Stand::Confirmed, 10, 0, WeightsState::Confirmed),
        // It may still arrive.
        (sent(), gone(), 10, 0, sent()),
        (sent(), gone(), 90, 0, failed("nothing")),
        (WeightsState::Confirmed, gone(), 90, 0, WeightsState::Confirmed),
        (failed("why"), gone(), 90, 0, failed("why")),
    ] {
        let world = left(state.clone());
        world.heads.send_replace(block);
        *world.stand.lock() = stand;
        let running = driver(&world, options(Some(1))).await;
        running.run(CancellationToken::new(), &|_| {}).await.unwrap();
        assert_eq!(world.sends.lock().len(), sends, "{state:?}");
        assert_eq!(world.weights.lock()[&0].state, expected, "{state:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_sends_and_remembers_no_weights() {
    let world = Arc::new(Fake::new());
    let options = RunOptions { is_dry: true, ..options(Some(1)) };
    let running = driver(&world, options).await;
    let summary = running.run(CancellationToken::new(), &|_| {}).await.unwrap();
    let Some(Settled::Weights(weights)) = summary.weights else { panic!("{summary:?}") };
    assert_eq!((weights.state, weights.values), (WeightsState::Planned, vec![(1, u16::MAX)]));
    assert!(world.sends.lock().is_empty() && world.weights.lock().is_empty());
}
