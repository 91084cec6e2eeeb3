//! Bounds what a template makes in memory: each text and each list, and all of them together.
//!
//! Texts that are written between tags into a variable (`{% set x %}`) are bounded by fuel alone.

use minijinja::value::{Kwargs, Object, Rest, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of a rendered conversation.
pub(super) const TEXT_BYTES_MAX: usize = 32 << 20;
/// Items of one list.
const ITEMS_MAX: usize = 1_000_000;
/// Bytes of all texts and lists of one rendering, also of those that are gone: an honest template
/// appends to one text again and again, and each step counts as a whole.
const MADE_BYTES_MAX: usize = 32 * TEXT_BYTES_MAX;
/// Where a rendering keeps what it has made.
const MADE: &str = "__made";
/// minijinja's own filter of this name.
pub(super) const INDENT: &str = "__indent";

/// An error of an operation.
pub(super) fn failed(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

#[derive(Default, Debug)]
struct Made(AtomicUsize);

impl Object for Made {}

/// Counts `bytes` as made.
pub(super) fn charge(state: &State, bytes: usize) -> Result<(), Error> {
    check_bytes(bytes)?;
    let made = state.get_or_set_temp_object(MADE, Made::default);
    if made.0.fetch_add(bytes, Ordering::Relaxed) + bytes > MADE_BYTES_MAX {
        return Err(failed(format!("texts may have at most {MADE_BYTES_MAX} bytes in all")));
    }
    Ok(())
}

pub(super) fn check_bytes(bytes: usize) -> Result<(), Error> {
    match bytes <= TEXT_BYTES_MAX {
        true => Ok(()),
        false => Err(failed(format!("a text may have at most {TEXT_BYTES_MAX} bytes"))),
    }
}

pub(super) fn check_items(items: usize) -> Result<(), Error> {
    match items <= ITEMS_MAX {
        true => Ok(()),
        false => Err(failed(format!("a list may have at most {ITEMS_MAX} items"))),
    }
}

/// Counts `times` of a value as made.
fn charge_value(state: &State, value: &Value, times: usize) -> Result<(), Error> {
    if let Some(text) = value.as_str() {
        return charge(state, text.len().saturating_mul(times));
    }
    let is_list = matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable);
    let items = if is_list { value.len().unwrap_or(0).saturating_mul(times) } else { 0 };
    check_items(items)?;
    charge(state, items * size_of::<Value>())
}

/// An operand of `+`: the value, counted.
pub(super) fn operand(state: &State, value: Value) -> Result<Value, Error> {
    charge_value(state, &value, 1)?;
    Ok(value)
}

/// `left * right`.
pub(super) fn product(state: &State, left: Value, right: Value) -> Result<Value, Error> {
    for (part, count) in [(&left, &right), (&right, &left)] {
        charge_value(state, part, count.as_usize().unwrap_or(1))?;
    }
    arithmetic(state, "left * right", left, right)
}

/// What minijinja makes of two values.
pub(super) fn arithmetic(
    state: &State,
    expression: &str,
    left: Value,
    right: Value,
) -> Result<Value, Error> {
    state.env().compile_expression(expression)?.eval(minijinja::context! { left, right })
}

/// The filter `list`.
pub(super) fn list(state: &State, value: Value) -> Result<Value, Error> {
    let items: Vec<Value> = value.try_iter()?.take(ITEMS_MAX + 1).collect();
    operand(state, items.into())
}

/// Counts the result of replacing every `from` in `text`.
pub(super) fn charge_replaced(
    state: &State,
    text: &str,
    from: &str,
    to: &str,
) -> Result<(), Error> {
    let added = text.matches(from).count().saturating_mul(to.len());
    charge(state, text.len().saturating_add(added))
}

/// One of minijinja's filters that make lists of so many items.
type CountFilter = fn(&State, Value, usize, Option<Value>) -> Result<Value, Error>;

/// The filter with a limit on the count.
pub(super) fn limited(
    filter: CountFilter,
) -> impl Fn(&State, Value, usize, Option<Value>) -> Result<Value, Error> {
    move |state, value, count, fill| {
        check_items(count)?;
        filter(state, value, count, fill)
    }
}

/// The filter `indent`.
pub(super) fn indent(state: &State, value: Value, rest: Rest<Value>) -> Result<Value, Error> {
    let named = rest.last().filter(|last| last.is_kwargs()).cloned();
    let named = named.map(Kwargs::try_from).transpose()?;
    let width = match named.and_then(|named| named.peek::<usize>("width").ok()) {
        Some(width) => width,
        None => rest.first().and_then(Value::as_usize).unwrap_or(0),
    };
    let (lines, bytes) =
        value.as_str().map_or((0, 0), |text| (text.lines().count() + 1, text.len()));
    charge(state, lines.saturating_mul(width).saturating_add(bytes))?;
    charge(state, width)?;
    let args: Vec<Value> = std::iter::once(value).chain(rest.0).collect();
    state.apply_filter(INDENT, &args)
}

/// The filter `format`: `%` with its arguments.
pub(super) fn format(state: &State, format: Value, args: Rest<Value>) -> Result<Value, Error> {
    let template = format.as_str().unwrap_or_default();
    check_widths(template, '%', &args)?;
    let made = minijinja::format_filter(minijinja::FormatStyle::Printf, template, &args)?;
    operand(state, made.into())
}

/// Refuses widths and precisions (after `%` or `{`) that make more than a text may have.
pub(super) fn check_widths(format: &str, mark: char, args: &[Value]) -> Result<(), Error> {
    let is_part = |c: char| match mark {
        '%' => c.is_ascii_digit() || "#-+ .*".contains(c),
        _ => c != '}',
    };
    let mut width = 0_usize;
    for piece in format.split(mark).skip(1) {
        let end = piece.find(|c| !is_part(c)).unwrap_or(piece.len());
        let runs = piece[..end].split(|c: char| !c.is_ascii_digit()).filter(|run| !run.is_empty());
        let widths = runs.map(|run| run.parse().unwrap_or(usize::MAX));
        width = widths.fold(width, usize::saturating_add);
        if piece[..end].contains(['*', '{']) {
            let widest = args.iter().filter_map(Value::as_i64).map(i64::unsigned_abs).max();
            width = width.saturating_add(widest.unwrap_or(0) as usize);
        }
    }
    match width <= TEXT_BYTES_MAX {
        true => Ok(()),
        false => Err(failed(format!("widths may be at most {TEXT_BYTES_MAX} in all"))),
    }
}
