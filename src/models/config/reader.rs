//! Reads single keys of `config.json` by type, with errors that name the key.

use crate::models::error::LoadError;
use crate::models::family::Family;
use crate::ops::rowwise::Activation;
use serde_json::Value;
use std::path::Path;

/// Layers that a model may have: the largest published models have 128.
const LAYERS_MAX: usize = 1 << 10;

/// Typed access to the JSON, with errors that name the key.
pub(super) struct CheckpointConfig<'a> {
    pub(super) path: &'a Path,
    pub(super) json: &'a Value,
}

impl CheckpointConfig<'_> {
    pub(super) fn error(&self, key: &str, what: impl ToString) -> LoadError {
        LoadError::Key { path: self.path.into(), key: key.into(), what: what.to_string() }
    }

    pub(super) fn unsupported(&self, key: &str, value: &str, supported: &str) -> LoadError {
        LoadError::Unsupported {
            path: self.path.into(),
            key: key.into(),
            value: value.into(),
            supported: supported.into(),
        }
    }

    /// The value of `key`; null counts as absent.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    pub(super) fn string(&self, key: &str) -> Result<String, LoadError> {
        let value = self.get(key).ok_or_else(|| self.error(key, "is missing"))?;
        let text = value.as_str();
        text.map(str::to_owned).ok_or_else(|| self.error(key, format!("must be text, got {value}")))
    }

    pub(super) fn optional_usize(&self, key: &str) -> Result<Option<usize>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().and_then(|v| usize::try_from(v).ok());
        let wrong =
            || self.error(key, format!("must be a whole number of at least 0, got {value}"));
        number.map(Some).ok_or_else(wrong)
    }

    pub(super) fn usize(&self, key: &str) -> Result<usize, LoadError> {
        self.optional_usize(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    pub(super) fn within(&self, key: &str, value: usize, max: usize) -> Result<(), LoadError> {
        if (1..=max).contains(&value) {
            return Ok(());
        }
        Err(self.error(key, format!("must lie in 1..={max}, got {value}")))
    }

    /// The number of layers, checked at once because lists have their length.
    pub(super) fn layers(&self) -> Result<usize, LoadError> {
        let key = "num_hidden_layers";
        let layers = self.usize(key)?;
        self.within(key, layers, LAYERS_MAX)?;
        Ok(layers)
    }

    /// Refuses a model whose output is not the next token, such as a classifier of the family.
    pub(super) fn check_architecture(&self, family: &Family) -> Result<(), LoadError> {
        let key = "architectures";
        let Some(value) = self.get(key) else { return Ok(()) };
        let Family { name, class, .. } = family;
        let list = value.as_array();
        let list = list.ok_or_else(|| self.error(key, format!("must be a list, got {value}")))?;
        match list.iter().find(|listed| *listed != class) {
            Some(other) => {
                Err(self.unsupported(key, &other.to_string(), &format!("{class} is for {name}")))
            }
            None => Ok(()),
        }
    }

    pub(super) fn optional_f64(&self, key: &str) -> Result<Option<f64>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().filter(|v| v.is_finite() && *v > 0.0);
        let wrong = || self.error(key, format!("must be a positive number, got {value}"));
        number.map(Some).ok_or_else(wrong)
    }

    pub(super) fn f64(&self, key: &str) -> Result<f64, LoadError> {
        self.optional_f64(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    /// A number that null takes away; an absent key means the library's default.
    pub(super) fn f64_or(&self, key: &str, default: f64) -> Result<Option<f64>, LoadError> {
        match self.json.get(key) {
            None => Ok(Some(default)),
            Some(_) => self.optional_f64(key),
        }
    }

    /// `sliding_window`: null means none, an absent key means the library's default.
    pub(super) fn window_or(&self, default: usize) -> Result<Option<usize>, LoadError> {
        if self.json.get("sliding_window").is_none() {
            return Ok(Some(default));
        }
        self.optional_usize("sliding_window")
    }

    pub(super) fn flag(&self, key: &str) -> Result<bool, LoadError> {
        let Some(value) = self.get(key) else { return Ok(false) };
        let wrong = || self.error(key, format!("must be true or false, got {value}"));
        value.as_bool().ok_or_else(wrong)
    }

    /// Refuses any value of `key` but `allowed` (or none).
    pub(super) fn only(&self, key: &str, allowed: &Value) -> Result<(), LoadError> {
        match self.get(key) {
            Some(value) if value != allowed => {
                Err(self.unsupported(key, &value.to_string(), &format!("{allowed} is")))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn activation(&self) -> Result<Activation, LoadError> {
        let key = if self.has("hidden_activation") { "hidden_activation" } else { "hidden_act" };
        match self.get(key).map(|v| v.as_str().unwrap_or_default()) {
            None | Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
            Some(other) => Err(self.unsupported(key, other, "silu and gelu_pytorch_tanh are")),
        }
    }

    /// Which layers slide, from `layer_types`.
    pub(super) fn layer_types(&self, layers: usize) -> Result<Option<Vec<bool>>, LoadError> {
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
