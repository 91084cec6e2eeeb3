//! Writes values as Python does: signatures and templates depend on every byte.

use serde_json::Value;

/// What `json.dumps` writes of a value: a space after each comma and colon, and nothing but ASCII.
/// Epistula signs such bytes (protocol 2.2).
pub fn dumps(value: &Value) -> String {
    let mut out = String::new();
    write(&mut out, value);
    out
}

fn write(out: &mut String, value: &Value) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(is_true) => out.push_str(if *is_true { "true" } else { "false" }),
        Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() => out.push_str(&self::float(float)),
            _ => out.push_str(&number.to_string()),
        },
        Value::String(text) => quote(out, text, true),
        Value::Array(list) => {
            out.push('[');
            for (place, item) in list.iter().enumerate() {
                out.push_str(if place > 0 { ", " } else { "" });
                write(out, item);
            }
            out.push(']');
        }
        Value::Object(map) => {
            out.push('{');
            for (place, (key, item)) in map.iter().enumerate() {
                out.push_str(if place > 0 { ", " } else { "" });
                quote(out, key, true);
                out.push_str(": ");
                write(out, item);
            }
            out.push('}');
        }
    }
}

/// Writes a text as a JSON string. With `is_ascii` whatever is outside of ` ` to `~` is escaped,
/// by pairs of surrogates where need be; else only what JSON demands.
pub fn quote(out: &mut String, text: &str, is_ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (is_ascii && c > '~') => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// `repr` of a float: the shortest digits, an exponent below 1e-4 and from 1e16 on.
pub fn float(number: f64) -> String {
    if number.is_nan() {
        return "nan".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf".into() } else { "-inf".into() };
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = number.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use sha2::{Digest, Sha256};

    /// What CPython's `json.dumps` wrote of the same values.
    #[test]
    fn bytes_are_pythons() {
        for (value, text) in [
            (
                json!([1, -2, 0, u64::MAX, i64::MIN]),
                "[1, -2, 0, 18446744073709551615, -9223372036854775808]",
            ),
            (
                json!([0.0, -0.0, 1.0, 0.1, 1e16, 123456789012345680.0, 9999999999999998.0, 1e-4]),
                "[0.0, -0.0, 1.0, 0.1, 1e+16, 1.2345678901234568e+17, 9999999999999998.0, 0.0001]",
            ),
            (
                json!([1e-5, 1.5e-7, 5e-324, f64::MAX, 0.30000000000000004, 100.0]),
                "[1e-05, 1.5e-07, 5e-324, 1.7976931348623157e+308, 0.30000000000000004, 100.0]",
            ),
            (
                json!({"s": "\"\\/\n\r\t\u{8}\u{c}\0\u{1f}\u{7f}\u{80}é日😀\u{2028}<>&'", "é": {}}),
                "{\"s\": \"\\\"\\\\/\\n\\r\\t\\b\\f\\u0000\\u001f\\u007f\\u0080\\u00e9\\u65e5\
                 \\ud83d\\ude00\\u2028<>&'\", \"\\u00e9\": {}}",
            ),
            (
                json!([[], {}, null, true, false, {"a": [1], "b": 2}]),
                "[[], {}, null, true, false, {\"a\": [1], \"b\": 2}]",
            ),
        ] {
            assert_eq!(dumps(&value), text);
        }
    }

    #[test]
    fn a_list_of_models_has_the_hash_of_the_protocol() {
        let bytes = dumps(&json!(["NousResearch/Meta-Llama-3.1-8B-Instruct", "é"]));
        let hash = hex::encode(Sha256::digest(bytes));
        assert_eq!(hash, "b437edca80ecb2b06fd754644367080e744e6d95c395fd267cb13f603b0ac725");
    }

    proptest! {
        #[test]
        fn it_is_json_of_the_same_value(text in "\\PC*", number in any::<f64>(), key in ".*") {
            prop_assume!(number.is_finite());
            let value = json!({key: [text, number]});
            let written = dumps(&value);
            prop_assert!(written.is_ascii());
            prop_assert_eq!(serde_json::from_str::<Value>(&written).unwrap(), value);
        }
    }
}
