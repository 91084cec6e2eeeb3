//! Makes the configurations of Llamas of any size, for tests.

use super::parse;
use crate::models::spec::Spec;
use serde_json::{Value, json};
use std::path::Path;

/// What distinguishes one Llama from another.
#[derive(Clone, Copy)]
pub(crate) struct LlamaSizes {
    pub(crate) vocab: usize,
    pub(crate) hidden: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    /// Rows of a gate.
    pub(crate) inter: usize,
    pub(crate) context: usize,
    /// Whether the embedding is also the head.
    pub(crate) tied: bool,
}

/// Llama 3.1 8B.
pub(crate) const LLAMA_8B: LlamaSizes = LlamaSizes {
    vocab: 128_256,
    hidden: 4096,
    layers: 32,
    heads: 32,
    kv_heads: 8,
    inter: 14_336,
    context: 131_072,
    tied: false,
};

/// SmolLM2-135M.
pub(crate) const SMOLLM2_135M: LlamaSizes = LlamaSizes {
    vocab: 49_152,
    hidden: 576,
    layers: 30,
    heads: 9,
    kv_heads: 3,
    inter: 1536,
    context: 8192,
    tied: true,
};

impl LlamaSizes {
    /// Its `config.json`.
    pub(crate) fn json(self) -> Value {
        let mut json = json!({
            "model_type": "llama", "vocab_size": self.vocab, "hidden_size": self.hidden,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "intermediate_size": self.inter,
            "max_position_embeddings": self.context, "rms_norm_eps": 1e-5,
        });
        // Families have defaults of their own for this key.
        if self.tied {
            json["tie_word_embeddings"] = json!(true);
        }
        json
    }

    /// Its shape, with `extra` over the keys of its configuration.
    pub(crate) fn spec_with(self, extra: &Value) -> Spec {
        let mut json = self.json();
        json.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        parse(Path::new("config.json"), &json).unwrap()
    }

    /// Its shape.
    pub(crate) fn spec(self) -> Spec {
        self.spec_with(&json!({}))
    }
}
