//! The weights root: one hash of all tensors of a checkpoint, computed once and remembered.
//!
//! `H("targon-engine/weights/1", count, then for each tensor in order of its name: name, stored
//! type, shape, H(bytes))`. It names the stored bytes, so two files with the same values in other
//! types have other roots.

use super::checkpoint::Checkpoint;
use super::error::LoadError;
use super::tensor::Tensor;
use super::weight_file::WeightFile;
use crate::ops::pool::Pool;
use crate::proof::codec::{Encoder, Hash, from_hex, to_hex};
use parking_lot::Mutex;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Where the program keeps what it can compute again: `TARGON_CACHE`, or the user's cache
/// directory.
pub fn cache_dir() -> PathBuf {
    let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty()).map(PathBuf::from);
    var("TARGON_CACHE").unwrap_or_else(|| {
        let home = || var("HOME").unwrap_or_default().join(".cache");
        var("XDG_CACHE_HOME").unwrap_or_else(home).join("targon-engine")
    })
}

/// The root of a checkpoint, from the cache where its files are unchanged.
///
/// # Errors
/// When a file cannot be read, or was changed since it was opened.
pub fn weights_root(checkpoint: &Checkpoint, pool: &Pool) -> Result<Hash, LoadError> {
    let cache = cache_dir().join("roots.json");
    let identity = identity(checkpoint);
    if let Some(root) = remembered(&cache, &identity) {
        return Ok(root);
    }
    let root = compute(checkpoint, pool)?;
    remember(&cache, identity, &root);
    Ok(root)
}

/// The root, computed from the tensors on all threads.
///
/// # Errors
/// When a file cannot be read, or was changed since it was opened.
pub fn compute(checkpoint: &Checkpoint, pool: &Pool) -> Result<Hash, LoadError> {
    let tensors: Vec<&Tensor> = checkpoint.tensors().collect();
    let hashes: Vec<Mutex<Option<Result<blake3::Hash, LoadError>>>> =
        tensors.iter().map(|_| Mutex::new(None)).collect();
    pool.turn().run(tensors.len(), |i| *hashes[i].lock() = Some(tensors[i].hash()));
    let mut e = Encoder::new("targon-engine/weights/1");
    e.u32(tensors.len() as u32);
    for (tensor, hash) in tensors.iter().zip(hashes) {
        e.bytes(tensor.name.as_bytes()).bytes(tensor.stored.name().as_bytes());
        e.u32(tensor.shape.len() as u32);
        tensor.shape.iter().for_each(|d| {
            e.i64(*d as i64);
        });
        let hash = hash.into_inner().unwrap_or_else(|| tensor.hash())?;
        e.raw(hash.as_bytes());
    }
    Ok(e.finish())
}

/// What changes when one of the files does, as they were when they were opened.
fn identity(checkpoint: &Checkpoint) -> String {
    let files: BTreeMap<&Path, &WeightFile> =
        checkpoint.tensors().map(|t| (t.file.path(), &*t.file)).collect();
    let parts: Vec<String> = files.into_values().map(WeightFile::identity).collect();
    parts.join("\n")
}

fn read_cache(cache: &Path) -> Map<String, Value> {
    // An absent or damaged cache is an empty one.
    let bytes = std::fs::read(cache).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

fn remembered(cache: &Path, identity: &str) -> Option<Hash> {
    from_hex(read_cache(cache).get(identity)?.as_str()?).ok()
}

/// Writes the cache in one rename; a failure costs only another computation.
fn remember(cache: &Path, identity: String, root: &Hash) {
    let mut entries = read_cache(cache);
    entries.insert(identity, to_hex(root).into());
    if let Err(e) = write_atomically(cache, &Value::Object(entries).to_string()) {
        tracing::warn!(path = %cache.display(), "cannot remember the weights root: {e}");
    }
}

/// Replaces a file by way of a temporary one beside it.
pub(super) fn write_atomically(path: &Path, text: &str) -> std::io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory)?;
    let temporary = directory.join(format!(".{}.tmp", std::process::id()));
    std::fs::write(&temporary, text)?;
    std::fs::rename(&temporary, path)
}
