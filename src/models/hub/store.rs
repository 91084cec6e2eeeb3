//! Manages the files of the Hub's cache: sizes, checksums, locks and links.

use super::error::{HubError, corrupt};
use super::listing::RepositoryFile;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::fs::TryLockError;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Another process may take this long for a blob: six hours.
const LOCK_TRIES_MAX: u32 = 6 * 60 * 60 * 4;
const LOCK_PAUSE: Duration = Duration::from_millis(250);

pub(super) fn verify(entry: &RepositoryFile, path: &Path) -> Result<(), HubError> {
    let io = |source| HubError::Io { path: path.to_owned(), source };
    let mut file = std::fs::File::open(path).map_err(io)?;
    let (expected, got) = match &entry.lfs {
        Some(lfs) => (lfs.sha256.clone(), digest(&mut file, Sha256::new()).map_err(io)?),
        None => {
            let mut hasher = Sha1::new();
            hasher.update(format!("blob {}\0", entry.size).as_bytes());
            let got = digest(&mut file, hasher).map_err(io)?;
            (entry.blob_id.clone().unwrap_or_default(), got)
        }
    };
    if expected.eq_ignore_ascii_case(&got) {
        return Ok(());
    }
    Err(corrupt(&entry.rfilename, format!("checksum {expected}"), got))
}

fn digest(file: &mut std::fs::File, mut hasher: impl Digest) -> io::Result<String> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect());
        }
        hasher.update(&buffer[..count]);
    }
}

pub(super) fn size_of(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |m| m.len())
}

pub(super) fn has_size(path: &Path, size: u64) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.len() == size)
}

pub(super) fn make_parent(path: &Path) -> Result<(), HubError> {
    let parent = path.parent().unwrap_or(path);
    std::fs::create_dir_all(parent)
        .map_err(|source| HubError::Io { path: parent.to_owned(), source })
}

pub(super) fn write_small(path: &Path, bytes: &[u8]) -> Result<(), HubError> {
    make_parent(path)?;
    std::fs::write(path, bytes).map_err(|source| HubError::Io { path: path.to_owned(), source })
}

/// Held while a blob is written, so that two processes do not write the same one.
pub(super) async fn lock(path: &Path) -> Result<std::fs::File, HubError> {
    let io = |source| HubError::Io { path: path.to_owned(), source };
    let file = std::fs::File::create(path).map_err(io)?;
    for _ in 0..LOCK_TRIES_MAX {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => tokio::time::sleep(LOCK_PAUSE).await,
            Err(TryLockError::Error(source)) => return Err(io(source)),
        }
    }
    Err(HubError::Locked { path: path.to_owned() })
}

/// Puts a blob into a snapshot: a relative link, or a copy where links are refused.
pub(super) fn link(blob: &Path, at: &Path) -> Result<(), HubError> {
    make_parent(at)?;
    if at.exists() {
        return Ok(());
    }
    let io = |source| HubError::Io { path: at.to_owned(), source };
    // A dangling link is left over from an earlier, broken download.
    let _ = std::fs::remove_file(at);
    #[cfg(unix)]
    {
        let name = blob.file_name().unwrap_or_default();
        let nested = at.components().count() - blob.components().count();
        let target =
            (0..nested + 1).fold(PathBuf::new(), |p, _| p.join("..")).join("blobs").join(name);
        if std::os::unix::fs::symlink(&target, at).is_ok() && at.exists() {
            return Ok(());
        }
        let _ = std::fs::remove_file(at);
    }
    std::fs::copy(blob, at).map(|_| ()).map_err(io)
}
