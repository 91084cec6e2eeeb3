//! Counts the bytes moved and the operations done by the steps of a model, from its shape alone.
//!
//! Weights and the KV cache have two bytes an element. A multiply-add counts as two operations.

use crate::engine::plan::STEP_TOKENS;
use crate::models::parameter_counts::ParameterCounts;
use crate::models::spec::Spec;

const ELEMENT: f64 = 2.0;

/// What a step moves and computes. Its two parts follow one another in every layer, so neither can
/// use what the other leaves idle.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Work {
    /// Products with weights, each read once.
    pub products: Part,
    /// Attention over the KV cache.
    pub attention: Part,
}

/// A part of a step.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Part {
    /// Bytes read from memory.
    pub bytes: f64,
    /// Floating-point operations.
    pub operations: f64,
}

impl Work {
    /// Bytes of both parts.
    pub fn bytes(&self) -> f64 {
        self.products.bytes + self.attention.bytes
    }

    /// Operations of both parts.
    pub fn operations(&self) -> f64 {
        self.products.operations + self.attention.operations
    }
}

/// Experts of a layer that `tokens` tokens visit at least once, where each visits `used` of
/// `count` at random: `count * (1 - (1 - used / count)^tokens)`.
fn touched(count: usize, used: usize, tokens: f64) -> f64 {
    let (count, used) = (count as f64, used as f64);
    count * (1.0 - (1.0 - used / count).powf(tokens))
}

/// Bytes of the KV cache that a query at the end of `context` positions reads.
fn kv_read(spec: &Spec, context: f64) -> f64 {
    let row = 2.0 * ELEMENT * (spec.attention.kv_heads * spec.attention.head_dim) as f64;
    seen(spec, context) * row
}

/// Positions that a query sees, summed over layers.
fn seen(spec: &Spec, context: f64) -> f64 {
    let in_layer = |layer: usize| match spec.attention.windows.get(layer).copied().flatten() {
        Some(window) => context.min(window as f64),
        None => context,
    };
    (0..spec.layers).map(in_layer).sum()
}

/// Operations of attention for one query: two products over the positions that it sees.
fn attention(spec: &Spec, context: f64) -> f64 {
    4.0 * spec.attention_cols() as f64 * seen(spec, context)
}

/// Bytes of the weights that a step of `tokens` tokens touches, without the head.
fn weights_touched(spec: &Spec, parameters: &ParameterCounts, tokens: f64) -> f64 {
    let experts = spec.feed_forward.experts.map_or(0.0, |e| touched(e.count, e.used, tokens));
    ELEMENT * (parameters.shared + experts * parameters.expert)
}

/// One token for each of `batch` sequences, each `context` positions long.
pub fn decode(spec: &Spec, batch: usize, context: usize) -> Work {
    let (p, batch, context) = (ParameterCounts::of(spec), batch as f64, context as f64);
    let products = Part {
        bytes: weights_touched(spec, &p, batch) + ELEMENT * p.head,
        operations: batch * 2.0 * (p.active() + p.head),
    };
    let attention = Part {
        bytes: batch * kv_read(spec, context),
        operations: batch * attention(spec, context),
    };
    Work { products, attention }
}

/// `prompts` new prompts of `tokens` tokens each, computed in steps that are full; of each the last
/// `scored` rows go through the head. A step reads the weights once for all its rows.
pub fn prefill(spec: &Spec, prompts: usize, tokens: usize, scored: usize) -> Work {
    let p = ParameterCounts::of(spec);
    let (rows, each) = (prompts * tokens, tokens.div_ceil(STEP_TOKENS));
    let steps = rows.div_ceil(STEP_TOKENS) as f64;
    let weights = weights_touched(spec, &p, rows.min(STEP_TOKENS) as f64);
    let (prompts, tokens, scored) = (prompts as f64, tokens as f64, scored as f64);
    let products = Part {
        bytes: steps * weights + steps.min(prompts) * ELEMENT * p.head,
        operations: 2.0 * prompts * (p.active() * tokens + p.head * scored),
    };
    // The mean query sees half of the prompt, and a step reads what its prompt has up to it.
    let attention = Part {
        bytes: prompts * kv_read(spec, tokens) * (each as f64 + 1.0) / 2.0,
        operations: prompts * tokens * attention(spec, (tokens + 1.0) / 2.0),
    };
    Work { products, attention }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::plan::weight_bytes;
    use crate::models::config::samples::LLAMA_8B;
    use serde_json::json;

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-3 * b.abs()
    }

    #[test]
    fn an_8b_llama_has_its_known_numbers() {
        let spec = LLAMA_8B.spec();
        let p = ParameterCounts::of(&spec);
        // 8.03e9 parameters with the embedding of 0.525e9, norms left out.
        assert!(near(p.shared + 2.0 * p.head, 8.03e9), "{p:?}");
        let one = decode(&spec, 1, 0);
        assert!(near(one.bytes(), weight_bytes(&spec) as f64), "{one:?}");
        assert!(near(one.operations(), 2.0 * (p.shared + p.head)));
        // 128 KiB of cache a token.
        let deep = decode(&spec, 1, 1000);
        assert!(near(deep.bytes() - one.bytes(), 131_072.0 * 1000.0));
        let batch = decode(&spec, 8, 1000);
        assert!(near(batch.bytes() - one.bytes(), 8.0 * 131_072.0 * 1000.0));
    }

    #[test]
    fn experts_are_touched_by_more_tokens_but_computed_by_each() {
        let moe = LLAMA_8B.spec_with(&json!({
            "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2,
            "vocab_size": 32_000,
        }));
        assert!(near(touched(8, 2, 1.0), 2.0) && touched(8, 2, 1000.0) > 7.99);
        let (one, many) = (decode(&moe, 1, 0), decode(&moe, 64, 0));
        assert!(
            many.bytes() > 3.0 * one.bytes() && many.bytes() < 4.0 * one.bytes(),
            "{one:?} {many:?}"
        );
        assert!(near(many.operations(), 64.0 * one.operations()));
        assert!(near(many.bytes(), weight_bytes(&moe) as f64), "{many:?}");
    }

    #[test]
    fn windows_bound_what_is_read() {
        let wide = LLAMA_8B.spec_with(&json!({"model_type": "mistral", "sliding_window": null}));
        let narrow = LLAMA_8B.spec_with(&json!({"model_type": "mistral", "sliding_window": 4096}));
        let read = |spec: &Spec| decode(spec, 1, 32_768).bytes() - decode(spec, 1, 0).bytes();
        assert!(near(read(&wide), 8.0 * read(&narrow)));
        let (short, long) = (prefill(&wide, 1, 512, 1), prefill(&wide, 1, 1024, 1));
        assert!(long.operations() > 2.0 * short.operations(), "{short:?} {long:?}");
        assert!((1.9..2.1).contains(&(long.bytes() / short.bytes())), "{short:?} {long:?}");
    }

    #[test]
    fn prompts_share_the_weights_of_a_step() {
        let spec = LLAMA_8B.spec();
        let one = prefill(&spec, 1, 128, 1);
        let (four, eight) = (prefill(&spec, 4, 128, 1), prefill(&spec, 8, 128, 1));
        // Four prompts fill a step, eight fill two.
        let ratio = |a: &Work, b: &Work| a.products.bytes / b.products.bytes;
        assert!(near(ratio(&four, &one), 1.0) && near(ratio(&eight, &one), 2.0));
        assert!(near(four.operations(), 4.0 * one.operations()));
        assert!(near(eight.attention.bytes, 8.0 * one.attention.bytes));
    }
}
