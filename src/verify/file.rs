//! Reads and replaces small JSON files that a verifier keeps: strictly, and as a whole or not at
//! all.

use crate::files;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

/// Bytes of a file: evidence about 1,024 miners, with names of 128 bytes that are written as six
/// each, is below 2 MiB.
pub(super) const FILE_BYTES_MAX: u64 = 4 << 20;

/// A fault in a file.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{path}: {what}")]
pub struct FileError {
    /// The file that the fault is in.
    pub path: PathBuf,
    /// Key, rule and fact.
    pub what: String,
}

impl FileError {
    /// A fault of a file.
    pub fn new(path: &Path, what: impl Into<String>) -> Self {
        Self { path: path.to_owned(), what: what.into() }
    }

    pub(super) fn key(path: &Path, key: &str, what: &str) -> Self {
        Self::new(path, format!("`{key}` {what}"))
    }
}

/// Reads a file that must hold one `T` and nothing else.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, FileError> {
    let unread = |e: String| FileError::new(path, format!("cannot be read: {e}"));
    let bytes = files::read(path, FILE_BYTES_MAX).map_err(|e| unread(e.to_string()))?;
    let text = String::from_utf8(bytes).map_err(|e| unread(e.to_string()))?;
    let mut deserializer = serde_json::Deserializer::from_str(&text);
    let parsed = serde_path_to_error::deserialize(&mut deserializer).map_err(|e| {
        let (key, what) = (e.path().to_string(), e.inner());
        match key.as_str() {
            "." | "?" => FileError::new(path, what.to_string()),
            key => FileError::key(path, key, &format!("is wrong: {what}")),
        }
    })?;
    deserializer.end().map_err(|e| FileError::new(path, format!("goes on after its end: {e}")))?;
    Ok(parsed)
}

/// Puts `value` in place of the file, if there is one.
pub(super) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), FileError> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| FileError::new(path, format!("cannot be put into words: {e}")))?;
    files::replace(path, (text + "\n").as_bytes())
        .map_err(|e| FileError::new(path, format!("cannot be written: {e}")))
}
