//! Allows one writer for each SQLite file: a lock on a file beside it ends with its process.
//!
//! The lock is not on the database itself: closing any descriptor of that file would give up the
//! locks that SQLite holds on it.

use super::error::Cause;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

/// Bytes that are read of a process id.
const PROCESS_BYTES_MAX: u64 = 16;

/// Holds the place of the only writer until it is dropped.
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the place, at once or not at all.
    ///
    /// # Errors
    /// [`Cause::InUse`] when another process has it.
    pub(super) fn take(database: &Path) -> Result<Self, Cause> {
        let path = beside(database);
        let options =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = options.map_err(Cause::File)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Cause::InUse { process: holder(&mut file) });
            }
            Err(TryLockError::Error(e)) => return Err(Cause::File(e)),
        }
        let mut leave_id = || {
            file.set_len(0)?;
            file.rewind()?;
            write!(file, "{}", std::process::id())
        };
        leave_id().map_err(Cause::File)?;
        Ok(Self { _file: file })
    }
}

fn beside(database: &Path) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push("-lock");
    name.into()
}

/// Who holds the lock, as far as it has said so.
fn holder(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(PROCESS_BYTES_MAX).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}
