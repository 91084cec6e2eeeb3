//! Defines why the Hub could not give a file.

use reqwest::StatusCode;
use std::io;
use std::path::PathBuf;

/// What must arrive within a while, unless the file ends.
pub(super) const BURST_BYTES: u64 = 64 << 10;

/// Why the Hub could not give a file.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Offline and not in the cache.
    #[error("{what} is not in the cache ({cache}) and HF_HUB_OFFLINE is set")]
    Offline {
        /// The repository or file.
        what: String,
        /// Where it was looked for.
        cache: PathBuf,
    },
    /// The Hub answered with an error.
    #[error("{url} answered {status}{}", hint(*status))]
    Status {
        /// The URL that was asked for.
        url: String,
        /// The HTTP status of the answer.
        status: StatusCode,
    },
    /// The Hub could not be reached, or the connection broke for good.
    #[error("cannot reach {url}: {why}")]
    Network {
        /// The URL that was asked for.
        url: String,
        /// Why there was no answer, or no whole one.
        why: String,
    },
    /// Bytes come so slowly that there is no end to it.
    #[error("{url} sent less than {BURST_BYTES} bytes in {seconds} seconds")]
    Slow {
        /// The URL that was asked for.
        url: String,
        /// The time it had.
        seconds: f64,
    },
    /// Another process holds a file of the cache.
    #[error("{path} is held by another process")]
    Locked {
        /// The lock file of the cache.
        path: PathBuf,
    },
    /// A file is not what the Hub promised.
    #[error("{file}: expected {expected}, got {got}")]
    Corrupt {
        /// The file of the repository.
        file: String,
        /// Promised size or checksum.
        expected: String,
        /// The size or checksum of what was received.
        got: String,
    },
    /// The repository lacks a file that a checkpoint needs.
    #[error("repository {repo} at {commit} has no {file}")]
    Missing {
        /// The repository, as `owner/name`.
        repo: String,
        /// The commit that was asked for.
        commit: String,
        /// The file that the commit lacks.
        file: String,
    },
    /// There is no place for what is downloaded.
    #[error("there is no place for files of the Hub: HOME is not set, nor HF_HOME or HF_HUB_CACHE")]
    NoHome,
    /// A name that would leave the cache directory.
    #[error("`{0}` is not a valid name for a repository, revision or file")]
    Name(String),
    /// The cache cannot be written.
    #[error("cannot write {path}: {source}")]
    Io {
        /// The file of the cache that cannot be written.
        path: PathBuf,
        /// Why the system refuses.
        source: io::Error,
    },
}

impl HubError {
    /// Whether it is of the Hub or of the way to it, and may be over in a while.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Network { .. } | Self::Slow { .. } => true,
            Self::Status { status, .. } => {
                *status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error()
            }
            _ => false,
        }
    }
}

fn hint(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            "; a gated or private repository needs HF_TOKEN and accepted terms"
        }
        StatusCode::NOT_FOUND => "; check the repository's name and revision",
        _ => "",
    }
}

/// A file that is not what the Hub describes.
pub(super) fn corrupt(file: &str, expected: impl ToString, got: impl ToString) -> HubError {
    let (expected, got) = (expected.to_string(), got.to_string());
    HubError::Corrupt { file: file.to_owned(), expected, got }
}
