//! The contract of a backend, held by both: SmolLM2-135M-Instruct on the native engine and on
//! mistral.rs, beside each other in one process, on the CPU. `scripts/test-mistralrs` runs it.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

#[path = "../common/mod.rs"]
mod common;

mod contract;
mod devices;
mod families;
mod pair;
mod proofs;
mod service;
