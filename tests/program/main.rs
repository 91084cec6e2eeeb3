//! The program as its users run it, and a chain for it to talk to.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/node.rs"]
mod node;

mod chain;
mod cli;
mod miner;
mod weight_files;
