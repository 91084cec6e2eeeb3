//! Describes as data what distinguishes the dense decoder families: one forward pass reads a
//! [`Spec`].

use super::family::{ExpertNames, Family};
use crate::ops::attention::KvDims;
use crate::ops::rope::RopeScaling;
use crate::ops::rowwise::Activation;
use std::collections::BTreeSet;

/// Shape and options of a decoder-only transformer.
#[derive(Clone, PartialEq, Debug)]
pub struct Spec {
    /// What sets its family apart.
    pub family: &'static Family,
    /// Rows of the embedding (and of the logits).
    pub vocab: usize,
    /// Elements of the residual stream.
    pub hidden: usize,
    /// How many decoder layers a row passes.
    pub layers: usize,
    /// Longest sequence the model was made for.
    pub context: usize,
    /// How a layer attends.
    pub attention: AttentionSpec,
    /// The feed-forward half of each layer.
    pub feed_forward: FeedForwardSpec,
    /// How rows are normalised.
    pub norm: NormSpec,
    /// How positions rotate queries and keys.
    pub rope: RopeSpec,
    /// Factor on the embedding (Gemma).
    pub embed_scale: Option<f32>,
    /// Soft cap on the logits (Gemma 2).
    pub logit_softcap: Option<f32>,
    /// The head is the embedding.
    pub tied: bool,
    /// Where f32 weights would overflow or lose f16 range, the family asks for bf16.
    pub prefers_bf16: bool,
}

/// Options of the attention layers.
#[derive(Clone, PartialEq, Debug)]
pub struct AttentionSpec {
    /// Heads that queries have.
    pub heads: usize,
    /// Heads that keys and values have; each serves as many query heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// A bias on the output projection.
    pub out_bias: bool,
    /// RMS norms on each head's q and k (Qwen 3).
    pub qk_norm: bool,
    /// q, k and v are one stored matrix (Phi-3).
    pub fused: bool,
    /// Factor on the scores.
    pub scale: f32,
    /// Soft cap on the scores (Gemma 2).
    pub softcap: Option<f32>,
    /// Per layer: how many positions a query sees, where that is limited.
    pub windows: Vec<Option<usize>>,
}

/// The feed-forward half of a layer.
#[derive(Clone, PartialEq, Debug)]
pub struct FeedForwardSpec {
    /// Rows of the gate and up matrices (of one expert).
    pub inter: usize,
    /// Activation of the gate.
    pub activation: Activation,
    /// Gate and up are one stored matrix (Phi-3).
    pub fused: bool,
    /// Routing, for mixtures of experts.
    pub experts: Option<ExpertSpec>,
}

/// Routing of a mixture of experts.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ExpertSpec {
    /// Experts of a layer.
    pub count: usize,
    /// Experts that a token visits.
    pub used: usize,
    /// The chosen experts' weights are scaled to sum to one.
    pub renormalise: bool,
    /// Tensor names within a layer.
    pub names: ExpertNames,
}

/// How rows are normalised.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct NormSpec {
    /// Added to the mean square.
    pub eps: f32,
    /// Added to the stored weight (Gemma stores `w - 1`).
    pub offset: f32,
    /// Added to the weight as the family publishes it: the same but where a file holds the sum.
    pub published_offset: f32,
    /// A norm after attention and after the feed-forward layer as well (Gemma 2).
    pub post: bool,
}

/// How positions rotate queries and keys.
#[derive(Clone, PartialEq, Debug)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: f64,
    /// How frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

impl Spec {
    /// Rows of the joint q, k, v matrix.
    pub fn qkv_rows(&self) -> usize {
        (self.attention.heads + 2 * self.attention.kv_heads) * self.attention.head_dim
    }

    /// Columns of the attention result.
    pub fn attention_cols(&self) -> usize {
        self.attention.heads * self.attention.head_dim
    }

    /// Shape of the KV cache.
    pub fn kv_dims(&self) -> KvDims {
        KvDims {
            layers: self.layers,
            kv_heads: self.attention.kv_heads,
            head_dim: self.attention.head_dim,
        }
    }

    /// The names of all tensors that the model is computed with.
    pub fn tensor_names(&self) -> BTreeSet<String> {
        let mut names =
            BTreeSet::from(["model.embed_tokens.weight".into(), "model.norm.weight".into()]);
        // A table of divisors that GGUF files of Llama 3 hold.
        names.insert("rope_freqs.weight".into());
        if !self.tied {
            names.insert("lm_head.weight".into());
        }
        for layer in 0..self.layers {
            self.layer_names(|part| {
                names.insert(format!("model.layers.{layer}.{part}"));
            });
        }
        names
    }

    /// The names of the tensors of a layer, within it.
    fn layer_names(&self, mut name: impl FnMut(String)) {
        let a = &self.attention;
        let qkv: &[&str] = if a.fused { &["qkv_proj"] } else { &["q_proj", "k_proj", "v_proj"] };
        for (projection, has_bias) in
            qkv.iter().map(|p| (p, a.qkv_bias)).chain([(&"o_proj", a.out_bias)])
        {
            name(format!("self_attn.{projection}.weight"));
            if has_bias {
                name(format!("self_attn.{projection}.bias"));
            }
        }
        let mut norms = vec!["input_layernorm", "post_attention_layernorm"];
        if self.norm.post {
            norms.extend(["pre_feedforward_layernorm", "post_feedforward_layernorm"]);
        }
        if a.qk_norm {
            norms.extend(["self_attn.q_norm", "self_attn.k_norm"]);
        }
        norms.iter().for_each(|norm| name(format!("{norm}.weight")));
        match self.feed_forward.experts {
            Some(ExpertSpec { count, names: ExpertNames { module, projections, .. }, .. }) => {
                name(format!("{module}.gate.weight"));
                for (expert, part) in (0..count).flat_map(|e| projections.map(|p| (e, p))) {
                    name(format!("{module}.experts.{expert}.{part}.weight"));
                }
            }
            None if self.feed_forward.fused => {
                ["gate_up_proj", "down_proj"].iter().for_each(|p| name(format!("mlp.{p}.weight")));
            }
            None => {
                let parts = ["gate_proj", "up_proj", "down_proj"];
                parts.iter().for_each(|p| name(format!("mlp.{p}.weight")));
            }
        }
    }
}
