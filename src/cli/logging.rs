//! Writes logs to stderr, as text or JSON; it keeps them in memory while the live view uses the
//! terminal.

use super::Failure;
use crate::config::log::LogFilter;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

/// Lines that a view has to show, and characters of one.
const LINES_MAX: usize = 50;
const LINE_CHARS_MAX: usize = 500;

/// Replaces the filter of the running log.
static HANDLE: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();
/// The newest lines, while they do not go to stderr.
static LINES: Mutex<Option<VecDeque<String>>> = Mutex::new(None);

pub(super) fn start(log: &LogFilter, json: bool) -> Result<(), Failure> {
    let filter = log.filter().map_err(|e| Failure::user(format!("--log is not followed: {e}")))?;
    let (filter, handle) = reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(|| Output)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal());
    let lines = if json { lines.json().boxed() } else { lines.boxed() };
    let started = tracing_subscriber::registry().with(filter).with(lines).try_init();
    started.map_err(|e| Failure::ours(format!("cannot start logging: {e}")))?;
    // Only `main` starts the log, and only once.
    let _ = HANDLE.set(handle);
    Ok(())
}

/// Logs from now on what `log` says.
///
/// # Errors
/// When the running log cannot follow it.
pub(super) fn set(log: &LogFilter) -> anyhow::Result<()> {
    let filter = log.filter()?;
    Ok(HANDLE.get().map_or(Ok(()), |handle| handle.reload(filter))?)
}

/// Logs from now on what a models file says, if it says it.
pub(super) fn follow(log: Option<&LogFilter>) -> Result<(), Failure> {
    log.map_or(Ok(()), set).map_err(Failure::ours)
}

/// Keeps lines from now on, where stderr is the terminal that a view draws on.
pub(super) fn to_memory() {
    if io::stderr().is_terminal() {
        *LINES.lock() = Some(VecDeque::new());
    }
}

/// Writes lines to stderr again, those that were kept at first: nothing of the log is lost that a
/// view had to show.
pub(super) fn to_stderr() {
    let kept = LINES.lock().take().unwrap_or_default();
    for line in kept {
        // Nobody is left to tell where stderr is gone too.
        let _ = writeln!(io::stderr(), "{line}");
    }
}

/// The newest lines.
pub(super) fn remembered() -> Vec<String> {
    LINES.lock().as_ref().map_or(Vec::new(), |lines| lines.iter().cloned().collect())
}

/// Where a line goes.
struct Output;

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut lines = LINES.lock();
        let Some(lines) = lines.as_mut() else { return io::stderr().write(bytes) };
        for line in String::from_utf8_lossy(bytes).lines() {
            if lines.len() >= LINES_MAX {
                lines.pop_front();
            }
            lines.push_back(plain(line).chars().take(LINE_CHARS_MAX).collect());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// A line without its colours: `ESC [ digits m`.
fn plain(line: &str) -> String {
    let mut parts = line.split("\u{1b}[");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let rest = part.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';');
        text += rest.strip_prefix('m').unwrap_or(rest);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn colours_are_left_out_and_words_kept() {
        let line = "\u{1b}[2m12:00\u{1b}[0m \u{1b}[32m INFO\u{1b}[0m a round [1m] \u{1b}[1;31mx";
        assert_eq!(plain(line), "12:00  INFO a round [1m] x");
    }
}
