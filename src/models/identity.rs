//! Computes what proofs of a model are bound to: its weights root, its calibration and its canon.

use super::calibration;
use super::device::Device;
use super::error::LoadError;
use super::model::Model;
use super::remembered::{self, Remembered};
use super::root;
use crate::ops::CANON;
use crate::ops::dtype::Dtype;
use crate::ops::pool::Pool;
use crate::proof::codec::{Hash, to_hex};
use crate::proof::commit::{calibration_hash, model_hash};
use crate::proof::residue::Calibration;
use std::borrow::Cow;
use std::path::{Path, PathBuf};
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
    /// How the weights are quantised in safetensors or were when they were loaded, where they are:
    /// such a model is another one.
    pub scheme: Option<String>,
    /// The canon that its rows are computed in, or the name of another engine.
    pub canon: Cow<'static, str>,
    /// Hash of all of these.
    pub model_hash: Hash,
}

/// An identity whose calibration was computed anew.
#[derive(Debug)]
pub struct Recalibrated {
    /// With this calibration.
    pub identity: Identity,
    /// Hidden rows that it comes from.
    pub rows: usize,
    /// Where it was put.
    pub path: PathBuf,
}

impl Identity {
    /// The identity of a loaded model; root and calibration are computed at most once for a
    /// checkpoint and remembered.
    ///
    /// # Errors
    /// When a file cannot be read, the calibration pass fails, or another calibration lies beside
    /// the model.
    pub fn of(model: &Model, pool: &Pool) -> Result<Self, LoadError> {
        Self::cached_in(&remembered::cache_dir()?, model, pool)
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

    /// The same with a calibration that is computed now, whatever the cache holds, and put there.
    ///
    /// # Errors
    /// As for [`of`](Self::of), and when the calibration cannot be written.
    pub fn recalibrated(model: &Model, pool: &Pool) -> Result<Recalibrated, LoadError> {
        let cache = remembered::cache_dir()?;
        let remembered = Remembered(&cache);
        let weights_root = root::weights_root(&model.checkpoint, pool, remembered)?;
        let (calibration, rows) = calibration::compute(model, pool)?;
        let path = calibration::store(model, &weights_root, &calibration, rows, remembered)?;
        Ok(Recalibrated { identity: Self::new(model, weights_root, calibration), rows, path })
    }

    fn new(model: &Model, weights_root: Hash, calibration: Calibration) -> Self {
        let identity = Self {
            weights_root,
            calibration: Arc::new(calibration),
            dtype: model.dtype,
            scheme: model.checkpoint.scheme().map(str::to_owned),
            canon: model.canon(),
            model_hash: [0; 32],
        };
        identity.hashed()
    }

    fn hashed(self) -> Self {
        Self { model_hash: self.hash_under(&self.canon), ..self }
    }

    /// The same model with rows that another engine computes: equal but for rounding. Verifiers
    /// hold such rows against limits, and never expect equal bits.
    #[must_use]
    pub fn in_canon(self, canon: String) -> Self {
        Self { canon: Cow::Owned(canon), ..self }.hashed()
    }

    /// The identity of a model whose weights are in another engine, and which this one can read:
    /// where its calibration is not remembered it is loaded here for the time of its computation.
    ///
    /// # Errors
    /// As for [`of`](Self::of), and when there is no memory for its weights.
    pub fn of_described(model: &Model, pool: &Pool) -> Result<Self, LoadError> {
        let cache = remembered::cache_dir()?;
        let remembered = Remembered(&cache);
        let weights_root = root::weights_root(&model.checkpoint, pool, remembered)?;
        if let Some(calibration) = calibration::known(model, &weights_root, remembered)? {
            return Ok(Self::new(model, weights_root, calibration));
        }
        tracing::info!("the calibration of this model is computed once, with the native engine");
        let (path, dtype) = (&model.checkpoint.path, Some(model.dtype));
        Self::of(&Model::load_on(Device::Cpu, path, dtype, pool, |_, _| {})?, pool)
    }

    /// The same model with its weights quantised by `scheme`: no verifier takes one for the other.
    #[must_use]
    pub fn quantised(self, scheme: &str) -> Self {
        let scheme = match &self.scheme {
            None => scheme.to_owned(),
            Some(stored) => format!("{stored}+{scheme}"),
        };
        Self { scheme: Some(scheme), ..self }.hashed()
    }

    /// What the hash would be if rows were computed in another canon, with the same calibration.
    pub fn hash_under(&self, canon: &str) -> Hash {
        let calibration = calibration_hash(&self.calibration);
        model_hash(&self.weights_root, &self.type_name(), canon, &calibration)
    }

    /// The hash in [`CANON`], whatever its rows are computed in: limits of a model are kept under
    /// it.
    pub fn portable_hash(&self) -> Hash {
        self.hash_under(CANON)
    }

    /// Version, canon, weights root, type and kernels in one word.
    pub fn fingerprint(&self, kernels: &str) -> String {
        let root = to_hex(&self.weights_root[..8]);
        let (version, dtype) = (env!("CARGO_PKG_VERSION"), self.type_name());
        format!("targon-engine-{version}-{}-{root}-{dtype}-{kernels}", self.canon)
    }

    /// The type, and the scheme where there is one: `bf16`, `bf16+isq-q8_0`.
    pub fn type_name(&self) -> String {
        match &self.scheme {
            None => self.dtype.to_string(),
            Some(scheme) => format!("{}+{scheme}", self.dtype),
        }
    }
}
