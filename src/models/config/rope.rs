//! Reads what a configuration says of the rotary embedding, in its old and its new spelling.

use super::reader::CheckpointConfig;
use crate::models::error::LoadError;
use crate::models::spec::RopeSpec;
use crate::ops::rope::RopeScaling;
use serde_json::{Map, Value};

const PARTIAL: &str = "partial_rotary_factor";
/// The keys of an object about the rotary embedding that are understood.
const ROPE_KEYS: [&str; 8] = [
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    PARTIAL,
];

impl CheckpointConfig<'_> {
    pub(super) fn refuse_partial_rotary(&self) -> Result<(), LoadError> {
        for source in [None, Some("rope_parameters"), Some("rope_scaling")] {
            let object = source.map_or(Some(self.json), |key| self.get(key));
            let factor = object.and_then(|o| o.get(PARTIAL)).filter(|v| !v.is_null());
            if let Some(value) = factor.filter(|v| v.as_f64() != Some(1.0)) {
                let key = source.map_or(PARTIAL.to_owned(), |s| format!("{s}.{PARTIAL}"));
                return Err(self.unsupported(&key, &value.to_string(), "1.0 is"));
            }
        }
        Ok(())
    }

    /// The rotary embedding. Newer files keep theta and scaling in one object, `rope_parameters`,
    /// older ones apart, some both; what is said twice must be the same. Where nothing says theta
    /// it is `default`.
    pub(super) fn rope(&self, default: f64) -> Result<RopeSpec, LoadError> {
        let mut theta = self.optional_f64("rope_theta")?.map(|theta| ("rope_theta", theta));
        let mut scaling = None;
        for (key, theta_key) in [
            ("rope_parameters", "rope_parameters.rope_theta"),
            ("rope_scaling", "rope_scaling.rope_theta"),
        ] {
            let Some(object) = self.get(key) else { continue };
            let rope = RopeObject::new(self, key, object)?;
            self.agree(&mut theta, theta_key, rope.optional("rope_theta")?)?;
            self.agree(&mut scaling, key, Some(rope.scaling()?))?;
        }
        let theta = theta.map_or(default, |(_, theta)| theta);
        Ok(RopeSpec { theta, scaling: scaling.map_or(RopeScaling::None, |(_, s)| s) })
    }

    /// Keeps what `key` says, which must not contradict what an earlier key said.
    fn agree<T: PartialEq + std::fmt::Debug>(
        &self,
        known: &mut Option<(&'static str, T)>,
        key: &'static str,
        said: Option<T>,
    ) -> Result<(), LoadError> {
        match (&known, said) {
            (Some((other, first)), Some(second)) if *first != second => {
                Err(self.error(key, format!("is {second:?}, but `{other}` is {first:?}")))
            }
            (None, Some(first)) => {
                *known = Some((key, first));
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// `rope_parameters` or `rope_scaling`.
struct RopeObject<'a> {
    config: &'a CheckpointConfig<'a>,
    name: &'a str,
    object: &'a Map<String, Value>,
}

impl<'a> RopeObject<'a> {
    fn new(
        config: &'a CheckpointConfig<'a>,
        name: &'a str,
        value: &'a Value,
    ) -> Result<Self, LoadError> {
        let wrong = || config.error(name, format!("must be an object, got {value}"));
        let object = value.as_object().ok_or_else(wrong)?;
        let unknown = |(key, value): &(&String, &Value)| {
            !ROPE_KEYS.contains(&key.as_str()) && !value.is_null()
        };
        match object.iter().find(unknown) {
            Some((key, value)) => {
                let supported = format!("{} are the keys that are known", ROPE_KEYS.join(", "));
                Err(config.unsupported(&format!("{name}.{key}"), &value.to_string(), &supported))
            }
            None => Ok(Self { config, name, object }),
        }
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.name)
    }

    fn optional(&self, key: &str) -> Result<Option<f64>, LoadError> {
        let Some(value) = self.object.get(key).filter(|v| !v.is_null()) else { return Ok(None) };
        let number = value.as_f64().filter(|v| v.is_finite() && *v > 0.0);
        let wrong =
            || self.config.error(&self.key(key), format!("must be a positive number, got {value}"));
        number.map(Some).ok_or_else(wrong)
    }

    fn number(&self, key: &str) -> Result<f64, LoadError> {
        let wrong = || self.config.error(&self.key(key), "must be a positive number, is missing");
        self.optional(key)?.ok_or_else(wrong)
    }

    fn text(&self, key: &str) -> Result<Option<&str>, LoadError> {
        let Some(value) = self.object.get(key).filter(|v| !v.is_null()) else { return Ok(None) };
        let wrong = || self.config.error(&self.key(key), format!("must be text, got {value}"));
        value.as_str().map(Some).ok_or_else(wrong)
    }

    fn kind(&self) -> Result<&str, LoadError> {
        match (self.text("rope_type")?, self.text("type")?) {
            (Some(new), Some(old)) if new != old => {
                let what = format!("is {old:?}, but `{}` is {new:?}", self.key("rope_type"));
                Err(self.config.error(&self.key("type"), what))
            }
            (new, old) => Ok(new.or(old).unwrap_or("default")),
        }
    }

    fn scaling(&self) -> Result<RopeScaling, LoadError> {
        match self.kind()? {
            "default" => match self.optional("factor")?.filter(|factor| *factor != 1.0) {
                Some(factor) => {
                    let supported = "1.0 is for the type default";
                    let (key, factor) = (self.key("factor"), factor.to_string());
                    Err(self.config.unsupported(&key, &factor, supported))
                }
                None => Ok(RopeScaling::None),
            },
            "linear" => Ok(RopeScaling::Linear { factor: self.number("factor")? }),
            "llama3" => {
                let (low, high) =
                    (self.number("low_freq_factor")?, self.number("high_freq_factor")?);
                if high <= low {
                    let what = format!("must be above low_freq_factor = {low}, got {high}");
                    return Err(self.config.error(&self.key("high_freq_factor"), what));
                }
                let original_context = self.number("original_max_position_embeddings")?;
                let factor = self.number("factor")?;
                Ok(RopeScaling::Llama3 { factor, low, high, original_context })
            }
            other => {
                let supported = "default, linear and llama3 are";
                Err(self.config.unsupported(&self.key("rope_type"), other, supported))
            }
        }
    }
}
