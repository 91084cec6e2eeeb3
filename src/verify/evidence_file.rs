//! Stores evidence about miners in one JSON file. One process writes it; every change replaces the
//! whole file before the answer is acted on. What somebody else wrote in the meantime is not
//! replaced.

use super::evidence::{Evidence, EvidenceStore};
use super::file::{FILE_BYTES_MAX, FileError, read_json, write_json};
use crate::files;
use crate::proof::codec::Hash;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Version of the file.
const VERSION: u32 = 1;
/// Miners that a file holds: four subnets' worth.
const MINERS_MAX: usize = 1024;
/// Bytes of a miner's name.
const NAME_BYTES_MAX: usize = 128;

/// A file of evidence, held open in memory.
#[derive(Clone, Debug)]
pub struct EvidenceFile {
    path: PathBuf,
    stored: Stored,
    /// What the file held when it was last read or written.
    seen: Option<Hash>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    version: u32,
    miners: BTreeMap<String, Evidence>,
}

impl EvidenceFile {
    /// Reads the file; one that does not exist knows nobody.
    ///
    /// # Errors
    /// The file, the key, the rule and the fact.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        // Only a file that is not there is nobody's: one that cannot be seen must not be replaced.
        let is_absent =
            std::fs::symlink_metadata(path).is_err_and(|e| e.kind() == ErrorKind::NotFound);
        // Before it is read: a change in between is noticed then.
        let seen = hash(path)?;
        let stored = match is_absent {
            false => read_json(path)?,
            true => Stored { version: VERSION, miners: BTreeMap::new() },
        };
        if stored.version != VERSION {
            let what = format!("must be {VERSION}, got {}", stored.version);
            return Err(FileError::key(path, "version", &what));
        }
        if stored.miners.len() > MINERS_MAX {
            let what = format!("must hold at most {MINERS_MAX}, got {}", stored.miners.len());
            return Err(FileError::key(path, "miners", &what));
        }
        for (miner, evidence) in &stored.miners {
            check_name(path, miner)?;
            let key = format!("miners.{miner}.sums");
            evidence.check().map_err(|e| FileError::key(path, &key, &e.to_string()))?;
        }
        Ok(Self { path: path.to_owned(), stored, seen })
    }
}

/// Hash of the file, if there is one.
fn hash(path: &Path) -> Result<Option<Hash>, FileError> {
    match files::read(path, FILE_BYTES_MAX) {
        Ok(bytes) => Ok(Some(blake3::hash(&bytes).into())),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(FileError::new(path, format!("cannot be read: {e}"))),
    }
}

fn check_name(path: &Path, miner: &str) -> Result<(), FileError> {
    if (1..=NAME_BYTES_MAX).contains(&miner.len()) {
        return Ok(());
    }
    let what = format!("a miner's name has 1 to {NAME_BYTES_MAX} bytes, got {}", miner.len());
    Err(FileError::new(path, what))
}

impl EvidenceStore for EvidenceFile {
    type Error = FileError;

    fn load(&self, miner: &str) -> Result<Option<Evidence>, FileError> {
        Ok(self.stored.miners.get(miner).copied())
    }

    fn save(&mut self, miner: &str, evidence: &Evidence) -> Result<(), FileError> {
        let miners = &self.stored.miners;
        check_name(&self.path, miner)?;
        if miners.len() >= MINERS_MAX && !miners.contains_key(miner) {
            let what = format!("holds at most {MINERS_MAX} miners, {miner} would be one more");
            return Err(FileError::new(&self.path, what));
        }
        if hash(&self.path)? != self.seen {
            let what = "was changed by somebody else since it was read, and is not replaced";
            return Err(FileError::new(&self.path, what));
        }
        let before = self.stored.miners.insert(miner.to_owned(), *evidence);
        if let Err(e) = write_json(&self.path, &self.stored) {
            // What is not in the file must not count, nor be written with the next one.
            match before {
                Some(known) => self.stored.miners.insert(miner.to_owned(), known),
                None => self.stored.miners.remove(miner),
            };
            return Err(e);
        }
        self.seen = hash(&self.path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evidence() -> Evidence {
        Evidence::default()
    }

    #[test]
    fn a_damaged_file_is_an_error_that_names_it_and_stays_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evidence.json");
        let mut file = EvidenceFile::open(&path).unwrap();
        for name in ["a", &"b".repeat(NAME_BYTES_MAX)] {
            file.save(name, &evidence()).unwrap();
        }
        let whole = std::fs::read_to_string(&path).unwrap();
        assert_eq!(EvidenceFile::open(&path).unwrap().stored.miners.len(), 2);
        let name = whole.replace(&"b".repeat(NAME_BYTES_MAX), &"b".repeat(NAME_BYTES_MAX + 1));
        for (damaged, want) in [
            (String::new(), "EOF"),
            (whole[..whole.len() / 2].to_owned(), "EOF"),
            (format!("{whole}x"), "goes on after its end"),
            (whole.replace("\"version\": 1", "\"version\": 7"), "`version` must be 1, got 7"),
            (name, "a miner's name has 1 to 128 bytes, got 129"),
            (" ".repeat(5 << 20), "it has more than 4194304 bytes"),
        ] {
            std::fs::write(&path, &damaged).unwrap();
            let error = EvidenceFile::open(&path).unwrap_err().to_string();
            assert!(error.starts_with(&path.display().to_string()), "{error}");
            assert!(error.contains(want), "{want}: {error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), damaged);
        }
    }

    #[test]
    fn what_somebody_else_wrote_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evidence.json");
        let mut first = EvidenceFile::open(&path).unwrap();
        let mut second = EvidenceFile::open(&path).unwrap();
        first.save("a", &evidence()).unwrap();
        first.save("b", &evidence()).unwrap();
        let error = second.save("c", &evidence()).unwrap_err().to_string();
        assert!(error.contains("was changed by somebody else"), "{error}");
        assert_eq!(EvidenceFile::open(&path).unwrap().stored.miners.len(), 2);
        std::fs::write(&path, "damaged").unwrap();
        assert!(first.save("d", &evidence()).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "damaged");
    }

    #[test]
    fn what_cannot_be_written_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("below");
        std::fs::create_dir(&below).unwrap();
        let mut file = EvidenceFile::open(&below.join("evidence.json")).unwrap();
        // A link to nowhere: no file is there, and none can be made.
        std::fs::remove_dir(&below).unwrap();
        std::os::unix::fs::symlink(dir.path().join("nowhere/at/all"), &below).unwrap();
        assert!(file.save("a", &evidence()).is_err());
        assert_eq!(file.load("a").unwrap(), None);
        std::fs::remove_file(&below).unwrap();
        file.save("b", &evidence()).unwrap();
        let names = EvidenceFile::open(&below.join("evidence.json")).unwrap().stored.miners;
        assert_eq!(names.into_keys().collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn a_full_file_can_be_read_and_one_that_is_fuller_cannot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evidence.json");
        // Every byte of these names is written as six.
        let name = |i: usize| format!("{i:08}") + &"\u{1}".repeat(NAME_BYTES_MAX - 8);
        let mut miners: BTreeMap<String, Evidence> =
            (0..MINERS_MAX).map(|i| (name(i), evidence())).collect();
        write_json(&path, &Stored { version: VERSION, miners: miners.clone() }).unwrap();
        let mut file = EvidenceFile::open(&path).unwrap();
        file.save(&name(0), &evidence()).unwrap();
        let error = file.save("one more", &evidence()).unwrap_err().to_string();
        assert!(error.contains("at most 1024 miners"), "{error}");
        miners.insert("one more".into(), evidence());
        write_json(&path, &Stored { version: VERSION, miners }).unwrap();
        let error = EvidenceFile::open(&path).unwrap_err().to_string();
        assert!(error.contains("`miners` must hold at most 1024, got 1025"), "{error}");
    }
}
