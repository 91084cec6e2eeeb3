//! The validator's side: signed queries, rounds of them, and weights out of what was seen.
//!
//! [`round`] is a pure state machine; [`run`] executes what it says; [`scores`] makes weights of
//! what rounds have found, [`prompt`] what they ask. [`service`] shows all of it to operators.

pub mod eligible;
pub mod models;
pub mod organics;
pub mod prompt;
pub mod query;
pub mod round;
pub mod run;
pub mod scores;
pub mod service;
#[cfg(test)]
mod simulation;
