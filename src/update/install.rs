//! Replaces the program's own file: a new program is written beside it, tried, and renamed over it.
//!
//! At every moment a complete program exists under the program's name. The old one stays beside it
//! as `NAME.previous`.

use super::refusal::{SelfTestError, UpdateError};
use super::release::Version;
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// How long a new program may take to say its version, and how often it is looked at.
const SAY_TIME: Duration = Duration::from_secs(10);
const SAY_LOOK: Duration = Duration::from_millis(50);
/// Tries to start it while its file is busy.
const BUSY_TRIES_MAX: u32 = 20;
/// Bytes of what it says that are read.
const SAID_BYTES_MAX: u64 = 4096;

/// Where the running program lies.
#[derive(Clone, Debug)]
pub struct Installed {
    path: PathBuf,
}

impl Installed {
    /// The file of this process; to be asked before anything replaces it.
    ///
    /// # Errors
    /// When the system does not say, or the file is gone already.
    pub fn running() -> Result<Self, UpdateError> {
        let path = std::env::current_exe();
        let path =
            path.map_err(|e| UpdateError::io("cannot find", Path::new("this program"), e))?;
        Self::at(&path)
    }

    /// A program at a path.
    ///
    /// # Errors
    /// When there is none.
    pub fn at(path: &Path) -> Result<Self, UpdateError> {
        let path = fs::canonicalize(path).map_err(|e| UpdateError::io("cannot find", path, e))?;
        Ok(Self { path })
    }

    /// Path of the program, links resolved.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn directory(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    /// A name beside the program's.
    pub(super) fn beside(&self, before: &str, after: &str) -> PathBuf {
        let mut name = OsString::from(before);
        name.push(self.path.file_name().unwrap_or_default());
        name.push(after);
        self.directory().join(name)
    }

    /// Whether the file has this checksum.
    fn has(&self, sha256: &str) -> Result<bool, UpdateError> {
        let io = |e| UpdateError::io("cannot read", &self.path, e);
        let (mut file, mut sum) = (File::open(&self.path).map_err(io)?, Sha256::new());
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer).map_err(io)? {
                0 => return Ok(hex::encode(sum.finalize()) == sha256),
                count => sum.update(&buffer[..count]),
            }
        }
    }

    /// Locks the directory against other updaters and opens an empty file beside the program.
    pub(super) fn begin(&self) -> Result<(Staging, File), UpdateError> {
        let directory = self.directory();
        let lock =
            File::open(directory).map_err(|e| UpdateError::io("cannot open", directory, e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(UpdateError::Busy { path: self.path.clone() });
            }
            Err(TryLockError::Error(e)) => {
                return Err(UpdateError::io("cannot lock", directory, e));
            }
        }
        let path = self.beside(".", ".new");
        // What an update that was killed has left.
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                return Err(UpdateError::io("cannot remove", &path, e));
            }
            _ => {}
        }
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(|e| UpdateError::io("cannot create", &path, e))?;
        Ok((Staging { installed: self.clone(), path, lock }, file))
    }

    /// Becomes the newer program at this path, on probation: where it fails in its first minutes,
    /// the old one comes back. Returns only where that fails.
    pub fn restart(&self) -> UpdateError {
        let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
        if let Err(error) = self.put_on_probation(&arguments) {
            tracing::warn!("the new program is not rolled back if it fails: {error}");
        }
        self.start()
    }

    /// Becomes the program at this path, in this process, with its arguments and environment.
    /// Returns only where that fails.
    pub(super) fn start(&self) -> UpdateError {
        let mut arguments = std::env::args_os();
        let name = arguments.next().unwrap_or_else(|| self.path.clone().into());
        let e = Command::new(&self.path).arg0(name).args(arguments).exec();
        UpdateError::io("cannot be started", &self.path, e)
    }
}

/// A new program beside the old one. Dropped, it is removed.
#[derive(Debug)]
pub(super) struct Staging {
    installed: Installed,
    path: PathBuf,
    /// Held for as long as this is.
    lock: File,
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After the swap there is nothing under this name; what cannot be removed is removed by
        // the next update.
        let _ = fs::remove_file(&self.path);
    }
}

impl Staging {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether another process has put the new program in place already: its copy of the old one
    /// must not be written over.
    pub(super) fn is_in_place(&self, sha256: &str) -> Result<bool, UpdateError> {
        self.installed.has(sha256)
    }

    /// Gives the new file the old one's mode, and lets it say its version. Takes up to ten seconds;
    /// not for an async thread.
    pub(super) fn finish(&self, file: File, version: Version) -> Result<(), UpdateError> {
        let old = &self.installed.path;
        let io = |e| UpdateError::io("cannot take over the mode", &self.path, e);
        let mode = fs::metadata(old).map_err(io)?.permissions();
        file.set_permissions(mode).map_err(io)?;
        file.sync_all().map_err(io)?;
        // A file that is open for writing cannot be run.
        drop(file);
        let said = tried(&self.path).map_err(|why| UpdateError::Unfit { why })?;
        let expected = format!("targon-engine {version}");
        match said.trim() == expected {
            true => Ok(()),
            false => {
                let said: String = said.trim().chars().take(80).collect();
                Err(UpdateError::Unfit { why: SelfTestError::Version { expected, said } })
            }
        }
    }

    /// Puts the new program in the old one's place, which stays as `NAME.previous`.
    pub(super) fn swap(self) -> Result<(), UpdateError> {
        let installed = &self.installed;
        let (old, previous) = (&installed.path, installed.beside("", ".previous"));
        let link = installed.beside(".", ".previous");
        let _ = fs::remove_file(&link);
        fs::hard_link(old, &link)
            .and_then(|()| fs::rename(&link, &previous))
            .map_err(|e| UpdateError::io("the old program cannot be kept", &previous, e))?;
        fs::rename(&self.path, old).map_err(|e| UpdateError::io("cannot be replaced", old, e))?;
        // Without this a power cut can undo the rename. The new program stands either way.
        let synced = self.lock.sync_all();
        synced.map_err(|e| UpdateError::io("cannot bring to the disk", installed.directory(), e))
    }
}

/// What a program says of its version.
fn tried(path: &Path) -> Result<String, SelfTestError> {
    let mut child = started(path)?;
    let status = ended(&mut child).inspect_err(|_| {
        // It is gone, or it is ended now; both are well.
        let _ = child.kill();
        let _ = child.wait();
    })?;
    let mut said = Vec::new();
    if let Some(out) = child.stdout.take() {
        out.take(SAID_BYTES_MAX).read_to_end(&mut said)?;
    }
    match status.success() {
        true => Ok(String::from_utf8_lossy(&said).into_owned()),
        false => Err(SelfTestError::Status(status)),
    }
}

fn started(path: &Path) -> Result<Child, SelfTestError> {
    let mut tries = 0;
    loop {
        let mut command = Command::new(path);
        command.arg("--version").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        match command.spawn() {
            // A child that another thread starts at this moment may still hold the file open.
            Err(e) if e.kind() == ErrorKind::ExecutableFileBusy && tries < BUSY_TRIES_MAX => {
                tries += 1;
                std::thread::sleep(SAY_LOOK);
            }
            other => return Ok(other?),
        }
    }
}

/// Waits for a child, up to [`SAY_TIME`].
fn ended(child: &mut Child) -> Result<ExitStatus, SelfTestError> {
    let mut waited = Duration::ZERO;
    while waited < SAY_TIME {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        std::thread::sleep(SAY_LOOK);
        waited += SAY_LOOK;
    }
    Err(SelfTestError::Late(SAY_TIME))
}
