//! Models of a models file, from their files to their end: located or downloaded, planned, loaded
//! ([`load`]), followed while the file changes ([`reload`]), and watched ([`watch`]).
//!
//! Nothing here prints; who runs it says how progress is shown ([`load::Progress`]).

pub mod load;
pub mod reload;
pub mod watch;
