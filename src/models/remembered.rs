//! Remembers values that were computed from checkpoints: weights roots by the identity of their
//! files, and hashes of calibrations and rounding energies by what they are computed from.
//!
//! It is one file of the cache, written by this program alone. A damaged file is ignored, because
//! everything in it can be computed again.

use super::error::LoadError;
use crate::files;
use crate::proof::codec::{Encoder, Hash, from_hex, to_hex};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Version of the file.
const VERSION: u32 = 3;
/// Entries of a kind; one more, and all others of its kind are forgotten.
const ENTRIES_MAX: usize = 1024;
/// Bytes of the file: three kinds of entries, each entry two hashes in hexadecimal at most.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Changes of the file by this process, one at a time.
static CHANGING: Mutex<()> = Mutex::new(());

/// Where the program keeps what it can compute again: `TARGON_CACHE`, or the user's cache
/// directory.
///
/// # Errors
/// When the environment names neither.
pub fn cache_dir() -> Result<PathBuf, LoadError> {
    let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty()).map(PathBuf::from);
    let of_user = || {
        let home = || var("HOME").map(|home| home.join(".cache"));
        var("XDG_CACHE_HOME").or_else(home).map(|caches| caches.join("targon-engine"))
    };
    var("TARGON_CACHE").or_else(of_user).ok_or(LoadError::NoCache)
}

/// The file of a cache directory.
#[derive(Clone, Copy)]
pub struct Remembered<'a>(pub &'a Path);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    version: u32,
    /// Hash of `kept`, by which damage is noticed.
    check: String,
    kept: Kept,
}

/// Entries in hexadecimal, whose order is always the same.
#[derive(Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Kept {
    roots: BTreeMap<String, String>,
    calibrations: BTreeMap<String, String>,
    /// Numbers, as their bits.
    #[serde(default)]
    roundings: BTreeMap<String, String>,
}

impl Remembered<'_> {
    /// The weights root of the files with this identity.
    pub fn root(self, identity: &Hash) -> Option<Hash> {
        from_hex(self.read().roots.get(&to_hex(identity))?).ok()
    }

    /// The hash of the calibration that was computed from these inputs.
    pub fn calibration(self, inputs: &Hash) -> Option<Hash> {
        from_hex(self.read().calibrations.get(&to_hex(inputs))?).ok()
    }

    /// The rounding energy of a model whose calibration has these inputs.
    pub fn rounding(self, inputs: &Hash) -> Option<f64> {
        let kept = self.read();
        let bits = u64::from_str_radix(kept.roundings.get(&to_hex(inputs))?, 16).ok()?;
        Some(f64::from_bits(bits)).filter(|energy| energy.is_finite() && *energy >= 0.0)
    }

    /// Remembers a weights root.
    pub fn keep_root(self, identity: &Hash, root: &Hash) {
        self.change(|kept| insert(&mut kept.roots, identity, to_hex(root)));
    }

    /// Remembers the hash of a calibration.
    pub fn keep_calibration(self, inputs: &Hash, calibration: &Hash) {
        self.change(|kept| insert(&mut kept.calibrations, inputs, to_hex(calibration)));
    }

    /// Remembers the rounding energy of a model.
    pub fn keep_rounding(self, inputs: &Hash, energy: f64) {
        let bits = format!("{:x}", energy.to_bits());
        self.change(|kept| insert(&mut kept.roundings, inputs, bits));
    }

    fn path(self) -> PathBuf {
        self.0.join("roots.json")
    }

    fn read(self) -> Kept {
        let path = self.path();
        let why = match files::read(&path, FILE_BYTES_MAX) {
            Ok(bytes) => match parse(&bytes) {
                Ok(kept) => return kept,
                Err(why) => why,
            },
            Err(e) if e.kind() == ErrorKind::NotFound => return Kept::default(),
            Err(e) => CacheFileError::Read(e),
        };
        tracing::warn!(path = %path.display(), "the cache of computed values is not used: {why}");
        Kept::default()
    }

    /// Replaces the file; a failure costs only another computation.
    fn change(self, change: impl FnOnce(&mut Kept)) {
        let _one = CHANGING.lock();
        let mut kept = self.read();
        change(&mut kept);
        let stored = check(&kept).map(|check| Stored { version: VERSION, check, kept });
        let written = stored
            .and_then(|stored| serde_json::to_vec(&stored))
            .map_err(std::io::Error::other)
            .and_then(|bytes| files::replace(&self.path(), &bytes));
        if let Err(e) = written {
            tracing::warn!(path = %self.path().display(), "cannot be stored in the cache: {e}");
        }
    }
}

fn insert(entries: &mut BTreeMap<String, String>, key: &Hash, value: String) {
    if entries.len() >= ENTRIES_MAX {
        entries.clear();
    }
    entries.insert(to_hex(key), value);
}

/// Why a file of what was remembered is not used.
#[derive(Debug, thiserror::Error)]
enum CacheFileError {
    #[error(transparent)]
    Read(#[from] std::io::Error),
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error("`version` must be {VERSION}, got {0}")]
    Version(u32),
    #[error("it is damaged: `check` is not the hash of `kept`")]
    Damaged,
}

fn parse(bytes: &[u8]) -> Result<Kept, CacheFileError> {
    let stored: Stored = serde_json::from_slice(bytes)?;
    if stored.version != VERSION {
        return Err(CacheFileError::Version(stored.version));
    }
    let want = check(&stored.kept)?;
    match stored.check == want {
        true => Ok(stored.kept),
        false => Err(CacheFileError::Damaged),
    }
}

fn check(kept: &Kept) -> serde_json::Result<String> {
    let bytes = serde_json::to_vec(kept)?;
    Ok(to_hex(&Encoder::new("targon-engine/remembered/3").bytes(&bytes).finish()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_remembered_is_found_until_the_file_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let remembered = Remembered(dir.path());
        assert_eq!(remembered.root(&[1; 32]), None);
        remembered.keep_root(&[1; 32], &[2; 32]);
        remembered.keep_calibration(&[1; 32], &[3; 32]);
        remembered.keep_rounding(&[1; 32], 0.1);
        assert_eq!(remembered.root(&[1; 32]), Some([2; 32]));
        assert_eq!(
            (remembered.rounding(&[1; 32]), remembered.rounding(&[2; 32])),
            (Some(0.1), None)
        );
        for energy in [f64::NAN, f64::INFINITY, -1.0] {
            remembered.keep_rounding(&[3; 32], energy);
            assert_eq!(remembered.rounding(&[3; 32]), None, "{energy} is none");
        }
        assert_eq!(remembered.calibration(&[1; 32]), Some([3; 32]));
        let whole = std::fs::read(remembered.path()).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            std::fs::write(remembered.path(), &flipped).unwrap();
            assert_eq!(remembered.root(&[1; 32]), None, "a bit of byte {at} was flipped");
            std::fs::write(remembered.path(), &whole[..at]).unwrap();
            assert_eq!(remembered.root(&[1; 32]), None, "cut to {at} bytes");
        }
        remembered.keep_root(&[4; 32], &[5; 32]);
        assert_eq!(remembered.root(&[4; 32]), Some([5; 32]));
    }

    #[test]
    fn the_file_does_not_grow_without_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut kept = Kept::default();
        for i in 0..=ENTRIES_MAX as u64 {
            let key: Hash = *blake3::hash(&i.to_le_bytes()).as_bytes();
            insert(&mut kept.roots, &key, to_hex(&key));
            insert(&mut kept.calibrations, &key, to_hex(&key));
            insert(&mut kept.roundings, &key, format!("{:x}", f64::MAX.to_bits()));
            if i + 1 == ENTRIES_MAX as u64 {
                Remembered(dir.path()).change(|all| *all = std::mem::take(&mut kept));
                kept = Remembered(dir.path()).read();
                assert_eq!(kept.roots.len(), ENTRIES_MAX, "a full file can be read");
            }
        }
        assert_eq!(kept.roots.len(), 1);
    }
}
