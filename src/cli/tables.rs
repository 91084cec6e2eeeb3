//! Draws the frame that tables on a terminal have, and writes fields of comma-separated values.

use comfy_table::{Row, Table, presets};

/// An empty table with lines around its cells.
pub(super) fn bordered(header: impl Into<Row>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header(header);
    table
}

/// A text as one field of a line of RFC 4180: with quotation marks where it has a mark or a comma
/// of its own.
pub(super) fn csv_field(text: &str) -> String {
    match text.contains(['"', ',', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    }
}
