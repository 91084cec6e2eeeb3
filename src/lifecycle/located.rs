//! Plans and loads a model whose files are on this machine.

use crate::config::models_toml::ModelConfig;
use crate::engine::plan::MemoryPlan;
use crate::models::checkpoint::Checkpoint;
use crate::models::error::LoadError;
use crate::models::panics::contained;
use crate::models::spec::Spec;
use crate::models::{Model, config};
use crate::ops::pool::Pool;
use std::path::PathBuf;

/// What a plan is made for before it is compared with the memory there is.
pub(super) const BOUNDLESS: u64 = 1 << 60;

/// A model whose files are on this machine.
pub struct Located {
    /// What the file says of it.
    pub config: ModelConfig,
    /// Its directory, or its GGUF file.
    pub path: PathBuf,
    /// Its commit on the Hub, or where it lies.
    pub revision: String,
}

impl Located {
    /// Loads the model onto its device, computing as the models file says. `progress` gets the
    /// layers that are loaded, and all.
    ///
    /// # Errors
    /// What is wrong with its files or its device, or that the device cannot compute so.
    pub fn load_model(
        &self,
        pool: &Pool,
        progress: impl Fn(usize, usize),
    ) -> Result<Model, LoadError> {
        let ModelConfig { device, dtype, arithmetic, .. } = self.config;
        Model::load_on(device, &self.path, dtype, pool, progress)?.computing(arithmetic)
    }

    /// The model's shape, from its headers alone.
    ///
    /// # Errors
    /// What is wrong with its files, in words.
    pub fn spec(&self) -> anyhow::Result<Spec> {
        contained("planning it", || {
            let checkpoint = Checkpoint::open(&self.path)?;
            Ok(config::parse(&checkpoint.config_path, &checkpoint.config)?)
        })?
    }

    /// Plans the model into `available` bytes of its device, from its headers alone.
    ///
    /// # Errors
    /// Why it does not fit or cannot be planned, in words.
    pub fn plan_within(&self, available: u64) -> anyhow::Result<MemoryPlan> {
        shape_within(&self.config, &self.spec()?, available)
    }
}

/// Plans a model of this shape into `available` bytes of its device.
///
/// # Errors
/// Why it does not fit, in words.
pub(super) fn shape_within(
    config: &ModelConfig,
    spec: &Spec,
    available: u64,
) -> anyhow::Result<MemoryPlan> {
    let ModelConfig { device, wanted, backend, .. } = *config;
    Ok(MemoryPlan::with(backend, device, spec, wanted, available)?)
}
