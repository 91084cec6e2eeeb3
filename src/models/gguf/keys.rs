//! Lists the metadata keys that are read, and what each may hold.

use super::header::{List, ScalarType, Value as Meta};
use crate::models::error::LoadError;
use std::collections::BTreeMap;
use std::path::Path;

/// The metadata of a file, or of all its parts.
pub(super) type Metadata = BTreeMap<String, Meta>;

/// What a key may hold.
#[derive(Clone, Copy)]
pub(super) enum Want {
    Text,
    Flag,
    Whole,
    Positive,
    Texts,
    Floats,
    Integers,
}

use Want::{Flag, Floats, Integers, Positive, Text, Texts, Whole};

/// GGUF key (after the architecture) to Hugging Face key.
pub(super) const CONFIG_KEYS: &[(&str, &str, Want)] = &[
    ("block_count", "num_hidden_layers", Whole),
    ("context_length", "max_position_embeddings", Whole),
    ("embedding_length", "hidden_size", Whole),
    ("feed_forward_length", "intermediate_size", Whole),
    ("attention.head_count", "num_attention_heads", Whole),
    ("attention.head_count_kv", "num_key_value_heads", Whole),
    ("attention.key_length", "head_dim", Whole),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps", Positive),
    ("attention.sliding_window", "sliding_window", Whole),
    ("attn_logit_softcapping", "attn_logit_softcapping", Positive),
    ("final_logit_softcapping", "final_logit_softcapping", Positive),
    ("rope.freq_base", "rope_theta", Positive),
    ("expert_count", "num_local_experts", Whole),
    ("expert_used_count", "num_experts_per_tok", Whole),
    ("expert_feed_forward_length", "moe_intermediate_size", Whole),
];

/// Further keys after the architecture.
const ARCHITECTURE_KEYS: &[(&str, Want)] = &[
    ("attention.value_length", Whole),
    ("rope.dimension_count", Whole),
    ("rope.scaling.type", Text),
    ("rope.scaling.factor", Positive),
    ("rope.scale_linear", Positive),
];

const OTHER_KEYS: &[(&str, Want)] = &[
    ("general.architecture", Text),
    ("tokenizer.chat_template", Text),
    ("tokenizer.ggml.model", Text),
    ("tokenizer.ggml.pre", Text),
    ("tokenizer.ggml.tokens", Texts),
    ("tokenizer.ggml.merges", Texts),
    ("tokenizer.ggml.scores", Floats),
    ("tokenizer.ggml.token_type", Integers),
    ("tokenizer.ggml.add_bos_token", Flag),
    ("tokenizer.ggml.add_eos_token", Flag),
    ("tokenizer.ggml.add_space_prefix", Flag),
    ("tokenizer.ggml.bos_token_id", Whole),
    ("tokenizer.ggml.eos_token_id", Whole),
    ("tokenizer.ggml.eot_token_id", Whole),
    ("tokenizer.ggml.eom_token_id", Whole),
];

/// Fails where a known key holds something else than it may.
pub(super) fn check(path: &Path, metadata: &Metadata) -> Result<(), LoadError> {
    for (key, want) in OTHER_KEYS {
        check_key(path, metadata, key, *want)?;
    }
    let architecture = architecture(path, metadata)?;
    let config = CONFIG_KEYS.iter().map(|(key, _, want)| (key, want));
    for (key, want) in config.chain(ARCHITECTURE_KEYS.iter().map(|(key, want)| (key, want))) {
        check_key(path, metadata, &format!("{architecture}.{key}"), *want)?;
    }
    Ok(())
}

/// The architecture, by which most keys begin.
pub(super) fn architecture<'a>(path: &Path, metadata: &'a Metadata) -> Result<&'a str, LoadError> {
    let key = "general.architecture";
    let text = match metadata.get(key) {
        Some(Meta::Text(text)) => std::str::from_utf8(text).ok(),
        _ => None,
    };
    text.ok_or_else(|| error(path, key, "is missing"))
}

/// A fault that is named by its metadata key.
pub(super) fn error(path: &Path, key: &str, what: impl ToString) -> LoadError {
    LoadError::Key { path: path.to_owned(), key: key.to_owned(), what: what.to_string() }
}

fn check_key(path: &Path, metadata: &Metadata, key: &str, want: Want) -> Result<(), LoadError> {
    match metadata.get(key).map(|value| (value, fault(value, want))) {
        Some((value, Some(rule))) => Err(error(path, key, format!("must be {rule}, got {value}"))),
        _ => Ok(()),
    }
}

/// The rule that a value breaks.
fn fault(value: &Meta, want: Want) -> Option<&'static str> {
    let (holds, rule) = match want {
        Text => (is_text(value), "UTF-8 text"),
        Flag => (matches!(value, Meta::Bool(_)), "true or false"),
        Whole => (is_whole(value), "a whole number of at least 0"),
        Positive => (is_positive(value), "a positive number"),
        Texts => (matches!(value, Meta::List(List::Texts(_))), "a list of texts"),
        Floats => {
            let floats =
                matches!(value, Meta::List(List::Scalars(ScalarType::F32 | ScalarType::F64, _)));
            (floats, "a list of floats")
        }
        Integers => (is_integers(value), "a list of integers"),
    };
    (!holds).then_some(rule)
}

fn is_text(value: &Meta) -> bool {
    matches!(value, Meta::Text(text) if std::str::from_utf8(text).is_ok())
}

fn is_whole(value: &Meta) -> bool {
    matches!(value, Meta::Integer(v) if u64::try_from(*v).is_ok())
}

fn is_positive(value: &Meta) -> bool {
    match value {
        Meta::Integer(v) => *v > 0,
        Meta::Float(v) => v.is_finite() && *v > 0.0,
        _ => false,
    }
}

fn is_integers(value: &Meta) -> bool {
    let Meta::List(List::Scalars(kind, _)) = value else { return false };
    !matches!(kind, ScalarType::F32 | ScalarType::F64 | ScalarType::Bool)
}
