//! Runs `verifier`: offers the HTTP routes of Targon's verifier container, until a signal comes.

use super::out::announce;
use super::progress::Bars;
use super::serve::{check_host, finish, stop_signal};
use super::shared::runtime;
use super::shared::{ComputeArgs, ListenArgs, ModelsArg};
use super::subnet::{feed_watchdog, tell};
use super::{Failure, logging};
use crate::clock::Clock;
use crate::config::models_toml::Config;
use crate::lifecycle::accounts::MemoryAccounts;
use crate::lifecycle::load::{Loading, start_models};
use crate::lifecycle::watch::last_engine_death;
use crate::ops::pool::Pool;
use crate::server::listen::serve_all;
use crate::server::registry::{ModelState, Registry};
use crate::verifier::Service;
use clap::Args;
use sd_notify::NotifyState;
use std::sync::Arc;
use std::time::Duration;

/// Arguments of `verifier`.
#[derive(Args)]
pub(super) struct VerifierArgs {
    #[command(flatten)]
    models: ModelsArg,
    #[command(flatten)]
    listen: ListenArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Seconds for which running verifications may continue after SIGTERM.
    #[arg(long, env = "TARGON_SHUTDOWN_TIMEOUT", default_value_t = 30)]
    shutdown_timeout: u64,
}

pub(super) fn run(args: &VerifierArgs) -> Result<(), Failure> {
    let config = args.models.read(&[])?;
    logging::follow(config.server.log.as_ref())?;
    let server = &config.server.settings;
    if !server.keys.is_empty() || !server.cors_origins.is_empty() {
        tracing::warn!(
            "[server] api_keys and cors_origins have no effect here: Targon's verifier has no keys"
        );
    }
    let pool = args.compute.pool()?;
    let runtime = runtime()?;
    let outcome = runtime.block_on(serve(args, config, pool));
    // Loading threads may still be busy; nothing waits for them.
    runtime.shutdown_background();
    outcome
}

async fn serve(args: &VerifierArgs, config: Config, pool: Pool) -> Result<(), Failure> {
    let (listener, local) = args.listen.bind().await?;
    check_host(local, true, false)?;
    let (registry, clock) = (Registry::default(), Clock::system());
    let announced = registry.announce(config.models.iter().map(|m| m.name.clone()));
    let settings = config.server.settings;
    let service = Service::new(registry.clone(), &settings, clock.clone(), &pool);
    // Before anybody can know that it runs, and end it.
    let signal = stop_signal()?;
    announce!("http://{local}");
    let stop = async move {
        signal.await;
        tell(NotifyState::Stopping);
    };
    let timeout = Duration::from_secs(args.shutdown_timeout);
    let listeners = vec![(listener, service.router())];
    let serving = tokio::spawn(serve_all(listeners, service.state().clone(), stop, timeout));
    let stall_time = settings.limits.stall_time;
    tokio::spawn(feed_watchdog(registry.clone(), move || stall_time));
    let shown = Arc::new(Bars::new());
    let memory = MemoryAccounts::default();
    let loading = Loading { registry: announced, pool, clock, memory, shown };
    let loading = tokio::spawn(start_models(config.models, loading));
    let mut serving = std::pin::pin!(serving);
    tokio::select! {
        outcome = &mut serving => return finish(outcome),
        loaded = loading => if !loaded.map_err(Failure::ours)? {
            return Err(Failure::of_models(&registry));
        },
    }
    // A container that lacks its model does not come up; neither does this.
    if registry.entries().iter().any(|e| matches!(e.state, ModelState::Failed(_))) {
        return Err(Failure::of_models(&registry));
    }
    tell(NotifyState::Ready);
    tokio::select! {
        outcome = &mut serving => finish(outcome),
        name = last_engine_death(registry) => {
            Err(Failure::ours(format!("the engine of {name} has stopped")))
        }
    }
}
