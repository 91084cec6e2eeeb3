//! Computes the whitening for the residue sketch from the hidden rows of a fixed text. This is the
//! calibration pass.
//!
//! The pass is deterministic (the rows have the same bits everywhere), so any two parties that hold
//! the same model compute the same calibration. Proofs are bound to its hash. It is always computed
//! here. The cache stores it under the hash of its inputs, and it is used again only if its own
//! hash equals the one that was stored with it. A calibration file beside a model may come from an
//! untrusted publisher; an extreme one would make every sketch zero. Such a file is never used, and
//! the model is refused if the file differs from what is computed.

use super::arithmetic::Arithmetic;
use super::error::LoadError;
use super::model::Model;
use super::pass::{Batch, Pass, PassFault, RowAsk, RowResult, blocks_of};
use super::remembered::Remembered;
use crate::files;
use crate::ops::CANON;
use crate::ops::dtype::Dtype;
use crate::ops::pool::Pool;
use crate::proof::codec::{Encoder, Hash, to_hex};
use crate::proof::commit::calibration_hash;
use crate::proof::residue::Calibration;
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The text, by paragraphs; about 1,300 tokens of prose, code, numbers and dialogue.
const TEXT: &str = include_str!("calibration.txt");
const PIECE_TOKENS_MAX: usize = 256;
/// Relative error that honest implementations show against each other (root mean square of
/// whitened differences), measured between bf16 stacks and this engine on SmolLM2-135M: 0.020 in
/// the median, 0.029 at most over chunks.
const HONEST_ERROR: f64 = 0.02;
/// Version of the stored file and of the pass: a change of what the pass computes is a new one.
const VERSION: u32 = 2;
/// Bytes of a stored file: 65,536 channels, each an exponent and a mean of 12 bytes at most.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A calibration as the cache keeps it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub struct Stored {
    /// Version of this file.
    pub version: u32,
    /// Hash of everything that it was computed from.
    pub inputs: String,
    /// The weights it belongs to.
    pub weights_root: String,
    /// The type they were computed in.
    pub dtype: String,
    /// Rows it was computed from.
    pub rows: usize,
    /// Bits of a projection below its residue.
    pub shift: u8,
    /// Channel c is multiplied by `2^(exponents[c] + 8)`.
    pub exponents: Vec<i8>,
    /// What is subtracted from each channel afterwards.
    pub means: Vec<i16>,
}

/// What lies beside a model, of any version.
#[derive(Deserialize)]
struct Beside {
    weights_root: String,
    dtype: String,
    shift: u8,
    exponents: Vec<i8>,
    means: Vec<i16>,
}

/// The calibration of a model: the cached one where it is whole, or computed and cached now.
///
/// # Errors
/// When the forward pass fails, or another calibration of this model lies beside it.
pub fn of_model(
    model: &Model,
    root: &Hash,
    pool: &Pool,
    remembered: Remembered<'_>,
) -> Result<Calibration, LoadError> {
    let calibration = match cached(model, root, remembered)? {
        Some(calibration) => calibration,
        None => {
            let (calibration, rows) = compute(model, pool)?;
            if let Err(e) = store(model, root, &calibration, rows, remembered) {
                tracing::warn!("the calibration is not cached: {e}");
            }
            calibration
        }
    };
    check_beside(model, root, &calibration)?;
    Ok(calibration)
}

/// The calibration of a model where it was computed before.
///
/// # Errors
/// When the text cannot be tokenised, or another calibration of this model lies beside it.
pub fn known(
    model: &Model,
    root: &Hash,
    remembered: Remembered<'_>,
) -> Result<Option<Calibration>, LoadError> {
    let calibration = cached(model, root, remembered)?;
    if let Some(calibration) = &calibration {
        check_beside(model, root, calibration)?;
    }
    Ok(calibration)
}

/// Runs the text through the model; returns the calibration and how many rows it comes from.
///
/// # Errors
/// When weights cannot be read or the text cannot be tokenised.
pub fn compute(model: &Model, pool: &Pool) -> Result<(Calibration, usize), LoadError> {
    let (channels, dtype) = (model.spec.hidden, model.dtype);
    // In the one arithmetic that every device has, so that all parties compute the same.
    let blocks = blocks_of(PIECE_TOKENS_MAX);
    let mut pass = model.pass_by(Arithmetic::Portable, pool, blocks).map_err(of_pass)?;
    let mut rows = Vec::new();
    for piece in pieces(model)? {
        let bits = rows_of_piece(&mut *pass, &piece)?;
        rows.extend(bits.into_iter().flatten().map(|bits| dtype.widen(bits)));
    }
    let calibration = Calibration::from_rows(&rows, channels, HONEST_ERROR);
    Ok((calibration, rows.len() / channels))
}

/// The text as pieces of ids, each of which begins a sequence.
///
/// # Errors
/// When it cannot be tokenised.
pub fn pieces(model: &Model) -> Result<Vec<Vec<u32>>, LoadError> {
    let vocab = model.spec.vocab as u32;
    let limit = PIECE_TOKENS_MAX.min(model.spec.context);
    let mut pieces = Vec::new();
    for paragraph in TEXT.split("\n\n") {
        let ids = model.text.tokenizer.encode(paragraph, true);
        let ids = ids.map_err(|e| LoadError::invalid(Path::new("calibration text"), e))?;
        let known: Vec<u32> = ids.into_iter().filter(|id| *id < vocab).collect();
        pieces.extend(known.chunks(limit).map(<[u32]>::to_vec));
    }
    Ok(pieces)
}

/// The hidden row of every token of a piece, which begins a sequence.
fn rows_of_piece(pass: &mut dyn Pass, ids: &[u32]) -> Result<Vec<Vec<u16>>, LoadError> {
    let ask = |row| RowAsk { hidden: true, ..RowAsk::new(row, row) };
    let asks: Vec<RowAsk<'_>> = (0..ids.len()).map(ask).collect();
    let results = pass.step(&Batch::of(ids, 0), &asks).map_err(of_pass)?;
    let row = |result: RowResult| {
        let report = result.map_err(|e| LoadError::invalid(Path::new("calibration text"), e))?;
        Ok(report.hidden.unwrap_or_default())
    };
    results.into_iter().map(row).collect()
}

fn of_pass(fault: PassFault) -> LoadError {
    match fault {
        PassFault::Weights(e) => e,
        fault => LoadError::Device(fault.into()),
    }
}

/// Hash of everything that the pass depends on: the canon, weights and their type, shape and
/// options of the model, the ids of the text.
///
/// # Errors
/// When the text cannot be tokenised.
pub fn inputs(model: &Model, root: &Hash) -> Result<Hash, LoadError> {
    let mut e = Encoder::new("targon-engine/calibration-inputs/1");
    e.u32(VERSION).bytes(CANON.as_bytes());
    e.raw(root).bytes(model.dtype.to_string().as_bytes());
    e.bytes(format!("{:?}", model.spec).as_bytes());
    // The root has the bytes; this says how they are read.
    if let Some(scheme) = model.checkpoint.scheme() {
        e.bytes(scheme.as_bytes());
    }
    for piece in pieces(model)? {
        e.ids(&piece);
    }
    Ok(e.finish())
}

/// The file beside a checkpoint, where earlier versions put it and anybody could.
fn beside(checkpoint: &Path) -> PathBuf {
    if checkpoint.is_dir() {
        return checkpoint.join("targon-calibration.json");
    }
    checkpoint.with_extension("targon-calibration.json")
}

/// The file in the cache.
fn in_cache(cache: &Path, root: &Hash, dtype: Dtype) -> PathBuf {
    cache.join("calibration").join(format!("{}-{dtype}.json", to_hex(&root[..16])))
}

/// Puts a calibration that was computed here into the cache; returns where it is.
///
/// # Errors
/// When the file cannot be written, or the text cannot be tokenised.
pub fn store(
    model: &Model,
    root: &Hash,
    calibration: &Calibration,
    rows: usize,
    remembered: Remembered<'_>,
) -> Result<PathBuf, LoadError> {
    let inputs = inputs(model, root)?;
    let path = in_cache(remembered.0, root, model.dtype);
    let stored = Stored {
        version: VERSION,
        inputs: to_hex(&inputs),
        weights_root: to_hex(root),
        dtype: model.dtype.to_string(),
        rows,
        shift: calibration.shift,
        exponents: calibration.exponents.clone(),
        means: calibration.means.clone(),
    };
    let written = serde_json::to_vec(&stored)
        .map_err(std::io::Error::other)
        .and_then(|bytes| files::replace(&path, &bytes));
    written.map_err(|e| LoadError::invalid(&path, format!("cannot be written: {e}")))?;
    remembered.keep_calibration(&inputs, &calibration_hash(calibration));
    Ok(path)
}

/// The cached calibration of these weights, where it is the one that was computed.
fn cached(
    model: &Model,
    root: &Hash,
    remembered: Remembered<'_>,
) -> Result<Option<Calibration>, LoadError> {
    let path = in_cache(remembered.0, root, model.dtype);
    let bytes = match files::read(&path, FILE_BYTES_MAX) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        bytes => bytes.map_err(CalibrationFileError::Read),
    };
    let inputs = inputs(model, root)?;
    match bytes.and_then(|bytes| parse(&bytes, &inputs, remembered)) {
        Ok(calibration) => Ok(Some(calibration)),
        Err(why) => {
            tracing::warn!(path = %path.display(), "a cached calibration is not used: {why}");
            Ok(None)
        }
    }
}

/// Why a file with a calibration is not used.
#[derive(Debug, thiserror::Error)]
enum CalibrationFileError {
    #[error(transparent)]
    Read(#[from] std::io::Error),
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error("it was computed from another model or text")]
    Inputs,
    #[error("its hash is not that of what was computed")]
    Hash,
    #[error("it is for other weights")]
    Weights,
}

fn parse(
    bytes: &[u8],
    inputs: &Hash,
    remembered: Remembered<'_>,
) -> Result<Calibration, CalibrationFileError> {
    let stored: Stored = serde_json::from_slice(bytes)?;
    if stored.inputs != to_hex(inputs) {
        return Err(CalibrationFileError::Inputs);
    }
    let Stored { exponents, means, shift, .. } = stored;
    let calibration = Calibration { exponents, means, shift };
    match remembered.calibration(inputs) == Some(calibration_hash(&calibration)) {
        true => Ok(calibration),
        false => Err(CalibrationFileError::Hash),
    }
}

/// Refuses a model that has another calibration of itself lying beside it: the one who put it there
/// wants proofs that nobody else makes.
fn check_beside(model: &Model, root: &Hash, computed: &Calibration) -> Result<(), LoadError> {
    let path = beside(&model.checkpoint.path);
    let bytes = match files::read(&path, FILE_BYTES_MAX) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        bytes => bytes.map_err(CalibrationFileError::Read),
    };
    let found = bytes.and_then(|b| {
        let found: Beside = serde_json::from_slice(&b)?;
        let dtype = model.dtype.to_string();
        match found.weights_root == to_hex(root) && found.dtype == dtype {
            true => Ok(found),
            false => Err(CalibrationFileError::Weights),
        }
    });
    let Beside { exponents, means, shift, .. } = match found {
        Ok(found) => found,
        Err(why) => {
            tracing::warn!(path = %path.display(), "the calibration here is ignored: {why}");
            return Ok(());
        }
    };
    let (want, got) = (calibration_hash(computed), Calibration { exponents, means, shift });
    let got = calibration_hash(&got);
    if got == want {
        return Ok(());
    }
    let (want, got) = (to_hex(&want), to_hex(&got));
    let what = format!("must be the calibration that this model gives, {want}, got {got}");
    Err(LoadError::invalid(&path, format!("{what}; remove the file")))
}
