//! The engine and what lies below it: arithmetic, checkpoints, scheduling, proofs.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

#[path = "../common/mod.rs"]
mod common;

mod calibration;
mod canon;
mod changed_weights;
mod checkpoints;
mod drafts;
mod endings;
mod fuzz;
mod gguf_files;
mod hub;
mod kernels;
mod loading;
mod panics;
mod parity;
mod prefixes;
mod proofs;
mod quantised;
mod real_model;
mod reference;
mod scheduler_sim;
mod tapped;
mod text;
mod twin;
