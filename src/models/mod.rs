//! Models: checkpoints, tokenizers, chat templates, and weights to hidden rows to logits.
//!
//! [`Model::load`] opens a checkpoint, turns its configuration into a [`spec::Spec`], packs the
//! weights, and keeps the files open. A family is data for the one decoder of a device; [`pass`] is
//! how everybody runs it, [`cpu`] is the pass on the CPU. Nothing here knows about requests or
//! scheduling.

pub mod calibration;
pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod error;
pub mod gguf;
mod gguf_tokenizer;
pub mod grammar;
pub mod header;
pub mod hub;
pub mod margin;
pub mod parameters;
pub mod pass;
pub mod remembered;
pub mod root;
pub mod rows;
pub mod rules;
pub mod sampler;
pub mod spec;
pub mod tensor;
pub mod tokenizer;
mod tokenizer_config;
pub mod weight_file;

use crate::ops::CANON;
use crate::ops::dtype::Dtype;
use crate::ops::pool::Pool;
use crate::proof::codec::Hash;
use crate::proof::commit::{calibration_hash, model_hash};
use crate::proof::residue::Calibration;
use chat::ChatTemplate;
use checkpoint::Checkpoint;
use cpu::CpuPass;
use cpu::decoder::Decoder;
use error::LoadError;
use grammar::{Constraint, Grammar, GrammarError, Grammars};
use parameters::Parameters;
use pass::Pass;
use remembered::Remembered;
use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use tokenizer::TextTokenizer;

/// A loaded model.
pub struct Model {
    /// The files, still open.
    pub checkpoint: Checkpoint,
    /// Weights and forward pass.
    pub decoder: Arc<Decoder>,
    /// Text to ids and back.
    pub tokenizer: TextTokenizer,
    /// How conversations become text; base models have none.
    pub chat: Option<ChatTemplate>,
    /// Ids that end a generation.
    pub stop_ids: Vec<u32>,
    /// The weights as vLLM lists them, for powv.
    pub parameters: Parameters,
    grammars: OnceLock<Result<Grammars, GrammarError>>,
}

/// What proofs of a model are bound to.
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
        let (calibration, _) = calibration::compute(&model.decoder, &model.tokenizer, pool)?;
        Ok(Self::new(model, weights_root, calibration))
    }

    fn new(model: &Model, weights_root: Hash, calibration: Calibration) -> Self {
        let (dtype, calibration) = (model.decoder.dtype, Arc::new(calibration));
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

impl Model {
    /// Loads a checkpoint directory or a GGUF file. `dtype` overrides the stored type;
    /// `progress(done, layers)` is called after each layer.
    ///
    /// # Errors
    /// When a file is missing or malformed, or asks for what this engine refuses by name.
    pub fn load(
        path: &Path,
        dtype: Option<Dtype>,
        pool: &Pool,
        progress: impl Fn(usize, usize),
    ) -> Result<Self, LoadError> {
        let mut checkpoint = Checkpoint::open(path)?;
        let tokenizer = TextTokenizer::load(&checkpoint)?;
        if let Some(gguf) = &mut checkpoint.gguf {
            gguf.forget_lists();
        }
        let chat = ChatTemplate::load(&checkpoint, &tokenizer)?;
        let vocab = config::parse(&checkpoint.config_path, &checkpoint.config)?.vocab;
        let stop_ids = tokenizer::stop_ids(&checkpoint, vocab)?;
        let decoder = Arc::new(Decoder::load(&checkpoint, dtype, pool, progress)?);
        let parameters = Parameters::new(&checkpoint, &decoder.spec, decoder.dtype)?;
        let grammars = OnceLock::new();
        Ok(Self { checkpoint, decoder, tokenizer, chat, stop_ids, parameters, grammars })
    }

    /// A pass of this model with an empty KV cache of `blocks` blocks.
    ///
    /// # Errors
    /// When the system refuses the memory.
    pub fn pass(&self, pool: &Pool, blocks: usize) -> io::Result<Box<dyn Pass>> {
        Ok(Box::new(CpuPass::new(&self.decoder, pool, blocks)?))
    }

    /// Compiles what an output must look like. The first call indexes the vocabulary.
    ///
    /// # Errors
    /// When the constraint cannot be used, or the model has no end token.
    pub fn grammar(&self, constraint: Constraint) -> Result<Grammar, GrammarError> {
        let vocab = self.decoder.spec.vocab;
        let grammars =
            self.grammars.get_or_init(|| Grammars::new(&self.tokenizer, &self.stop_ids, vocab));
        grammars.as_ref().map_err(Clone::clone)?.compile(constraint)
    }
}
