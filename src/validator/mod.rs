//! The validator's side: one signed query, and weights out of what was seen.

pub mod models;
pub mod prompt;
pub mod query;
pub mod scores;
