//! Turns `config.json` into a [`Spec`]: every family reads its own keys, and a value that the
//! engine cannot honour is refused by name, never ignored.

mod families;
mod reader;
mod rope;
#[cfg(test)]
pub(crate) mod samples;

pub use families::{families, of_gguf};

use super::error::LoadError;
use super::quantised::Quantisation;
use super::spec::Spec;
use crate::ops::attention::HEAD_DIM_MAX;
use crate::ops::lanes::LANES;
use reader::CheckpointConfig;
use serde_json::Value;
use std::path::Path;

/// What a shape may be. The largest published models have 128 layers of 16384 elements; with these
/// limits no size in bytes overflows 64 bits.
const EXPERTS_MAX: usize = 1 << 12;
const HEADS_MAX: usize = 1 << 10;
const HIDDEN_MAX: usize = 1 << 17;
const INTER_MAX: usize = 1 << 20;
const VOCAB_MAX: usize = 1 << 22;
const CONTEXT_MAX: usize = 1 << 28;

/// Reads the model's shape and options.
///
/// # Errors
/// When a key is missing, has the wrong type, or a value is not supported.
pub fn parse(path: &Path, json: &Value) -> Result<Spec, LoadError> {
    let config = CheckpointConfig { path, json };
    if !json.is_object() {
        return Err(LoadError::invalid(path, "must be an object"));
    }
    Quantisation::of(path, json)?;
    let spec = families::read(&config)?;
    check_shape(&config, &spec)?;
    Ok(spec)
}

fn check_shape(c: &CheckpointConfig<'_>, spec: &Spec) -> Result<(), LoadError> {
    let a = &spec.attention;
    let experts = spec.feed_forward.experts;
    for (key, value, max) in [
        ("vocab_size", spec.vocab, VOCAB_MAX),
        ("hidden_size", spec.hidden, HIDDEN_MAX),
        ("max_position_embeddings", spec.context, CONTEXT_MAX),
        ("num_attention_heads", a.heads, HEADS_MAX),
        ("num_key_value_heads", a.kv_heads, HEADS_MAX),
        ("intermediate_size", spec.feed_forward.inter, INTER_MAX),
        ("num_experts", experts.map_or(1, |e| e.count), EXPERTS_MAX),
    ] {
        c.within(key, value, max)?;
    }
    if !a.heads.is_multiple_of(a.kv_heads) {
        let what = format!("must divide num_attention_heads = {}, got {}", a.heads, a.kv_heads);
        return Err(c.error("num_key_value_heads", what));
    }
    if a.head_dim == 0 || !a.head_dim.is_multiple_of(LANES) || a.head_dim > HEAD_DIM_MAX {
        let supported = format!("multiples of {LANES} up to {HEAD_DIM_MAX} are");
        return Err(c.unsupported("head_dim", &a.head_dim.to_string(), &supported));
    }
    for (key, value) in
        [("hidden_size", spec.hidden), ("intermediate_size", spec.feed_forward.inter)]
    {
        if !value.is_multiple_of(2) {
            return Err(c.unsupported(key, &value.to_string(), "even numbers are"));
        }
    }
    if let Some(e) = experts
        && !(1..=e.count).contains(&e.used)
    {
        let what = format!("must lie in 1..={}, got {}", e.count, e.used);
        return Err(c.error("num_experts_per_tok", what));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::samples::LlamaSizes;
    use super::*;
    use crate::ops::rowwise::Activation;
    use serde_json::json;

    fn base() -> Value {
        let tiny = LlamaSizes {
            vocab: 100,
            hidden: 64,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            inter: 96,
            context: 256,
            tied: false,
        };
        let mut json = tiny.json();
        json["hidden_act"] = json!("silu");
        json
    }

    fn parse_with(key: &str, value: Value) -> Result<Spec, String> {
        let mut json = base();
        json[key] = value;
        parse(Path::new("config.json"), &json).map_err(|e| e.to_string())
    }

    #[test]
    fn a_plain_llama_is_understood() {
        let spec = parse(Path::new("config.json"), &base()).unwrap();
        assert_eq!((spec.attention.head_dim, spec.qkv_rows()), (16, 128));
        assert!(!spec.tied && spec.attention.windows == [None, None]);
    }

    #[test]
    fn absent_keys_have_their_librarys_defaults_and_null_takes_away() {
        let of = |family: &str, key: Option<(&str, Value)>| {
            let mut json = base();
            json["model_type"] = json!(family);
            json.as_object_mut().unwrap().remove("hidden_act");
            (json["num_local_experts"], json["num_experts_per_tok"]) = (json!(4), json!(2));
            if let Some((key, value)) = key {
                json[key] = value;
            }
            parse(Path::new("config.json"), &json).unwrap()
        };
        let gemma = of("gemma2", None);
        assert_eq!((gemma.attention.softcap, gemma.logit_softcap), (Some(50.0), Some(30.0)));
        assert_eq!(gemma.attention.scale, 1.0 / 16.0);
        assert_eq!(gemma.feed_forward.activation, Activation::GeluTanh);
        assert_eq!(gemma.attention.windows, [Some(4096), None]);
        let without = |key: &str| of("gemma2", Some((key, Value::Null)));
        assert_eq!(without("attn_logit_softcapping").attention.softcap, None);
        assert_eq!(without("final_logit_softcapping").logit_softcap, None);
        assert_eq!(without("sliding_window").attention.windows, [None, None]);
        assert_eq!(of("mixtral", None).rope.theta, 1e6);
        assert_eq!(of("mixtral", Some(("rope_theta", json!(5e5)))).rope.theta, 5e5);
        assert_eq!(of("qwen2", None).rope.theta, 1e4);
    }

    #[test]
    fn values_that_cannot_be_honoured_are_refused_by_name() {
        for (key, value, want) in [
            ("model_type", json!("mamba"), "`model_type` = mamba is not supported; llama, mist"),
            ("hidden_act", json!("relu"), "`hidden_act` = relu is not supported"),
            ("mlp_bias", json!(true), "`mlp_bias` = true is not supported; false is"),
            ("rope_scaling", json!({"type": "yarn"}), "`rope_scaling.rope_type` = yarn is not"),
            ("rope_scaling", json!({"type": "linear"}), "`rope_scaling.factor` must be a positive"),
            ("rope_scaling", json!("linear"), "`rope_scaling` must be an object, got \"linear\""),
            ("rope_scaling", json!([]), "`rope_scaling` must be an object, got []"),
            ("rope_parameters", json!(1), "`rope_parameters` must be an object, got 1"),
            ("rope_scaling", json!({"type": 3}), "`rope_scaling.type` must be text, got 3"),
            ("rope_scaling", json!({"factor": 4.0}), "`rope_scaling.factor` = 4 is not supported"),
            ("rope_scaling", json!({"type": "linear", "factor": "2"}), "number, got \"2\""),
            (
                "rope_scaling",
                json!({"rope_type": "default", "type": "linear", "factor": 2}),
                "`rope_scaling.type` is \"linear\", but `rope_scaling.rope_type` is \"default\"",
            ),
            (
                "rope_scaling",
                json!({"partial_rotary_factor": 0.5}),
                "`rope_scaling.partial_rotary_factor` = 0.5 is not supported",
            ),
            (
                "rope_parameters",
                json!({"rope_type": "default", "mrope_section": [1, 2]}),
                "`rope_parameters.mrope_section` = [1,2] is not supported",
            ),
            (
                "rope_scaling",
                json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
                    "high_freq_factor": 4, "original_max_position_embeddings": 8192}),
                "`rope_scaling.high_freq_factor` must be above low_freq_factor = 4, got 4",
            ),
            (
                "architectures",
                json!(["LlamaForSequenceClassification"]),
                "`architectures` = \"LlamaForSequenceClassification\" is not supported; \
                    LlamaForCausalLM is for llama",
            ),
            ("architectures", json!("LlamaForCausalLM"), "`architectures` must be a list"),
            ("num_hidden_layers", json!(u64::MAX), "`num_hidden_layers` must lie in 1..=1024"),
            ("vocab_size", json!(1 << 23), "`vocab_size` must lie in 1..=4194304, got 8388608"),
            ("quantization_config", json!({"quant_method": "eetq"}), "= \"eetq\" is not supported"),
            ("partial_rotary_factor", json!(0.5), "`partial_rotary_factor` = 0.5 is not supported"),
            ("head_dim", json!(20), "`head_dim` = 20 is not supported; multiples of 16"),
            ("num_key_value_heads", json!(3), "`num_key_value_heads` must divide"),
            ("vocab_size", json!(-1), "`vocab_size` must be a whole number of at least 0, got -1"),
            ("vocab_size", json!(null), "`vocab_size` is missing"),
            ("hidden_size", json!("64"), "`hidden_size` must be a whole number"),
        ] {
            let error = parse_with(key, value).unwrap_err();
            assert!(error.contains(want), "{key}: {error}");
        }
    }

    #[test]
    fn both_spellings_of_rope_parameters_are_read() {
        let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5});
        let new = parse_with("rope_parameters", llama3.clone()).unwrap().rope;
        let old = parse_with("rope_scaling", llama3.clone()).unwrap().rope;
        assert_eq!((new.theta, old.theta), (5e5, 5e5));
        assert_eq!(new.scaling, old.scaling);
        // What is said twice must be the same.
        let mut json = base();
        json["rope_parameters"] = llama3.clone();
        json["rope_scaling"] = llama3;
        json["rope_theta"] = json!(5e5);
        assert_eq!(parse(Path::new("config.json"), &json).unwrap().rope, new);
        for (key, value, want) in [
            (
                "rope_theta",
                json!(1e4),
                "`rope_parameters.rope_theta` is 500000.0, but `rope_theta`",
            ),
            ("rope_scaling", json!({"type": "linear", "factor": 2}), "`rope_scaling` is Linear"),
        ] {
            let mut json = json.clone();
            json[key] = value;
            let error = parse(Path::new("config.json"), &json).unwrap_err().to_string();
            assert!(error.contains(want), "expected `{want}` in `{error}`");
        }
    }

    #[test]
    fn only_models_of_the_next_token_are_served() {
        for (family, class) in [("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM")] {
            let mut json = base();
            (json["model_type"], json["architectures"]) = (json!(family), json!([class]));
            assert_eq!(parse(Path::new("config.json"), &json).unwrap().family.name, family);
        }
    }

    #[test]
    fn gemma_alternates_windows() {
        let mut json = base();
        json["model_type"] = json!("gemma2");
        json["hidden_activation"] = json!("gelu_pytorch_tanh");
        json["sliding_window"] = json!(32);
        let spec = parse(Path::new("config.json"), &json).unwrap();
        assert_eq!(spec.attention.windows, [Some(32), None]);
        assert_eq!((spec.norm.offset, spec.norm.post, spec.tied), (1.0, true, true));
        json["layer_types"] = json!(["full_attention", "sliding_attention"]);
        let spec = parse(Path::new("config.json"), &json).unwrap();
        assert_eq!(spec.attention.windows, [None, Some(32)]);
    }
}
