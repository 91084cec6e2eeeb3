//! Keeps rounds that could not be stored when the program ended in a file, one JSON object a line.

use crate::files;
use crate::store::record::Round;
use anyhow::anyhow;
use std::io::ErrorKind;
use std::path::Path;

/// Bytes of such a file.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// Writes them, after those that are there already. The file is replaced as a whole.
pub(super) fn write(path: &Path, rounds: &[Round]) -> anyhow::Result<()> {
    let fault = |what: String| anyhow!("{}: {what}", path.display());
    let mut all = read(path)?;
    all.extend_from_slice(rounds);
    let mut text = Vec::new();
    for round in &all {
        serde_json::to_writer(&mut text, round).map_err(|e| fault(e.to_string()))?;
        text.push(b'\n');
    }
    files::replace(path, &text).map_err(|e| fault(format!("cannot be written: {e}")))
}

/// Reads them; a file that is not there has none.
///
/// # Errors
/// When it cannot be read, or a line of it is not a round.
pub fn read(path: &Path) -> anyhow::Result<Vec<Round>> {
    let fault = |what: String| anyhow!("{}: {what}", path.display());
    let bytes = match files::read(path, FILE_BYTES_MAX) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(fault(format!("cannot be read: {e}"))),
    };
    let lines = bytes.split(|b| *b == b'\n').enumerate();
    let lines = lines.filter(|(_, line)| !line.trim_ascii().is_empty());
    let read = |(number, line): (usize, &[u8])| {
        let round = serde_json::from_slice(line);
        round.map_err(|e| fault(format!("line {}: not a round: {e}", number + 1)))
    };
    lines.map(read).collect()
}

/// Removes it, once its rounds are remembered.
pub(super) fn remove(path: &Path) -> anyhow::Result<()> {
    std::fs::remove_file(path).map_err(|e| anyhow!("{}: cannot be removed: {e}", path.display()))
}
