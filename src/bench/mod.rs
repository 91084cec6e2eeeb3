//! Measurements that tell users what to expect. So far: what each verification scheme catches.
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
pub mod plot;
pub mod prompts;
mod published;
pub mod results;
pub mod stats;
pub mod tamper;
mod trial;
