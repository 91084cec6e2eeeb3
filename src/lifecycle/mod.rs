//! Manages the models of a models file: they are located or downloaded, planned and loaded
//! ([`load`]), updated when the file changes ([`reload`]), and monitored ([`watch`]); [`accounts`]
//! keeps account of memory.
//!
//! Models to verify with are loaded by [`verifiers`] for captured answers, and by [`residents`] for
//! a validator, which may have them in memory in turn. [`pairs`] checks captured honest answers
//! with them.
//!
//! Nothing here prints; the caller says how progress is shown ([`load::Progress`]).

pub mod accounts;
pub mod load;
pub mod located;
#[cfg(feature = "mistralrs")]
mod mistral;
pub mod pairs;
pub mod prefixes;
pub mod reload;
pub mod residents;
pub mod verifiers;
pub mod watch;
