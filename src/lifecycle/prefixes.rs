//! Keeps the prefixes that a model's requests often begin with across restarts. The file has their
//! token ids only; they are computed again when the program starts, while no request runs, so that
//! the first requests find them in the prefix cache.

use crate::config::models_toml::Config;
use crate::engine::hot::{HotPrefix, PREFIXES_MAX, TOKENS_MAX, hottest};
use crate::engine::output::Event;
use crate::engine::request::Request;
use crate::engine::{Engine, Options, SubmitError, WeakEngine};
use crate::files;
use crate::ops::attention::BLOCK_TOKENS;
use crate::proof::codec::{Encoder, Hash, from_hex, to_hex};
use crate::server::registry::Served;
use serde::{Deserialize, Serialize};
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::task::spawn_blocking;

/// What a user should know whose models file names files for prefixes: those of a known client's
/// requests are salted by their owner and never kept, whether a key or a signature tells who it is.
pub fn unused(config: &Config, is_miner: bool) -> Option<String> {
    let names = config.models.iter().filter(|m| m.prefix_cache_file.is_some());
    let names: Vec<&str> = names.map(|m| m.name.as_str()).collect();
    let why = match (config.server.settings.keys.is_empty(), is_miner) {
        _ if names.is_empty() => return None,
        (true, false) => return None,
        (true, true) => "signed requests are never kept, only those that come to the open listener",
        (false, _) => "nothing is kept where requests need an API key: each key has its own cache",
    };
    Some(format!("`prefix_cache_file` of {}: {why}", names.join(", ")))
}

/// Written into the file; another form gets another number.
const VERSION: u32 = 1;
/// Bytes of a file that is read: twice what the most tokens take.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// How often what is hot is written, where it has changed.
const SAVE_EVERY: Duration = Duration::from_secs(5);
/// How often it is looked whether the engine is idle.
const IDLE_EVERY: Duration = Duration::from_millis(20);
/// The part of the KV cache that may be filled at start.
const CACHE_PART: usize = 2;

/// The form of the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    /// [`binding`] in hexadecimal digits.
    model: String,
    prefixes: Vec<HotPrefix>,
}

/// Why nothing of a file is used.
#[derive(Debug, thiserror::Error)]
enum FileError {
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("it is not a list of prefixes: {0}")]
    Json(#[from] serde_json::Error),
    #[error("`version` must be {VERSION}, got {0}")]
    Version(u32),
    #[error("it is of another model or tokenizer")]
    Model,
    #[error("it must have at most {PREFIXES_MAX} prefixes with {TOKENS_MAX} tokens in all")]
    Length,
    #[error("prefix {0} is empty or has an id that is not below {1}")]
    Ids(usize, usize),
}

/// What ids mean: the model's weights and its tokenizer.
fn binding(served: &Served) -> Hash {
    let tokenizer = &served.model.text.tokenizer;
    let mut encoder = Encoder::new("targon-engine/prefixes/1");
    encoder.raw(&served.identity.weights_root);
    for id in 0..tokenizer.len() as u32 {
        encoder.bytes(tokenizer.bytes_of(id));
    }
    encoder.finish()
}

/// Reads the file; one that is not there, or was only just made, has none.
fn read(path: &Path, binding: &Hash, vocab: usize) -> Result<Vec<HotPrefix>, FileError> {
    let bytes = match files::read(path, FILE_BYTES_MAX) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        read => read?,
    };
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    let File { version, model, prefixes } = serde_json::from_slice(&bytes)?;
    let tokens: usize = prefixes.iter().map(|prefix| prefix.tokens.len()).sum();
    let is_strange = |prefix: &HotPrefix| {
        prefix.tokens.is_empty() || prefix.tokens.iter().any(|id| *id as usize >= vocab)
    };
    match prefixes.iter().position(is_strange) {
        _ if version != VERSION => Err(FileError::Version(version)),
        _ if from_hex(&model).ok().as_ref() != Some(binding) => Err(FileError::Model),
        _ if prefixes.len() > PREFIXES_MAX || tokens > TOKENS_MAX => Err(FileError::Length),
        Some(index) => Err(FileError::Ids(index, vocab)),
        None => Ok(prefixes),
    }
}

fn write(path: &Path, binding: &Hash, prefixes: &[HotPrefix]) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    // Prompts can be read back from ids, so a new file is for its owner alone.
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(e),
    }
    let (model, prefixes) = (to_hex(binding), prefixes.to_vec());
    let file = File { version: VERSION, model, prefixes };
    files::replace(path, &serde_json::to_vec(&file)?)
}

/// Computes what the file has, then writes what is hot into it for as long as the engine runs.
pub(super) async fn keep(path: PathBuf, served: Served) {
    let Served { engine, .. } = &served;
    engine.stats().keep_hot_prefixes();
    let (binding, shown) = (binding(&served), path.display().to_string());
    let old = read(&path, &binding, engine.text().vocab).unwrap_or_else(|e| {
        tracing::warn!(file = shown, "no prefix is computed beforehand: {e}");
        Vec::new()
    });
    let (engine, kept) = (engine.downgrade(), halved(old.clone()));
    drop(served);
    match warm_up(&engine, &old).await {
        Ok(0) => {}
        Ok(tokens) => tracing::info!(file = shown, tokens, "kept prefixes are in the cache"),
        Err(e) => tracing::warn!(file = shown, "kept prefixes are not computed: {e}"),
    }
    let (mut written, mut is_told) = (old, false);
    while let Some(hot) = engine.upgrade().map(|engine| engine.stats().hot_prefixes()) {
        let now = hottest([hot, kept.clone()].concat());
        if now != written && !now.is_empty() {
            // Down to the disk, which may take a while.
            let (path, new) = (path.clone(), now.clone());
            let outcome = spawn_blocking(move || write(&path, &binding, &new)).await;
            match outcome.unwrap_or_else(|e| Err(io::Error::other(e))) {
                Ok(()) => (written, is_told) = (now, false),
                Err(e) if !is_told => {
                    is_told = true;
                    tracing::warn!(file = shown, "hot prefixes are not kept: {e}");
                }
                Err(_) => {}
            }
        }
        tokio::time::sleep(SAVE_EVERY).await;
    }
}

/// What nobody begins with any more is forgotten after a few restarts.
fn halved(prefixes: Vec<HotPrefix>) -> Vec<HotPrefix> {
    let half = |p: HotPrefix| HotPrefix { reuses: p.reuses / 2, ..p };
    prefixes.into_iter().map(half).collect()
}

/// Fills the prefix cache, the hottest first, in pieces of one step that start while nothing runs:
/// a request waits for one of them at most. Returns how many tokens are in the cache then.
async fn warm_up(engine: &WeakEngine, prefixes: &[HotPrefix]) -> Result<usize, SubmitError> {
    let Some(Options { blocks, context_max, .. }) = engine.upgrade().map(|e| e.options()) else {
        return Ok(0);
    };
    let (mut tokens, room) = (0, blocks * BLOCK_TOKENS / CACHE_PART);
    for HotPrefix { tokens: prefix, .. } in prefixes {
        if prefix.len() > context_max || tokens + prefix.len() > room {
            continue;
        }
        if !compute(engine, prefix).await? {
            break;
        }
        tokens += prefix.len();
    }
    Ok(tokens)
}

/// Computes a prefix; false where the engine has ended.
async fn compute(engine: &WeakEngine, prefix: &[u32]) -> Result<bool, SubmitError> {
    let mut end = 0;
    while end < prefix.len() {
        let Some(engine) = idle(engine).await else { return Ok(false) };
        end = (end + engine.options().step_tokens_max).min(prefix.len());
        let piece = prefix[..end].to_vec();
        let mut running =
            engine.submit(Request { is_warmup: true, ..Request::greedy(piece, 1) })?;
        while let Some(event) = running.next().await {
            if let Event::Fault(fault) = event {
                return Err(fault.into());
            }
        }
    }
    Ok(true)
}

/// The engine, once nothing runs or waits on it; `None` where it has ended.
async fn idle(engine: &WeakEngine) -> Option<Engine> {
    loop {
        let running = engine.upgrade()?;
        let load = running.stats().snapshot().load;
        if load.running + load.waiting == 0 {
            return Some(running);
        }
        drop(running);
        tokio::time::sleep(IDLE_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_as_it_was_written_and_a_bad_one_is_refused_by_its_rule() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.json");
        let read = |vocab| read(&path, &[1; 32], vocab).map_err(|e| e.to_string());
        assert_eq!(read(9), Ok(vec![]));
        let list = vec![HotPrefix { reuses: 4, tokens: vec![8; 64] }];
        write(&path, &[1; 32], &list).unwrap();
        assert_eq!(read(9), Ok(list.clone()));
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let refused = |vocab, want: &str| {
            let error = read(vocab).unwrap_err();
            assert!(error.contains(want), "{error}");
        };
        refused(8, "prefix 0 is empty or has an id that is not below 8");
        let long = HotPrefix { reuses: 1, tokens: vec![1; TOKENS_MAX] };
        write(&path, &[1; 32], &[list[0].clone(), long]).unwrap();
        refused(9, "65536 tokens in all");
        write(&path, &[1; 32], &vec![list[0].clone(); PREFIXES_MAX + 1]).unwrap();
        refused(9, "at most 16 prefixes");
        write(&path, &[2; 32], &list).unwrap();
        refused(9, "another model or tokenizer");
        let other = std::fs::read_to_string(&path).unwrap().replace(":1,", ":2,");
        for (text, want) in [
            ("nonsense", "not a list of prefixes"),
            ("{\"version\":1}", "missing field `model`"),
            (&other, "`version` must be 1, got 2"),
            (&" ".repeat(FILE_BYTES_MAX as usize + 1), "more than 1048576 bytes"),
        ] {
            std::fs::write(&path, text).unwrap();
            refused(9, want);
        }
        std::fs::write(&path, "").unwrap();
        assert_eq!(read(9), Ok(vec![]));
    }

    #[test]
    fn a_file_that_nothing_is_written_to_is_named() {
        let config = |text: &str| {
            crate::config::models_toml::parse(Path::new("models.toml"), text, &[]).unwrap()
        };
        let file = "[[model]]\nname = \"a\"\nprefix_cache_file = \"p\"\n[[model]]\nname = \"b\"\n";
        let keys = "[server]\napi_keys = [\"a-long-enough-key\"]\n";
        let keyed = unused(&config(&format!("{file}{keys}")), false).unwrap();
        assert!(keyed.starts_with("`prefix_cache_file` of a: nothing is kept"), "{keyed}");
        let signed = unused(&config(file), true).unwrap();
        assert!(signed.contains("signed requests are never kept"), "{signed}");
        assert_eq!(unused(&config(file), false), None);
        assert_eq!(unused(&config(&format!("[[model]]\nname = \"b\"\n{keys}")), true), None);
    }
}
