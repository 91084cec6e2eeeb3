//! Loads a derived checkpoint into the memory of mistral.rs.

use crate::engine::plan::Part;
use crate::models::device::Device;
use crate::models::error::LoadError;
use crate::models::tapped::Tapped;
use crate::ops::dtype::Dtype;
use mistralrs::core::{
    Loader, MistralRs, MistralRsBuilder, NormalLoaderBuilder, NormalSpecificConfig,
};
use mistralrs::{
    DefaultSchedulerMethod, DeviceMapSetting, LayerTopology, ModelDType, SchedulerConfig,
    TokenSource, Topology, parse_isq_value,
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
    /// Which layers lie on which device; the first one has embedding and head too. Where there is
    /// none, all lie in the processor's memory.
    pub parts: Vec<Part>,
}

/// A model that mistral.rs holds.
pub struct LoadedMistral {
    pub(super) runner: Arc<MistralRs>,
    pub(super) tapped: Tapped,
}

impl LoadedMistral {
    /// Loads a derived checkpoint of this type onto its devices; at most `sequences_max` sequences
    /// will run at once.
    ///
    /// # Errors
    /// What mistral.rs says, or that it panicked.
    pub fn load(
        tapped: Tapped,
        settings: &MistralSettings,
        dtype: Dtype,
        sequences_max: usize,
    ) -> Result<Self, LoadError> {
        // mistral.rs keeps in a thread what it quantises to, so each model has one of its own.
        let load = || runner(&tapped, settings, dtype, sequences_max);
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
    dtype: Dtype,
    sequences_max: usize,
) -> Result<Arc<MistralRs>, LoadError> {
    let parts = settings.parts.iter().map(|part| Ok((open(part.device)?, part.layers)));
    let parts = parts.collect::<Result<Vec<(candle_core::Device, usize)>, LoadError>>()?;
    let device = parts.first().map_or(candle_core::Device::Cpu, |(device, _)| device.clone());
    let dtype = match (&device, dtype) {
        // It does not multiply 16-bit numbers on the processor.
        (candle_core::Device::Cpu, _) => ModelDType::F32,
        (_, Dtype::Bf16) => ModelDType::BF16,
        (_, Dtype::F16) => ModelDType::F16,
    };
    let topology = topology(settings.isq.as_deref(), &parts)?;
    let config = NormalSpecificConfig { topology, ..NormalSpecificConfig::default() };
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

/// The device as mistral.rs knows it.
fn open(device: Device) -> Result<candle_core::Device, LoadError> {
    match device.resolved() {
        Device::Cuda(number) => candle_core::Device::new_cuda(number).map_err(error),
        _ => Ok(candle_core::Device::Cpu),
    }
}

/// What is said of layers: their type, where they are quantised, and their device, where there are
/// several. Head and embedding are not quantised: that would give no exact rows.
fn topology(
    isq: Option<&str>,
    parts: &[(candle_core::Device, usize)],
) -> Result<Option<Topology>, LoadError> {
    let mut topology = match isq {
        None => Topology::empty(),
        Some(isq) => {
            parse_isq_value(isq, None).map_err(|e| LoadError::Device(e.into()))?;
            let layers = serde_json::json!({ LAYERS: {"isq": isq} }).to_string();
            Topology::from_str(&layers).map_err(|e| error(format!("{e:#}")))?
        }
    };
    if parts.len() > 1 {
        let mut first = 0;
        for (device, layers) in parts {
            let layer = LayerTopology { isq: None, device: Some(device.clone()) };
            topology = topology.with_range(first..first + layers, layer);
            first += layers;
        }
    }
    let says_nothing = isq.is_none() && parts.len() <= 1;
    Ok((!says_nothing).then_some(topology))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device::Cpu;

    #[test]
    fn each_layer_is_on_the_device_of_its_part_and_is_quantised_where_it_is_asked() {
        assert!(topology(None, &[]).unwrap().is_none());
        assert!(topology(None, &[(Cpu, 30)]).unwrap().is_none());
        for isq in [None, Some("q8_0")] {
            let said = topology(isq, &[(Cpu, 2), (Cpu, 3)]).unwrap().unwrap();
            assert_eq!(said.layers.len(), 5, "{isq:?}");
            let layers = said.layers.iter().flatten();
            let placed = layers.filter(|layer| layer.device.is_some() && layer.isq.is_none());
            assert_eq!(placed.count(), 5, "{isq:?}");
            assert_eq!(said.patterns.len(), usize::from(isq.is_some()));
        }
        let one = topology(Some("q8_0"), &[(Cpu, 30)]).unwrap().unwrap();
        assert!(one.layers.is_empty() && one.patterns[0].0.is_match("model.layers.29.mlp"));
        assert!(!one.patterns[0].0.is_match("lm_head.weight"), "a head gives exact rows");
        assert!(topology(Some("int4"), &[]).is_err());
    }
}
