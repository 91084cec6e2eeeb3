//! Defines the errors of an update. After each of them the running program stays in place.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

/// Why this program is not replaced.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// Nobody said where releases are and who signs them.
    #[error("--update.url and --update.key are not both set, so this program does not update")]
    NotConfigured,
    /// The address cannot be used.
    #[error("--update.url {url}: {why}")]
    Address {
        /// Scheme, host and port of what was given.
        url: String,
        /// What is wrong with it.
        why: String,
    },
    /// The key cannot be parsed.
    #[error("--update.key is not the base64 line of a minisign public key: {why}")]
    Key {
        /// What the decoder says.
        why: String,
    },
    /// Nobody answers, or the connection breaks.
    #[error("{url} cannot be read: {why}")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// What happened.
        why: String,
    },
    /// The server says no.
    #[error("{url} answered {status}")]
    Status {
        /// What was asked for.
        url: String,
        /// The status that the server answered with.
        status: u16,
    },
    /// It points to another host, or in circles.
    #[error(
        "{url} redirects to {to}: only redirects to the same scheme, host and port are followed"
    )]
    Redirected {
        /// What was asked for.
        url: String,
        /// The address that it points to.
        to: String,
    },
    /// It took too long.
    #[error("{url} took longer than {seconds} s in all, or longer than {gap} s between two reads")]
    Late {
        /// What was asked for.
        url: String,
        /// The deadline, in seconds.
        seconds: u64,
        /// The longest gap, in seconds.
        gap: u64,
    },
    /// It is larger than it may be.
    #[error("{url} must have at most {limit} bytes, and has more")]
    Long {
        /// What was asked for.
        url: String,
        /// The most bytes that are taken.
        limit: u64,
    },
    /// Fewer bytes came than the list says.
    #[error("{file} must have {expected} bytes, got {got}: it is truncated")]
    Truncated {
        /// The name of the release's file.
        file: String,
        /// What the list says.
        expected: u64,
        /// Bytes that came.
        got: u64,
    },
    /// The list cannot be understood.
    #[error("{url} does not contain a release list: {why}")]
    List {
        /// The address that was read.
        url: String,
        /// What is wrong with it.
        why: ListError,
    },
    /// The release has nothing for this machine.
    #[error("release {version} has no build for {target}")]
    NoBuild {
        /// The version of the release.
        version: String,
        /// The target that this program was built for.
        target: String,
    },
    /// The signature is not that of the key.
    #[error("the signature of {file} is not valid: {why}")]
    Signature {
        /// The name of the release's file.
        file: String,
        /// What the verifier says.
        why: String,
    },
    /// The signature is valid, and is for something else.
    #[error("the signature of {file} must be for `{expected}`, it is for `{got}`")]
    SignedFor {
        /// The name of the release's file.
        file: String,
        /// Program, version and target that the list names.
        expected: String,
        /// The trusted comment of the signature.
        got: String,
    },
    /// The bytes are others than the list says.
    #[error("{file} must have the SHA-256 {expected}, got {got}")]
    Checksum {
        /// The name of the release's file.
        file: String,
        /// What the list says.
        expected: String,
        /// The SHA-256 of what came.
        got: String,
    },
    /// The new program does not start here.
    #[error("the new program does not run on this machine: {why}")]
    Unfit {
        /// What is wrong with the new program.
        why: SelfTestError,
    },
    /// It ran here, failed in its first minutes, and was replaced by the program before it.
    #[error(
        "release {version} failed here and was rolled back; to try it again, remove {}",
        path.display()
    )]
    Failed {
        /// The version of the release.
        version: String,
        /// The file that says so.
        path: PathBuf,
    },
    /// There is no other program to go back to.
    #[error("{}: there is no older program to return to", path.display())]
    NoOther {
        /// Where the old program is kept.
        path: PathBuf,
    },
    /// Another process updates the same file.
    #[error("another process is updating {}", path.display())]
    Busy {
        /// The program's file.
        path: PathBuf,
    },
    /// No space is left.
    #[error("{}: no space is left for the new program", path.display())]
    DiskFull {
        /// What could not be written.
        path: PathBuf,
    },
    /// The directory of the program cannot be written.
    #[error("{}: the program's directory cannot be written: {source}", path.display())]
    ReadOnly {
        /// What could not be written.
        path: PathBuf,
        /// Why the system refuses.
        source: io::Error,
    },
    /// Another step with a file fails.
    #[error("{}: {what}: {source}", path.display())]
    Io {
        /// What cannot be done with the file.
        what: &'static str,
        /// The file that the step is about.
        path: PathBuf,
        /// Why the system refuses.
        source: io::Error,
    },
}

/// What is wrong with the list of a release.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// It is not the JSON object that it must be.
    #[error("{0}")]
    Json(String),
    /// Its format is not known.
    #[error("`format` must be {known}, got {got}")]
    Format {
        /// The format that this version reads.
        known: u32,
        /// What the list says.
        got: u32,
    },
    /// A version is not written as MAJOR.MINOR.PATCH.
    #[error("a version must be MAJOR.MINOR.PATCH, got {0:?}")]
    Version(String),
    /// The name of a file would lead elsewhere.
    #[error("`file` must be a plain name beside the list, got {0:?}")]
    File(String),
    /// The address of a file cannot be made.
    #[error(transparent)]
    Address(#[from] url::ParseError),
    /// A checksum is not written as 64 lowercase hexadecimal digits.
    #[error("`sha256` of {file} must have 64 lowercase hexadecimal digits")]
    Sha256 {
        /// The name that the list gives the file.
        file: String,
    },
    /// A signature cannot be parsed.
    #[error("`signature` of {file} is not a minisign signature: {why}")]
    Signature {
        /// The name that the list gives the file.
        file: String,
        /// What the decoder says.
        why: minisign_verify::Error,
    },
}

/// Why a new program cannot take the old one's place.
#[derive(Debug, thiserror::Error)]
pub enum SelfTestError {
    /// It cannot be started or read from.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It fails where it is to say its version.
    #[error("`--version` ends with {0}")]
    Status(ExitStatus),
    /// It says nothing in time.
    #[error("`--version` takes longer than {0:?}")]
    Late(Duration),
    /// It is another version.
    #[error("`--version` must say {expected:?}, it says {said:?}")]
    Version {
        /// What the release says.
        expected: String,
        /// What the program says.
        said: String,
    },
    /// The running program's version cannot be parsed, so nothing can be newer.
    #[error(transparent)]
    Running(#[from] ListError),
    /// The step itself broke.
    #[error(transparent)]
    Step(#[from] tokio::task::JoinError),
}

impl UpdateError {
    /// The refusal of a step with a file.
    pub(super) fn io(what: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::DiskFull { path },
            ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied => {
                Self::ReadOnly { path, source }
            }
            _ => Self::Io { what, path, source },
        }
    }
}
