//! Writes and hashes the bytes of a derived checkpoint in one pass.

use crate::models::error::LoadError;
use crate::models::tensor::{Runs, Tensor};
use crate::ops::dtype::Dtype;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

/// Bytes that are copied or hashed at once.
const PIECE_BYTES: usize = 1 << 20;

/// A file that is hashed while it is written.
pub(super) struct HashedFile {
    path: PathBuf,
    file: BufWriter<File>,
    hasher: blake3::Hasher,
}

impl HashedFile {
    /// A file that must not exist yet.
    pub(super) fn create(path: PathBuf) -> Result<Self, LoadError> {
        let file = File::create_new(&path).map_err(|source| io_error(&path, source))?;
        Ok(Self { path, file: BufWriter::new(file), hasher: blake3::Hasher::new() })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), LoadError> {
        self.hasher.update(bytes);
        self.file.write_all(bytes).map_err(|source| io_error(&self.path, source))
    }

    /// Its hash, once it is safe on the disk.
    pub(super) fn finish(self) -> Result<String, LoadError> {
        let Self { path, file, hasher } = self;
        let synced = file.into_inner().map_err(|e| e.into_error()).and_then(|f| f.sync_all());
        synced.map_err(|source| io_error(&path, source))?;
        Ok(hasher.finalize().to_hex().to_string())
    }
}

/// The tensor's bytes as they are stored.
pub(super) fn copied(tensor: &Tensor, out: &mut HashedFile) -> Result<(), LoadError> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut at = tensor.range.start;
    while at < tensor.range.end {
        let len = (tensor.range.end - at).min(PIECE_BYTES as u64) as usize;
        tensor.file.read_at(&mut piece[..len], at)?;
        out.write(&piece[..len])?;
        at += len as u64;
    }
    Ok(())
}

/// The tensor's rows in their logical order, as the native engine rounds them.
pub(super) fn rounded(
    tensor: &Tensor,
    dtype: Dtype,
    out: &mut HashedFile,
) -> Result<(), LoadError> {
    let runs = Runs::new(tensor, 1)?;
    let mut row = vec![0; tensor.cols()];
    for number in 0..tensor.rows() {
        runs.read_row(number, dtype, &mut row)?;
        let bytes: Vec<u8> = row.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        out.write(&bytes)?;
    }
    Ok(())
}

/// The identity of so many channels.
pub(super) fn identity(
    channels: usize,
    dtype: &str,
    out: &mut HashedFile,
) -> Result<(), LoadError> {
    let one: &[u8] = match dtype {
        "F32" => &[0, 0, 0x80, 0x3f],
        "F16" => &[0, 0x3c],
        _ => &[0x80, 0x3f],
    };
    let mut row = vec![0; channels * one.len()];
    for channel in 0..channels {
        let at = channel * one.len();
        row[at..at + one.len()].copy_from_slice(one);
        out.write(&row)?;
        row[at..at + one.len()].fill(0);
    }
    Ok(())
}

/// Bytes of an element of a type that heads have.
pub(super) fn width(dtype: &str) -> usize {
    if dtype == "F32" { 4 } else { 2 }
}

pub(super) fn io_error(path: &Path, source: io::Error) -> LoadError {
    LoadError::Io { path: path.to_owned(), source }
}

/// BLAKE3 of a file, in hexadecimal.
pub(super) fn hash_file(path: &Path) -> io::Result<String> {
    let (mut file, mut hasher) = (File::open(path)?, blake3::Hasher::new());
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hasher.finalize().to_hex().to_string()),
            count => hasher.update(&piece[..count]),
        };
    }
}
