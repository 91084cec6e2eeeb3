//! Admits requests: what every request passes before its handler ([`access`]), and the checks of
//! signed requests on a subnet's miner ([`guard()`]). Requests that members with stake have signed
//! are admitted, each once, and no member can starve another.
//!
//! A signed request is checked in the order of [`checks`]: headers, membership, stake, age,
//! repetition. Then the body is read ([`bodies`]) and the signature is checked; then come
//! repetition again, the rate limit, and the [`fair`] queue. A refused request changes nothing that
//! could harm its signer.

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
pub use outcome::{Refused, SignedOutcome};
