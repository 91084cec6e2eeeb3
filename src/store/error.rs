//! Defines what can go wrong with a store: which database, what was to be done, and the cause.

use std::fmt;
use std::io;
use std::time::Duration;

/// An operation on a store that failed. Its words never hold a password.
#[derive(Debug, thiserror::Error)]
#[error("{database}: cannot {operation}: {cause}")]
pub struct StoreError {
    /// The path, or the URL without its password and parameters.
    pub database: String,
    /// What was to be done.
    pub operation: String,
    /// Why it was not.
    pub cause: Cause,
}

/// Why an operation failed.
#[derive(Debug)]
pub enum Cause {
    /// Another process writes this store.
    InUse {
        /// Its process id, where it left one.
        process: Option<u32>,
    },
    /// The database took longer than it may.
    TooSlow {
        /// What was waited for.
        what: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// The store was written by a newer version of this program.
    NewerSchema {
        /// The schema's version in the database.
        found: u64,
        /// The newest version that is known here.
        known: u64,
    },
    /// The store was written by an older version, and is only read.
    OlderSchema {
        /// The schema's version in the database.
        found: u64,
        /// The version that is read here.
        known: u64,
    },
    /// The database has other contents.
    NotAStore(String),
    /// The URL, or the path.
    Place(String),
    /// The record cannot be kept: which field, the rule and the fact.
    Record(String),
    /// What is stored cannot be read back: which column, and why.
    Stored(String),
    /// The SQLite file is no longer the one that was opened.
    Gone,
    /// The file beside the database, or its directory.
    File(io::Error),
    /// The database refused, in its words.
    Database(String),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InUse { process: Some(process) } => {
                write!(f, "process {process} writes it, and only one process may")
            }
            Self::InUse { process: None } => {
                f.write_str("another process writes it, and only one process may")
            }
            Self::TooSlow { what, limit } => write!(f, "{what} took longer than {limit:?}"),
            Self::NewerSchema { found, known } => write!(
                f,
                "it has version {found} of the schema, and this program knows versions up to \
                 {known}: use the newer program"
            ),
            Self::OlderSchema { found, known } => write!(
                f,
                "it has version {found} of the schema, and version {known} is read here: the \
                 validator brings it up to date when it starts"
            ),
            Self::Gone => f.write_str("the file was removed or replaced since it was opened"),
            Self::File(e) => e.fmt(f),
            Self::NotAStore(words)
            | Self::Place(words)
            | Self::Record(words)
            | Self::Stored(words)
            | Self::Database(words) => f.write_str(words),
        }
    }
}
