//! Translates the tensors of a GGUF file to the names and the row order that Hugging Face files
//! have.

use crate::models::error::LoadError;
use crate::models::family::{ExpertNames, Family, GgufFamily};
use crate::models::tensor::Tensor;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Heads and experts, which the order of rows and stacks depends on.
pub(super) struct HeadCounts {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) experts: usize,
}

/// All tensors of a file of a family, translated.
pub(super) fn translate_all(
    (family, gguf): (&Family, &GgufFamily),
    counts: &HeadCounts,
    stored: &BTreeMap<String, Tensor>,
) -> Result<BTreeMap<String, Tensor>, LoadError> {
    let mut tensors = BTreeMap::new();
    for (name, tensor) in stored {
        let mut tensor = tensor.clone();
        if gguf.is_interleaved {
            if name.contains("attn_q.") {
                unpermute(&mut tensor, counts.heads);
            } else if name.contains("attn_k.") {
                unpermute(&mut tensor, counts.kv_heads);
            }
        }
        match expert_stack(family, name) {
            Some(expert) => split_experts(&tensor, counts.experts, &expert, &mut tensors)?,
            None => insert(&mut tensors, translate(family, gguf, name), tensor)?,
        }
    }
    Ok(tensors)
}

/// Refuses a second tensor of one name: two names of the file may mean the same.
fn insert(
    tensors: &mut BTreeMap<String, Tensor>,
    name: String,
    tensor: Tensor,
) -> Result<(), LoadError> {
    if let Some(other) = tensors.get(&name) {
        return Err(tensor.error(format!("means the same as `{}`: {name}", other.name)));
    }
    tensors.insert(name, tensor);
    Ok(())
}

/// The Hugging Face name of a GGUF tensor; unknown names stay as they are.
fn translate(family: &Family, gguf: &GgufFamily, name: &str) -> String {
    match name {
        "token_embd.weight" => return "model.embed_tokens.weight".into(),
        "output_norm.weight" => return "model.norm.weight".into(),
        "output.weight" => return "lm_head.weight".into(),
        _ => {}
    }
    let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let Some((layer, part)) = layer else { return name.to_owned() };
    let (part, suffix) = part.rsplit_once('.').unwrap_or((part, "weight"));
    let part = match part {
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_qkv" => "self_attn.qkv_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "attn_norm" => "input_layernorm",
        "ffn_norm" => gguf.ffn_norm,
        "post_attention_norm" => "post_attention_layernorm",
        "post_ffw_norm" => "post_feedforward_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => gguf.ffn_up,
        "ffn_down" => "mlp.down_proj",
        "ffn_gate_inp" => {
            let module = family.experts.map_or("mlp", |experts| experts.module);
            return format!("model.layers.{layer}.{module}.gate.{suffix}");
        }
        other => other,
    };
    format!("model.layers.{layer}.{part}.{suffix}")
}

/// For a stack of all experts' matrices: the name of one expert's, with `{}` for its number.
fn expert_stack(family: &Family, name: &str) -> Option<String> {
    let ExpertNames { module, projections: [gate, up, down], .. } = family.experts?;
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    let projection = match part {
        "ffn_gate_exps.weight" => gate,
        "ffn_up_exps.weight" => up,
        "ffn_down_exps.weight" => down,
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{module}.experts.{{}}.{projection}.weight"))
}

fn split_experts(
    stack: &Tensor,
    experts: usize,
    name: &str,
    tensors: &mut BTreeMap<String, Tensor>,
) -> Result<(), LoadError> {
    let [count, rows, cols] = stack.shape[..] else {
        return Err(stack.error(format!("expected 3 dimensions, got {:?}", stack.shape)));
    };
    if count != experts {
        return Err(stack.error(format!("expected {experts} experts, got {count}")));
    }
    // Of a type whose size is not known, every expert is the whole stack: nothing can use it.
    let bytes = stack.stored.bytes(rows * cols).map(|bytes| bytes as u64);
    for expert in 0..experts {
        let range = bytes.map_or(stack.range.clone(), |bytes| {
            let start = stack.range.start + expert as u64 * bytes;
            start..start + bytes
        });
        let translated = name.replace("{}", &expert.to_string());
        let (name, shape) = (translated.clone(), vec![rows, cols]);
        insert(tensors, translated, Tensor { name, shape, range, ..stack.clone() })?;
    }
    Ok(())
}

/// llama.cpp interleaves the two rotary halves of each head; this reads them back half by half.
fn unpermute(tensor: &mut Tensor, heads: usize) {
    let rows = if tensor.shape.len() == 1 { 0 } else { tensor.rows() };
    if rows == 0 || heads == 0 || !rows.is_multiple_of(heads * 2) {
        return;
    }
    let head_dim = rows / heads;
    tensor.order = Some(Arc::new(move |row| {
        let (head, r) = (row / head_dim, row % head_dim);
        head * head_dim + r % (head_dim / 2) * 2 + r / (head_dim / 2)
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::config::of_gguf;

    #[test]
    fn names_become_those_of_hugging_face() {
        for (arch, experts, from, to) in [
            ("llama", 0, "token_embd.weight", "model.embed_tokens.weight"),
            ("llama", 0, "blk.7.attn_q.weight", "model.layers.7.self_attn.q_proj.weight"),
            ("qwen2", 0, "blk.0.attn_k.bias", "model.layers.0.self_attn.k_proj.bias"),
            ("llama", 0, "blk.1.ffn_norm.weight", "model.layers.1.post_attention_layernorm.weight"),
            (
                "gemma2",
                0,
                "blk.1.ffn_norm.weight",
                "model.layers.1.pre_feedforward_layernorm.weight",
            ),
            ("phi3", 0, "blk.2.ffn_up.weight", "model.layers.2.mlp.gate_up_proj.weight"),
            (
                "llama",
                8,
                "blk.2.ffn_gate_inp.weight",
                "model.layers.2.block_sparse_moe.gate.weight",
            ),
            ("qwen3moe", 8, "blk.2.ffn_gate_inp.weight", "model.layers.2.mlp.gate.weight"),
            ("llama", 0, "rope_freqs.weight", "rope_freqs.weight"),
        ] {
            let (family, gguf) = of_gguf(arch, experts).unwrap();
            assert_eq!(translate(family, gguf, from), to);
        }
        for (arch, part, name) in [
            ("qwen3moe", "up", "model.layers.3.mlp.experts.{}.up_proj.weight"),
            ("llama", "down", "model.layers.3.block_sparse_moe.experts.{}.w2.weight"),
        ] {
            let (family, _) = of_gguf(arch, 8).unwrap();
            let stack = format!("blk.3.ffn_{part}_exps.weight");
            assert_eq!(expert_stack(family, &stack).as_deref(), Some(name));
        }
    }
}
