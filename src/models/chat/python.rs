//! Implements what Python does to values in a template: `str`, `repr`, `%`, methods of strings and
//! lists.

use super::bounds::{
    TEXT_BYTES_MAX, arithmetic, charge, charge_replaced, check_bytes, check_items, check_widths,
    failed, operand,
};
use crate::wire::python::float;
use minijinja::value::{Kwargs, Rest, ValueKind, from_args};
use minijinja::{Error, FormatStyle, Output, State, Value, format_filter};
use std::fmt::{self, Write};

/// Lists within lists that are written; deeper ones are an error.
pub(super) const DEPTH_MAX: usize = 128;

pub(super) fn check_depth(depth: usize) -> Result<(), Error> {
    match depth <= DEPTH_MAX {
        true => Ok(()),
        false => Err(failed(format!("values may be nested {DEPTH_MAX} deep, this is deeper"))),
    }
}

/// Whether minijinja writes such a value otherwise than Python.
fn is_ours(value: &Value) -> bool {
    let is_float = value.kind() == ValueKind::Number && !value.is_integer();
    is_float || matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable)
}

/// Writes the value of `{{ .. }}`.
pub(super) fn write_value(out: &mut Output, state: &State, value: &Value) -> Result<(), Error> {
    if is_ours(value) {
        let text = repr(value)?;
        charge(state, text.len())?;
        Ok(out.write_str(&text)?)
    } else {
        charge(state, value.as_str().map_or(0, str::len))?;
        minijinja::escape_formatter(out, state, value)
    }
}

/// `str(value)`.
pub(super) fn text(value: &Value) -> Result<Value, Error> {
    if !is_ours(value) {
        return Ok(match value.kind() {
            ValueKind::String => value.clone(),
            _ => value.to_string().into(),
        });
    }
    repr(value).map(Value::from)
}

/// An operand of `~`, and the filter `string`: Python's text of it, counted.
pub(super) fn counted_text(state: &State, value: Value) -> Result<Value, Error> {
    operand(state, text(&value)?)
}

/// The filter `replace`.
pub(super) fn replace(state: &State, value: Value, from: Value, to: Value) -> Result<Value, Error> {
    let [value, from, to] = [text(&value)?, text(&from)?, text(&to)?];
    let [value, from, to] = [&value, &from, &to].map(|v| v.as_str().unwrap_or_default());
    charge_replaced(state, value, from, to)?;
    Ok(value.replace(from, to).into())
}

/// The text that Python's `repr` gives for a value.
fn repr(value: &Value) -> Result<String, Error> {
    let mut out = Bounded(String::new());
    write_repr(&mut out, value, 0)?;
    Ok(out.0)
}

/// A text that is refused once it is too long.
struct Bounded(String);

impl Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.push_str(text);
        check_bytes(self.0.len()).map_err(|_| fmt::Error)
    }
}

fn write_repr(out: &mut dyn Write, value: &Value, depth: usize) -> Result<(), Error> {
    check_depth(depth)?;
    match value.kind() {
        ValueKind::String => write_quoted(out, value.as_str().unwrap_or_default())?,
        ValueKind::Seq | ValueKind::Iterable => {
            out.write_char('[')?;
            for (place, item) in value.try_iter()?.enumerate() {
                out.write_str(if place > 0 { ", " } else { "" })?;
                write_repr(out, &item, depth + 1)?;
            }
            out.write_char(']')?;
        }
        ValueKind::Map => {
            out.write_char('{')?;
            for (place, key) in value.try_iter()?.enumerate() {
                out.write_str(if place > 0 { ", " } else { "" })?;
                write_repr(out, &key, depth + 1)?;
                out.write_str(": ")?;
                write_repr(out, &value.get_item(&key)?, depth + 1)?;
            }
            out.write_char('}')?;
        }
        ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(number) => out.write_str(&float(number))?,
            Err(_) => write!(out, "{value}")?,
        },
        ValueKind::Undefined => out.write_str("Undefined")?,
        _ => write!(out, "{value}")?,
    }
    Ok(())
}

/// A text in Python's quotes.
fn write_quoted(out: &mut dyn Write, text: &str) -> fmt::Result {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.write_char(quote)?;
    for c in text.chars() {
        match c {
            '\\' => out.write_str("\\\\")?,
            '\n' => out.write_str("\\n")?,
            '\r' => out.write_str("\\r")?,
            '\t' => out.write_str("\\t")?,
            c if c == quote => write!(out, "\\{c}")?,
            c if is_printable(c) => out.write_char(c)?,
            c if u32::from(c) < 0x100 => write!(out, "\\x{:02x}", u32::from(c))?,
            c if u32::from(c) < 0x10000 => write!(out, "\\u{:04x}", u32::from(c))?,
            c => write!(out, "\\U{:08x}", u32::from(c))?,
        }
    }
    out.write_char(quote)
}

/// `str.isprintable`. The standard library knows it, but for marks that combine with a letter.
fn is_printable(c: char) -> bool {
    c.is_ascii_graphic() || c == ' ' || !format!("a{c}").escape_debug().skip(1).any(|e| e == '\\')
}

/// `left % right`: Python's formatting where the left side is a text.
pub(super) fn modulo(
    state: &State,
    left: Value,
    right: Value,
    is_tuple: Option<bool>,
) -> Result<Value, Error> {
    let Some(format) = left.as_str() else {
        return arithmetic(state, "left % right", left, right);
    };
    let args: Vec<Value> = match is_tuple {
        Some(true) => right.try_iter()?.collect(),
        _ => vec![right],
    };
    let (format, args) = prepare(format, args)?;
    check_widths(&format, '%', &args)?;
    operand(state, format_filter(FormatStyle::Printf, &format, &args)?.into())
}

/// Gives `%s` Python's text of its argument and `%r` its `repr`. Named arguments stay as they are.
fn prepare(format: &str, mut args: Vec<Value>) -> Result<(String, Vec<Value>), Error> {
    let mut out = String::with_capacity(format.len());
    let mut place = 0;
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        let flags = |c: char| !(c.is_ascii_digit() || "#-+ .*".contains(c));
        let length = rest[at + 1..].find(flags).map_or(rest.len(), |n| at + 1 + n);
        out.push_str(&rest[..length]);
        rest = &rest[length..];
        let Some(kind) = rest.chars().next().filter(|c| *c != '(') else { continue };
        rest = &rest[kind.len_utf8()..];
        out.push(if kind == 'r' { 's' } else { kind });
        if kind == '%' {
            continue;
        }
        if let Some(arg) = args.get_mut(place) {
            match kind {
                's' => *arg = text(arg)?,
                'r' => *arg = repr(arg)?.into(),
                _ => {}
            }
        }
        place += 1;
    }
    out.push_str(rest);
    let takes_map = args.len() == 1 && args[0].kind() == ValueKind::Map;
    if place < args.len() && !takes_map && !format.contains("%(") {
        return Err(failed("not all arguments converted during string formatting"));
    }
    Ok((out, args))
}

/// The filter `join`.
pub(super) fn join(
    state: &State,
    value: Value,
    joiner: Option<String>,
    options: Kwargs,
) -> Result<String, Error> {
    let joiner = match joiner {
        Some(joiner) => joiner,
        None => options.get::<Option<String>>("d")?.unwrap_or_default(),
    };
    let attribute: Option<Value> = options.get("attribute")?;
    options.assert_all_used()?;
    let mut out = String::new();
    for (place, item) in value.try_iter()?.enumerate() {
        let item = match &attribute {
            Some(name) => item.get_item(name)?,
            None => item,
        };
        out.push_str(if place > 0 { &joiner } else { "" });
        out.push_str(text(&item)?.as_str().unwrap_or_default());
        check_bytes(out.len())?;
    }
    charge(state, out.len())?;
    Ok(out)
}

/// Methods of strings and lists; what is not here is minijinja-contrib's.
pub(super) fn method(
    state: &State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let found = match (value.as_str(), value.kind()) {
        (Some(text), _) => {
            check_method(state, text, name, args)?;
            string_method(text, name, args)?
        }
        (None, ValueKind::Seq | ValueKind::Iterable) if name == "index" => {
            let (wanted,): (Value,) = from_args(args)?;
            let place = value.try_iter()?.position(|item| item == wanted);
            let name = repr(&wanted)?;
            Some(place.ok_or_else(|| failed(format!("{name} is not in list")))?.into())
        }
        _ => None,
    };
    match found {
        Some(value) => Ok(value),
        None => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// Refuses a method whose result would be too long.
fn check_method(state: &State, text: &str, name: &str, args: &[Value]) -> Result<(), Error> {
    let part = |place: usize| args.get(place).and_then(Value::as_str);
    match (name, part(0), part(1)) {
        ("replace", Some(from), Some(to)) => charge_replaced(state, text, from, to),
        ("split" | "rsplit", Some(mark), _) if !mark.is_empty() => {
            check_items(text.matches(mark).count())
        }
        ("split" | "rsplit", ..) => check_items(text.split_whitespace().count()),
        ("splitlines", ..) => check_items(text.lines().count()),
        ("format", ..) => check_widths(text, '{', args),
        ("join", ..) => match args.first().map(Value::try_iter) {
            Some(Ok(items)) => {
                let mut bytes = 0_usize;
                for item in items {
                    bytes += item.as_str().map_or(0, str::len) + text.len();
                    check_bytes(bytes)?;
                }
                charge(state, bytes)
            }
            _ => Ok(()),
        },
        _ => Ok(()),
    }
}

fn string_method(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let one = || from_args::<(&str,)>(args).map(|(text,): (&str,)| text.to_owned());
    Ok(Some(match name {
        "split" | "rsplit" => split(text, name == "rsplit", args)?.into(),
        "partition" => {
            let mark = one()?;
            match text.split_once(mark_of(&mark)?) {
                Some((head, tail)) => list([head, &mark, tail]),
                None => list([text, "", ""]),
            }
        }
        "rpartition" => {
            let mark = one()?;
            match text.rsplit_once(mark_of(&mark)?) {
                Some((head, tail)) => list([head, &mark, tail]),
                None => list(["", "", text]),
            }
        }
        "removeprefix" => text.strip_prefix(one()?.as_str()).unwrap_or(text).into(),
        "removesuffix" => text.strip_suffix(one()?.as_str()).unwrap_or(text).into(),
        "index" | "rindex" => {
            let wanted = one()?;
            let at = if name == "index" { text.find(&wanted) } else { text.rfind(&wanted) };
            let at = at.ok_or_else(|| failed("substring not found"))?;
            text[..at].chars().count().into()
        }
        "casefold" => text.to_lowercase().into(),
        "swapcase" => text.chars().flat_map(swap_case).collect::<String>().into(),
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = match text.strip_prefix(['+', '-']) {
                Some(digits) => text.split_at(text.len() - digits.len()),
                None => ("", text),
            };
            let zeros = missing(text, width)?;
            format!("{sign}{}{digits}", "0".repeat(zeros)).into()
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            let (blanks, fill) = (missing(text, width)?, fill.unwrap_or(' ').to_string());
            // Python puts the odd blank to the left where the width is odd.
            let left = match name {
                "ljust" => 0,
                "rjust" => blanks,
                _ => blanks / 2 + (blanks & width & 1),
            };
            format!("{}{text}{}", fill.repeat(left), fill.repeat(blanks - left)).into()
        }
        _ => return Ok(None),
    }))
}

fn list<const N: usize>(parts: [&str; N]) -> Value {
    parts.into_iter().map(Value::from).collect()
}

fn mark_of(mark: &str) -> Result<&str, Error> {
    if mark.is_empty() { Err(failed("empty separator")) } else { Ok(mark) }
}

fn swap_case(c: char) -> Vec<char> {
    if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
}

/// Characters that a text lacks to be `width` long.
fn missing(text: &str, width: usize) -> Result<usize, Error> {
    if width > TEXT_BYTES_MAX {
        return Err(failed(format!("a width may be at most {}", TEXT_BYTES_MAX)));
    }
    Ok(width.saturating_sub(text.chars().count()))
}

/// `split` and `rsplit`.
fn split(text: &str, from_right: bool, args: &[Value]) -> Result<Vec<String>, Error> {
    let (positional, options): (Rest<Value>, Kwargs) = from_args(args)?;
    let option = |place: usize, name: &str| match positional.get(place) {
        Some(value) => Ok::<_, Error>(Some(value.clone())),
        None => options.get::<Option<Value>>(name),
    };
    let (mark, limit) = (option(0, "sep")?, option(1, "maxsplit")?);
    options.assert_all_used()?;
    let limit = limit.and_then(|l| l.as_i64()).and_then(|l| usize::try_from(l).ok());
    let limit = limit.unwrap_or(usize::MAX - 1);
    let mark = mark.filter(|m| !m.is_none());
    let mut parts: Vec<&str> = match (mark.as_ref().map(|m| m.as_str()), from_right) {
        (Some(None), _) => return Err(failed("a separator must be text or none")),
        (Some(Some(mark)), false) => text.splitn(limit + 1, mark_of(mark)?).collect(),
        (Some(Some(mark)), true) => text.rsplitn(limit + 1, mark_of(mark)?).collect(),
        (None, _) => words(text, limit, from_right),
    };
    if from_right {
        parts.reverse();
    }
    Ok(parts.into_iter().map(str::to_owned).collect())
}

/// At most `limit` words between blanks, then the rest with its blanks; from the right in reverse
/// order.
fn words(text: &str, limit: usize, from_right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let trim = |rest: &'_ str| -> usize {
        if from_right { rest.trim_end().len() } else { rest.trim_start().len() }
    };
    let mut rest = text;
    loop {
        let length = trim(rest);
        rest = if from_right { &rest[..length] } else { &rest[rest.len() - length..] };
        let at = match from_right {
            _ if rest.is_empty() => return parts,
            _ if parts.len() == limit => None,
            false => rest.find(char::is_whitespace),
            true => rest.rfind(char::is_whitespace).map(|at| at + char_len(rest, at)),
        };
        let Some(at) = at else {
            parts.push(rest);
            return parts;
        };
        let (head, tail) = rest.split_at(at);
        let (word, others) = if from_right { (tail, head) } else { (head, tail) };
        parts.push(word);
        rest = others;
    }
}

fn char_len(text: &str, at: usize) -> usize {
    text[at..].chars().next().map_or(0, char::len_utf8)
}
