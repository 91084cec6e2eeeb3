//! Chooses which models a validator asks for, and learns which ones a miner serves.
//!
//! The list comes from this program, from a file or from a server ([`Mode`]). Miners are told it by
//! `POST /models` and asked for theirs by `GET /models` ([`exchange`]), as validators of versions 4
//! and 5 do (protocol 5.8). All that a peer sends is read by [`names`], which takes lists, maps
//! and lists of objects, and nothing larger than its limits.

pub mod names;

use super::query::{QueryError, Size, Target};
use crate::clock::Clock;
use crate::endpoint::shown;
use crate::files;
use crate::wire::models::LIST_MODELS_MAX;
use crate::wire::python::dumps;
use anyhow::bail;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The model of version 4's mode `default`.
pub const DEFAULT_MODEL: &str = "NousResearch/Meta-Llama-3.1-8B-Instruct";
/// Where version 4 looks for its list in mode `config`.
pub const CONFIG_FILE: &str = "models.txt";
/// Whom version 4 asks in mode `endpoint`.
pub const ENDPOINT: &str = "https://targon.sybil.com/api/models";

/// How long a miner may take for each of the two requests (protocol 5.8).
const MINER_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a server of a list may take.
const ENDPOINT_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a file of names: as many as fit, with room for comments.
const FILE_BYTES_MAX: u64 = 256 << 10;
/// Bad lines that an error names.
const BAD_LINES_MAX: usize = 20;

/// Where the list of models comes from (protocol 5.11).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Mode {
    /// [`DEFAULT_MODEL`], as in version 4 up to 4.4.0. Later ones ask a server, which here happens
    /// only where it is said.
    Default,
    /// A file with one name a line.
    Config(PathBuf),
    /// The URL of a JSON list.
    Endpoint(String),
}

/// Errors of a list of models.
#[derive(Debug, thiserror::Error)]
pub enum ModelsError {
    /// A file that cannot be read.
    #[error("{}: {what}", path.display())]
    File {
        /// The file with the list of models.
        path: PathBuf,
        /// What is wrong with it, line by line.
        what: String,
    },
    /// A server that gives none.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// A server that gives something else.
    #[error("{url}: {what}")]
    Answer {
        /// URL of the server that was asked for the list.
        url: String,
        /// The rule for its answer, and what was found in its place.
        what: String,
    },
}

impl Mode {
    /// The list as it is now; it has at least one name, and none twice.
    ///
    /// # Errors
    /// The file with its bad lines, or what the server did.
    pub async fn list(&self, clock: &Clock) -> Result<Vec<String>, ModelsError> {
        match self {
            Mode::Default => Ok(vec![DEFAULT_MODEL.to_owned()]),
            Mode::Config(path) => read_file(path),
            Mode::Endpoint(url) => fetch(url, clock).await,
        }
    }
}

fn read_file(path: &Path) -> Result<Vec<String>, ModelsError> {
    let failed = |what: String| ModelsError::File { path: path.to_owned(), what };
    let bytes = files::read(path, FILE_BYTES_MAX).map_err(|e| failed(e.to_string()))?;
    let text = String::from_utf8(bytes).map_err(|e| failed(format!("must be UTF-8: {e}")))?;
    parse(&text).map_err(|e| failed(e.to_string()))
}

/// One name a line; empty lines and those that begin with `#` say nothing.
fn parse(text: &str) -> anyhow::Result<Vec<String>> {
    let (mut lines, mut bad) = (BTreeMap::new(), Vec::new());
    let mut listed = Vec::new();
    for (place, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        let (number, name) = (place + 1, line.trim());
        if name.is_empty() || name.starts_with('#') {
            continue;
        }
        if let Err(what) = names::check(name) {
            bad.push(format!("line {number}: {what}"));
        } else if let Some(first) = lines.insert(name, number) {
            lines.insert(name, first);
            bad.push(format!("line {number}: `{name}` stands on line {first} already"));
        } else {
            listed.push(name.to_owned());
        }
    }
    if !bad.is_empty() {
        let more = bad.len().saturating_sub(BAD_LINES_MAX);
        bad.truncate(BAD_LINES_MAX);
        let more = if more > 0 { format!("; and {more} more") } else { String::new() };
        bail!("{}{more}", bad.join("; "));
    }
    match listed.len() {
        0 => bail!("must name at least one model"),
        count if count > LIST_MODELS_MAX => {
            bail!("must name at most {} models, got {count}", LIST_MODELS_MAX)
        }
        _ => Ok(listed),
    }
}

async fn fetch(url: &str, clock: &Clock) -> Result<Vec<String>, ModelsError> {
    let failed = |what: String| ModelsError::Answer { url: shown(url), what };
    let server = Target {
        url: url.to_owned(),
        hotkey: None,
        signer: None,
        api_key: None,
        read_timeout: ENDPOINT_TIMEOUT,
        timeout: ENDPOINT_TIMEOUT,
        size: Size::of_tokens(0),
    };
    let bytes = server.call("", None, clock).await?;
    let names = names::read(&bytes).map_err(|e| failed(e.to_string()))?;
    match names.first() {
        Some(_) => Ok(names),
        None => Err(failed("must list at least one model, and lists none".into())),
    }
}

/// The body that tells miners which models are asked for: these bytes are signed, and sent. Version
/// 4 signs what `json.dumps` writes.
pub fn broadcast(models: &[String]) -> Vec<u8> {
    dumps(&models.iter().cloned().map(Value::String).collect()).into_bytes()
}

/// What a miner serves, each name once.
///
/// # Errors
/// When it does not answer, or with something else than names.
pub async fn served(target: &Target, clock: &Clock) -> Result<Vec<String>, QueryError> {
    let target = brief(target);
    let bytes = target.call("/models", None, clock).await?;
    names::read(&bytes).map_err(|what| target.malformed(what))
}

/// Tells a miner by [`broadcast`]'s bytes which models are asked for, then asks which ones it
/// serves. Miners of version 4 answer the first request with an empty text and the second one with
/// their list; those from 5.0 on answer both, so that the first answer serves where there is no
/// second one. A miner that refuses to be told is asked all the same.
///
/// # Errors
/// When it does not answer, or with something else than names.
pub async fn exchange(
    target: &Target,
    broadcast: Vec<u8>,
    clock: &Clock,
) -> Result<Vec<String>, QueryError> {
    let told = match brief(target).call("/models", Some(broadcast), clock).await {
        Ok(bytes) => names::read(&bytes).ok(),
        // It would not answer the second request either, and each costs its whole time.
        Err(e @ QueryError::Network { .. }) => return Err(e),
        Err(_) => None,
    };
    match served(target, clock).await {
        Ok(names) => Ok(names),
        Err(e) => told.ok_or(e),
    }
}

/// The same miner, with the time limits for a list of models.
fn brief(target: &Target) -> Target {
    let size = Size::of_tokens(0);
    Target { read_timeout: MINER_TIMEOUT, timeout: MINER_TIMEOUT, size, ..target.clone() }
}

#[cfg(test)]
mod tests;
