//! Watches the first minutes of a new program: where it fails in them, the old one comes back.
//!
//! Before a program becomes a newer one it leaves a note beside it, `.NAME.trial-…`, for a start
//! with the same arguments. The new program reads it before anything else ([`Probation::begin`]),
//! counts its starts in it, and removes it once it has run for [`PROBATION_TIME`]. Where it ends
//! with an error before, or was started [`STARTS_MAX`] times and never lasted, it puts the kept
//! program back in place, writes its own version into `NAME.failed`, and becomes the old program.
//! No updater takes that version again, so this happens once.

use super::install::Installed;
use super::refusal::UpdateError;
use super::release::Version;
use crate::files;
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a new program runs before it counts as good. Models are loaded in it.
pub const PROBATION_TIME: Duration = Duration::from_secs(600);
/// Starts of a new program that did not last; before the next one, the old program comes back.
pub const STARTS_MAX: u32 = 3;
/// Bytes of a note, and of the file with the version that failed.
const NOTE_BYTES_MAX: u64 = 64;
/// Hexadecimal digits of the arguments' hash in the note's name.
const NAME_DIGITS: usize = 16;

/// A new program that has not shown yet that it works here.
#[derive(Debug)]
pub struct Probation {
    installed: Installed,
    note: PathBuf,
    starts: u32,
}

impl Installed {
    /// The note on starts with these arguments, the program's name left out.
    fn note(&self, arguments: &[OsString]) -> PathBuf {
        let mut sum = Sha256::new();
        for argument in arguments {
            sum.update(argument.as_bytes());
            sum.update([0]);
        }
        let name = hex::encode(sum.finalize());
        self.beside(".", &format!(".trial-{}", &name[..NAME_DIGITS]))
    }

    /// Where the version stands that failed here.
    fn failed(&self) -> PathBuf {
        self.beside("", ".failed")
    }

    /// Says that the program in place is on probation for starts with these arguments.
    ///
    /// # Errors
    /// When the note cannot be written: the new program is then not rolled back.
    pub(super) fn put_on_probation(&self, arguments: &[OsString]) -> Result<(), UpdateError> {
        let note = self.note(arguments);
        files::replace(&note, b"0").map_err(|e| UpdateError::io("cannot be written", &note, e))
    }

    /// Refuses a version that failed here before.
    ///
    /// # Errors
    /// When it did.
    pub(super) fn check_not_failed(&self, version: Version) -> Result<(), UpdateError> {
        let path = self.failed();
        let said = match files::read(&path, NOTE_BYTES_MAX) {
            Ok(said) => said,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(UpdateError::io("cannot be read", &path, e)),
        };
        match String::from_utf8_lossy(&said).trim() == version.to_string() {
            true => Err(UpdateError::Failed { version: version.to_string(), path }),
            false => Ok(()),
        }
    }
}

impl Probation {
    /// The probation of this process, if it is on one; counts this start. To be asked before
    /// anything that may fail.
    ///
    /// # Errors
    /// When the note is there and cannot be read or written.
    pub fn begin() -> Result<Option<Self>, UpdateError> {
        let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
        let Ok(installed) = Installed::running() else { return Ok(None) };
        let Some(probation) = Self::of(installed, &arguments)? else { return Ok(None) };
        let note = probation.note.clone();
        // Where no thread can be had, the note stays, and the next start counts on.
        let wait = move || {
            std::thread::sleep(PROBATION_TIME);
            let _ = fs::remove_file(note);
        };
        let _ = std::thread::Builder::new().name("probation".into()).spawn(wait);
        Ok(Some(probation))
    }

    pub(super) fn of(
        installed: Installed,
        arguments: &[OsString],
    ) -> Result<Option<Self>, UpdateError> {
        let note = installed.note(arguments);
        let said = match files::read(&note, NOTE_BYTES_MAX) {
            Ok(said) => said,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(UpdateError::io("cannot be read", &note, e)),
        };
        // A note that cannot be read rolls the program back, as its starts say nothing.
        let before = String::from_utf8_lossy(&said).trim().parse().unwrap_or(STARTS_MAX);
        let starts = before.saturating_add(1);
        let written = files::replace(&note, starts.to_string().as_bytes());
        written.map_err(|e| UpdateError::io("cannot be written", &note, e))?;
        Ok(Some(Self { installed, note, starts }))
    }

    /// Whether it was started often enough and never lasted.
    pub fn is_over(&self) -> bool {
        self.starts > STARTS_MAX
    }

    /// Whether it still counts: the program has not run for long enough.
    pub fn is_open(&self) -> bool {
        self.note.exists()
    }

    /// Puts the kept program back in place and becomes it. Returns only where that fails: the new
    /// program then stays, and is on probation no more.
    pub fn roll_back(self) -> UpdateError {
        let own = env!("CARGO_PKG_VERSION");
        match self.put_back(own) {
            Ok(installed) => installed.start(),
            Err(error) => error,
        }
    }

    /// Puts the kept program back, and writes down that `version` failed.
    pub(super) fn put_back(self, version: &str) -> Result<Installed, UpdateError> {
        // Whatever happens below, it is tried once.
        let removed = fs::remove_file(&self.note);
        removed.map_err(|e| UpdateError::io("cannot be removed", &self.note, e))?;
        let installed = self.installed;
        let (program, previous) = (installed.path(), installed.beside("", ".previous"));
        let node = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino()));
        let kept = node(&previous).map_err(|e| UpdateError::io("cannot be found", &previous, e))?;
        if node(program).is_ok_and(|own| own == kept) {
            return Err(UpdateError::NoOther { path: previous });
        }
        let failed = installed.failed();
        files::replace(&failed, format!("{version}\n").as_bytes())
            .map_err(|e| UpdateError::io("cannot be written", &failed, e))?;
        // A link beside it, so that there is a whole program under the name at every moment.
        let link = installed.beside(".", ".back");
        let _ = fs::remove_file(&link);
        fs::hard_link(&previous, &link)
            .and_then(|()| fs::rename(&link, program))
            .map_err(|e| UpdateError::io("cannot be replaced by the old program", program, e))?;
        Ok(installed)
    }
}
