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
        for (miner, evidence) in &stored.miners {
            let key = format!("miners.{miner}.sums");
            evidence.check().map_err(|what| FileError::key(path, &key, &what))?;
        }
        Ok(Self { path: path.to_owned(), stored })
    }
}

impl EvidenceStore for EvidenceFile {
    type Error = FileError;

    fn load(&self, miner: &str) -> Result<Option<Evidence>, FileError> {
        Ok(self.stored.miners.get(miner).copied())
    }

    fn save(&mut self, miner: &str, evidence: &Evidence) -> Result<(), FileError> {
        let miners = &mut self.stored.miners;
        if miner.is_empty() || miner.len() > NAME_BYTES_MAX {
            let what =
                format!("a miner's name has 1 to {NAME_BYTES_MAX} bytes, got {}", miner.len());
            return Err(FileError::new(&self.path, what));
        }
        if miners.len() >= MINERS_MAX && !miners.contains_key(miner) {
            let what = format!("holds at most {MINERS_MAX} miners, {miner} would be one more");
            return Err(FileError::new(&self.path, what));
        }
        miners.insert(miner.to_owned(), *evidence);
        write_json(&self.path, &self.stored)
    }
}
