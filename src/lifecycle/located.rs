//! Plans and loads a model whose files are on this machine.

use crate::config::models_toml::ModelConfig;
use crate::engine::plan::{MemoryPlan, Part};
use crate::models::checkpoint::Checkpoint;
use crate::models::device::Device;
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
        let ModelConfig { dtype, arithmetic, .. } = self.config;
        let device = self.config.device();
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

    /// Plans the model into `available` bytes of each of its devices, from its headers alone.
    ///
    /// # Errors
    /// Why it does not fit or cannot be planned, in words.
    pub fn plan_within(&self, available: u64) -> anyhow::Result<MemoryPlan> {
        Ok(shape_within(&self.config, &self.spec()?, |_| available)?.0)
    }
}

/// Plans a model of this shape into what each of its devices has `free`; says what each will have.
///
/// # Errors
/// Why it does not fit, in words.
pub(super) fn shape_within(
    config: &ModelConfig,
    spec: &Spec,
    mut free: impl FnMut(Device) -> u64,
) -> anyhow::Result<(MemoryPlan, Vec<Part>)> {
    let with_free = |device: &Device| (device.resolved(), free(device.resolved()));
    let devices: Vec<(Device, u64)> = config.devices.iter().map(with_free).collect();
    Ok(MemoryPlan::over(config.backend, &devices, spec, config.wanted)?)
}
