//! Computes the weights root: one hash of all tensors of a checkpoint, computed once and
//! remembered.
//!
//! `H("targon-engine/weights/1", count, then for each tensor in order of its name: name, stored
//! type, shape, H(bytes))`. It names the stored bytes, so two files with the same values in other
//! types have other roots.

use super::checkpoint::Checkpoint;
use super::error::LoadError;
use super::remembered::Remembered;
use super::tensor::{Hashing, Tensor};
use super::weight_file::WeightFile;
use crate::ops::pool::Pool;
use crate::proof::codec::{Encoder, Hash};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

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

/// The root, computed from the tensors on all threads, in many short turns: engines go on beside
/// it.
///
/// # Errors
/// When a file cannot be read, or was changed since it was opened.
pub fn compute(checkpoint: &Checkpoint, pool: &Pool) -> Result<Hash, LoadError> {
    let tensors: Vec<&Tensor> = checkpoint.stored().collect();
    let hashes = hashes(&tensors, &pool.separate())?;
    let mut e = Encoder::new("targon-engine/weights/1");
    e.u32(tensors.len() as u32);
    for (tensor, hash) in tensors.iter().zip(hashes) {
        e.bytes(tensor.name.as_bytes()).bytes(tensor.stored.name().as_bytes());
        e.u32(tensor.shape.len() as u32);
        tensor.shape.iter().for_each(|d| {
            e.i64(*d as i64);
        });
        e.raw(hash.as_bytes());
    }
    Ok(e.finish())
}

/// Pieces that a thread hashes in one turn.
const PIECES_EACH: usize = 8;

/// The hashes of tensors, in this order.
fn hashes(tensors: &[&Tensor], pool: &Pool) -> Result<Vec<blake3::Hash>, LoadError> {
    let next = AtomicUsize::new(0);
    let mut workers: Vec<Mutex<Worker<'_>>> =
        (0..pool.threads()).map(|_| Mutex::default()).collect();
    loop {
        pool.turn().run(workers.len(), |i| workers[i].lock().work(tensors, &next));
        let is_idle = workers.iter_mut().all(|worker| worker.get_mut().current.is_none());
        if is_idle && next.load(Ordering::Relaxed) >= tensors.len() {
            break;
        }
    }
    let done = workers.into_iter().flat_map(|worker| worker.into_inner().done);
    let by_place: BTreeMap<usize, Result<blake3::Hash, LoadError>> = done.collect();
    by_place.into_values().collect()
}

/// One thread's share of the tensors.
#[derive(Default)]
struct Worker<'a> {
    current: Option<(usize, Hashing<'a>)>,
    buffer: Vec<u8>,
    done: Vec<(usize, Result<blake3::Hash, LoadError>)>,
}

impl<'a> Worker<'a> {
    fn work(&mut self, tensors: &[&'a Tensor], next: &AtomicUsize) {
        for _ in 0..PIECES_EACH {
            let taken = self.current.take().or_else(|| {
                let place = next.fetch_add(1, Ordering::Relaxed);
                Some((place, tensors.get(place)?.hashing()))
            });
            let Some((place, mut hashing)) = taken else { return };
            match hashing.step(&mut self.buffer).transpose() {
                Some(hash) => self.done.push((place, hash)),
                None => self.current = Some((place, hashing)),
            }
        }
    }
}

/// What changes when one of the files does, as they were when they were opened.
fn identity(checkpoint: &Checkpoint) -> Hash {
    let files: BTreeMap<&Path, &WeightFile> =
        checkpoint.stored().map(|t| (t.file.path(), &*t.file)).collect();
    let mut e = Encoder::new("targon-engine/files/1");
    for file in files.into_values() {
        file.identify(&mut e);
    }
    e.finish()
}
