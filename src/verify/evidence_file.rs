//! Evidence about miners in one JSON file. One process writes it; every change replaces the whole
//! file before the answer is acted on.

use super::evidence::{Evidence, EvidenceStore};
use super::file::{FileError, read_json, write_json};
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
            evidence.check().map_err(|what| FileError::key(path, &key, &what))?;
        }
        Ok(Self { path: path.to_owned(), stored })
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
        let miners = &mut self.stored.miners;
        check_name(&self.path, miner)?;
        if miners.len() >= MINERS_MAX && !miners.contains_key(miner) {
            let what = format!("holds at most {MINERS_MAX} miners, {miner} would be one more");
            return Err(FileError::new(&self.path, what));
        }
        miners.insert(miner.to_owned(), *evidence);
        write_json(&self.path, &self.stored)
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
