//! Finds what the cache keeps of a repository, without the Hub.

use super::error::HubError;
use super::listing::{WantedFiles, check_commit};
use crate::models::checkpoint::missing_weights;
use std::path::{Path, PathBuf};

/// A repository on disk.
#[derive(Debug)]
pub struct Snapshot {
    /// The commit that the revision stood for.
    pub commit: String,
    /// The directory with the files.
    pub directory: PathBuf,
}

/// A snapshot from the cache alone, where all files are there that `wanted` needs.
pub(super) fn find(
    root: &Path,
    repo: &str,
    revision: &str,
    wanted: WantedFiles<'_>,
) -> Result<Snapshot, HubError> {
    let absent = |what: String| HubError::Offline { what, cache: root.to_owned() };
    let commit = std::fs::read_to_string(root.join("refs").join(revision))
        .map_or_else(|_| revision.to_owned(), |c| c.trim().to_owned());
    let directory = root.join("snapshots").join(&commit);
    if check_commit(revision, &commit).is_err() || !directory.is_dir() {
        return Err(absent(format!("{repo} at {revision}")));
    }
    let needed = wanted.needed().into_iter().find(|name| !directory.join(name).exists());
    let missing = match (needed, wanted) {
        (Some(name), _) => Some(name.to_owned()),
        // An index that cannot be read is named when the checkpoint is opened.
        (None, WantedFiles::Checkpoint) => missing_weights(&directory).unwrap_or_default(),
        (None, WantedFiles::Configuration | WantedFiles::File(_)) => None,
    };
    match missing {
        Some(name) => Err(absent(format!("{repo}/{name} at {revision}"))),
        None => Ok(Snapshot { commit, directory }),
    }
}

/// What is kept of a whole commit, which never changes, where this program has fetched it by that
/// name: other programs keep parts of a commit too.
pub(super) fn find_commit(
    root: &Path,
    repo: &str,
    revision: &str,
    wanted: WantedFiles<'_>,
) -> Option<Snapshot> {
    let is_fetched =
        check_commit(revision, revision).is_ok() && root.join("refs").join(revision).exists();
    if is_fetched { find(root, repo, revision, wanted).ok() } else { None }
}
