//! Defines what can be wrong with a checkpoint: always the file, key or tensor, the rule and the
//! fact.

use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// What a device or another engine said, as the error of its own kind.
pub type DeviceError = Box<dyn std::error::Error + Send + Sync>;

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file that the system does not open or read.
        path: PathBuf,
        /// Why the system refuses.
        source: io::Error,
    },
    /// There is no place for what is computed.
    #[error("there is no place for a cache: HOME is not set, nor TARGON_CACHE or XDG_CACHE_HOME")]
    NoCache,
    /// A file is not what its name promises.
    #[error("{path}: {}", plain(.what))]
    Invalid {
        /// The file that is wrong.
        path: PathBuf,
        /// The rule for it, and what was found in its place.
        what: String,
    },
    /// A key of the model configuration is missing or has the wrong type.
    #[error("{path}: `{key}` {}", plain(.what))]
    Key {
        /// The configuration file that the key belongs to.
        path: PathBuf,
        /// The key that has a wrong value.
        key: String,
        /// The rule for the value, and what was found in its place.
        what: String,
    },
    /// A value that this engine does not implement.
    #[error("{path}: `{key}` = {value} is not supported; {supported}")]
    Unsupported {
        /// The configuration file that the key belongs to.
        path: PathBuf,
        /// The key whose value is not supported.
        key: String,
        /// The value that stands there.
        value: String,
        /// The values that are supported.
        supported: String,
    },
    /// A tensor is missing, or has the wrong shape or type.
    #[error("tensor `{name}` in {path}: {}", plain(.what))]
    Tensor {
        /// Name of the tensor, as the file has it.
        name: String,
        /// The file (or directory) it was looked for in.
        path: PathBuf,
        /// The rule for the tensor, and what was found in its place.
        what: String,
    },
    /// The system refused memory.
    #[error("cannot reserve memory: {0}")]
    Memory(#[from] io::Error),
    /// The device refuses the model, or does not work.
    #[error(transparent)]
    Device(DeviceError),
    /// The Hub could not give the files.
    #[error(transparent)]
    Hub(#[from] super::hub::HubError),
}

impl LoadError {
    pub(crate) fn invalid(path: &Path, what: impl ToString) -> Self {
        LoadError::Invalid { path: path.to_owned(), what: what.to_string() }
    }
}

/// A message without the backtrace that candle appends to its own where `RUST_BACKTRACE` is set:
/// messages are for users, and go into answers.
fn plain(what: &str) -> &str {
    what.split_once("\n   0: ").map_or(what, |(message, _)| message)
}

/// Bytes of a file that is read whole: configuration, index, tokenizer, template.
pub const FILE_BYTES_MAX: u64 = 256 << 20;
/// What Git leaves in place of a large file that was not downloaded begins with.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Bytes at the start of a file by which it is known.
pub(super) const POINTER_BYTES: u64 = LFS_POINTER.len() as u64;

/// Refuses the text that Git leaves in place of a large file.
pub(super) fn refuse_pointer(path: &Path, bytes: &[u8]) -> Result<(), LoadError> {
    if !bytes.starts_with(LFS_POINTER) {
        return Ok(());
    }
    let what = "is a Git LFS pointer, not the file itself: run `git lfs pull`, or get the model \
        with `targon-engine fetch`";
    Err(LoadError::invalid(path, what))
}

/// Reads a whole file.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    let io = |source| LoadError::Io { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(LoadError::invalid(path, format!("must be at most {FILE_BYTES_MAX} bytes")));
    }
    refuse_pointer(path, &bytes)?;
    Ok(bytes)
}

/// Reads a text file.
pub(super) fn read_text(path: &Path) -> Result<String, LoadError> {
    String::from_utf8(read(path)?).map_err(|_| LoadError::invalid(path, "must be UTF-8"))
}

/// Reads a JSON file. A key that stands twice in an object is an error: which value counts would
/// be a guess.
pub(crate) fn read_json(path: &Path) -> Result<Value, LoadError> {
    let json: Result<Strict, _> = serde_json::from_slice(&read(path)?);
    json.map(|j| j.0).map_err(|e| LoadError::invalid(path, format!("not valid JSON: {e}")))
}

/// A JSON value whose objects have every key once.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Strict(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = serde_json::Map::new();
        while let Some((key, Strict(value))) = entries.next_entry::<String, _>()? {
            if map.contains_key(&key) {
                return Err(A::Error::custom(format!("the key `{key}` stands twice in an object")));
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_message_holds_a_backtrace() {
        let trace = std::backtrace::Backtrace::force_capture();
        let what = format!("not a whole file: early end\n{trace}");
        assert!(what.len() > 100, "a backtrace was captured");
        let (path, name) = (PathBuf::from("m"), "n".to_owned());
        for (error, want) in [
            (LoadError::invalid(&path, &what), "m: not a whole file: early end"),
            (
                LoadError::Key { path: path.clone(), key: "k".into(), what: what.clone() },
                "m: `k` not a whole file: early end",
            ),
            (
                LoadError::Tensor { name, path: path.clone(), what },
                "tensor `n` in m: not a whole file: early end",
            ),
        ] {
            assert_eq!(error.to_string(), want);
        }
    }
}
