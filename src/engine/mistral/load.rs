//! Loads a derived checkpoint into the memory of mistral.rs.

use crate::models::error::LoadError;
use crate::models::tapped::Tapped;
use mistralrs::core::{
    Loader, MistralRs, MistralRsBuilder, NormalLoaderBuilder, NormalSpecificConfig,
};
use mistralrs::{
    DefaultSchedulerMethod, DeviceMapSetting, ModelDType, SchedulerConfig, TokenSource, Topology,
    parse_isq_value,
};
use std::num::NonZeroUsize;
use std::sync::Arc;

/// The version that models are loaded by.
pub const VERSION: &str = "0.8.1";
/// The weights of all layers, as mistral.rs selects them: a regular expression.
const LAYERS: &str = "/^model[.]layers[.]/";

/// How mistral.rs loads a model.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct MistralSettings {
    /// The type that the layers' weights are quantised to while they are loaded, by its name in
    /// mistral.rs. Head and embedding are not.
    pub isq: Option<String>,
}

/// A model that mistral.rs holds.
pub struct LoadedMistral {
    pub(super) runner: Arc<MistralRs>,
    pub(super) tapped: Tapped,
}

impl LoadedMistral {
    /// Loads a derived checkpoint into the processor's memory; at most `sequences_max` sequences
    /// will run at once.
    ///
    /// # Errors
    /// What mistral.rs says, or that it panicked.
    pub fn load(
        tapped: Tapped,
        settings: &MistralSettings,
        sequences_max: usize,
    ) -> Result<Self, LoadError> {
        // mistral.rs keeps in a thread what it quantises to, so each model has one of its own.
        let load = || runner(&tapped, settings, sequences_max);
        let loaded = std::thread::scope(|scope| scope.spawn(load).join());
        let panicked = |_| Err(error("it panicked at the model; the log says where"));
        let runner = loaded.unwrap_or_else(panicked)?;
        Ok(Self { runner, tapped })
    }
}

fn error(what: impl std::fmt::Display) -> LoadError {
    LoadError::Device(format!("mistral.rs: {what}").into())
}

fn runner(
    tapped: &Tapped,
    settings: &MistralSettings,
    sequences_max: usize,
) -> Result<Arc<MistralRs>, LoadError> {
    // It does not multiply 16-bit numbers on the processor.
    let (device, dtype) = (candle_core::Device::Cpu, ModelDType::F32);
    let config = NormalSpecificConfig {
        topology: settings.isq.as_deref().map(topology).transpose()?,
        ..NormalSpecificConfig::default()
    };
    let directory = tapped.directory.display().to_string();
    let loader = NormalLoaderBuilder::new(config, None, None, Some(directory), false, None);
    let loader: Box<dyn Loader> = loader.build(None).map_err(error)?;
    let map = DeviceMapSetting::dummy();
    let pipeline = loader
        .load_model_from_hf(None, TokenSource::None, &dtype, &device, true, map, None, None)
        .map_err(|e| error(format!("{e:#}")))?;
    let sequences = NonZeroUsize::new(sequences_max).unwrap_or(NonZeroUsize::MIN);
    let method = DefaultSchedulerMethod::Fixed(sequences);
    let scheduler = SchedulerConfig::DefaultScheduler { method };
    let builder = MistralRsBuilder::new(pipeline, scheduler, false, None)
        .with_no_prefix_cache(true)
        .with_disable_eos_stop(true);
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    Ok(runtime.block_on(builder.build()))
}

/// Quantises the layers and nothing else: a head that is quantised gives no exact rows.
fn topology(isq: &str) -> Result<Topology, LoadError> {
    parse_isq_value(isq, None).map_err(|e| LoadError::Device(e.into()))?;
    let layers = serde_json::json!({ LAYERS: {"isq": isq} }).to_string();
    Topology::from_str(&layers).map_err(|e| error(format!("{e:#}")))
}
