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

/// A stranger's words for one line of a terminal: what would steer it, or begin a line of its own,
/// is shown as an escape.
pub(super) fn printable(text: &str) -> String {
    printable_lines(text).replace('\n', "\\n").replace('\t', "\\t")
}

/// The same where lines and tabs are welcome. The escapes are those of JSON, where such characters
/// stand in strings only, so a line of JSON stays one.
pub(super) fn printable_lines(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match steers(c) {
            true => shown.push_str(&format!("\\u{:04x}", u32::from(c))),
            false => shown.push(c),
        }
    }
    shown
}

/// Whether a character moves a cursor, changes a terminal, or turns the order of those around it.
fn steers(c: char) -> bool {
    let is_control = c.is_control() && !matches!(c, '\n' | '\t');
    let is_direction = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}'
        | '\u{2066}'..='\u{2069}');
    is_control || is_direction || matches!(c, '\u{2028}' | '\u{2029}')
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
    /// The address, where it is given by number.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        format!("{}:{}", self.host, self.port).parse().ok()
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_steers_a_terminal() {
        let words = "a\u{1b}[2J\u{9b}31m\u{7f}\r\u{202e}é\t日\n\u{2028}b";
        let lines = "a\\u001b[2J\\u009b31m\\u007f\\u000d\\u202eé\t日\n\\u2028b";
        assert_eq!(printable_lines(words), lines);
        assert_eq!(printable(words), lines.replace('\n', "\\n").replace('\t', "\\t"));
        // What JSON leaves raw comes back from its escape.
        let json = serde_json::json!({ "text": words }).to_string();
        let read: serde_json::Value = serde_json::from_str(&printable_lines(&json)).unwrap();
        assert_eq!(read["text"], words);
    }
}
