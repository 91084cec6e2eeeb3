//! Lists the families: one entry has all that is known of each by name, and how its configuration
//! is read. A family that is added here is read from safetensors; from GGUF and by the second
//! engine where its entry says so.

use super::reader::CheckpointConfig;
use crate::models::error::LoadError;
use crate::models::family::{ExpertNames, Family, GgufFamily, HostedFamily, listed};
use crate::models::spec::{AttentionSpec, ExpertSpec, FeedForwardSpec, NormSpec, Spec};
use crate::ops::rowwise::Activation;
use serde_json::Value;

/// A family, and how its configuration is read.
struct Entry {
    family: Family,
    read: fn(&CheckpointConfig<'_>, &'static Family) -> Result<Spec, LoadError>,
}

const MIXTRAL_EXPERTS: ExpertNames =
    ExpertNames { module: "block_sparse_moe", projections: ["w1", "w3", "w2"], router_first: true };
const QWEN_EXPERTS: ExpertNames = ExpertNames {
    module: "mlp",
    projections: ["gate_proj", "up_proj", "down_proj"],
    router_first: false,
};

static ENTRIES: [Entry; 8] = [
    Entry {
        family: Family {
            name: "llama",
            class: "LlamaForCausalLM",
            experts: None,
            gguf: Some(GgufFamily { is_interleaved: true, ..GgufFamily::plain("llama") }),
            hosted: Some(HostedFamily {
                has_head_dim: false,
                has_window: false,
                has_rope_scaling: true,
                ..HostedFamily::PLAIN
            }),
        },
        read: llama,
    },
    Entry {
        family: Family {
            name: "mistral",
            class: "MistralForCausalLM",
            experts: None,
            // GGUF files of it are of the architecture llama.
            gguf: None,
            hosted: Some(HostedFamily::PLAIN),
        },
        read: mistral,
    },
    Entry {
        family: Family {
            name: "qwen2",
            class: "Qwen2ForCausalLM",
            experts: None,
            gguf: Some(GgufFamily::plain("qwen2")),
            hosted: Some(HostedFamily {
                has_qkv_bias: true,
                has_head_dim: false,
                ..HostedFamily::PLAIN
            }),
        },
        read: qwen2,
    },
    Entry {
        family: Family {
            name: "qwen3",
            class: "Qwen3ForCausalLM",
            experts: None,
            gguf: Some(GgufFamily::plain("qwen3")),
            hosted: Some(HostedFamily::PLAIN),
        },
        read: qwen3,
    },
    Entry {
        family: Family {
            name: "gemma2",
            class: "Gemma2ForCausalLM",
            experts: None,
            gguf: Some(GgufFamily {
                ffn_norm: "pre_feedforward_layernorm",
                norms_include_one: true,
                activation: Some("gelu_pytorch_tanh"),
                // The 27B model.
                scaled_by_heads: Some(46),
                ..GgufFamily::plain("gemma2")
            }),
            // A cap on the logits would change the row behind them.
            hosted: None,
        },
        read: gemma2,
    },
    Entry {
        family: Family {
            name: "phi3",
            class: "Phi3ForCausalLM",
            experts: None,
            gguf: Some(GgufFamily { ffn_up: "mlp.gate_up_proj", ..GgufFamily::plain("phi3") }),
            hosted: Some(HostedFamily { has_head_dim: false, ..HostedFamily::PLAIN }),
        },
        read: phi3,
    },
    Entry {
        family: Family {
            name: "mixtral",
            class: "MixtralForCausalLM",
            experts: Some(MIXTRAL_EXPERTS),
            gguf: Some(GgufFamily {
                experts: 1..=u64::MAX,
                is_interleaved: true,
                ..GgufFamily::plain("llama")
            }),
            hosted: Some(HostedFamily { has_head_dim: false, ..HostedFamily::PLAIN }),
        },
        read: mixtral,
    },
    Entry {
        family: Family {
            name: "qwen3_moe",
            class: "Qwen3MoeForCausalLM",
            experts: Some(QWEN_EXPERTS),
            gguf: Some(GgufFamily { experts: 0..=u64::MAX, ..GgufFamily::plain("qwen3moe") }),
            // On the processor mistral.rs 0.8.1 finds experts only where they are stacked.
            hosted: None,
        },
        read: qwen3_moe,
    },
];

/// Every family that can be loaded, in the order in which errors list them.
pub fn families() -> impl Iterator<Item = &'static Family> {
    ENTRIES.iter().map(|entry| &entry.family)
}

/// The family that GGUF files hold under `architecture` with so many experts, and how.
pub fn of_gguf(architecture: &str, experts: u64) -> Option<(&'static Family, &'static GgufFamily)> {
    families().find_map(|family| {
        let gguf = family.gguf.as_ref()?;
        let is_it = gguf.architecture == architecture && gguf.experts.contains(&experts);
        is_it.then_some((family, gguf))
    })
}

/// Reads the configuration as its family does.
pub(super) fn read(c: &CheckpointConfig<'_>) -> Result<Spec, LoadError> {
    let key = "model_type";
    let name = c.string(key)?;
    let Some(entry) = ENTRIES.iter().find(|entry| entry.family.name == name) else {
        return Err(c.unsupported(key, &name, &listed(families().map(|f| f.name))));
    };
    let spec = (entry.read)(c, &entry.family)?;
    c.check_architecture(&entry.family)?;
    Ok(spec)
}

fn llama(c: &CheckpointConfig<'_>, family: &'static Family) -> Result<Spec, LoadError> {
    c.only("mlp_bias", &Value::Bool(false))?;
    let bias = c.flag("attention_bias")?;
    let mut spec = dense(c, family)?;
    (spec.attention.qkv_bias, spec.attention.out_bias) = (bias, bias);
    Ok(spec)
}

fn mistral(c: &CheckpointConfig<'_>, family: &'static Family) -> Result<Spec, LoadError> {
    let mut spec = dense(c, family)?;
    spec.attention.windows = vec![c.window_or(4096)?; spec.layers];
    Ok(spec)
}

fn qwen2(c: &CheckpointConfig<'_>, family: &'static Family) -> Result<Spec, LoadError> {
    c.only("use_sliding_window", &Value::Bool(false))?;
    let mut spec = dense(c, family)?;
    spec.attention.qkv_bias = true;
    Ok(spec)
}

fn qwen3(c: &CheckpointConfig<'_>, family: &'static Family) -> Result<Spec, LoadError> {
    c.only("use_sliding_window", &Value::Bool(false))?;
    let bias = c.flag("attention_bias")?;
    let mut spec = dense(c, family)?;
    (spec.attention.qkv_bias, spec.attention.out_bias) = (bias, bias);
    spec.attention.qk_norm = true;
    Ok(spec)
}

fn gemma2(c: &CheckpointConfig<'_>, family: &'static Family) -> Result<Spec, LoadError> {
    c.only("attention_bias", &Value::Bool(false))?;
    let mut spec = dense(c, family)?;
    let scalar = c.optional_f64("query_pre_attn_scalar")?.unwrap_or(256.0);
    spec.attention.scale = (1.0 / scalar.sqrt()) as f32;
    spec.attention.softcap = c.f64_or("attn_logit_softcapping", 50.0)?.map(|v| v as f32);
    spec.logit_softcap = c.f64_or("final_logit_softcapping", 30.0)?.map(|v| v as f32);
    if !c.has("hidden_activation") && !c.has("hidden_act") {
        spec.feed_forward.activation = Activation::GeluTanh;
    }
    let window = c.window_or(4096)?;
    let sliding = c.layer_types(spec.layers)?;
    let sliding = sliding.unwrap_or_else(|| (0..spec.layers).map(|i| i % 2 == 0).collect());
    spec.attention.windows = sliding.into_iter().map(|s| window.filter(|_| s)).collect();
    spec.norm.offset = if c.flag("norm_includes_one")? { 0.0 } else { 1.0 };
    spec.norm.published_offset = 1.0;
    spec.norm.post = true;
    spec.embed_scale = Some((spec.hidden as f32).sqrt());
    // The default of the library for this key.
    spec.tied |= c.json.get("tie_word_embeddings").is_none();
    spec.prefers_bf16 = true;
    Ok(spec)
}

fn phi3(c: &CheckpointConfig<'_>, family: &'static Family) -> Result<Spec, LoadError> {
    let mut spec = dense(c, family)?;
    spec.attention.fused = true;
    spec.feed_forward.fused = true;
    // A window as long as the context limits nothing.
    let window = c.optional_usize("sliding_window")?.filter(|w| *w < spec.context);
    spec.attention.windows = vec![window; spec.layers];
    Ok(spec)
}

fn mixtral(c: &CheckpointConfig<'_>, family: &'static Family) -> Result<Spec, LoadError> {
    let mut spec = dense(c, family)?;
    spec.attention.windows = vec![c.optional_usize("sliding_window")?; spec.layers];
    spec.rope = c.rope(1e6)?;
    spec.feed_forward.experts = Some(ExpertSpec {
        count: c.usize("num_local_experts")?,
        used: c.usize("num_experts_per_tok")?,
        renormalise: true,
        names: MIXTRAL_EXPERTS,
    });
    Ok(spec)
}

fn qwen3_moe(c: &CheckpointConfig<'_>, family: &'static Family) -> Result<Spec, LoadError> {
    c.only("use_sliding_window", &Value::Bool(false))?;
    c.only("decoder_sparse_step", &Value::from(1))?;
    c.only("mlp_only_layers", &Value::Array(Vec::new()))?;
    let bias = c.flag("attention_bias")?;
    let mut spec = dense(c, family)?;
    (spec.attention.qkv_bias, spec.attention.out_bias) = (bias, bias);
    spec.attention.qk_norm = true;
    spec.feed_forward.inter = c.usize("moe_intermediate_size")?;
    let count = if c.has("num_experts") { "num_experts" } else { "num_local_experts" };
    spec.feed_forward.experts = Some(ExpertSpec {
        count: c.usize(count)?,
        used: c.usize("num_experts_per_tok")?,
        // Absent in GGUF, whose converted models all renormalise.
        renormalise: !c.has("norm_topk_prob") || c.flag("norm_topk_prob")?,
        names: QWEN_EXPERTS,
    });
    Ok(spec)
}

/// What all families share; options are off.
fn dense(c: &CheckpointConfig<'_>, family: &'static Family) -> Result<Spec, LoadError> {
    let (hidden, heads) = (c.usize("hidden_size")?, c.usize("num_attention_heads")?);
    let layers = c.layers()?;
    let head_dim = c.optional_usize("head_dim")?.unwrap_or(hidden / heads.max(1));
    c.refuse_partial_rotary()?;
    Ok(Spec {
        family,
        vocab: c.usize("vocab_size")?,
        hidden,
        layers,
        context: c.usize("max_position_embeddings")?,
        attention: AttentionSpec {
            heads,
            kv_heads: c.optional_usize("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            qkv_bias: false,
            out_bias: false,
            qk_norm: false,
            fused: false,
            scale: (1.0 / (head_dim as f64).sqrt()) as f32,
            softcap: None,
            windows: vec![None; layers],
        },
        feed_forward: FeedForwardSpec {
            inter: c.usize("intermediate_size")?,
            activation: c.activation()?,
            fused: false,
            experts: None,
        },
        norm: NormSpec {
            eps: c.f64("rms_norm_eps")? as f32,
            offset: 0.0,
            published_offset: 0.0,
            post: false,
        },
        rope: c.rope(10_000.0)?,
        embed_scale: None,
        logit_softcap: None,
        tied: c.flag("tie_word_embeddings")?,
        prefers_bf16: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn entries_do_not_contradict_each_other() {
        let names: BTreeSet<&str> = families().map(|f| f.name).collect();
        let classes: BTreeSet<&str> = families().map(|f| f.class).collect();
        assert_eq!((names.len(), classes.len()), (ENTRIES.len(), ENTRIES.len()));
        for family in families() {
            let Some(gguf) = &family.gguf else { continue };
            // No file means two families.
            for experts in [0, 8].into_iter().filter(|n| gguf.experts.contains(n)) {
                assert_eq!(of_gguf(gguf.architecture, experts), Some((family, gguf)));
            }
            // A mixture is one by its experts' names, and by what its GGUF files count.
            assert_eq!(family.experts.is_some(), gguf.experts.contains(&8), "{}", family.name);
        }
        assert_eq!(of_gguf("qwen2", 8), None);
        assert_eq!(of_gguf("mamba", 0), None);
    }
}
