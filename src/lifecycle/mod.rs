//! Manages the models of a models file: they are located or downloaded, planned and loaded
//! ([`load`]), updated when the file changes ([`reload`]), and monitored ([`watch`]).
//!
//! Nothing here prints; the caller says how progress is shown ([`load::Progress`]).

pub mod load;
#[cfg(feature = "mistralrs")]
mod mistral;
mod prefixes;
pub mod reload;
pub mod watch;
