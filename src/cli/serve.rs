//! Runs `serve`: offers models over HTTP until a signal comes.

use super::out::announce;
use super::progress::Bars;
use super::shared::runtime;
use super::shared::{ComputeArgs, ListenArgs, ModelsArg};
use super::subnet::{PreparedMiner, RunningMiner, feed_watchdog, tell};
use super::subnet_args::{AxonArgs, ChainArgs, MemberFlags, OriginalArgs, WalletArgs};
use super::update::{UpdateArgs, replaced, restart};
use super::{Failure, logging};
use crate::clock::Clock;
use crate::config::log::LogFilter;
use crate::config::models_toml::Config;
use crate::intake::translate::Defaults;
use crate::lifecycle::accounts::MemoryAccounts;
use crate::lifecycle::load::{Loading, Progress, start_models};
use crate::lifecycle::prefixes;
use crate::lifecycle::reload::{Reloader, Stamp, stamp};
use crate::lifecycle::watch::last_engine_death;
use crate::models::pass::LogprobMode;
use crate::ops::CANON;
use crate::ops::pool::Pool;
use crate::server::listen::{check_open, serve_all};
use crate::server::operations::metrics::summarize;
use crate::server::registry::Registry;
use crate::server::router;
use crate::server::state::ServerState;
use crate::update::Installed;
use axum::Router;
use clap::{Args, ValueEnum};
use sd_notify::NotifyState;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Arguments of `serve`.
#[derive(Args)]
pub(super) struct ServeArgs {
    #[command(flatten)]
    models: ModelsArg,
    #[command(flatten)]
    listen: ListenArgs,
    #[command(flatten)]
    members: MemberFlags,
    #[command(flatten)]
    pub(super) wallet: WalletArgs,
    #[command(flatten)]
    pub(super) chain: ChainArgs,
    #[command(flatten)]
    pub(super) axon: AxonArgs,
    #[command(flatten)]
    original: OriginalArgs,
    #[command(flatten)]
    update: UpdateArgs,
    /// Look for newer releases and restart as the newest one, after running requests have ended.
    #[arg(long, env = "TARGON_AUTOUPDATE", help_heading = "Updates")]
    autoupdate: bool,
    /// API keys, separated by commas; [server] of the models file may have more.
    #[arg(long, env = "TARGON_API_KEY", hide_env_values = true, value_delimiter = ',')]
    pub(super) api_key: Vec<String>,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Seconds for which running requests may continue after SIGTERM.
    #[arg(long, env = "TARGON_SHUTDOWN_TIMEOUT", default_value_t = 30)]
    shutdown_timeout: u64,
    /// Name tokens `token_id:<n>` in log-probabilities, as Targon's validators expect.
    #[arg(long, env = "TARGON_RETURN_TOKENS_AS_TOKEN_IDS")]
    return_tokens_as_token_ids: bool,
    /// Which distribution log-probabilities describe if a request does not say.
    #[arg(long, env = "TARGON_LOGPROBS_MODE", default_value = "raw")]
    logprobs_mode: Mode,
}

#[derive(Clone, Copy, ValueEnum)]
enum Mode {
    /// Softmax of the model's own logits.
    Raw,
    /// After penalties and temperature.
    Scaled,
}

pub(super) fn run(args: ServeArgs, log: LogFilter) -> Result<(), Failure> {
    args.original.check()?;
    let seen = stamp(&args.models.path);
    let config = args.models.read(&args.api_key)?;
    let pool = args.compute.pool()?;
    tracing::info!(threads = pool.threads(), isa = %pool.isa(), canon = CANON, "compute pool");
    let runtime = runtime()?;
    logging::follow(config.server.log.as_ref())?;
    let outcome = runtime.block_on(serve(args, log, (config, seen), pool));
    // Loading threads may still be busy; nothing waits for them.
    runtime.shutdown_background();
    outcome?.map_or(Ok(()), |installed| Err(restart(&installed)))
}

/// Serves until a signal, or until there is a newer program to become.
async fn serve(
    args: ServeArgs,
    log: LogFilter,
    (config, seen): (Config, Option<Stamp>),
    pool: Pool,
) -> Result<Option<Installed>, Failure> {
    if !args.autoupdate {
        args.update.warn_unused();
    }
    let updater = args.update.updater(args.autoupdate)?;
    let (listener, local) = args.listen.bind().await?;
    let clock = Clock::system();
    let is_miner = PreparedMiner::is_wanted(&args.wallet, &args.chain);
    check_host(local, config.server.settings.keys.is_empty(), is_miner)?;
    if let Some(what) = prefixes::unused(&config, is_miner) {
        tracing::warn!("{what}");
    }
    let subnet = subnet(&args, &config, &clock).await?;
    if let Some(subnet) = &subnet
        && args.axon.dry_run
    {
        return subnet.dry_run().await.map(|()| None);
    }
    let registry = Registry::default();
    let announced = registry.announce(config.models.iter().map(|m| m.name.clone()));
    let state = state(&args, &config, registry.clone(), subnet.as_ref(), clock.clone());
    let (ended, signalled) = (CancellationToken::new(), CancellationToken::new());
    // Before anybody can know that it runs, and end it.
    let stop = stopping(ended.clone(), signalled.clone())?;
    announce!("http://{local}");
    let (listeners, running) = listeners(listener, &state, subnet);
    let timeout = Duration::from_secs(args.shutdown_timeout);
    let serving = tokio::spawn(serve_all(listeners, state.clone(), stop, timeout));
    let models = config.models.clone();
    let shown: Arc<dyn Progress> = Arc::new(Bars::new());
    let memory = MemoryAccounts::default();
    let loading = Loading { registry: announced, pool, clock, memory, shown };
    let started = tokio::spawn(start_models(models, loading.clone()));
    let mut serving = std::pin::pin!(serving);
    tokio::select! {
        outcome = &mut serving => return finish(outcome).map(|()| None),
        ready = started => if !ready.map_err(Failure::ours)? {
            return Err(Failure::of_models(&registry));
        },
    }
    let (path, keys) = (args.models.path, args.api_key);
    let open = (local, is_miner);
    let set_log = logging::set;
    let reloader = Reloader { path, seen, keys, log, set_log, config, state, loading, open };
    let (outcome, newer) = tokio::select! {
        outcome = &mut serving => return finish(outcome).map(|()| None),
        outcome = follow(reloader, registry) => return outcome.map(|()| None),
        outcome = mine(running) => (outcome, None),
        installed = replaced(updater, args.update.every()) => (Ok(()), Some(installed)),
    };
    // What runs may end.
    ended.cancel();
    finish(serving.await)?;
    outcome.map(|()| newer.filter(|_| !signalled.is_cancelled()))
}

/// Follows the models file for as long as an engine is left.
async fn follow(reloader: Reloader, registry: Registry) -> Result<(), Failure> {
    tokio::select! {
        outcome = reloader.run() => {
            outcome.map_err(|e| Failure::ours(format!("cannot watch signals: {e}")))
        }
        name = last_engine_death(registry) => {
            Err(Failure::ours(format!("the last engine, that of {name}, has stopped")))
        }
    }
}

/// The subnet's side, where flags ask for it.
async fn subnet(
    args: &ServeArgs,
    config: &Config,
    clock: &Clock,
) -> Result<Option<PreparedMiner>, Failure> {
    if PreparedMiner::is_wanted(&args.wallet, &args.chain) {
        let slots = config.models.iter().map(|m| m.wanted.sequences_max).sum();
        return PreparedMiner::open((&args.wallet, &args.chain, &args.axon), slots, clock.clone())
            .await
            .map(Some);
    }
    args.members.warn_unused();
    Ok(None)
}

/// What handlers share, and what watches over it.
fn state(
    args: &ServeArgs,
    config: &Config,
    registry: Registry,
    subnet: Option<&PreparedMiner>,
    clock: Clock,
) -> ServerState {
    let defaults = Defaults {
        tokens_as_ids: args.return_tokens_as_token_ids,
        logprob_mode: match args.logprobs_mode {
            Mode::Raw => LogprobMode::Raw,
            Mode::Scaled => LogprobMode::Scaled,
        },
    };
    let mut state = ServerState::new(registry.clone(), defaults, clock);
    if let Some(subnet) = subnet {
        state = state.signed_by(Arc::clone(&subnet.signer)).behind(subnet.gate.clone());
    }
    state.set(config.server.settings.clone());
    tokio::spawn(summarize(state.clone()));
    let settings = state.clone();
    let stall = move || settings.settings().limits.stall_time;
    tokio::spawn(feed_watchdog(registry, stall));
    state
}

/// All listeners with their routes, and what else a miner runs.
fn listeners(
    open: TcpListener,
    state: &ServerState,
    subnet: Option<PreparedMiner>,
) -> (Vec<(TcpListener, Router)>, Option<RunningMiner>) {
    let mut listeners = vec![(open, router(state.clone()))];
    let running = subnet.map(|subnet| {
        announce!("http://{} signed", subnet.local);
        let signed = crate::server::subnet::router(state.clone(), subnet.gate.clone());
        let (listener, running) = subnet.split();
        listeners.push((listener, signed));
        running
    });
    (listeners, running)
}

/// Completes at a signal, which cancels `signalled`, or when `ended` says so.
fn stopping(
    ended: CancellationToken,
    signalled: CancellationToken,
) -> Result<impl Future<Output = ()> + Send, Failure> {
    let (signal, token) = (stop_signal()?, signalled.clone());
    tokio::spawn(async move {
        signal.await;
        token.cancel();
    });
    Ok(async move {
        tokio::select! {
            () = signalled.cancelled() => {}
            () = ended.cancelled() => {}
        }
        tell(NotifyState::Stopping);
    })
}

/// A miner's life on chain; of a server that is none, nothing.
async fn mine(running: Option<RunningMiner>) -> Result<(), Failure> {
    match running {
        Some(running) => running.run().await,
        None => {
            tell(NotifyState::Ready);
            std::future::pending().await
        }
    }
}

pub(super) fn finish(outcome: Result<(), tokio::task::JoinError>) -> Result<(), Failure> {
    outcome.map_err(Failure::ours)?;
    tracing::info!("stopped");
    Ok(())
}

/// [`check_open`] with what helps.
pub(super) fn check_host(
    address: SocketAddr,
    is_open: bool,
    is_miner: bool,
) -> Result<(), Failure> {
    let hint = "give API keys by --api-key, or omit --host: signed requests come to \
                --axon.port";
    check_open(address, is_open, is_miner).map_err(|e| Failure::user(e).with_hint(Some(hint)))
}

/// Completes at the first SIGTERM or SIGINT; a second one ends the process at once.
pub(super) fn stop_signal() -> Result<impl Future<Output = ()> + Send, Failure> {
    let watch =
        |kind| signal(kind).map_err(|e| Failure::ours(format!("cannot watch signals: {e}")));
    let (mut terminate, mut interrupt) =
        (watch(SignalKind::terminate())?, watch(SignalKind::interrupt())?);
    let (sender, receiver) = tokio::sync::oneshot::channel::<()>();
    tokio::spawn(async move {
        let mut sender = Some(sender);
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            match sender.take() {
                // The server may have ended by itself.
                Some(sender) => drop(sender.send(())),
                None => {
                    super::tui::restore();
                    std::process::exit(1)
                }
            }
        }
    });
    Ok(async move {
        // An error means that the watcher is gone, which ends the server too.
        let _ = receiver.await;
    })
}
