//! Answers `/models`: the list of models that validators want, in the shape that each version
//! expects.

use crate::chain::epistula;
use crate::wire::models::{LIST_BYTES_MAX, LIST_MODELS_MAX, NAME_CHARS_MAX};
use axum::http::{HeaderMap, HeaderName, header};
use serde_json::Value;

/// How a validator reads what is served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ListShape {
    /// A list of names: versions 4 and 5.0.
    List,
    /// A map from names to how much of each can be asked: versions from 5.1.
    Map,
}

impl ListShape {
    /// The shape that the sender of a `POST /models` reads. All versions send the same list of
    /// names, and none says which it is. Those before 5 send it by httpx and ignore the answer.
    /// From 5.0 on aiohttp sends it and the answer is read; 5.0.0 to 5.0.5 write the content type
    /// behind the signature, all later ones before it.
    pub fn of(headers: &HeaderMap) -> Self {
        let agent = headers.get(header::USER_AGENT).and_then(|v| v.to_str().ok());
        let place = |name: HeaderName| headers.keys().position(|known| *known == name);
        let kind = place(header::CONTENT_TYPE);
        let signature = place(HeaderName::from_static(epistula::HEADER_SIGNATURE));
        match agent {
            Some(agent) if agent.contains("aiohttp/") && kind <= signature => ListShape::Map,
            _ => ListShape::List,
        }
    }
}

/// What a validator last asked this miner to serve.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WantedModels {
    /// The models that it wants, by name.
    pub models: Vec<String>,
    /// How it reads what is served.
    pub shape: ListShape,
    /// When, in Unix milliseconds.
    pub at_ms: u64,
}

/// A body that names no models.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "the body must be a JSON list of at most {LIST_MODELS_MAX} model names, or a map from them, of \
     at most {NAME_CHARS_MAX} characters each"
)]
pub struct NotModels;

impl WantedModels {
    /// From a `POST /models`.
    ///
    /// # Errors
    /// The rule, where the body is neither a list of names nor a map from names.
    pub fn read(headers: &HeaderMap, body: &[u8], at_ms: u64) -> Result<Self, NotModels> {
        if body.len() > LIST_BYTES_MAX {
            return Err(NotModels);
        }
        let value: Value = serde_json::from_slice(body).map_err(|_| NotModels)?;
        let (names, shape): (Vec<Option<String>>, ListShape) = match value {
            Value::Array(list) => {
                let names = list.into_iter().map(|v| v.as_str().map(str::to_owned)).collect();
                (names, ListShape::of(headers))
            }
            Value::Object(map) => {
                (map.into_iter().map(|(name, _)| Some(name)).collect(), ListShape::Map)
            }
            _ => return Err(NotModels),
        };
        if names.len() > LIST_MODELS_MAX {
            return Err(NotModels);
        }
        let fit = |name: Option<String>| name.filter(|n| n.chars().count() <= NAME_CHARS_MAX);
        let models = names.into_iter().map(fit).collect::<Option<_>>().ok_or(NotModels)?;
        Ok(Self { models, shape, at_ms })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[test]
    fn lists_and_maps_of_models_are_understood_and_nothing_else() {
        let read = |text: &str| WantedModels::read(&HeaderMap::new(), text.as_bytes(), 5);
        let list = read("[\"a\", \"b\"]").unwrap();
        let models: Vec<String> = vec!["a".into(), "b".into()];
        assert_eq!(list, WantedModels { models, shape: ListShape::List, at_ms: 5 });
        assert_eq!(read("{\"a\": 3}").unwrap().shape, ListShape::Map);
        assert_eq!(read("[]").unwrap().models, Vec::<String>::new());
        let many = serde_json::to_string(&vec!["a"; 257]).unwrap();
        let long = format!("[\"{}\"]", "x".repeat(201));
        for bad in ["", "3", "[3]", "[null]", "nope", many.as_str(), long.as_str()] {
            assert!(
                read(bad).unwrap_err().to_string().contains("JSON list of at most 256"),
                "{bad}"
            );
        }
    }

    #[test]
    fn versions_are_told_apart_by_how_they_send_their_list() {
        let of = |agent: &'static str, names: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for name in names {
                headers.insert(*name, HeaderValue::from_static("x"));
            }
            headers.insert("user-agent", HeaderValue::from_static(agent));
            ListShape::of(&headers)
        };
        let (before, behind) = (
            ["content-type", "epistula-version", "epistula-request-signature"],
            ["epistula-version", "epistula-request-signature", "content-type"],
        );
        let aiohttp = "Python/3.12 aiohttp/3.10.11";
        assert_eq!(of(aiohttp, &before), ListShape::Map);
        assert_eq!(of(aiohttp, &behind), ListShape::List);
        assert_eq!(of("python-httpx/0.27.2", &before), ListShape::List);
        assert_eq!(ListShape::of(&HeaderMap::new()), ListShape::List);
    }
}
