//! Contains panics of libraries that read untrusted model files: such a panic fails that model
//! only.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// A library panicked at a file. Its own words and place are in the log by the panic hook.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0} panicked; the log says where")]
pub struct Panicked(pub &'static str);

/// Runs `work`, which reads files of a model; `doing` names it.
///
/// # Errors
/// When it panics.
pub fn contained<T>(doing: &'static str, work: impl FnOnce() -> T) -> Result<T, Panicked> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|_| Panicked(doing))
}
