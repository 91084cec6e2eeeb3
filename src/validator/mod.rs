//! The validator's side. So far: the HTTP service that stands in for Targon's verifier container.

pub mod service;
