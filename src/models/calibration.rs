//! The calibration pass: whitening for the residue sketch, from the hidden rows of a fixed text.
//!
//! The pass is deterministic (the rows have the same bits everywhere), so any two parties who hold
//! the same weights compute the same calibration; its hash is part of what proofs are bound to. It
//! is stored beside the model, or in the cache, under the weights root.

use super::Model;
use super::decoder::{Decoder, Scratch};
use super::error::LoadError;
use super::root::{cache_dir, write_atomically};
use super::tokenizer::TextTokenizer;
use crate::ops::attention::{BLOCK_TOKENS, KvCache, Segment};
use crate::ops::dtype::Dtype;
use crate::ops::pool::Pool;
use crate::proof::codec::{Hash, to_hex};
use crate::proof::residue::Calibration;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The text, by paragraphs; about 1,300 tokens of prose, code, numbers and dialogue.
const TEXT: &str = include_str!("calibration.txt");
/// Tokens of one piece.
const PIECE_TOKENS_MAX: usize = 256;
/// Relative error that honest implementations show against each other (root mean square of
/// whitened differences), measured between bf16 stacks and this engine on SmolLM2-135M: 0.020 in
/// the median, 0.029 at most over chunks.
pub const HONEST_ERROR: f64 = 0.02;
/// Version of the stored file.
const VERSION: u32 = 1;

/// A calibration as it is stored.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub struct Stored {
    /// Version of this file.
    pub version: u32,
    /// The weights it belongs to.
    pub weights_root: String,
    /// The type they were computed in.
    pub dtype: String,
    /// Rows it was computed from.
    pub rows: usize,
    /// See [`Calibration`].
    pub shift: u8,
    /// See [`Calibration`].
    pub exponents: Vec<i8>,
    /// See [`Calibration`].
    pub means: Vec<i16>,
}

/// The calibration of a model: stored, or computed and stored now.
///
/// # Errors
/// When the forward pass fails, or a stored file is malformed.
pub fn of_model(model: &Model, root: &Hash, pool: &Pool) -> Result<Calibration, LoadError> {
    for path in [beside(&model.checkpoint.path), in_cache(root, model.decoder.dtype)] {
        if let Some(calibration) = read(&path, model, root)? {
            return Ok(calibration);
        }
    }
    let (calibration, rows) = compute(&model.decoder, &model.tokenizer, pool, HONEST_ERROR)?;
    let path = in_cache(root, model.decoder.dtype);
    if let Err(e) = write(&path, model, root, &calibration, rows) {
        tracing::warn!(path = %path.display(), "cannot store the calibration: {e}");
    }
    Ok(calibration)
}

/// Runs the text through the model; returns the calibration and how many rows it comes from.
///
/// # Errors
/// When weights cannot be read or the text cannot be tokenised.
pub fn compute(
    decoder: &Decoder,
    tokenizer: &TextTokenizer,
    pool: &Pool,
    honest_error: f64,
) -> Result<(Calibration, usize), LoadError> {
    let channels = decoder.spec.hidden;
    let mut rows = Vec::new();
    for piece in pieces(decoder, tokenizer)? {
        rows.extend(hidden_rows(decoder, pool, &piece)?);
    }
    let calibration = Calibration::from_rows(&rows, channels, honest_error);
    Ok((calibration, rows.len() / channels))
}

fn pieces(decoder: &Decoder, tokenizer: &TextTokenizer) -> Result<Vec<Vec<u32>>, LoadError> {
    let vocab = decoder.spec.vocab as u32;
    let limit = PIECE_TOKENS_MAX.min(decoder.spec.context);
    let mut pieces = Vec::new();
    for paragraph in TEXT.split("\n\n") {
        let ids = tokenizer.encode(paragraph, true);
        let ids = ids.map_err(|e| LoadError::invalid(Path::new("calibration text"), e))?;
        let known: Vec<u32> = ids.into_iter().filter(|id| *id < vocab).collect();
        pieces.extend(known.chunks(limit).map(<[u32]>::to_vec));
    }
    Ok(pieces)
}

fn hidden_rows(decoder: &Decoder, pool: &Pool, ids: &[u32]) -> Result<Vec<f32>, LoadError> {
    let turn = pool.turn();
    let blocks = ids.len().div_ceil(BLOCK_TOKENS);
    let mut cache = KvCache::new(decoder.spec.kv_dims(), decoder.dtype, blocks)?;
    let segment = Segment { rows: 0..ids.len(), start: 0, blocks: (0..blocks as u32).collect() };
    let mut scratch = Scratch::new(decoder);
    decoder.forward(&turn, &mut cache, ids, &[segment], &mut scratch)?;
    let all: Vec<usize> = (0..ids.len()).collect();
    let rows = decoder.final_rows(&turn, &all, &scratch);
    Ok(all.iter().flat_map(|row| rows.values(*row).iter().copied()).collect())
}

/// The file beside a checkpoint.
pub fn beside(checkpoint: &Path) -> PathBuf {
    if checkpoint.is_dir() {
        return checkpoint.join("targon-calibration.json");
    }
    checkpoint.with_extension("targon-calibration.json")
}

/// The file in the cache.
pub fn in_cache(root: &Hash, dtype: Dtype) -> PathBuf {
    cache_dir().join("calibration").join(format!("{}-{dtype}.json", to_hex(&root[..16])))
}

/// Writes a calibration.
///
/// # Errors
/// When the file cannot be written.
pub fn write(
    path: &Path,
    model: &Model,
    root: &Hash,
    calibration: &Calibration,
    rows: usize,
) -> std::io::Result<()> {
    let stored = Stored {
        version: VERSION,
        weights_root: to_hex(root),
        dtype: model.decoder.dtype.to_string(),
        rows,
        shift: calibration.shift,
        exponents: calibration.exponents.clone(),
        means: calibration.means.clone(),
    };
    let text = serde_json::to_string(&stored).map_err(std::io::Error::other)?;
    write_atomically(path, &text)
}

/// A stored calibration, if there is one for these weights.
fn read(path: &Path, model: &Model, root: &Hash) -> Result<Option<Calibration>, LoadError> {
    if !path.exists() {
        return Ok(None);
    }
    let stored: Stored = serde_json::from_slice(&super::error::read(path)?)
        .map_err(|e| LoadError::invalid(path, format!("not a calibration: {e}")))?;
    let dtype = model.decoder.dtype.to_string();
    if stored.version != VERSION || stored.weights_root != to_hex(root) || stored.dtype != dtype {
        tracing::warn!(path = %path.display(), "a calibration of other weights is ignored");
        return Ok(None);
    }
    let Stored { exponents, means, shift, .. } = stored;
    let calibration = Calibration { exponents, means, shift };
    calibration.validate().map_err(|e| LoadError::invalid(path, e))?;
    let (want, got) = (model.decoder.spec.hidden, calibration.channels());
    if want != got {
        return Err(LoadError::invalid(path, format!("expected {want} channels, got {got}")));
    }
    Ok(Some(calibration))
}
