//! Reads and replaces the small files that the program keeps for itself. A read has a limit, and a
//! file is always replaced as a whole.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// A key of a file whose value breaks a rule.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{key}` {rule}")]
pub struct KeyError {
    /// The key, with the tables that it is in.
    pub key: &'static str,
    /// The rule and the fact, as in "must be 1, got 2".
    pub rule: String,
}

impl KeyError {
    /// Names the key, the rule and the fact.
    pub fn new(key: &'static str, rule: impl ToString) -> Self {
        Self { key, rule: rule.to_string() }
    }
}

/// Where a TOML text is wrong, and how: the line, its key where a value is at fault, and the rule.
pub fn toml_fault(text: &str, error: &toml::de::Error) -> String {
    let before = error.span().map_or("", |span| &text[..span.start]);
    let (number, message) = (before.matches('\n').count() + 1, error.message());
    let line = text.lines().nth(number - 1).unwrap_or_default();
    let is_in_key = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    match line.split_once('=').map(|(key, _)| key.trim()) {
        // A line within a list may hold `=` in a text.
        Some(key) if message.starts_with("invalid ") && key.chars().all(is_in_key) => {
            format!("line {number}: `{key}`: {message}")
        }
        _ => format!("line {number}: {message}"),
    }
}

/// Reads a file of at most `limit` bytes.
///
/// # Errors
/// When it cannot be read, is longer, or is a pipe or device, which may never end.
pub fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    // Before it is opened: opening a pipe waits for its writer.
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::other(format!("it has more than {limit} bytes")));
    }
    Ok(bytes)
}

/// Puts `bytes` in place of the file, if there is one, by way of a temporary file beside it: after
/// a crash at any point the file is the old or the new one. It keeps its mode, and a link to it
/// stays a link.
///
/// # Errors
/// When a step fails; the file is then the old one, or not yet safe on the disk.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let path = &std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    std::fs::create_dir_all(&directory)?;
    // A random name: nobody else writes it, and nobody can lay a link in its place beforehand.
    let temporary = directory.join(format!(".{}.tmp", uuid::Uuid::new_v4().simple()));
    write_new(&temporary, path, bytes)
        .and_then(|()| std::fs::rename(&temporary, path))
        .inspect_err(|_| {
            // What is left of it would only confuse; that it failed is reported either way.
            let _ = std::fs::remove_file(&temporary);
        })?;
    // Without this a power cut can undo the rename.
    File::open(&directory)?.sync_all()
}

/// Tries whether the file can be written, for those who write it only after long work. Nothing of
/// it changes, and where there was none there is none again.
///
/// # Errors
/// When it cannot be opened, or made where there is none.
pub fn check_writable(path: &Path) -> io::Result<()> {
    let mut options = OpenOptions::new();
    match options.append(true).open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            options.create(true).open(path)?;
            // What a link stands for was made, not the link.
            std::fs::remove_file(std::fs::canonicalize(path)?)
        }
        opened => opened.map(drop),
    }
}

/// Adds a line to a file, which is made where there is none. A last line that was not ended is
/// ended before, and where the line cannot be written whole, nothing of it stays.
///
/// # Errors
/// When it cannot be opened, read or written.
pub fn append_line(path: &Path, line: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    let meta = file.metadata()?;
    let length = meta.is_file().then_some(meta.len());
    let mut bytes = Vec::with_capacity(line.len() + 2);
    if length.is_some_and(|length| length > 0) && last_byte(path)? != b'\n' {
        bytes.push(b'\n');
    }
    bytes.extend_from_slice(line);
    bytes.push(b'\n');
    file.write_all(&bytes).inspect_err(|_| {
        if let Some(length) = length {
            // That it failed is reported either way.
            let _ = file.set_len(length);
        }
    })
}

fn last_byte(path: &Path) -> io::Result<u8> {
    let (mut file, mut last) = (File::open(path)?, [0]);
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(last[0])
}

/// A directory among the system's temporary files that goes with its owner.
pub struct ScratchDirectory(PathBuf);

impl ScratchDirectory {
    /// A new one, whose name begins with `prefix`.
    ///
    /// # Errors
    /// The path, and why it cannot be made.
    pub fn new(prefix: &str) -> io::Result<Self> {
        // A random name: nobody can lay a directory in its place beforehand.
        let path = std::env::temp_dir().join(format!("{prefix}-{}", uuid::Uuid::new_v4().simple()));
        let named = |e: io::Error| {
            io::Error::new(e.kind(), format!("{} cannot be made: {e}", path.display()))
        };
        std::fs::create_dir(&path).map_err(named)?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for ScratchDirectory {
    fn drop(&mut self) {
        // What is left in the temporary directory is the system's to clean.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Writes a file that must not exist yet down to the disk, with the mode of `like`.
fn write_new(path: &Path, like: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    if let Ok(old) = std::fs::metadata(like) {
        file.set_permissions(old.permissions())?;
    }
    file.write_all(bytes)?;
    // Without this a power cut can leave the new name with the contents missing.
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_scratch_directory_goes_with_its_owner() {
        let (one, two) = (ScratchDirectory::new("t").unwrap(), ScratchDirectory::new("t").unwrap());
        assert_ne!(one.path(), two.path());
        std::fs::write(one.path().join("file"), "text").unwrap();
        let path = one.path().to_owned();
        drop(one);
        assert!(!path.exists() && two.path().is_dir());
        let error = ScratchDirectory::new("no/such/place").err().unwrap().to_string();
        assert!(error.contains("no/such/place-") && error.contains(" cannot be made: "), "{error}");
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        let mut names: Vec<String> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_as_a_whole_and_keeps_mode_and_link() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("deep/er/kept.json"), dir.path().join("link.json"));
        replace(&path, b"one").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        symlink(&path, &link).unwrap();
        replace(&link, b"two").unwrap();
        assert_eq!(read(&path, 3).unwrap(), b"two");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(names(path.parent().unwrap()), ["kept.json"]);
    }

    #[test]
    fn many_writers_leave_one_whole_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kept");
        let contents: Vec<Vec<u8>> = (0..8).map(|i| vec![b'a' + i; 40_000]).collect();
        std::thread::scope(|scope| {
            for bytes in &contents {
                scope.spawn(|| (0..5).for_each(|_| replace(&path, bytes).unwrap()));
            }
        });
        assert!(contents.contains(&read(&path, 40_000).unwrap()));
        assert_eq!(names(dir.path()), ["kept"]);
    }

    #[test]
    fn what_cannot_be_replaced_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("taken");
        std::fs::create_dir_all(path.join("inside")).unwrap();
        assert!(replace(&path, b"x").is_err());
        assert_eq!(names(dir.path()), ["taken"]);
    }

    #[test]
    fn whether_a_file_can_be_written_is_tried_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (kept, link) = (dir.path().join("kept"), dir.path().join("link"));
        std::fs::write(&kept, "text").unwrap();
        symlink(dir.path().join("none"), &link).unwrap();
        for path in [&kept, &link, &dir.path().join("new")] {
            check_writable(path).unwrap();
        }
        assert_eq!(names(dir.path()), ["kept", "link"]);
        assert_eq!(std::fs::read(&kept).unwrap(), b"text");
        for path in [dir.path(), &dir.path().join("no/such"), &kept.join("below")] {
            assert!(check_writable(path).is_err(), "{}", path.display());
        }
    }

    #[test]
    fn a_line_is_added_after_one_that_was_not_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lines");
        for (before, want) in [("", "new\n"), ("old\n", "old\nnew\n"), ("old", "old\nnew\n")] {
            std::fs::write(&path, before).unwrap();
            append_line(&path, b"new").unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), want);
        }
        append_line(&dir.path().join("made"), b"new").unwrap();
        // What is no file has no last line and no length.
        append_line(Path::new("/dev/null"), b"new").unwrap();
        assert!(append_line(Path::new("/dev/full"), b"new").is_err());
    }

    #[test]
    fn reading_has_a_limit_and_wants_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("long");
        std::fs::write(&path, [7; 11]).unwrap();
        assert_eq!(read(&path, 11).unwrap().len(), 11);
        assert!(read(&path, 10).unwrap_err().to_string().contains("more than 10 bytes"));
        for path in [Path::new("/dev/zero"), dir.path()] {
            assert!(read(path, 10).unwrap_err().to_string().contains("not a file"));
        }
        assert_eq!(read(&dir.path().join("no"), 1).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
