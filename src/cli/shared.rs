//! Arguments that several commands take.

use super::Failure;
use crate::config::models_toml::{self, Config};
use crate::ops::lanes::Isa;
use crate::ops::pool::Pool;
use clap::Args;
use std::net::SocketAddr;
use std::path::PathBuf;
use tokio::net::TcpListener;

/// Which models.
#[derive(Args)]
pub(super) struct ModelsArg {
    /// Which models: a file with [[model]] entries.
    #[arg(long = "models", env = "TARGON_MODELS", default_value = "models.toml")]
    pub(super) path: PathBuf,
}

impl ModelsArg {
    /// Reads the file; `keys` open the API besides those that it names.
    pub(super) fn read(&self, keys: &[String]) -> Result<Config, Failure> {
        models_toml::read(&self.path, keys)
            .map_err(|e| Failure::user(&e).with_hint(e.hint.as_deref()))
    }
}

/// A stranger's words for a terminal: what would steer it is shown as an escape.
pub(super) fn printable(text: &str) -> String {
    let shown = |c: char| match c.is_control() && c != '\n' {
        true => c.escape_default().to_string(),
        false => c.to_string(),
    };
    text.chars().map(shown).collect()
}

/// Where to listen.
#[derive(Args)]
pub(super) struct ListenArgs {
    /// Address to listen on. Who can reach it can use it, unless there are API keys: keep it on
    /// loopback.
    #[arg(long, env = "TARGON_HOST", default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, env = "TARGON_PORT", default_value_t = 8000)]
    port: u16,
}

impl ListenArgs {
    pub(super) async fn bind(&self) -> Result<(TcpListener, SocketAddr), Failure> {
        let address = format!("{}:{}", self.host, self.port);
        let listener = TcpListener::bind(&address)
            .await
            .map_err(|e| Failure::user(format!("cannot listen on {address}: {e}")))?;
        let local = listener.local_addr().map_err(Failure::ours)?;
        Ok((listener, local))
    }
}

/// What computes.
#[derive(Args)]
pub(super) struct ComputeArgs {
    /// Compute threads for all models; all cores where absent.
    #[arg(long, env = "TARGON_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Instruction set of the kernels; the fastest where absent. Results do not change.
    #[arg(long, env = "TARGON_ISA")]
    isa: Option<Isa>,
}

impl ComputeArgs {
    pub(super) fn pool(&self) -> Result<Pool, Failure> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = self.threads.map_or(cores, usize::from);
        Pool::new(threads, self.isa.unwrap_or_else(Isa::best))
            .map_err(|e| Failure::ours(format!("cannot start compute threads: {e}")))
    }
}
