//! Reads a release as its list describes it: what is newer, and which file is for this machine.
//!
//! The list is a JSON object at the release URL (`docs/updates.md`). It is not signed; every file
//! is, with a trusted comment that names program, version and target, so that whoever holds the
//! server can neither pass off an old file as a new one nor one machine's as another's.

use super::refusal::{ListError, UpdateError};
use crate::endpoint::shown;
use minisign_verify::Signature;
use serde::Deserialize;
use std::fmt;
use std::str::FromStr;

/// The one format of lists there is.
const FORMAT: u32 = 1;
/// Bytes of a file's name.
const NAME_BYTES_MAX: usize = 128;
/// The name under which releases are signed.
const PROGRAM: &str = "targon-engine";

/// `MAJOR.MINOR.PATCH`; versions with anything behind that are not released.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version(u64, u64, u64);

impl FromStr for Version {
    type Err = ListError;

    fn from_str(text: &str) -> Result<Self, ListError> {
        let rule = || ListError::Version(text.to_owned());
        let mut parts = text.split('.').map(|part| {
            let is_plain = part == "0" || !part.starts_with('0');
            let is_number = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
            part.parse().ok().filter(|_| is_plain && is_number)
        });
        let mut next = || parts.next().flatten().ok_or_else(rule);
        let version = Self(next()?, next()?, next()?);
        parts.next().is_none().then_some(version).ok_or_else(rule)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// What this program was built for: a target triple, with `+cuda` where it has kernels for cards.
pub fn target() -> String {
    let environment = match () {
        () if cfg!(target_env = "musl") => "-musl",
        () if cfg!(target_env = "gnu") => "-gnu",
        () => "",
    };
    let system = match std::env::consts::OS {
        "macos" => "apple-darwin",
        "linux" => "unknown-linux",
        other => other,
    };
    let cards = if cfg!(feature = "cuda") { "+cuda" } else { "" };
    format!("{}-{system}{environment}{cards}", std::env::consts::ARCH)
}

#[derive(Deserialize)]
struct List {
    format: u32,
    version: String,
    builds: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    target: String,
    file: String,
    bytes: u64,
    sha256: String,
    signature: String,
}

/// A release as its list describes it.
#[derive(Debug)]
pub(super) struct Release {
    pub(super) version: Version,
    builds: Vec<Build>,
}

/// One file of a release.
#[derive(Clone)]
pub(super) struct Build {
    target: String,
    /// A plain name, beside the list.
    pub(super) file: String,
    pub(super) bytes: u64,
    pub(super) sha256: String,
    pub(super) signature: Signature,
}

impl fmt::Debug for Build {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} for {}", self.file, self.target)
    }
}

impl Release {
    /// Reads the list that `url` gave.
    pub(super) fn read(url: &str, bytes: &[u8]) -> Result<Self, UpdateError> {
        let refuse = |why: ListError| UpdateError::List { url: shown(url), why };
        // The text of the list is untrusted and may be printed on a terminal, so it is shortened.
        let list: List = serde_json::from_slice(bytes)
            .map_err(|e| refuse(ListError::Json(e.to_string().chars().take(200).collect())))?;
        if list.format != FORMAT {
            return Err(refuse(ListError::Format { known: FORMAT, got: list.format }));
        }
        let version = list.version.parse().map_err(refuse)?;
        let builds = list.builds.into_iter().map(Build::check).collect::<Result<_, _>>();
        Ok(Self { version, builds: builds.map_err(refuse)? })
    }

    /// The file for a target.
    pub(super) fn build(&self, target: &str) -> Result<&Build, UpdateError> {
        let none = || UpdateError::NoBuild {
            version: self.version.to_string(),
            target: target.to_owned(),
        };
        self.builds.iter().find(|build| build.target == target).ok_or_else(none)
    }
}

impl Build {
    fn check(listed: Listed) -> Result<Self, ListError> {
        let Listed { target, file, bytes, sha256, signature } = listed;
        let is_name = |b: u8| b.is_ascii_alphanumeric() || b"._+-".contains(&b);
        let is_plain = file.bytes().all(is_name) && !file.starts_with('.') && !file.is_empty();
        if !is_plain || file.len() > NAME_BYTES_MAX {
            return Err(ListError::File(file.chars().take(NAME_BYTES_MAX).collect()));
        }
        let is_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if sha256.len() != 64 || !sha256.bytes().all(is_hex) {
            return Err(ListError::Sha256 { file });
        }
        match Signature::decode(&signature) {
            Ok(signature) => Ok(Self { target, file, bytes, sha256, signature }),
            Err(why) => Err(ListError::Signature { file, why }),
        }
    }

    /// The signed comment must name what the list names: a signature for an older version, or for
    /// another machine, is none for this one.
    pub(super) fn check_signed_for(&self, version: Version) -> Result<(), UpdateError> {
        let expected = format!("{PROGRAM} {version} {}", self.target);
        let got = self.signature.trusted_comment();
        if got == expected {
            return Ok(());
        }
        let got = got.chars().take(NAME_BYTES_MAX).collect();
        Err(UpdateError::SignedFor { file: self.file.clone(), expected, got })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_by_number_and_odd_ones_refused() {
        let of = |text: &str| text.parse::<Version>();
        let ascending = ["0.1.0", "0.1.9", "0.1.10", "0.2.0", "1.0.0", "10.0.0"].map(of);
        assert!(ascending.is_sorted_by(|a, b| a.as_ref().unwrap() < b.as_ref().unwrap()));
        for odd in ["", "1", "1.2", "1.2.3.4", "1.2.3-rc1", "v1.2.3", "1.2.03", "1.-2.3", "1.+2.3"]
        {
            assert!(of(odd).is_err(), "{odd}");
        }
        assert_eq!(of("1.20.3").unwrap().to_string(), "1.20.3");
        assert!(of(env!("CARGO_PKG_VERSION")).is_ok());
    }

    #[test]
    fn lists_that_are_none_are_refused_by_the_field() {
        let build = |file: &str, sha: &str, signature: &str| {
            serde_json::json!({"format": 1, "version": "1.0.0", "builds": [
                {"target": "t", "file": file, "bytes": 1, "sha256": sha, "signature": signature}]})
        };
        let sha = "0".repeat(64);
        for (list, want) in [
            ("[]".to_owned(), "invalid length 0"),
            (r#"{"format":2,"version":"1.0.0","builds":[]}"#.into(), "`format` must be 1, got 2"),
            (r#"{"format":1,"version":"one","builds":[]}"#.into(), "MAJOR.MINOR.PATCH"),
            (build("../up", &sha, "").to_string(), "plain name"),
            (build("a/b", &sha, "").to_string(), "plain name"),
            (build("", &sha, "").to_string(), "plain name"),
            (build("a", "XY", "").to_string(), "64 lowercase hexadecimal digits"),
            (build("a", &sha, "no").to_string(), "not a minisign signature"),
        ] {
            let refusal = Release::read("http://x/", list.as_bytes()).unwrap_err().to_string();
            assert!(refusal.contains(want), "{refusal}");
        }
    }
}
