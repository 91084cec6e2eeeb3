//! Holds a loaded model: its text side, and its weights where a device multiplies by them.

use super::arithmetic::Arithmetic;
use super::checkpoint::Checkpoint;
use super::cpu::CpuPass;
use super::cpu::decoder::Decoder;
#[cfg(feature = "cuda")]
use super::cuda::{Card, CudaPass, CudaWeights};
use super::departure::{Departure, Recipe};
use super::device::Device;
use super::error::LoadError;
use super::parameters::Parameters;
use super::pass::{Pass, PassFault};
use super::spec::Spec;
use super::text::Text;
use crate::ops::CANON;
use crate::ops::dtype::Dtype;
use crate::ops::pool::Pool;
use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

/// A model that is loaded: its weights, its text and where it computes.
pub struct Model {
    /// What reading and writing text needs of it.
    pub text: Arc<Text>,
    /// The files, still open.
    pub checkpoint: Checkpoint,
    /// The shape of the model, from its configuration.
    pub spec: Arc<Spec>,
    /// Type of weights, matrix inputs and KV cache.
    pub dtype: Dtype,
    /// The weights on their device.
    pub weights: DeviceWeights,
    /// How it multiplies by them.
    pub arithmetic: Arithmetic,
    /// The weights as vLLM lists them, for powv.
    pub parameters: Parameters,
}

/// Weights where a device multiplies by them.
#[derive(Clone)]
pub enum DeviceWeights {
    /// Packed for the processor.
    Cpu(Arc<Decoder>),
    /// Packed in the memory of an NVIDIA card.
    #[cfg(feature = "cuda")]
    Cuda(Arc<CudaWeights>),
    /// In another engine: this one cannot multiply by them.
    Elsewhere,
}

impl DeviceWeights {
    /// The decoder, where the weights are the processor's.
    pub fn cpu(&self) -> Option<&Arc<Decoder>> {
        match self {
            Self::Cpu(decoder) => Some(decoder),
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => None,
            Self::Elsewhere => None,
        }
    }

    /// The device they are for; `Auto` where only their engine knows.
    pub fn device(&self) -> Device {
        match self {
            Self::Cpu(_) => Device::Cpu,
            #[cfg(feature = "cuda")]
            Self::Cuda(weights) => Device::Cuda(weights.card().ordinal()),
            Self::Elsewhere => Device::Auto,
        }
    }

    /// Bytes of all packed matrices.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Cpu(decoder) => decoder.weights.bytes(),
            #[cfg(feature = "cuda")]
            Self::Cuda(weights) => weights.bytes(),
            Self::Elsewhere => 0,
        }
    }

    /// How their device multiplies where nothing is said.
    fn arithmetic(&self) -> Arithmetic {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => Arithmetic::Tensor,
            Self::Cpu(_) | Self::Elsewhere => Arithmetic::Portable,
        }
    }

    /// The canon of rows that are computed so; `None` where their device cannot.
    fn canon(&self, arithmetic: Arithmetic) -> Option<Cow<'static, str>> {
        match (self, arithmetic) {
            (_, Arithmetic::Portable) => Some(Cow::Borrowed(CANON)),
            #[cfg(feature = "cuda")]
            (Self::Cuda(weights), Arithmetic::Tensor) => {
                Some(Cow::Owned(weights.card().tensor_canon()))
            }
            (Self::Cpu(_) | Self::Elsewhere, Arithmetic::Tensor) => None,
        }
    }

    /// Packs the weights of a checkpoint for a device.
    fn load(
        device: Device,
        checkpoint: &Checkpoint,
        (spec, dtype): (&Arc<Spec>, Dtype),
        pool: &Pool,
        progress: impl Fn(usize, usize),
    ) -> Result<Self, LoadError> {
        match device.resolved() {
            #[cfg(feature = "cuda")]
            Device::Cuda(number) => {
                let card = Card::open(number)?;
                let weights = CudaWeights::load(&card, checkpoint, spec, dtype, pool, progress)?;
                Ok(Self::Cuda(Arc::new(weights)))
            }
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(number) => {
                let what = format!("cuda:{number} needs a build with the feature `cuda`");
                Err(LoadError::Device(what.into()))
            }
            Device::Auto | Device::Cpu => {
                let decoder = Decoder::load(checkpoint, spec, dtype, pool, progress)?;
                Ok(Self::Cpu(Arc::new(decoder)))
            }
        }
    }
}

impl Model {
    /// Loads a checkpoint directory or a GGUF file for the best device of this build. `dtype`
    /// overrides the stored type; `progress(done, layers)` is called after each layer.
    ///
    /// # Errors
    /// When a file is missing or malformed, or asks for what this engine refuses by name.
    pub fn load(
        path: &Path,
        dtype: Option<Dtype>,
        pool: &Pool,
        progress: impl Fn(usize, usize),
    ) -> Result<Self, LoadError> {
        Self::load_on(Device::Auto, path, dtype, pool, progress)
    }

    /// The same for `device`.
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    pub fn load_on(
        device: Device,
        path: &Path,
        dtype: Option<Dtype>,
        pool: &Pool,
        progress: impl Fn(usize, usize),
    ) -> Result<Self, LoadError> {
        let model = Self::describe(path, dtype)?;
        let Self { checkpoint, spec, dtype, .. } = &model;
        let weights = DeviceWeights::load(device, checkpoint, (spec, *dtype), pool, progress)?;
        Ok(Self { arithmetic: weights.arithmetic(), weights, ..model })
    }

    /// The same with rows computed by `arithmetic`, or as its device does where nothing is said.
    ///
    /// # Errors
    /// When its device cannot.
    pub fn computing(self, arithmetic: Option<Arithmetic>) -> Result<Self, LoadError> {
        let arithmetic = arithmetic.unwrap_or(self.weights.arithmetic());
        match self.weights.canon(arithmetic) {
            Some(_) => Ok(Self { arithmetic, ..self }),
            None => {
                let device = self.weights.device();
                let what = format!("{arithmetic} arithmetic needs an NVIDIA card, got {device}");
                Err(LoadError::Device(what.into()))
            }
        }
    }

    /// The canon of its rows.
    pub fn canon(&self) -> Cow<'static, str> {
        self.weights.canon(self.arithmetic).unwrap_or(Cow::Borrowed(CANON))
    }

    /// How its device computes rows of this canon, if it can: whatever it computes otherwise.
    pub fn arithmetic_of(&self, canon: &str) -> Option<Arithmetic> {
        let fits = |a: &Arithmetic| self.weights.canon(*a).is_some_and(|own| own == canon);
        [Arithmetic::Portable, Arithmetic::Tensor].into_iter().find(fits)
    }

    /// All of a model but its packed weights, which are [elsewhere](DeviceWeights::Elsewhere).
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    pub fn describe(path: &Path, dtype: Option<Dtype>) -> Result<Self, LoadError> {
        let mut checkpoint = Checkpoint::open(path)?;
        let text = Arc::new(Text::load(&mut checkpoint)?);
        let spec = Arc::new(checkpoint.spec()?);
        let dtype = dtype.map_or_else(|| checkpoint.dtype(&spec), Ok)?;
        let parameters = Parameters::new(&checkpoint, &spec, dtype)?;
        let weights = DeviceWeights::Elsewhere;
        let arithmetic = weights.arithmetic();
        Ok(Self { text, checkpoint, spec, dtype, weights, arithmetic, parameters })
    }

    /// A pass that departs from the canon, with the weights that `decoder` has.
    ///
    /// # Errors
    /// When the system refuses the memory.
    pub fn departing(
        decoder: &Arc<Decoder>,
        departure: Departure,
        (pool, blocks): (&Pool, usize),
    ) -> Result<Box<dyn Pass>, PassFault> {
        let pass = CpuPass::new(decoder, pool, blocks).map_err(PassFault::Cache)?;
        Ok(Box::new(pass.departing(departure)))
    }

    /// The weights as a recipe leaves them, packed for the processor.
    ///
    /// # Errors
    /// When they are another device's, or cannot be read again.
    pub fn coarse(&self, recipe: &Recipe, pool: &Pool) -> Result<Arc<Decoder>, LoadError> {
        let own = self.weights.cpu().ok_or_else(|| {
            LoadError::Device("departures from the canon need weights on the processor".into())
        })?;
        match recipe.weights {
            None => Ok(Arc::clone(own)),
            Some(grid) => {
                let (spec, dtype) = (&self.spec, self.dtype);
                Decoder::coarse(&self.checkpoint, (spec, dtype), grid, pool).map(Arc::new)
            }
        }
    }

    /// A pass of this model on the device of its weights, with an empty KV cache of `blocks`
    /// blocks.
    ///
    /// # Errors
    /// When the system refuses the memory, or the weights are elsewhere.
    pub fn pass(&self, pool: &Pool, blocks: usize) -> Result<Box<dyn Pass>, PassFault> {
        self.pass_by(self.arithmetic, pool, blocks)
    }

    /// The same by another arithmetic than the model's.
    ///
    /// # Errors
    /// As for [`pass`](Self::pass), and when its device cannot.
    pub fn pass_by(
        &self,
        arithmetic: Arithmetic,
        pool: &Pool,
        blocks: usize,
    ) -> Result<Box<dyn Pass>, PassFault> {
        match (&self.weights, arithmetic) {
            (DeviceWeights::Cpu(decoder), Arithmetic::Portable) => {
                Ok(Box::new(CpuPass::new(decoder, pool, blocks).map_err(PassFault::Cache)?))
            }
            (DeviceWeights::Cpu(_), Arithmetic::Tensor) => Err(PassFault::NeedsCard),
            #[cfg(feature = "cuda")]
            (DeviceWeights::Cuda(weights), arithmetic) => {
                Ok(Box::new(CudaPass::new(weights, pool, blocks)?.computing(arithmetic)))
            }
            (DeviceWeights::Elsewhere, _) => Err(PassFault::Elsewhere),
        }
    }
}
