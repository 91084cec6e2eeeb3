//! Reads the listing of a repository as a Hub sends it. It is untrusted: names, checksums and sizes
//! are checked before they are used for files here.

use super::error::{HubError, corrupt};
use crate::models::error::FILE_BYTES_MAX;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// Files of a repository.
const FILES_MAX: usize = 10_000;
/// Bytes of a file of weights.
const WEIGHTS_BYTES_MAX: u64 = 1 << 40;
/// Characters of a name.
const NAME_MAX: usize = 200;
const COMMIT_DIGITS: usize = 40;
const SHA256_DIGITS: usize = 64;
/// The file with a model's shape.
const CONFIGURATION: &str = "config.json";
/// The files of a checkpoint beside its weights.
const SMALL: [&str; 7] = [
    CONFIGURATION,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];

/// What to fetch of a repository.
#[derive(Clone, Copy, Debug)]
pub enum WantedFiles<'a> {
    /// Everything a safetensors checkpoint needs.
    Checkpoint,
    /// Its `config.json` alone. What a revision stands for in the cache stays as it is, so that a
    /// checkpoint which is kept under it is found there without the Hub.
    Configuration,
    /// The file of this name alone.
    File(&'a str),
}

impl<'a> WantedFiles<'a> {
    /// The files without which it is not there.
    pub(super) fn needed(self) -> Vec<&'a str> {
        match self {
            Self::File(file) => vec![file],
            Self::Checkpoint => vec![CONFIGURATION, "tokenizer.json"],
            Self::Configuration => vec![CONFIGURATION],
        }
    }
}

/// A repository at one commit.
#[derive(Deserialize)]
pub(super) struct Listing {
    /// Hash of the commit that the revision names.
    pub(super) sha: String,
    siblings: Vec<RepositoryFile>,
}

#[derive(Deserialize, Clone, Debug)]
#[serde(rename_all = "camelCase")]
pub(super) struct RepositoryFile {
    pub(super) rfilename: String,
    #[serde(default)]
    pub(super) size: u64,
    pub(super) blob_id: Option<String>,
    pub(super) lfs: Option<Lfs>,
}

#[derive(Deserialize, Clone, Debug)]
pub(super) struct Lfs {
    pub(super) sha256: String,
    pub(super) size: u64,
}

impl RepositoryFile {
    pub(super) fn size(&self) -> u64 {
        self.lfs.as_ref().map_or(self.size, |lfs| lfs.size)
    }

    /// The blob's name in the cache, which is its checksum.
    fn blob(&self) -> Result<&str, HubError> {
        let (digits, blob) = match (&self.lfs, &self.blob_id) {
            (Some(lfs), _) => (SHA256_DIGITS, lfs.sha256.as_str()),
            (None, Some(id)) => (COMMIT_DIGITS, id.as_str()),
            (None, None) => {
                return Err(corrupt(&self.rfilename, "a checksum in the listing", "none"));
            }
        };
        if is_hex(blob, digits) {
            return Ok(blob);
        }
        let expected = format!("a checksum of {digits} hexadecimal digits in the listing");
        Err(corrupt(&self.rfilename, expected, format!("{blob:?}")))
    }

    fn check(&self) -> Result<(), HubError> {
        check_name(&self.rfilename)?;
        let name = &self.rfilename;
        let is_weights = name.ends_with(".safetensors") || name.ends_with(".gguf");
        let max = if is_weights { WEIGHTS_BYTES_MAX } else { FILE_BYTES_MAX };
        match self.size() <= max {
            true => Ok(()),
            false => Err(corrupt(name, format!("at most {max} bytes"), self.size())),
        }
    }
}

impl Listing {
    /// Reads the answer of the Hub at `url`.
    pub(super) fn parse(url: &str, body: &[u8]) -> Result<Self, HubError> {
        let listing: Self =
            serde_json::from_slice(body).map_err(|e| corrupt(url, "a model description", e))?;
        check_commit(url, &listing.sha)?;
        if listing.siblings.len() > FILES_MAX {
            let (want, got) = (format!("at most {FILES_MAX} files"), listing.siblings.len());
            return Err(corrupt(url, want, got));
        }
        Ok(listing)
    }

    /// What is wanted of it: the files by their blobs, so that each blob is fetched once.
    pub(super) fn choose(
        &self,
        repo: &str,
        wanted: WantedFiles<'_>,
    ) -> Result<BTreeMap<String, Vec<RepositoryFile>>, HubError> {
        let missing = |file: &str| HubError::Missing {
            repo: repo.to_owned(),
            commit: self.sha.clone(),
            file: file.to_owned(),
        };
        let is_wanted = |name: &str| match wanted {
            WantedFiles::File(file) => name == file,
            WantedFiles::Checkpoint => is_checkpoint_file(name),
            WantedFiles::Configuration => name == CONFIGURATION,
        };
        let entries: Vec<&RepositoryFile> =
            self.siblings.iter().filter(|e| is_wanted(&e.rfilename)).collect();
        let has = |test: &dyn Fn(&str) -> bool| entries.iter().any(|e| test(&e.rfilename));
        if let Some(name) = wanted.needed().into_iter().find(|name| !has(&|n| n == *name)) {
            return Err(missing(name));
        }
        if matches!(wanted, WantedFiles::Checkpoint) && !has(&|n| n.ends_with(".safetensors")) {
            return Err(missing("model.safetensors"));
        }
        let (mut blobs, mut names) =
            (BTreeMap::<String, Vec<RepositoryFile>>::new(), BTreeSet::new());
        for entry in entries {
            entry.check()?;
            if !names.insert(&entry.rfilename) {
                return Err(corrupt(&entry.rfilename, "one file of this name", "two"));
            }
            let same = blobs.entry(entry.blob()?.to_owned()).or_default();
            if let Some(other) = same.first().filter(|other| other.size() != entry.size()) {
                let (want, got) = (format!("{} bytes", other.size()), entry.size());
                return Err(corrupt(&entry.rfilename, want, got));
            }
            same.push(entry.clone());
        }
        Ok(blobs)
    }
}

/// The files of a checkpoint: configuration, tokenizer, template, and `model*.safetensors`.
fn is_checkpoint_file(name: &str) -> bool {
    let is_weights = name.starts_with("model") && name.ends_with(".safetensors");
    SMALL.contains(&name) || (is_weights && !name.contains('/'))
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Only a whole commit names a snapshot.
pub(super) fn check_commit(source: &str, commit: &str) -> Result<(), HubError> {
    if is_hex(commit, COMMIT_DIGITS) {
        return Ok(());
    }
    let expected = format!("a commit of {COMMIT_DIGITS} hexadecimal digits");
    Err(corrupt(source, expected, format!("{commit:?}")))
}

/// `NAME` or `OWNER/NAME`. Two dashes stand for the slash in the cache.
pub(super) fn check_repo(name: &str) -> Result<(), HubError> {
    let is_sound = !name.contains("--") && name.split('/').count() <= 2;
    if is_sound { check_name(name) } else { Err(HubError::Name(name.to_owned())) }
}

/// Only names that stay inside the cache: no empty, hidden or parent components.
pub(super) fn check_name(name: &str) -> Result<(), HubError> {
    let good = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.+@=".contains(c))
    };
    let sound = name.len() <= NAME_MAX && name.split('/').all(good);
    if sound { Ok(()) } else { Err(HubError::Name(name.to_owned())) }
}
