//! Reads a file of weights by position; it is never mapped. A file that shrinks or changes while
//! its model is loaded or served is an error of the read that meets it, not a signal that ends the
//! process.

use super::error::{LoadError, POINTER_BYTES, refuse_pointer};
use crate::proof::codec::Encoder;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// An open file whose content must stay what it was.
pub struct WeightFile {
    path: PathBuf,
    real: PathBuf,
    file: File,
    opened: Stamp,
    changed: (i64, i64), // of the inode, when it was opened; a rename over the file changes it too
}

/// What changes when a file is replaced or written to.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    seconds: i64,
    nanoseconds: i64,
}

impl Stamp {
    fn of(m: &Metadata) -> Self {
        Self {
            device: m.dev(),
            inode: m.ino(),
            size: m.size(),
            seconds: m.mtime(),
            nanoseconds: m.mtime_nsec(),
        }
    }
}

impl WeightFile {
    /// Opens a regular file.
    ///
    /// # Errors
    /// When it cannot be read, or is a Git LFS pointer.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let io = |source| LoadError::Io { path: path.to_owned(), source };
        let real = std::fs::canonicalize(path).map_err(io)?;
        // Opening a pipe would wait for its other end.
        if !std::fs::metadata(&real).map_err(io)?.is_file() {
            return Err(LoadError::invalid(path, "is not a regular file"));
        }
        let file = File::open(&real).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        let (opened, changed) = (Stamp::of(&metadata), (metadata.ctime(), metadata.ctime_nsec()));
        let file = Self { path: path.to_owned(), real, file, opened, changed };
        let mut start = vec![0; file.len().min(POINTER_BYTES) as usize];
        file.read_at(&mut start, 0)?;
        refuse_pointer(path, &start)?;
        Ok(file)
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size when it was opened.
    pub fn len(&self) -> u64 {
        self.opened.size
    }

    /// Whether it was empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds path, device, inode, size and times: what differs when the file does. The time of the
    /// inode's last change is among them, because a copying tool can set the other one back.
    pub fn identify(&self, e: &mut Encoder) {
        let Stamp { device, inode, size, seconds, nanoseconds } = self.opened;
        let (changed, changed_nanoseconds) = self.changed;
        e.bytes(self.real.as_os_str().as_bytes());
        for number in [device, inode, size] {
            e.i64(number as i64);
        }
        for number in [seconds, nanoseconds, changed, changed_nanoseconds] {
            e.i64(number);
        }
    }

    /// Fills `bytes` from byte `at` on.
    ///
    /// # Errors
    /// When the file cannot be read, or was changed since it was opened: then the bytes are not
    /// those of the model.
    pub fn read_at(&self, bytes: &mut [u8], at: u64) -> Result<(), LoadError> {
        let read = self.file.read_exact_at(bytes, at);
        // Asked after the read: whatever was written before it has set the time.
        self.check_unchanged()?;
        read.map_err(|source| LoadError::Io { path: self.path.clone(), source })
    }

    /// Fails if the file was written to, cut or lengthened since it was opened.
    ///
    /// # Errors
    /// When it was, or cannot be looked at.
    pub fn check_unchanged(&self) -> Result<(), LoadError> {
        let io = |source| LoadError::Io { path: self.path.clone(), source };
        let now = Stamp::of(&self.file.metadata().map_err(io)?);
        if now == self.opened {
            return Ok(());
        }
        let (before, after) = (self.opened.size, now.size);
        let what = format!(
            "was changed after it was opened ({before} bytes then, {after} now); \
             to replace a file, rename the new one over it"
        );
        Err(LoadError::invalid(&self.path, what))
    }

    /// Reads from the start on.
    pub fn reader(&self) -> impl Read + '_ {
        struct Reader<'a>(&'a File, u64);
        impl Read for Reader<'_> {
            fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
                let count = self.0.read_at(bytes, self.1)?;
                self.1 += count as u64;
                Ok(count)
            }
        }
        io::BufReader::new(Reader(&self.file, 0))
    }
}
