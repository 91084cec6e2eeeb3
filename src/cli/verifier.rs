//! `verifier`: the HTTP surface of Targon's verifier container.

use super::out::announce;
use super::serve::{start_models, stop_signal};
use super::shared::{ComputeArgs, ListenArgs, ModelsArg};
use super::subnet::{feed_watchdog, tell};
use super::{Failure, runtime};
use crate::clock::Clock;
use crate::config::models_toml::ModelConfig;
use crate::ops::pool::Pool;
use crate::server::listen::accept;
use crate::server::registry::{Registry, State};
use crate::server::settings::Limits;
use crate::validator::service::{Entry, router};
use crate::verify::{self, Verifier};
use clap::Args;
use sd_notify::NotifyState;
use std::sync::Arc;

/// Arguments of `verifier`.
#[derive(Args)]
pub(super) struct VerifierArgs {
    #[command(flatten)]
    models: ModelsArg,
    #[command(flatten)]
    listen: ListenArgs,
    #[command(flatten)]
    compute: ComputeArgs,
}

pub(super) fn run(args: &VerifierArgs) -> Result<(), Failure> {
    let config = args.models.read(&[])?;
    let pool = args.compute.pool()?;
    runtime()?.block_on(serve(args, config.models, pool))
}

async fn serve(args: &VerifierArgs, models: Vec<ModelConfig>, pool: Pool) -> Result<(), Failure> {
    let (listener, local) = args.listen.bind().await?;
    let stop = stop_signal()?;
    let registry = Registry::default();
    registry.announce(models.iter().map(|m| m.name.clone()));
    start_models(models, registry.clone(), pool.clone(), Clock::system()).await;
    let mut entries = Vec::new();
    for entry in registry.entries() {
        match entry.state {
            State::Ready(served) => entries.push(Entry {
                name: entry.name,
                verifier: Verifier {
                    model: Arc::clone(served.engine.model()),
                    identity: served.identity,
                    pool: pool.separate(),
                    limits: verify::Limits::default(),
                    context_max: served.engine.options().context_max,
                },
                engine: served.engine,
            }),
            // A container that lacks its model does not come up; neither does this.
            State::Failed(why) => {
                return Err(Failure::user(format!("{} cannot be served: {why}", entry.name)));
            }
            State::Loading => {}
        }
    }
    announce!("http://{local}");
    tell(NotifyState::Ready);
    tokio::spawn(feed_watchdog(registry, || Limits::default().stall_time));
    let stop = async {
        stop.await;
        tell(NotifyState::Stopping);
    };
    accept(listener, router(entries), Limits::default, stop).await;
    Ok(())
}
