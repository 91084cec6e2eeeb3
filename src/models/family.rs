//! Describes what sets a family apart outside its configuration: names in files of other formats,
//! and what the second engine computes of it. The families themselves are in `config/families.rs`.

use std::ops::RangeInclusive;

/// A family of decoder-only transformers.
#[derive(Clone, PartialEq, Debug)]
pub struct Family {
    /// `model_type` of the configuration.
    pub name: &'static str,
    /// The one class in `architectures` whose output is the next token.
    pub class: &'static str,
    /// Names of the experts' tensors, for mixtures.
    pub experts: Option<ExpertNames>,
    /// How GGUF files hold it; `None` where they hold it as another family, or not at all.
    pub gguf: Option<GgufFamily>,
    /// What the class of mistral.rs computes; `None` where hidden rows do not come through it.
    pub hosted: Option<HostedFamily>,
}

/// Tensor names of a mixture, within `model.layers.N`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExpertNames {
    /// The router and the experts live below this module.
    pub module: &'static str,
    /// Gate, up and down projection of an expert.
    pub projections: [&'static str; 3],
    /// vLLM registers the router before the experts.
    pub router_first: bool,
}

/// How GGUF files, which llama.cpp's converter makes, hold a family.
#[derive(Clone, PartialEq, Debug)]
pub struct GgufFamily {
    /// `general.architecture`.
    pub architecture: &'static str,
    /// Values of `expert_count` by which families of one architecture are told apart; an absent
    /// key is 0.
    pub experts: RangeInclusive<u64>,
    /// Whether rows of q and k lie with the two rotary halves of each head interleaved.
    pub is_interleaved: bool,
    /// `ffn_norm` by its Hugging Face name.
    pub ffn_norm: &'static str,
    /// `ffn_up` by its Hugging Face name.
    pub ffn_up: &'static str,
    /// Whether stored norms are the sum of weight and offset.
    pub norms_include_one: bool,
    /// `hidden_activation`, which the metadata leaves out.
    pub activation: Option<&'static str>,
    /// Layers of the model that scales its queries by hidden size over heads, and not by the size
    /// of a head; the metadata does not say so.
    pub scaled_by_heads: Option<u64>,
}

impl GgufFamily {
    /// A dense family of plain names, whose metadata says everything.
    pub const fn plain(architecture: &'static str) -> Self {
        Self {
            architecture,
            experts: 0..=0,
            is_interleaved: false,
            ffn_norm: "post_attention_layernorm",
            ffn_up: "mlp.up_proj",
            norms_include_one: false,
            activation: None,
            scaled_by_heads: None,
        }
    }
}

/// What mistral.rs computes of a family (`docs/mistralrs.md`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostedFamily {
    /// Whether it adds biases of q, k and v.
    pub has_qkv_bias: bool,
    /// Whether heads may have another size than hidden size over heads.
    pub has_head_dim: bool,
    /// Whether it sees a limited window of positions.
    pub has_window: bool,
    /// Whether it stretches the frequencies of rotations.
    pub has_rope_scaling: bool,
}

impl HostedFamily {
    /// No biases, heads of any size, windows, frequencies as they are.
    pub const PLAIN: Self =
        Self { has_qkv_bias: false, has_head_dim: true, has_window: true, has_rope_scaling: false };
}

/// Names as a sentence goes on with them: `a, b and c are`.
pub fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    match names.split_last() {
        None => "none is".to_owned(),
        Some((only, [])) => format!("{only} is"),
        Some((last, others)) => format!("{} and {last} are", others.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_listed_as_a_sentence_needs_them() {
        for (names, want) in
            [(&[][..], "none is"), (&["a"], "a is"), (&["a", "b", "c"], "a, b and c are")]
        {
            assert_eq!(listed(names.iter().copied()), want);
        }
    }
}
