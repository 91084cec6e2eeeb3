//! Translates the tensors of a GGUF file to the names and the row order that Hugging Face files
//! have.

use crate::models::error::LoadError;
use crate::models::tensor::Tensor;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Heads and experts, which the order of rows and stacks depends on.
pub(super) struct Counts {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) experts: usize,
}

/// All tensors of a file of the architecture `arch`, translated.
pub(super) fn translate_all(
    arch: &str,
    counts: &Counts,
    stored: &BTreeMap<String, Tensor>,
) -> Result<BTreeMap<String, Tensor>, LoadError> {
    let mut tensors = BTreeMap::new();
    for (name, tensor) in stored {
        let mut tensor = tensor.clone();
        if arch == "llama" {
            if name.contains("attn_q.") {
                unpermute(&mut tensor, counts.heads);
            } else if name.contains("attn_k.") {
                unpermute(&mut tensor, counts.kv_heads);
            }
        }
        match expert_stack(arch, name) {
            Some(expert) => split_experts(&tensor, counts.experts, &expert, &mut tensors)?,
            None => insert(&mut tensors, translate(arch, name), tensor)?,
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
fn translate(arch: &str, name: &str) -> String {
    match name {
        "token_embd.weight" => return "model.embed_tokens.weight".into(),
        "output_norm.weight" => return "model.norm.weight".into(),
        "output.weight" => return "lm_head.weight".into(),
        _ => {}
    }
    let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let Some((layer, part)) = layer else { return name.to_owned() };
    let (part, suffix) = part.rsplit_once('.').unwrap_or((part, "weight"));
    let part = match (part, arch) {
        ("attn_q", _) => "self_attn.q_proj",
        ("attn_k", _) => "self_attn.k_proj",
        ("attn_v", _) => "self_attn.v_proj",
        ("attn_qkv", _) => "self_attn.qkv_proj",
        ("attn_output", _) => "self_attn.o_proj",
        ("attn_q_norm", _) => "self_attn.q_norm",
        ("attn_k_norm", _) => "self_attn.k_norm",
        ("attn_norm", _) => "input_layernorm",
        ("ffn_norm", "gemma2") => "pre_feedforward_layernorm",
        ("ffn_norm", _) | ("post_attention_norm", _) => "post_attention_layernorm",
        ("post_ffw_norm", _) => "post_feedforward_layernorm",
        ("ffn_up", "phi3") => "mlp.gate_up_proj",
        ("ffn_gate", _) => "mlp.gate_proj",
        ("ffn_up", _) => "mlp.up_proj",
        ("ffn_down", _) => "mlp.down_proj",
        ("ffn_gate_inp", "llama") => "block_sparse_moe.gate",
        ("ffn_gate_inp", _) => "mlp.gate",
        (other, _) => other,
    };
    format!("model.layers.{layer}.{part}.{suffix}")
}

/// For a stack of all experts' matrices: the name of one expert's, with `{}` for its number.
fn expert_stack(arch: &str, name: &str) -> Option<String> {
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    let (mixtral, qwen) = match part {
        "ffn_gate_exps.weight" => ("w1", "gate_proj"),
        "ffn_up_exps.weight" => ("w3", "up_proj"),
        "ffn_down_exps.weight" => ("w2", "down_proj"),
        _ => return None,
    };
    Some(match arch {
        "llama" => format!("model.layers.{layer}.block_sparse_moe.experts.{{}}.{mixtral}.weight"),
        _ => format!("model.layers.{layer}.mlp.experts.{{}}.{qwen}.weight"),
    })
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

    #[test]
    fn names_become_those_of_hugging_face() {
        for (arch, from, to) in [
            ("llama", "token_embd.weight", "model.embed_tokens.weight"),
            ("llama", "blk.7.attn_q.weight", "model.layers.7.self_attn.q_proj.weight"),
            ("qwen2", "blk.0.attn_k.bias", "model.layers.0.self_attn.k_proj.bias"),
            ("llama", "blk.1.ffn_norm.weight", "model.layers.1.post_attention_layernorm.weight"),
            ("gemma2", "blk.1.ffn_norm.weight", "model.layers.1.pre_feedforward_layernorm.weight"),
            ("phi3", "blk.2.ffn_up.weight", "model.layers.2.mlp.gate_up_proj.weight"),
            ("llama", "rope_freqs.weight", "rope_freqs.weight"),
        ] {
            assert_eq!(translate(arch, from), to);
        }
        assert_eq!(
            expert_stack("qwen3moe", "blk.3.ffn_up_exps.weight").as_deref(),
            Some("model.layers.3.mlp.experts.{}.up_proj.weight")
        );
    }
}
