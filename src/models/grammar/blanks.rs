//! Bounds how many blanks an output may have between two parts of a JSON value.

use serde_json::{Value, json};

/// Blanks between two parts of a JSON value. Without a bound, a model that prefers blanks writes
/// nothing else.
const BLANKS: &str = r"[\x20\x0A\x0D\x09]{1,32}";

/// A schema that lets at most [`BLANKS`] stand between two parts, unless it says itself which.
pub(super) fn bounded_blanks(schema: Value) -> Value {
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        other => other,
    };
    let Some(map) = schema.as_object_mut() else { return schema };
    let options = map.entry("x-guidance").or_insert_with(|| json!({}));
    let Some(options) = options.as_object_mut() else { return schema };
    let is_fixed = options.get("whitespace_flexible") == Some(&Value::Bool(false));
    let pattern = options.entry("whitespace_pattern").or_insert(Value::Null);
    if pattern.is_null() && !is_fixed {
        *pattern = BLANKS.into();
    }
    schema
}
