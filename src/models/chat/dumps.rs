//! Writes JSON as Python's `json.dumps` does with its options, because templates use it.

use super::bounds::{charge, check_bytes, failed};
use super::python::{DEPTH_MAX, check_depth, text};
use crate::wire::python::{float, quote};
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, State, Value};
use std::fmt::Write;

/// The filter `tojson`: Python's `json.dumps` with its options.
pub(super) fn to_json(state: &State, value: Value, options: Kwargs) -> Result<Value, Error> {
    let flag = |name: &str| options.get::<Option<bool>>(name).map(|f| f.unwrap_or(false));
    let indent: Option<Value> = options.get("indent")?;
    let indent = match indent.filter(|i| !i.is_none()) {
        None => None,
        Some(i) => Some(match (i.as_str(), i.as_usize()) {
            (Some(text), _) => text.to_owned(),
            (None, Some(width)) if width <= DEPTH_MAX => " ".repeat(width),
            _ => return Err(failed(format!("indent must be text or 0..={DEPTH_MAX}, got {i}"))),
        }),
    };
    let (item, key) = match options.get::<Option<Value>>("separators")?.filter(|s| !s.is_none()) {
        Some(pair) => (text(&pair.get_item_by_index(0)?)?, text(&pair.get_item_by_index(1)?)?),
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    };
    let json = Json {
        ascii: flag("ensure_ascii")?,
        sorted: flag("sort_keys")?,
        indent,
        item: item.to_string(),
        key: key.to_string(),
    };
    options.assert_all_used()?;
    let mut out = String::new();
    json.write(&mut out, &value, 0)?;
    charge(state, out.len())?;
    Ok(Value::from_safe_string(out))
}

/// How JSON is written.
struct Json {
    ascii: bool,
    sorted: bool,
    indent: Option<String>,
    item: String,
    key: String,
}

impl Json {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        check_depth(depth)?;
        check_bytes(out.len())?;
        match value.kind() {
            ValueKind::String => quote(out, value.as_str().unwrap_or_default(), self.ascii),
            ValueKind::None | ValueKind::Undefined => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => match f64::try_from(value.clone()).ok() {
                Some(number) if !value.is_integer() => out.push_str(match float(number).as_str() {
                    "nan" => "NaN",
                    "inf" => "Infinity",
                    "-inf" => "-Infinity",
                    finite => finite,
                }),
                _ => write!(out, "{value}")?,
            },
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list(out, ['[', ']'], items, depth, |out, item| {
                    self.write(out, &item, depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                self.list(out, ['{', '}'], keys, depth, |out, key| {
                    self.write_key(out, &key)?;
                    out.push_str(&self.key);
                    self.write(out, &value.get_item(&key)?, depth + 1)
                })?;
            }
            other => return Err(failed(format!("a {other} is not JSON"))),
        }
        Ok(())
    }

    /// Keys that are not text become text.
    fn write_key(&self, out: &mut String, key: &Value) -> Result<(), Error> {
        match key.as_str() {
            Some(text) => quote(out, text, self.ascii),
            None => {
                out.push('"');
                self.write(out, key, DEPTH_MAX)?;
                out.push('"');
            }
        }
        Ok(())
    }

    fn list(
        &self,
        out: &mut String,
        [open, close]: [char; 2],
        items: Vec<Value>,
        depth: usize,
        write: impl Fn(&mut String, Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let is_empty = items.is_empty();
        out.push(open);
        for (place, item) in items.into_iter().enumerate() {
            out.push_str(if place > 0 { &self.item } else { "" });
            self.line(out, depth + 1);
            write(out, item)?;
        }
        if !is_empty {
            self.line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn line(&self, out: &mut String, depth: usize) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    }
}
