//! The program as its users run it, and a chain for it to talk to.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/dishonest.rs"]
#[allow(unreachable_pub, reason = "an example uses it as well")]
mod dishonest;
#[path = "../common/node.rs"]
mod node;
#[path = "../common/shell.rs"]
mod shell;

mod asking;
mod bench;
mod build_script;
mod cache;
mod chain;
mod cli;
mod closed_stdout;
mod doctor;
mod guides;
mod miner;
mod plan;
mod store;
mod update;
mod validator;
mod verifier;
mod weight_files;
mod weights;
mod wiped;

/// Keeps what is freed while a test looks for secrets in it.
#[global_allocator]
static ALLOCATOR: wiped::Recorder = wiped::Recorder;
