//! What can be wrong with a checkpoint: always the file, key or tensor, the rule and the fact.

use std::io;
use std::path::{Path, PathBuf};

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file is not what its name promises.
    #[error("{path}: {what}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Rule and fact.
        what: String,
    },
    /// A key of the model configuration is missing or has the wrong type.
    #[error("{path}: `{key}` {what}")]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Rule and fact.
        what: String,
    },
    /// A value that this engine does not implement.
    #[error("{path}: `{key}` = {value} is not supported; {supported}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What is.
        supported: String,
    },
    /// A tensor is missing, or has the wrong shape or type.
    #[error("tensor `{name}` in {path}: {what}")]
    Tensor {
        /// The tensor.
        name: String,
        /// The file (or directory) it was looked for in.
        path: PathBuf,
        /// Rule and fact.
        what: String,
    },
    /// The system refused memory.
    #[error("cannot reserve memory: {0}")]
    Memory(#[from] io::Error),
    /// The Hub could not give the files.
    #[error(transparent)]
    Hub(#[from] super::hub::HubError),
}

impl LoadError {
    pub(super) fn invalid(path: &Path, what: impl ToString) -> Self {
        LoadError::Invalid { path: path.to_owned(), what: what.to_string() }
    }
}

/// Reads a whole file.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    std::fs::read(path).map_err(|source| LoadError::Io { path: path.to_owned(), source })
}

/// Reads a JSON file.
pub(super) fn read_json(path: &Path) -> Result<serde_json::Value, LoadError> {
    serde_json::from_slice(&read(path)?)
        .map_err(|e| LoadError::invalid(path, format!("not valid JSON: {e}")))
}
