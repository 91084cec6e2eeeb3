//! Runs `validate`: a validator on a subnet, until a signal comes or its rounds are over.

use super::out::{announce, outln};
use super::printable::printable;
use super::progress::Bars;
use super::serve::stop_signal;
use super::shared::runtime;
use super::subnet::tell;
pub(super) use super::validate_args::ValidateArgs;
use super::{Failure, tui, update, validate_table};
use crate::chain::Chain;
use crate::chain::keys::Keypair;
use crate::chain::metagraph::Metagraph;
use crate::chain::pace;
use crate::chain::subtensor::Subtensor;
use crate::chance::Chance;
use crate::clock::Clock;
use crate::config::units;
use crate::engine::plan::KvMemory;
use crate::entropy::Entropy;
use crate::lifecycle::residents::{LimitsFiles, Needs, ResidentRules, budget, residents};
use crate::overview::Overview;
use crate::server::listen::serve_all;
use crate::store::Store;
use crate::store::record::{Round, WeightsState};
use crate::update::{Installed, Updater};
use crate::validator::eligible::{self, MinerRules, NoPermit};
use crate::validator::prompt::dataset::Passages;
use crate::validator::query::QuerySigner;
use crate::validator::round::RoundSettings;
use crate::validator::run::hub::OrganicsHub;
use crate::validator::run::keeping::Keeper;
use crate::validator::run::progress::RunProgress;
use crate::validator::run::reading::{ReadingTerms, SubnetError};
use crate::validator::run::residents::Residents;
use crate::validator::run::world::{World, WorldState};
use crate::validator::run::{Driver, RunError, RunOptions, Settled, spill};
use sd_notify::NotifyState;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// A loop that stands still for so long is ended with the program: whoever supervises it starts it
/// again, and nothing that was finished is lost.
const STUCK_TIME: Duration = Duration::from_secs(300);
/// How often it is looked at.
const LOOK: Duration = Duration::from_secs(5);
/// Wait between two looks at weights that were sent.
const WEIGHTS_WAIT: Duration = Duration::from_secs(6);

pub(super) fn run(args: &ValidateArgs) -> Result<(), Failure> {
    args.original.check()?;
    if args.tui {
        tui::check()?;
    }
    let settings = args.round.settings(args.chain.netuid(), &args.verifying)?;
    let source = Passages::open(args.round.dataset.as_deref()).map_err(Failure::user)?;
    let limits = LimitsFiles::read(&args.verifying.limits).map_err(Failure::user)?;
    let (limits, budget) = (Arc::new(limits), verify_memory(args)?);
    spill::read(&args.unsaved).map_err(|e| Failure::user(format!("--unsaved {e}")))?;
    let urls = args.hub.urls()?;
    let signer = Arc::new(args.wallet.keypair()?);
    let runtime = runtime()?;
    runtime.block_on(args.listed.check(&Clock::system()))?;
    let listener = args.listen.map(|address| runtime.block_on(bound(address))).transpose()?;
    let chain = Subtensor::new(args.chain.endpoints()?);
    // Before anything large is loaded.
    let metagraph = runtime.block_on(check(args, &chain, &signer))?;
    let entropy = Entropy::system();
    let store = runtime.block_on(Store::open(&args.database.url, &entropy));
    let store = store.map_err(|e| Failure::user(e).with_hint(Some("see --database.url")))?;
    // A run of some rounds ends before anything newer matters.
    let updater = args.update.updater(args.round.count().is_none())?;
    let residents = runtime.block_on(find_models(args, Arc::clone(&limits), budget))?;
    let options = options(args, settings, &signer);
    let query_signer = QuerySigner { key: Arc::clone(&signer), entropy: entropy.clone() };
    let hub = OrganicsHub::new(urls, query_signer, Clock::system());
    let opened = Opened { chain, store: store.clone(), hub, residents, source, signer, entropy };
    let world = opened.world(args)?;
    let outcome = runtime.block_on(async {
        let outcome =
            validate(args, (world, options, updater), (&metagraph, &limits, listener)).await;
        store.close().await;
        outcome
    });
    // A verification that was given up may still compute; nothing waits for it.
    runtime.shutdown_background();
    outcome?.map_or(Ok(()), |installed| Err(update::restart(&installed)))
}

/// What a validator uses, opened or found.
struct Opened {
    chain: Subtensor,
    store: Store,
    hub: OrganicsHub,
    residents: Residents,
    source: Passages,
    signer: Arc<Keypair>,
    entropy: Entropy,
}

impl Opened {
    fn world(self, args: &ValidateArgs) -> Result<World<Subtensor>, Failure> {
        let Self { chain, store, hub, residents, source, signer, entropy } = self;
        let clock = Clock::system();
        Ok(World {
            chain,
            netuid: args.chain.netuid(),
            store,
            hub,
            keeper: Keeper::new(args.keeping.keeping(), clock.clone()),
            clock,
            entropy,
            residents,
            rewriting: args.round.rewriting(),
            rules: args.verifying.rules,
            mode: args.listed.mode(),
            source,
            scoring: args.weights.scoring(args.round.profile)?,
            waits: args.round.waits(),
            away_max: args.weights.away_max(args.round_time()),
            version_key: args.weights.version_key(args.round.profile),
            memory: WorldState::default(),
            signer,
        })
    }
}

fn options(args: &ValidateArgs, round: RoundSettings, signer: &Keypair) -> RunOptions {
    RunOptions {
        round,
        reading: reading(args, signer),
        epochs: args.weights.epochs(),
        checks: usize::from(args.verifying.checks),
        rounds: args.round.count(),
        is_dry: args.weights.dry_run,
        stop_time: Duration::from_secs(args.shutdown_timeout),
        weights_wait: WEIGHTS_WAIT,
        spill: Some(args.unsaved.clone()),
    }
}

/// Bytes that the models may have.
fn verify_memory(args: &ValidateArgs) -> Result<u64, Failure> {
    let wanted = args.verifying.memory.as_deref().map_or(Ok(KvMemory::Auto), units::kv_memory);
    let wanted = wanted.map_err(|e| Failure::user(format!("--verify-memory {e}")))?;
    budget(wanted).map_err(|e| Failure::user(format!("--verify-memory {e}")))
}

/// Finds the models to verify with; loads none.
async fn find_models(
    args: &ValidateArgs,
    limits: Arc<LimitsFiles>,
    budget: u64,
) -> Result<Residents, Failure> {
    let (models, pool) = (args.models.read(&[])?.models, args.compute.pool()?);
    let verifying = &args.verifying;
    let checks = usize::from(verifying.checks);
    let needs = Needs { checks, tokens: args.tokens_needed(), budget };
    let scrutiny = verifying.scrutiny.asked();
    let rules = ResidentRules { limits, exact: verifying.exact, scrutiny };
    residents(models, needs, (pool, rules), &Bars::new()).await.map_err(Failure::user)
}

fn reading(args: &ValidateArgs, signer: &Keypair) -> ReadingTerms {
    let rules = MinerRules {
        own: signer.hotkey(),
        vpermit_tao_limit: args.round.vpermit_tao_limit,
        private_axons: args.round.private_axons,
    };
    let is_permit_needed = !args.round.allow_no_permit && !args.chain.is_test();
    ReadingTerms { rules, is_permit_needed }
}

/// Whether this key may validate.
async fn check(
    args: &ValidateArgs,
    chain: &Subtensor,
    signer: &Keypair,
) -> Result<Metagraph, Failure> {
    let needs = reading(args, signer).is_permit_needed;
    let ask = || async {
        let metagraph = chain.metagraph(args.chain.netuid()).await?;
        eligible::validator(&metagraph, &signer.hotkey(), needs)?;
        Ok(metagraph)
    };
    pace::confirm(ask, SubnetError::is_passing, chain.doubt())
        .await
        .map_err(|e| run_failure(e.into()))
}

/// Validates until it is over, or until there is a newer program to become.
async fn validate(
    args: &ValidateArgs,
    (world, options, updater): (World<Subtensor>, RunOptions, Option<Updater>),
    (metagraph, limits, listener): (&Metagraph, &LimitsFiles, Option<TcpListener>),
) -> Result<Option<Installed>, Failure> {
    let is_bounded = options.rounds.is_some();
    let (clock, store, netuid) = (world.clock.clone(), world.store.clone(), world.netuid);
    let is_roomy = world.residents.is_roomy();
    let chance = Chance::of(&world.entropy);
    let driver = Driver::new(Arc::new(world), options, clock.clone(), chance).await;
    let driver = driver.map_err(run_failure)?;
    if is_roomy && !args.listed.is_apart() {
        limits.check_used().map_err(|e| Failure::user(format!("--limits {e}")))?;
    }
    let progress = driver.progress();
    if let Some(weights) = store.last_weights(netuid).await.map_err(Failure::ours)? {
        progress.set_weights(&weights);
    }
    let overview = Overview::new(Arc::clone(&progress), &store, netuid, clock);
    if let Some(listener) = listener {
        show_to_operators(listener, &overview)?;
    }
    watch(Arc::clone(&progress))?;
    let stop = stop_at_signal()?;
    let (retire, every) = (driver.retirement(), args.update.every());
    let newer = tokio::spawn(async move {
        let installed = update::replaced(updater, every).await;
        retire.cancel();
        installed
    });
    tell(NotifyState::Ready);
    let on_round = |round: &Round| {
        if is_bounded {
            let Round { id, block, model, endpoint, .. } = round;
            outln!("round {id} at block {block}: {} on {endpoint}", printable(model));
            outln!("{}", validate_table::verdicts(round));
        }
    };
    let shown = args.tui.then(|| tui::Tui::start(driver.watch(), stop.clone())).transpose()?;
    let summary = driver.run(stop.clone(), &on_round).await;
    drop(shown);
    let summary = summary.map_err(run_failure)?;
    if newer.is_finished() && !stop.is_cancelled() {
        return newer.await.map(Some).map_err(Failure::ours);
    }
    newer.abort();
    tell(NotifyState::Stopping);
    summary.weights.map_or(Ok(None), |settled| show(settled, metagraph).map(|()| None))
}

/// Is cancelled at the first signal.
fn stop_at_signal() -> Result<CancellationToken, Failure> {
    let (signal, stop) = (stop_signal()?, CancellationToken::new());
    let token = stop.clone();
    tokio::spawn(async move {
        signal.await;
        tell(NotifyState::Stopping);
        token.cancel();
    });
    Ok(stop)
}

/// The weights at the end.
fn show(settled: Settled, metagraph: &Metagraph) -> Result<(), Failure> {
    let weights = match settled {
        Settled::None(why) => {
            outln!("no weights: {why}");
            return Ok(());
        }
        Settled::Later(why) => return Err(Failure::ours(format!("weights are not set: {why}"))),
        Settled::Weights(weights) => weights,
    };
    let hotkey = |uid| metagraph.uid(uid).map(|neuron| neuron.hotkey.to_string());
    outln!("{}", validate_table::state(&weights));
    outln!("{}", validate_table::weights(&weights, hotkey));
    match weights.state {
        WeightsState::Failed { why } => Err(Failure::user(format!("weights are not set: {why}"))),
        _ => Ok(()),
    }
}

async fn bound(address: SocketAddr) -> Result<TcpListener, Failure> {
    let listener = TcpListener::bind(address).await;
    listener.map_err(|e| Failure::user(format!("--listen: cannot listen on {address}: {e}")))
}

/// Serves the routes for operators until the program ends: while it stops, they say so.
fn show_to_operators(listener: TcpListener, overview: &Overview) -> Result<(), Failure> {
    let local = listener.local_addr().map_err(Failure::ours)?;
    if !local.ip().is_loopback() {
        tracing::warn!(%local, "all who reach this address can read the validator's records");
    }
    announce!("http://{local}");
    let (listeners, state) = (vec![(listener, overview.router())], overview.state().clone());
    tokio::spawn(serve_all(listeners, state, std::future::pending(), Duration::ZERO));
    Ok(())
}

/// Ends the program if its loop hangs, and notifies the service manager's watchdog otherwise.
fn watch(progress: Arc<RunProgress>) -> Result<(), Failure> {
    let feeds = sd_notify::watchdog_enabled().is_some();
    let look = move || {
        let (mut seen, mut still) = (0, Duration::ZERO);
        loop {
            std::thread::sleep(LOOK);
            let beat = progress.beat_ms();
            still = if beat == seen { still + LOOK } else { Duration::ZERO };
            seen = beat;
            if still >= STUCK_TIME {
                tui::restore();
                tracing::error!("the validator has stood still for {STUCK_TIME:?}; it ends");
                std::process::exit(2);
            }
            if feeds && still < STUCK_TIME / 2 {
                tell(NotifyState::Watchdog);
            }
        }
    };
    let thread = std::thread::Builder::new().name("watch".into()).spawn(look);
    thread.map(drop).map_err(|e| Failure::ours(format!("cannot start a thread: {e}")))
}

fn run_failure(e: RunError) -> Failure {
    match &e {
        RunError::Subnet(SubnetError::NoPermit(NoPermit::NotRegistered { netuid, .. })) => {
            let hint = format!("btcli subnets register --netuid {netuid}, with the coldkey");
            Failure::user(&e).with_hint(Some(hint))
        }
        RunError::Subnet(SubnetError::NoPermit(NoPermit::NoPermit { .. })) => {
            let hint = "add stake; --allow-no-permit, or the networks test and local, need none";
            Failure::user(&e).with_hint(Some(hint))
        }
        RunError::Subnet(fault) if fault.is_passing() => {
            let hint = "other endpoints can be given by --subtensor.chain_endpoint";
            Failure::ours(&e).with_hint(Some(hint))
        }
        RunError::Subnet(_) | RunError::Chain(_) | RunError::Models(_) => Failure::user(&e),
        RunError::Records(_) => Failure::ours(&e),
    }
}
