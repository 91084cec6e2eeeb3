//! Holds the report of a measurement: it has one JSON schema, and Markdown, CSV and HTML are made
//! of it.
//!
//! [`schema`] is the data, [`facts`] says what was measured on, [`spread`] holds statistics,
//! [`seal`] signs and reads files, the rest writes. [`sheet`] is a table of several reports.

pub mod csv;
pub mod facts;
pub mod html;
pub mod markdown;
mod plots;
pub mod schema;
pub mod seal;
pub mod sheet;
pub mod spread;
