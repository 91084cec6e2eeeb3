//! The validator's side. So far: one signed query.

pub mod query;
