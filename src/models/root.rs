//! Computes the weights root: one hash of all tensors of a checkpoint, computed once and
//! remembered.
//!
//! `H("targon-engine/weights/1", count, then for each tensor in order of its name: name, stored
//! type, shape, H(bytes))`. It names the stored bytes, so two files with the same values in other
//! types have other roots.

use super::checkpoint::Checkpoint;
use super::error::LoadError;
use super::remembered::Remembered;
use super::tensor::Tensor;
use super::weight_file::WeightFile;
use crate::ops::pool::Pool;
use crate::proof::codec::{Encoder, Hash};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::Path;

/// The root of a checkpoint, from what is remembered where its files are unchanged.
///
/// # Errors
/// When a file cannot be read, or was changed since it was opened.
pub fn weights_root(
    checkpoint: &Checkpoint,
    pool: &Pool,
    remembered: Remembered<'_>,
) -> Result<Hash, LoadError> {
    let identity = identity(checkpoint);
    if let Some(root) = remembered.root(&identity) {
        return Ok(root);
    }
    let root = compute(checkpoint, pool)?;
    remembered.keep_root(&identity, &root);
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
fn identity(checkpoint: &Checkpoint) -> Hash {
    let files: BTreeMap<&Path, &WeightFile> =
        checkpoint.tensors().map(|t| (t.file.path(), &*t.file)).collect();
    let mut e = Encoder::new("targon-engine/files/1");
    for file in files.into_values() {
        file.identify(&mut e);
    }
    e.finish()
}
