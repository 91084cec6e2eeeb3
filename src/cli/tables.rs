//! Draws the frame that tables on a terminal have.

use comfy_table::{Row, Table, presets};

/// An empty table with lines around its cells.
pub(super) fn bordered(header: impl Into<Row>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header(header);
    table
}
