//! The weights root: one hash of all tensors of a checkpoint, computed once and remembered.
//!
//! `H("targon-engine/weights/1", count, then for each tensor in order of its name: name, stored
//! type, shape, H(bytes))`. It names the stored bytes, so two files with the same values in other
//! types have other roots.

use super::checkpoint::Checkpoint;
use super::error::LoadError;
use super::remembered::Remembered;
use super::tensor::Tensor;
use crate::ops::pool::Pool;
use crate::proof::codec::{Encoder, Hash};
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// The root of a checkpoint, from what is remembered where its files are unchanged.
///
/// # Errors
/// When a file's identity cannot be read.
pub fn weights_root(
    checkpoint: &Checkpoint,
    pool: &Pool,
    remembered: Remembered<'_>,
) -> Result<Hash, LoadError> {
    let identity = identity(checkpoint)?;
    if let Some(root) = remembered.root(&identity) {
        return Ok(root);
    }
    let root = compute(checkpoint, pool);
    remembered.keep_root(&identity, &root);
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

/// Path, device, inode, size and times of every file: what changes when a file does. The time of
/// the last change of the inode is among them, because a copying tool can set the other one back.
fn identity(checkpoint: &Checkpoint) -> Result<Hash, LoadError> {
    let paths: BTreeSet<&PathBuf> = checkpoint.tensors().map(|t| &t.path).collect();
    let mut e = Encoder::new("targon-engine/files/1");
    for path in paths {
        let io = |source| LoadError::Io { path: path.clone(), source };
        let real = std::fs::canonicalize(path).map_err(io)?;
        let m = std::fs::metadata(&real).map_err(io)?;
        e.bytes(real.as_os_str().as_bytes());
        for number in [m.dev(), m.ino(), m.size()] {
            e.i64(number as i64);
        }
        for number in [m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()] {
            e.i64(number);
        }
    }
    Ok(e.finish())
}
