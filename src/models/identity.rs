//! What proofs of a model are bound to.

use super::calibration;
use super::error::LoadError;
use super::model::Model;
use super::remembered::{self, Remembered};
use super::root;
use crate::ops::CANON;
use crate::ops::dtype::Dtype;
use crate::ops::pool::Pool;
use crate::proof::codec::Hash;
use crate::proof::commit::{calibration_hash, model_hash};
use crate::proof::residue::Calibration;
use std::path::Path;
use std::sync::Arc;

/// The hashes of a model, and the whitening of its rows.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Hash of the stored weights.
    pub weights_root: Hash,
    /// Whitening of its hidden rows.
    pub calibration: Arc<Calibration>,
    /// Type of weights and arithmetic.
    pub dtype: Dtype,
    /// Hash of all of these and of the [canon](CANON).
    pub model_hash: Hash,
}

impl Identity {
    /// The identity of a loaded model; root and calibration are computed at most once for a
    /// checkpoint and remembered.
    ///
    /// # Errors
    /// When a file cannot be read, the calibration pass fails, or another calibration lies beside
    /// the model.
    pub fn of(model: &Model, pool: &Pool) -> Result<Self, LoadError> {
        Self::cached_in(&remembered::cache_dir(), model, pool)
    }

    /// The same with this directory as the cache.
    ///
    /// # Errors
    /// As for [`of`](Self::of).
    pub fn cached_in(cache: &Path, model: &Model, pool: &Pool) -> Result<Self, LoadError> {
        let remembered = Remembered(cache);
        let weights_root = root::weights_root(&model.checkpoint, pool, remembered)?;
        let calibration = calibration::of_model(model, &weights_root, pool, remembered)?;
        Ok(Self::new(model, weights_root, calibration))
    }

    /// The same, computed afresh, reading and writing nothing beside the checkpoint.
    ///
    /// # Errors
    /// When a file cannot be read or the calibration pass fails.
    pub fn compute(model: &Model, pool: &Pool) -> Result<Self, LoadError> {
        let weights_root = root::compute(&model.checkpoint, pool)?;
        let (calibration, _) = calibration::compute(model, pool)?;
        Ok(Self::new(model, weights_root, calibration))
    }

    fn new(model: &Model, weights_root: Hash, calibration: Calibration) -> Self {
        let (dtype, calibration) = (model.dtype, Arc::new(calibration));
        let mut identity = Self { weights_root, calibration, dtype, model_hash: [0; 32] };
        identity.model_hash = identity.hash_under(CANON);
        identity
    }

    /// What the hash would be if rows were computed in another canon, with the same calibration.
    pub fn hash_under(&self, canon: &str) -> Hash {
        let calibration = calibration_hash(&self.calibration);
        model_hash(&self.weights_root, &self.dtype.to_string(), canon, &calibration)
    }
}
