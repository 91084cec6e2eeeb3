//! The validator's side. So far: one signed query, and the HTTP service that stands in for Targon's
//! verifier container.

pub mod query;
pub mod service;
