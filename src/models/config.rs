//! Turns `config.json` into a [`Spec`]: every family reads its own keys, and a value that the
//! engine cannot honour is refused by name, never ignored.

mod rope;

use super::error::LoadError;
use super::spec::{AttentionSpec, ExpertNames, ExpertSpec, FeedForwardSpec, NormSpec, Spec};
use crate::ops::attention::HEAD_DIM_MAX;
use crate::ops::lanes::LANES;
use crate::ops::rowwise::Activation;
use serde_json::Value;
use std::path::Path;

/// What a shape may be. The largest published models have 128 layers of 16384 elements; with these
/// limits no size in bytes overflows 64 bits.
const LAYERS_MAX: usize = 1 << 10;
const EXPERTS_MAX: usize = 1 << 12;
const HEADS_MAX: usize = 1 << 10;
const HIDDEN_MAX: usize = 1 << 17;
const INTER_MAX: usize = 1 << 20;
const VOCAB_MAX: usize = 1 << 22;
const CONTEXT_MAX: usize = 1 << 28;

/// Families by `model_type`.
const FAMILIES: &str = "llama, mistral, qwen2, qwen3, gemma2, phi3, mixtral and qwen3_moe are";
const MIXTRAL: ExpertNames =
    ExpertNames { module: "block_sparse_moe", projections: ["w1", "w3", "w2"], router_first: true };
const QWEN_MOE: ExpertNames = ExpertNames {
    module: "mlp",
    projections: ["gate_proj", "up_proj", "down_proj"],
    router_first: false,
};

/// Reads the model's shape and options.
///
/// # Errors
/// When a key is missing, has the wrong type, or a value is not supported.
pub fn parse(path: &Path, json: &Value) -> Result<Spec, LoadError> {
    let config = Config { path, json };
    if !json.is_object() {
        return Err(LoadError::invalid(path, "must be an object"));
    }
    config.refuse_quantised()?;
    let spec = match config.string("model_type")?.as_str() {
        "llama" => llama(&config)?,
        "mistral" => mistral(&config)?,
        "qwen2" => qwen2(&config)?,
        "qwen3" => qwen3(&config)?,
        "gemma2" => gemma2(&config)?,
        "phi3" => phi3(&config)?,
        "mixtral" => mixtral(&config)?,
        "qwen3_moe" => qwen3_moe(&config)?,
        other => return Err(config.unsupported("model_type", other, FAMILIES)),
    };
    config.check_architecture(spec.family)?;
    check_shape(&config, &spec)?;
    Ok(spec)
}

fn llama(c: &Config<'_>) -> Result<Spec, LoadError> {
    c.only("mlp_bias", &Value::Bool(false))?;
    let bias = c.flag("attention_bias")?;
    let mut spec = dense(c, "llama")?;
    (spec.attention.qkv_bias, spec.attention.out_bias) = (bias, bias);
    Ok(spec)
}

fn mistral(c: &Config<'_>) -> Result<Spec, LoadError> {
    let mut spec = dense(c, "mistral")?;
    spec.attention.windows = vec![c.window_or(4096)?; spec.layers];
    Ok(spec)
}

fn qwen2(c: &Config<'_>) -> Result<Spec, LoadError> {
    c.only("use_sliding_window", &Value::Bool(false))?;
    let mut spec = dense(c, "qwen2")?;
    spec.attention.qkv_bias = true;
    Ok(spec)
}

fn qwen3(c: &Config<'_>) -> Result<Spec, LoadError> {
    c.only("use_sliding_window", &Value::Bool(false))?;
    let bias = c.flag("attention_bias")?;
    let mut spec = dense(c, "qwen3")?;
    (spec.attention.qkv_bias, spec.attention.out_bias) = (bias, bias);
    spec.attention.qk_norm = true;
    Ok(spec)
}

fn gemma2(c: &Config<'_>) -> Result<Spec, LoadError> {
    c.only("attention_bias", &Value::Bool(false))?;
    let mut spec = dense(c, "gemma2")?;
    let scalar = c.optional_f64("query_pre_attn_scalar")?;
    let scalar = scalar.unwrap_or(spec.attention.head_dim as f64);
    spec.attention.scale = (1.0 / scalar.sqrt()) as f32;
    spec.attention.softcap = c.optional_f64("attn_logit_softcapping")?.map(|v| v as f32);
    spec.logit_softcap = c.optional_f64("final_logit_softcapping")?.map(|v| v as f32);
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

fn phi3(c: &Config<'_>) -> Result<Spec, LoadError> {
    let mut spec = dense(c, "phi3")?;
    spec.attention.fused = true;
    spec.feed_forward.fused = true;
    // A window as long as the context limits nothing.
    let window = c.optional_usize("sliding_window")?.filter(|w| *w < spec.context);
    spec.attention.windows = vec![window; spec.layers];
    Ok(spec)
}

fn mixtral(c: &Config<'_>) -> Result<Spec, LoadError> {
    let mut spec = dense(c, "mixtral")?;
    spec.attention.windows = vec![c.optional_usize("sliding_window")?; spec.layers];
    spec.feed_forward.experts = Some(ExpertSpec {
        count: c.usize("num_local_experts")?,
        used: c.usize("num_experts_per_tok")?,
        renormalise: true,
        names: MIXTRAL,
    });
    Ok(spec)
}

fn qwen3_moe(c: &Config<'_>) -> Result<Spec, LoadError> {
    c.only("use_sliding_window", &Value::Bool(false))?;
    c.only("decoder_sparse_step", &Value::from(1))?;
    c.only("mlp_only_layers", &Value::Array(Vec::new()))?;
    let bias = c.flag("attention_bias")?;
    let mut spec = dense(c, "qwen3_moe")?;
    (spec.attention.qkv_bias, spec.attention.out_bias) = (bias, bias);
    spec.attention.qk_norm = true;
    spec.feed_forward.inter = c.usize("moe_intermediate_size")?;
    let count = if c.has("num_experts") { "num_experts" } else { "num_local_experts" };
    spec.feed_forward.experts = Some(ExpertSpec {
        count: c.usize(count)?,
        used: c.usize("num_experts_per_tok")?,
        // Absent in GGUF, whose converted models all renormalise.
        renormalise: !c.has("norm_topk_prob") || c.flag("norm_topk_prob")?,
        names: QWEN_MOE,
    });
    Ok(spec)
}

/// What all families share; options are off.
fn dense(c: &Config<'_>, family: &'static str) -> Result<Spec, LoadError> {
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
        rope: c.rope()?,
        embed_scale: None,
        logit_softcap: None,
        tied: c.flag("tie_word_embeddings")?,
        prefers_bf16: false,
    })
}

fn check_shape(c: &Config<'_>, spec: &Spec) -> Result<(), LoadError> {
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

/// Typed access to the JSON, with errors that name the key.
struct Config<'a> {
    path: &'a Path,
    json: &'a Value,
}

impl Config<'_> {
    fn error(&self, key: &str, what: impl ToString) -> LoadError {
        LoadError::Key { path: self.path.into(), key: key.into(), what: what.to_string() }
    }

    fn unsupported(&self, key: &str, value: &str, supported: &str) -> LoadError {
        LoadError::Unsupported {
            path: self.path.into(),
            key: key.into(),
            value: value.into(),
            supported: supported.into(),
        }
    }

    /// The value of `key`; null counts as absent.
    fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    fn string(&self, key: &str) -> Result<String, LoadError> {
        let value = self.get(key).ok_or_else(|| self.error(key, "is missing"))?;
        let text = value.as_str();
        text.map(str::to_owned).ok_or_else(|| self.error(key, format!("must be text, got {value}")))
    }

    fn optional_usize(&self, key: &str) -> Result<Option<usize>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().and_then(|v| usize::try_from(v).ok());
        let wrong =
            || self.error(key, format!("must be a whole number of at least 0, got {value}"));
        number.map(Some).ok_or_else(wrong)
    }

    fn usize(&self, key: &str) -> Result<usize, LoadError> {
        self.optional_usize(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    fn within(&self, key: &str, value: usize, max: usize) -> Result<(), LoadError> {
        if (1..=max).contains(&value) {
            return Ok(());
        }
        Err(self.error(key, format!("must lie in 1..={max}, got {value}")))
    }

    /// The number of layers, checked at once because lists have their length.
    fn layers(&self) -> Result<usize, LoadError> {
        let key = "num_hidden_layers";
        let layers = self.usize(key)?;
        self.within(key, layers, LAYERS_MAX)?;
        Ok(layers)
    }

    /// Refuses a model whose output is not the next token, such as a classifier of the family.
    fn check_architecture(&self, family: &str) -> Result<(), LoadError> {
        let key = "architectures";
        let Some(value) = self.get(key) else { return Ok(()) };
        let class: String = family.split('_').map(capitalised).collect::<String>() + "ForCausalLM";
        let list = value.as_array();
        let list = list.ok_or_else(|| self.error(key, format!("must be a list, got {value}")))?;
        match list.iter().find(|name| **name != class.as_str()) {
            Some(other) => {
                Err(self.unsupported(key, &other.to_string(), &format!("{class} is for {family}")))
            }
            None => Ok(()),
        }
    }

    fn optional_f64(&self, key: &str) -> Result<Option<f64>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().filter(|v| v.is_finite() && *v > 0.0);
        let wrong = || self.error(key, format!("must be a positive number, got {value}"));
        number.map(Some).ok_or_else(wrong)
    }

    fn f64(&self, key: &str) -> Result<f64, LoadError> {
        self.optional_f64(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    /// `sliding_window`: null means none, an absent key means the library's default.
    fn window_or(&self, default: usize) -> Result<Option<usize>, LoadError> {
        if self.json.get("sliding_window").is_none() {
            return Ok(Some(default));
        }
        self.optional_usize("sliding_window")
    }

    fn flag(&self, key: &str) -> Result<bool, LoadError> {
        let Some(value) = self.get(key) else { return Ok(false) };
        let wrong = || self.error(key, format!("must be true or false, got {value}"));
        value.as_bool().ok_or_else(wrong)
    }

    /// Refuses any value of `key` but `allowed` (or none).
    fn only(&self, key: &str, allowed: &Value) -> Result<(), LoadError> {
        match self.get(key) {
            Some(value) if value != allowed => {
                Err(self.unsupported(key, &value.to_string(), &format!("{allowed} is")))
            }
            _ => Ok(()),
        }
    }

    fn refuse_quantised(&self) -> Result<(), LoadError> {
        let Some(quantisation) = self.get("quantization_config") else { return Ok(()) };
        let method = quantisation.get("quant_method").unwrap_or(quantisation).to_string();
        let supported = "bf16, f16 and f32 safetensors, and GGUF, are";
        Err(self.unsupported("quantization_config.quant_method", &method, supported))
    }

    fn activation(&self) -> Result<Activation, LoadError> {
        let key = if self.has("hidden_activation") { "hidden_activation" } else { "hidden_act" };
        match self.get(key).map(|v| v.as_str().unwrap_or_default()) {
            None | Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
            Some(other) => Err(self.unsupported(key, other, "silu and gelu_pytorch_tanh are")),
        }
    }

    /// Which layers slide, from `layer_types`.
    fn layer_types(&self, layers: usize) -> Result<Option<Vec<bool>>, LoadError> {
        let key = "layer_types";
        let Some(value) = self.get(key) else { return Ok(None) };
        let list = value
            .as_array()
            .filter(|l| l.len() == layers)
            .ok_or_else(|| self.error(key, format!("must list {layers} layers, got {value}")))?;
        let sliding = list.iter().map(|kind| match kind.as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => {
                let supported = "sliding_attention and full_attention are";
                Err(self.unsupported(key, &kind.to_string(), supported))
            }
        });
        sliding.collect::<Result<_, _>>().map(Some)
    }
}

fn capitalised(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn base() -> Value {
        json!({
            "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
            "max_position_embeddings": 256, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        })
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
            ("quantization_config", json!({"quant_method": "awq"}), "= \"awq\" is not supported"),
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
            assert_eq!(parse(Path::new("config.json"), &json).unwrap().family, family);
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
