//! Everything behind a socket or a router, and the verification of what came out of it.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

#[path = "../common/mod.rs"]
mod common;

mod audit;
mod constraints;
mod dates;
mod endurance;
mod evidence;
mod fast_rows;
mod gate;
mod hostile;
mod hub;
mod load;
mod operators;
mod published;
mod requests;
mod residents;
mod rewriting;
mod server;
mod service;
mod soak;
mod stall;
mod streams;
mod tampers;
mod twin;
mod verify;
mod verify_real;
