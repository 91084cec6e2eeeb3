//! Converts records into statements and rows into records: names, bounds, and what each column
//! holds.

use super::error::Cause;
use super::session::Bound;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::any::AnyRow;
use sqlx::{Any, Decode, Row, Type};
use std::fmt::Write;

/// Bytes of one JSON text, a capture among them.
const JSON_BYTES_MAX: usize = 256 << 20;

/// `($1, $2), ($3, $4)` for as many rows and columns.
pub(super) fn placeholders(rows: usize, columns: usize) -> String {
    let mut text = String::new();
    for row in 0..rows {
        text.push_str(if row == 0 { "(" } else { ", (" });
        for column in 0..columns {
            let comma = if column == 0 { "" } else { ", " };
            let _ = write!(text, "{comma}${}", row * columns + column + 1);
        }
        text.push(')');
    }
    text
}

/// A number that the databases can hold.
pub(super) fn number(field: &str, value: u64) -> Result<i64, Cause> {
    i64::try_from(value)
        .map_err(|_| Cause::Record(format!("`{field}` must be at most {}, got {value}", i64::MAX)))
}

/// A measurement; NaN is refused, because databases do not order it.
pub(super) fn finite(field: &str, value: f64) -> Result<Bound<'static>, Cause> {
    match value.is_finite() {
        true => Ok(value.into()),
        false => Err(Cause::Record(format!("`{field}` must be finite, got {value}"))),
    }
}

/// JSON as text.
pub(super) fn json(field: &str, value: &impl Serialize) -> Result<String, Cause> {
    let text = serde_json::to_string(value)
        .map_err(|e| Cause::Record(format!("`{field}` cannot be written as JSON: {e}")))?;
    if text.len() > JSON_BYTES_MAX {
        let (max, got) = (JSON_BYTES_MAX, text.len());
        let words = format!("`{field}` must have at most {max} bytes as JSON, got {got}");
        return Err(Cause::Record(words));
    }
    Ok(text)
}

/// What a column holds.
pub(super) fn get<'r, T: Decode<'r, Any> + Type<Any>>(
    row: &'r AnyRow,
    column: &str,
) -> Result<T, Cause> {
    row.try_get(column).map_err(|e| Cause::Stored(format!("column `{column}`: {e}")))
}

/// A number of another width.
pub(super) fn get_number<T: TryFrom<i64>>(row: &AnyRow, column: &str) -> Result<T, Cause> {
    let value: i64 = get(row, column)?;
    T::try_from(value)
        .map_err(|_| Cause::Stored(format!("column `{column}`: {value} is out of range")))
}

/// The same where the column may be empty.
pub(super) fn get_number_or_none<T: TryFrom<i64>>(
    row: &AnyRow,
    column: &str,
) -> Result<Option<T>, Cause> {
    let value: Option<i64> = get(row, column)?;
    let out = |value| Cause::Stored(format!("column `{column}`: {value} is out of range"));
    value.map(|value| T::try_from(value).map_err(|_| out(value))).transpose()
}

/// JSON that stands in a column.
pub(super) fn get_json<T: DeserializeOwned>(row: &AnyRow, column: &str) -> Result<T, Cause> {
    read_json(column, &get::<String>(row, column)?)
}

/// The same where the column may be empty.
pub(super) fn get_json_or_none<T: DeserializeOwned>(
    row: &AnyRow,
    column: &str,
) -> Result<Option<T>, Cause> {
    let text: Option<String> = get(row, column)?;
    text.map(|text| read_json(column, &text)).transpose()
}

fn read_json<T: DeserializeOwned>(column: &str, text: &str) -> Result<T, Cause> {
    serde_json::from_str(text).map_err(|e| Cause::Stored(format!("column `{column}`: {e}")))
}
