//! The weights root: one hash of all tensors of a checkpoint, computed once and remembered.
//!
//! `H("targon-engine/weights/1", count, then for each tensor in order of its name: name, stored
//! type, shape, H(bytes))`. It names the stored bytes, so two files with the same values in other
//! types have other roots.

use super::checkpoint::Checkpoint;
use super::error::LoadError;
use super::tensor::Tensor;
use crate::ops::pool::Pool;
use crate::proof::codec::{Encoder, Hash, from_hex, to_hex};
use parking_lot::Mutex;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
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
/// When a file's identity cannot be read.
pub fn weights_root(checkpoint: &Checkpoint, pool: &Pool) -> Result<Hash, LoadError> {
    let cache = cache_dir().join("roots.json");
    let identity = identity(checkpoint)?;
    if let Some(root) = remembered(&cache, &identity) {
        return Ok(root);
    }
    let root = compute(checkpoint, pool);
    remember(&cache, identity, &root);
    Ok(root)
}

/// The root, computed from the tensors on all threads.
pub fn compute(checkpoint: &Checkpoint, pool: &Pool) -> Hash {
    let tensors: Vec<&Tensor> = checkpoint.tensors().collect();
    let hashes: Vec<Mutex<Hash>> = tensors.iter().map(|_| Mutex::new([0; 32])).collect();
    pool.turn().run(tensors.len(), |i| {
        *hashes[i].lock() = *blake3::hash(tensors[i].bytes()).as_bytes();
        tensors[i].release();
    });
    let mut e = Encoder::new("targon-engine/weights/1");
    e.u32(tensors.len() as u32);
    for (tensor, hash) in tensors.iter().zip(hashes) {
        e.bytes(tensor.name.as_bytes()).bytes(tensor.stored.name().as_bytes());
        e.u32(tensor.shape.len() as u32);
        tensor.shape.iter().for_each(|d| {
            e.i64(*d as i64);
        });
        e.raw(&hash.into_inner());
    }
    e.finish()
}

/// Path, device, inode, size and time of change of every file: what changes when a file does.
fn identity(checkpoint: &Checkpoint) -> Result<String, LoadError> {
    let paths: BTreeSet<&PathBuf> = checkpoint.tensors().map(|t| &t.path).collect();
    let mut parts = Vec::new();
    for path in paths {
        let io = |source| LoadError::Io { path: path.clone(), source };
        let real = std::fs::canonicalize(path).map_err(io)?;
        let m = std::fs::metadata(&real).map_err(io)?;
        let (device, inode, size) = (m.dev(), m.ino(), m.size());
        let changed = format!("{}.{}", m.mtime(), m.mtime_nsec());
        parts.push(format!("{}:{device}:{inode}:{size}:{changed}", real.display()));
    }
    Ok(parts.join("\n"))
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
