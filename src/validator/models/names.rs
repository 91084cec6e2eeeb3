//! Reads names of models as peers send them.

use crate::wire::models::{LIST_BYTES_MAX, LIST_MODELS_MAX, NAME_CHARS_MAX};
use anyhow::{anyhow, bail};
use serde_json::Value;
use std::collections::BTreeSet;

/// Characters of a bad name that are repeated.
const SHOWN_CHARS_MAX: usize = 60;

/// Reads a list of names, a list of objects with a `model`, or a map from names; each name counts
/// once, in the order of its first place.
///
/// # Errors
/// Rule and fact, whatever the bytes are.
pub fn read(bytes: &[u8]) -> anyhow::Result<Vec<String>> {
    if bytes.len() > LIST_BYTES_MAX {
        bail!("a list of models must have at most {LIST_BYTES_MAX} bytes");
    }
    let value: Value =
        serde_json::from_slice(bytes).map_err(|e| anyhow!("a list of models must be JSON: {e}"))?;
    let names = match value {
        Value::Array(list) => {
            list.into_iter().enumerate().map(name).collect::<anyhow::Result<_>>()?
        }
        Value::Object(map) => map.into_iter().map(|(name, _)| name).collect::<Vec<String>>(),
        _ => bail!("must be a list of names or a map from them"),
    };
    let mut seen = BTreeSet::new();
    let mut unique = Vec::new();
    for name in names {
        check(&name)?;
        if seen.insert(name.clone()) {
            unique.push(name);
        }
    }
    match unique.len() {
        count if count > LIST_MODELS_MAX => {
            bail!("must list at most {LIST_MODELS_MAX} models, got {count}")
        }
        _ => Ok(unique),
    }
}

/// An entry of a list: the hub listed names in 2024 and objects from 2025 on.
fn name((place, entry): (usize, Value)) -> anyhow::Result<String> {
    match entry {
        Value::String(name) => Ok(name),
        Value::Object(mut fields) => match fields.remove("model") {
            Some(Value::String(name)) => Ok(name),
            _ => bail!("entry {place} must have a name in `model`, and has none"),
        },
        _ => bail!("entry {place} must be a name or an object with one in `model`"),
    }
}

/// Whether a text can be the name of a model.
///
/// # Errors
/// Rule and fact.
pub fn check(name: &str) -> anyhow::Result<()> {
    let shown = || name.chars().take(SHOWN_CHARS_MAX).collect::<String>();
    if name.is_empty() {
        bail!("a name must not be empty");
    }
    let count = name.chars().count();
    if count > NAME_CHARS_MAX {
        let shown = shown();
        bail!("a name must have at most {NAME_CHARS_MAX} characters, got {count}: `{shown}`...");
    }
    match name.chars().find(|c| c.is_whitespace() || c.is_control()) {
        Some(c) => bail!("a name must have no {c:?}, got `{}`", shown().escape_debug()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lists_maps_and_objects_are_read_and_names_count_once() {
        for (text, names) in [
            ("[]", &[][..]),
            ("[\"b\", \"a\", \"b\", \"a\"]", &["b", "a"][..]),
            ("{\"b\": 3, \"a\": null}", &["b", "a"]),
            ("[{\"model\": \"a\", \"context_length\": 5}, {\"model\": \"a\"}, \"b\"]", &["a", "b"]),
        ] {
            assert_eq!(read(text.as_bytes()).unwrap(), names, "{text}");
        }
        let same = format!("[{}\"a\"]", "\"a\",".repeat(5000));
        assert_eq!(read(same.as_bytes()).unwrap(), ["a"]);
    }

    #[test]
    fn anything_else_is_refused_with_the_rule() {
        let many: Vec<String> = (0..257).map(|n| n.to_string()).collect();
        let many = serde_json::to_string(&many).unwrap();
        let long = format!("[\"{}\"]", "x".repeat(201));
        let huge = format!("[{}]", " ".repeat(LIST_BYTES_MAX));
        let deep = "[".repeat(10_000);
        for (text, rule) in [
            ("", "must be JSON"),
            ("\"\"", "must be a list of names or a map"),
            ("null", "must be a list of names or a map"),
            ("[3]", "entry 0 must be a name"),
            ("[\"a\", {\"name\": \"b\"}]", "entry 1 must have a name in `model`"),
            ("[{\"model\": 3}]", "entry 0 must have a name in `model`"),
            ("[\"\"]", "must not be empty"),
            ("{\"a\\nb\": 1}", "must have no '\\n', got `a\\nb`"),
            ("[\"a b\"]", "must have no ' '"),
            (many.as_str(), "at most 256 models, got 257"),
            (long.as_str(), "at most 200 characters, got 201"),
            (huge.as_str(), "at most 262144 bytes"),
            (deep.as_str(), "must be JSON"),
        ] {
            let got = read(text.as_bytes()).unwrap_err().to_string();
            assert!(got.contains(rule), "{got}");
            assert!(got.chars().count() < 400 && !got.contains('\n'), "{got}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_names_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = read(&bytes);
        }

        #[test]
        fn any_names_are_taken_whole_or_refused(list in proptest::collection::vec(".{0,8}", 0..6)) {
            let text = serde_json::to_vec(&list).unwrap();
            match read(&text) {
                Ok(names) => prop_assert!(list.iter().all(|name| names.contains(name))),
                Err(_) => prop_assert!(list.iter().any(|name| check(name).is_err())),
            }
        }
    }
}
