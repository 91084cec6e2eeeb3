//! `verifier`: the HTTP surface of Targon's verifier container.

use super::serve::{start_models, stop_signal};
use super::{Failure, runtime};
use crate::clock::Clock;
use crate::config::models_toml::{self, ModelConfig};
use crate::ops::lanes::Isa;
use crate::ops::pool::Pool;
use crate::server::registry::{Registry, State};
use crate::validator::service::{Entry, router};
use crate::verify::{Limits, Verifier};
use clap::Args;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::net::TcpListener;

/// Arguments of `verifier`.
#[derive(Args)]
pub(super) struct VerifierArgs {
    /// Which models: a file with [[model]] entries.
    #[arg(long, env = "TARGON_MODELS", default_value = "models.toml")]
    models: PathBuf,
    /// Address to listen on. There is no authentication: keep it on loopback.
    #[arg(long, env = "TARGON_HOST", default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, env = "TARGON_PORT", default_value_t = 8000)]
    port: u16,
    /// Compute threads for all models; all cores where absent.
    #[arg(long, env = "TARGON_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

pub(super) fn run(args: &VerifierArgs) -> Result<(), Failure> {
    let config = models_toml::read(&args.models, &[])
        .map_err(|e| Failure::user(&e).with_hint(e.hint.as_deref()))?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let pool = Pool::new(args.threads.map_or(cores, usize::from), Isa::best())
        .map_err(|e| Failure::ours(format!("cannot start compute threads: {e}")))?;
    runtime()?.block_on(serve(args, config.models, pool))
}

async fn serve(args: &VerifierArgs, models: Vec<ModelConfig>, pool: Pool) -> Result<(), Failure> {
    let address = format!("{}:{}", args.host, args.port);
    let listener = TcpListener::bind(&address)
        .await
        .map_err(|e| Failure::user(format!("cannot listen on {address}: {e}")))?;
    let local = listener.local_addr().map_err(Failure::ours)?;
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
                    limits: Limits::default(),
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
    println!("http://{local}");
    axum::serve(listener, router(entries))
        .with_graceful_shutdown(stop)
        .await
        .map_err(|e| Failure::ours(format!("serving failed: {e}")))
}
