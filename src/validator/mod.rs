//! Asks miners in rounds of signed queries, and computes weights from their results.
//!
//! [`round`] is a pure state machine, and [`run`] executes its actions. [`prompt`] makes the
//! prompts of rounds, and [`scores`] computes weights from their results.

pub mod eligible;
pub mod models;
pub mod organics;
pub mod prompt;
pub mod query;
pub mod round;
pub mod run;
pub mod scores;
#[cfg(test)]
mod simulation;
