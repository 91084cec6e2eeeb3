//! Parses bytes into a request body, with errors that name the field, the rule and what came.

use super::error::{RequestError, echo};
use super::work::{self, SMALL_BYTES_MAX};
use crate::wire::openai::Common;
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde_json::{Error, Map, Value};
use serde_path_to_error::{Path, Segment};

/// Reads a body; a large one on a thread that may block.
///
/// # Errors
/// As for [`parse`], and "busy" where too many are being read.
pub async fn read<T: DeserializeOwned + Send + 'static>(body: Bytes) -> Result<T, RequestError> {
    if body.len() <= SMALL_BYTES_MAX {
        return parse(&body);
    }
    work::run(body.len(), move || parse(&body)).await
}

/// A JSON body.
///
/// # Errors
/// The field at fault, its rule, and what came in its place.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, RequestError> {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let parsed = serde_path_to_error::deserialize(&mut deserializer).map_err(|e| {
        let path = dotted(e.path());
        explain(body, path, e.inner())
    })?;
    deserializer
        .end()
        .map_err(|e| RequestError::new(format!("the body has more behind its JSON value: {e}")))?;
    Ok(parsed)
}

fn explain(body: &[u8], path: Option<String>, e: &Error) -> RequestError {
    if !e.is_data() {
        return RequestError::new(echo(&format!("the body is not a valid request: {e}")));
    }
    match path {
        Some(path) => fault(&path, e),
        None => at_top(body, e),
    }
}

/// What is wrong where no path is known: with the body as a whole, with a field that is missing,
/// or with one of those that both endpoints share, which are read on their own to find it.
fn at_top(body: &[u8], e: &Error) -> RequestError {
    let text = e.to_string();
    let whole = |what: &str| RequestError::new(format!("the body is not a valid request: {what}"));
    let fields = match serde_json::from_slice(body) {
        Ok(Value::Object(fields)) => fields,
        Ok(other) => return whole(&format!("it must be a JSON object, got {}", kind_of(&other))),
        Err(_) => return whole(&echo(&text)),
    };
    let wrong = fields.into_iter().find_map(|(key, value)| {
        let alone = Value::Object(Map::from_iter([(key, value)]));
        let e = serde_path_to_error::deserialize::<_, Common>(alone).err()?;
        Some(fault(&dotted(e.path())?, e.inner()))
    });
    wrong.unwrap_or_else(|| match quoted(&text, "missing field ") {
        Some(field) => RequestError::field(field, "is missing"),
        None => whole(&echo(&text)),
    })
}

/// What is wrong with the field at `path`.
fn fault(path: &str, e: &Error) -> RequestError {
    let (text, path) = (e.to_string(), echo(path));
    // A field's place is its path; in the body's bytes it helps nobody.
    let text = text.rfind(" at line ").map_or(text.as_str(), |at| &text[..at]);
    if let Some(inner) = quoted(text, "missing field ") {
        return RequestError::field(&path, format!("lacks `{inner}`"));
    }
    let mismatch = ["invalid type: ", "invalid value: "].into_iter();
    let mismatch = mismatch.filter_map(|start| text.strip_prefix(start)).next();
    match mismatch.and_then(|rest| rest.rsplit_once(", expected ")) {
        Some((got, rule)) => {
            let what = format!("must be {}, got {}", rule_words(rule), fact_words(got));
            RequestError::field(&path, echo(&what))
        }
        None => RequestError::field(&path, echo(&format!("cannot be read: {text}"))),
    }
}

/// A path as `messages.0.role`; `None` for the top.
fn dotted(path: &Path) -> Option<String> {
    let parts = path.iter().filter_map(|segment| match segment {
        Segment::Seq { index } => Some(index.to_string()),
        Segment::Map { key } => Some(key.clone()),
        Segment::Enum { .. } | Segment::Unknown => None,
    });
    let path = parts.collect::<Vec<_>>().join(".");
    (!path.is_empty()).then_some(path)
}

/// The name in backticks after `start`.
fn quoted<'a>(text: &'a str, start: &str) -> Option<&'a str> {
    text.strip_prefix(start)?.strip_prefix('`')?.split('`').next()
}

/// What serde expected, in the words of JSON.
fn rule_words(expected: &str) -> &str {
    match expected {
        "i8" | "i16" | "i32" | "i64" | "u8" | "u16" | "u32" | "u64" | "usize" => "an integer",
        "f32" | "f64" => "a number",
        "a sequence" => "a list",
        "a map" => "an object",
        other if other.starts_with("struct ") || other.starts_with("internally tagged") => {
            "an object"
        }
        other => other,
    }
}

/// What serde found, in the words of JSON; texts are not repeated.
fn fact_words(got: &str) -> &str {
    let number = || got.split('`').nth(1).unwrap_or(got);
    match got {
        "sequence" => "a list",
        "map" => "an object",
        "unit value" | "null" => "null",
        other if other.starts_with("string ") => "a string",
        other if other.ends_with('`') => number(),
        other => other,
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Reads a body that is JSON already.
///
/// # Errors
/// As for [`parse`].
pub fn parse_value<T: DeserializeOwned>(body: &Value) -> Result<T, RequestError> {
    parse(body.to_string().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::openai::{ChatRequest, CompletionRequest};
    use serde_json::json;

    #[test]
    fn every_fault_names_field_rule_and_fact() {
        let chat = [
            (json!({"max_tokens": "5"}), "max_tokens", "must be an integer, got a string"),
            (json!({"max_tokens": 1.5}), "max_tokens", "must be an integer, got 1.5"),
            (json!({"max_tokens": true}), "max_tokens", "must be an integer, got true"),
            (json!({"temperature": "hot"}), "temperature", "must be a number, got a string"),
            (json!({"temperature": [1]}), "temperature", "must be a number, got a list"),
            (
                json!({"seed": 18_446_744_073_709_551_615_u64}),
                "seed",
                "from -2^63 to 2^63 - 1, got 18446744073709551615",
            ),
            (json!({"seed": 2e19}), "seed", "from -2^63 to 2^63 - 1, got 2e+19"),
            (json!({"stop": 5}), "stop", "must be a string or a list of strings, got 5"),
            (
                json!({"stop": ["a", 5]}),
                "stop",
                "must be a string or a list of strings, got a list",
            ),
            (
                json!({"logprobs": "yes"}),
                "logprobs",
                "must be a boolean or an integer, got a string",
            ),
            (json!({"stop_token_ids": [1, "a"]}), "stop_token_ids.1", "an integer, got a string"),
            (json!({"stream": "true"}), "stream", "must be a boolean, got a string"),
            (json!({"stream_options": 1}), "stream_options", "must be an object, got 1"),
            (
                json!({"stream_options": {"include_usage": 1}}),
                "stream_options.include_usage",
                "must be a boolean, got 1",
            ),
            (json!({"logit_bias": []}), "logit_bias", "must be an object, got a list"),
            (json!({"response_format": {}}), "response_format", "lacks `type`"),
            (json!({"structured_outputs": {"a": 1}}), "structured_outputs.a", "unknown field `a`"),
            (json!({"top_logprobs": {}}), "top_logprobs", "must be an integer, got an object"),
            (json!({"messages": "hi"}), "messages", "must be a list, got a string"),
            (json!({"messages": [1]}), "messages.0", "must be an object, got 1"),
            (json!({"messages": [{"content": "a"}]}), "messages.0", "lacks `role`"),
            (
                json!({"messages": [{"role": "user", "content": 5}]}),
                "messages.0.content",
                "must be a string or a list of parts, got 5",
            ),
            (json!({"messages": [{"role": 5}]}), "messages.0.role", "must be a string, got 5"),
        ];
        for (extra, param, message) in chat {
            let mut body = json!({"messages": []});
            body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            let e = parse_value::<ChatRequest>(&body).unwrap_err();
            assert_eq!(e.param.as_deref(), Some(param), "{extra} {e}");
            assert!(e.message.contains(message), "{extra}: {e}");
            assert!(e.message.starts_with(&format!("`{param}` ")), "{extra}: {e}");
        }
    }

    #[test]
    fn prompts_and_missing_fields_are_named() {
        let forms = "must be a string, a list of strings, a list of token ids, or a list of such \
                     lists, got";
        for (body, param, message) in [
            (json!({}), "prompt", "`prompt` is missing"),
            (json!({"model": "m", "seed": 1}), "prompt", "`prompt` is missing"),
            (json!({"prompt": null}), "prompt", forms),
            (json!({"prompt": {"a": 1}}), "prompt", forms),
            (json!({"prompt": 5}), "prompt", forms),
            (
                json!({"prompt": [true]}),
                "prompt.0",
                "must be a string, a token id or a list of token",
            ),
            (json!({"prompt": [1.5]}), "prompt.0", "must be an integer, got 1.5"),
            (json!({"prompt": [1, "a"]}), "prompt.1", "must be an integer, got a string"),
            (json!({"prompt": ["a", 1]}), "prompt.1", "must be a string, got 1"),
            (json!({"prompt": [[1], [1, "a"]]}), "prompt.1.1", "must be an integer, got a string"),
        ] {
            let e = parse_value::<CompletionRequest>(&body).unwrap_err();
            assert_eq!(e.param.as_deref(), Some(param), "{body} {e}");
            assert!(e.message.contains(message), "{body}: {e}");
        }
        let e = parse_value::<ChatRequest>(&json!({"model": "m"})).unwrap_err();
        assert_eq!(e.message, "`messages` is missing");
        for (body, message) in [
            (&b"[]"[..], "it must be a JSON object, got a list"),
            (b"5", "it must be a JSON object, got a number"),
            (b"", "EOF while parsing"),
            (b"{\"prompt\": \"a\"", "EOF while parsing"),
            (b"{\"prompt\": \"a\"} x", "the body has more behind its JSON value"),
        ] {
            let e = parse::<CompletionRequest>(body).unwrap_err();
            assert!(e.message.contains(message) && e.param.is_none(), "{e}");
        }
    }
}
