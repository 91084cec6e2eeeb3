//! Holds what reading and writing text with a model needs: nothing of its weights or of a device.

use super::chat::ChatTemplate;
use super::checkpoint::Checkpoint;
use super::config;
use super::error::LoadError;
use super::grammar::{Constraint, Grammar, GrammarError, Grammars};
use super::tokenizer::{self, TextTokenizer};
use std::sync::OnceLock;

/// A model as requests and responses see it.
pub struct Text {
    /// Text to ids and back.
    pub tokenizer: TextTokenizer,
    /// How conversations become text; base models have none.
    pub chat: Option<ChatTemplate>,
    /// Ids that end a generation.
    pub stop_ids: Vec<u32>,
    /// Tokens that the model has a row and a logit for; ids lie below.
    pub vocab: usize,
    grammars: OnceLock<Result<Grammars, GrammarError>>,
}

impl Text {
    /// Reads the tokenizer, the chat template and the end tokens of a checkpoint. The lists in a
    /// GGUF file's metadata are dropped once they were read.
    ///
    /// # Errors
    /// When a file is missing or malformed, or asks for what this engine refuses by name.
    pub fn load(checkpoint: &mut Checkpoint) -> Result<Self, LoadError> {
        let tokenizer = TextTokenizer::load(checkpoint)?;
        if let Some(gguf) = &mut checkpoint.gguf {
            gguf.forget_lists();
        }
        let chat = ChatTemplate::load(checkpoint, &tokenizer)?;
        let vocab = config::parse(&checkpoint.config_path, &checkpoint.config)?.vocab;
        let stop_ids = tokenizer::stop_ids(checkpoint, vocab)?;
        Ok(Self { tokenizer, chat, stop_ids, vocab, grammars: OnceLock::new() })
    }

    /// Compiles what an output must look like. The first call indexes the vocabulary.
    ///
    /// # Errors
    /// When the constraint cannot be used, or the model has no end token.
    pub fn grammar(&self, constraint: Constraint) -> Result<Grammar, GrammarError> {
        let index = || Grammars::new(&self.tokenizer, &self.stop_ids, self.vocab);
        self.grammars.get_or_init(index).as_ref().map_err(Clone::clone)?.compile(constraint)
    }
}
