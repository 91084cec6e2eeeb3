//! Small JSON files that a verifier keeps: read strictly, replaced as a whole or not at all.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A fault in a file.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{path}: {what}")]
pub struct FileError {
    /// The file.
    pub path: PathBuf,
    /// Key, rule and fact.
    pub what: String,
}

impl FileError {
    pub(super) fn new(path: &Path, what: impl Into<String>) -> Self {
        Self { path: path.to_owned(), what: what.into() }
    }

    pub(super) fn key(path: &Path, key: &str, what: &str) -> Self {
        Self::new(path, format!("`{key}` {what}"))
    }
}

/// Reads a file that must hold one `T` and nothing else.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, FileError> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| FileError::new(path, format!("cannot be read: {e}")))?;
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
    replace(path, &text).map_err(|e| FileError::new(path, format!("cannot be written: {e}")))
}

/// By way of a temporary file beside it, so that a crash leaves the old or the new one.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.{}.tmp", std::process::id()));
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().inspect_err(|_| {
        // What is left of it would only confuse; that it failed is reported either way.
        let _ = std::fs::remove_file(&temporary);
    })
}
