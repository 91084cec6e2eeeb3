//! Measurements and predictions that tell users what to expect: [`plan`] predicts models on devices
//! that are not here; the rest says what each verification scheme catches.
//!
//! [`attack`] runs the list of attacks: cheats make answers, a court judges them, [`results`] are
//! plain data that [`plot`] draws. Nothing here prints or writes.

pub mod attack;
mod attacks;
mod cheats;
mod court;
mod goals;
mod lockstep;
mod malformed;
pub mod plan;
pub mod plot;
pub mod prompts;
mod published;
pub mod results;
pub mod stats;
pub mod tamper;
mod trial;
