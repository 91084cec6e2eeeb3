//! The door: what every request passes before its handler ([`access`]), and what a subnet's miner
//! asks of signed ones ([`guard()`]): requests signed by members with stake pass, each once, and no
//! member can crowd out another.
//!
//! Checks of a signed request run in the order of [`checks`]: headers, membership, stake, age,
//! repetition; then the body is read ([`bodies`]) and the signature checked; then repetition again,
//! rate, and the [`fair`] queue. A request that was refused leaves no trace that could harm its
//! signer.

pub mod access;
pub mod bodies;
pub mod checks;
mod counts;
pub mod fair;
mod gate;
mod guard;
pub mod members;
pub mod models;
mod outcome;
pub mod replay;
pub mod report;

pub use gate::{Gate, Policy, STAKE_MIN};
pub use guard::{Caller, guard};
pub use outcome::{Outcome, Refused};
