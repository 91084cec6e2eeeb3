//! Logs on stderr, as text or JSON.

use super::Failure;
use std::io::IsTerminal;
use std::sync::OnceLock;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

/// Replaces the filter of the running log.
static HANDLE: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

pub(super) fn start(text: &str, json: bool) -> Result<(), Failure> {
    let filter =
        filter(text).map_err(|e| Failure::user(format!("--log is not a valid filter: {e}")))?;
    let (filter, handle) = reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal());
    let lines = if json { lines.json().boxed() } else { lines.boxed() };
    let started = tracing_subscriber::registry().with(filter).with(lines).try_init();
    started.map_err(|e| Failure::ours(format!("cannot start logging: {e}")))?;
    // Only `main` starts the log, and only once.
    let _ = HANDLE.set(handle);
    Ok(())
}

/// Logs from now on what `text` says.
///
/// # Errors
/// When it is not a filter.
pub(super) fn set(text: &str) -> Result<(), String> {
    let filter = filter(text)?;
    HANDLE.get().map_or(Ok(()), |handle| handle.reload(filter).map_err(|e| e.to_string()))
}

fn filter(text: &str) -> Result<EnvFilter, String> {
    EnvFilter::try_new(text.replace("engine=", "targon_engine=")).map_err(|e| e.to_string())
}
