//! Logs on stderr, as text or JSON.

use super::Failure;
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

pub(super) fn start(filter: &str, json: bool) -> Result<(), Failure> {
    let filter = filter.replace("engine=", "targon_engine=");
    let filter = EnvFilter::try_new(filter)
        .map_err(|e| Failure::user(format!("--log is not a valid filter: {e}")))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal());
    let started = if json { builder.json().try_init() } else { builder.try_init() };
    started.map_err(|e| Failure::ours(format!("cannot start logging: {e}")))
}
