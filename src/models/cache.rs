//! Finds, measures and removes, by kind, what the program keeps on disk and can get or compute
//! again.
//!
//! [`KINDS`] is data: a kind is a name and where its things lie. Links are never followed: one in
//! the place of a thing is shown and left alone, those inside a thing are removed as links. What
//! another process has open, maps or locks is held, and stays.

use super::error::LoadError;
use super::remembered::cache_dir;
use serde::Serialize;
use std::fs::{File, Metadata, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// Files of one thing that are looked at.
const FILES_MAX: usize = 100_000;
/// What a thing is called while it is removed.
const REMOVED: &str = ".removed-";

/// Directories that things are kept in.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct CacheDirectories {
    /// Of the Hub, which other Hugging Face tools use too.
    pub hub: PathBuf,
    /// The directory of this program's own files.
    pub own: PathBuf,
}

impl CacheDirectories {
    /// The Hub's directory `hub`, and the one that the environment names.
    ///
    /// # Errors
    /// When it names none.
    pub fn new(hub: &Path) -> Result<Self, LoadError> {
        Ok(Self { hub: hub.to_owned(), own: cache_dir()? })
    }

    fn of(&self, place: Place) -> &Path {
        match place {
            Place::Hub => &self.hub,
            Place::Own => &self.own,
        }
    }
}

/// One of the [`CacheDirectories`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    Hub,
    Own,
}

/// Things of one kind.
#[derive(Debug)]
pub struct CacheKind {
    /// Its name in commands.
    pub name: &'static str,
    /// What it holds, in words.
    pub what: &'static str,
    /// Where its things lie: names below a place, each with at most one `*`.
    patterns: &'static [(Place, &'static str)],
}

/// The kinds, in the order in which they are shown.
pub const KINDS: &[CacheKind] = &[
    CacheKind {
        name: "model",
        what: "models from the Hub, shared with other Hugging Face tools",
        patterns: &[(Place::Hub, "models--*")],
    },
    CacheKind {
        name: "partial",
        what: "downloads that did not end",
        patterns: &[(Place::Hub, "models--*/blobs/*.incomplete")],
    },
    CacheKind {
        name: "calibration",
        what: "whitenings that proofs need; computed again at the next start",
        patterns: &[(Place::Own, "calibration/*.json")],
    },
    CacheKind {
        name: "remembered",
        what: "weights roots and hashes of calibrations; computed again at the next start",
        patterns: &[(Place::Own, "roots.json")],
    },
    CacheKind {
        name: "tapped",
        what: "checkpoints derived for mistral.rs; built again at the next start",
        patterns: &[(Place::Own, "tapped/weights-*")],
    },
    CacheKind {
        name: "temporary",
        what: "what an interrupted write or removal left",
        patterns: &[
            (Place::Own, ".*.tmp"),
            (Place::Own, "calibration/.*.tmp"),
            (Place::Own, ".removed-*"),
            (Place::Own, "calibration/.removed-*"),
            (Place::Own, "tapped/.*.building"),
            (Place::Own, "tapped/.removed-*"),
            (Place::Hub, ".removed-*"),
            (Place::Hub, "models--*/blobs/.removed-*"),
        ],
    },
];

/// Why a thing stays.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum InUse {
    /// This process has it open.
    Process(u32),
    /// Somebody holds this lock.
    Lock(PathBuf),
    /// It is a link to somewhere else.
    Link,
}

/// One thing that is kept.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Item {
    /// The name of its kind.
    pub kind: &'static str,
    /// Its name: of a model, that of its repository.
    pub name: String,
    /// The file or directory.
    pub path: PathBuf,
    /// Bytes of its files.
    pub bytes: u64,
    /// When a file of it was last read or written, in milliseconds since 1970. Many systems note
    /// reads once a day.
    pub used_ms: u64,
    /// Why it cannot be removed now.
    pub held: Option<InUse>,
}

/// All things of a kind.
///
/// # Errors
/// When a directory that is there cannot be read.
pub fn find(places: &CacheDirectories, kind: &'static CacheKind) -> io::Result<Vec<Item>> {
    let mut items = Vec::new();
    for (place, pattern) in kind.patterns {
        let mut paths = vec![places.of(*place).to_owned()];
        for (depth, name) in pattern.split('/').enumerate() {
            let mut below = Vec::new();
            // The place itself may be a link; what lies in it may not lead out of it.
            for directory in paths.iter().filter(|path| depth == 0 || !path.is_symlink()) {
                below.extend(matching(directory, name)?);
            }
            paths = below;
        }
        for path in paths {
            items.push(item(places, kind, path)?);
        }
    }
    Ok(items)
}

/// What in a directory has a name like `pattern`; nothing where it is not a directory, or a link.
fn matching(directory: &Path, pattern: &str) -> io::Result<Vec<PathBuf>> {
    let (before, after) = pattern.split_once('*').unwrap_or((pattern, ""));
    let is_exact = !pattern.contains('*');
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(e) => return Err(named(directory, &e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| named(directory, &e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_like = match is_exact {
            true => name == pattern,
            false => {
                name.len() >= before.len() + after.len()
                    && name.starts_with(before)
                    && name.ends_with(after)
            }
        };
        if is_like {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn named(path: &Path, e: &io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("{}: {e}", path.display()))
}

fn item(places: &CacheDirectories, kind: &CacheKind, path: PathBuf) -> io::Result<Item> {
    let file_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let name = match file_name.strip_prefix("models--") {
        Some(repo) => repo.replacen("--", "/", 1),
        None => file_name,
    };
    let files = files(&path)?;
    let bytes = files.iter().map(|(_, m)| m).filter(|m| m.is_file()).map(Metadata::len).sum();
    let used_ms = files.iter().map(|(_, m)| used_ms(m)).max().unwrap_or_default();
    let held = held(places, &path, &files);
    Ok(Item { kind: kind.name, name, path, bytes, used_ms, held })
}

/// A thing with all that lies in it; links are not followed.
fn files(path: &Path) -> io::Result<Vec<(PathBuf, Metadata)>> {
    let mut open = vec![path.to_owned()];
    let mut found = Vec::new();
    while let Some(path) = open.pop() {
        let metadata = match std::fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            // Another process tidies too.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(named(&path, &e)),
        };
        if metadata.is_dir() {
            open.extend(matching(&path, "*")?);
        }
        found.push((path, metadata));
        if found.len() > FILES_MAX {
            let what = format!("it has more than {FILES_MAX} files");
            return Err(named(&found[0].0, &io::Error::other(what)));
        }
    }
    Ok(found)
}

/// When a file was last used. Looking at a directory counts as reading it, so only its writes do.
fn used_ms(metadata: &Metadata) -> u64 {
    let read = metadata.accessed().ok().filter(|_| metadata.is_file());
    let latest = metadata.modified().ok().max(read);
    let since = latest.and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn held(places: &CacheDirectories, path: &Path, files: &[(PathBuf, Metadata)]) -> Option<InUse> {
    if files.first().is_some_and(|(_, metadata)| metadata.is_symlink()) {
        return Some(InUse::Link);
    }
    let is_lock = |path: &&PathBuf| path.extension().is_some_and(|e| e == "lock");
    let inside = files.iter().filter(|(_, m)| m.is_file()).map(|(path, _)| path.clone());
    let beside = path.with_extension("lock");
    // Where the Hub's own tools keep theirs.
    let name = path.file_name().unwrap_or_default();
    let theirs = matching(&places.hub.join(".locks").join(name), "*.lock").unwrap_or_default();
    let mut locks = inside.chain([beside]).chain(theirs);
    if let Some(lock) = locks.find(|path| is_lock(&path) && is_locked(path)) {
        return Some(InUse::Lock(lock));
    }
    process_with(path).map(InUse::Process)
}

fn is_locked(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    matches!(file.try_lock(), Err(TryLockError::WouldBlock))
}

/// Another process that has a file at or below `path` open or mapped. Those of other users cannot
/// be seen without being root.
fn process_with(path: &Path) -> Option<u32> {
    let path = std::fs::canonicalize(path).ok()?;
    let processes = std::fs::read_dir("/proc").ok()?;
    processes.flatten().find_map(|entry| {
        let id: u32 = entry.file_name().to_str()?.parse().ok()?;
        (id != std::process::id() && uses(&entry.path(), &path)).then_some(id)
    })
}

fn uses(process: &Path, path: &Path) -> bool {
    let open = std::fs::read_dir(process.join("fd"));
    let mut links = open.into_iter().flatten().flatten();
    if links.any(|link| std::fs::read_link(link.path()).is_ok_and(|to| to.starts_with(path))) {
        return true;
    }
    let maps = std::fs::read_to_string(process.join("maps")).unwrap_or_default();
    let mut mapped = maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
    mapped.any(|file| Path::new(file).starts_with(path))
}

/// Removes a thing that nobody holds; says who does otherwise. It gets another name first, so that
/// a process that begins to use it meanwhile finds it whole or not at all.
///
/// # Errors
/// When it cannot be renamed or removed; what is left of it is of the kind `temporary`.
pub fn remove(places: &CacheDirectories, item: &Item) -> io::Result<Option<InUse>> {
    let failed = |e: io::Error| named(&item.path, &e);
    if let Some(held) = held(places, &item.path, &files(&item.path)?) {
        return Ok(Some(held));
    }
    let name = format!("{REMOVED}{}", uuid::Uuid::new_v4().simple());
    let aside = item.path.with_file_name(name);
    std::fs::rename(&item.path, &aside).map_err(failed)?;
    if let Some(process) = process_with(&aside) {
        std::fs::rename(&aside, &item.path).map_err(failed)?;
        return Ok(Some(InUse::Process(process)));
    }
    let is_dir = std::fs::symlink_metadata(&aside).map_err(failed)?.is_dir();
    let removed = match is_dir {
        true => std::fs::remove_dir_all(&aside),
        false => std::fs::remove_file(&aside),
    };
    removed.map_err(failed).map(|()| None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::process::{Command, Stdio};

    fn kind(name: &str) -> &'static CacheKind {
        KINDS.iter().find(|kind| kind.name == name).unwrap()
    }

    fn names(places: &CacheDirectories, name: &str) -> Vec<String> {
        find(places, kind(name)).unwrap().into_iter().map(|item| item.name).collect()
    }

    /// A cache with a model, a broken download, and what this program computes.
    fn cache() -> (tempfile::TempDir, CacheDirectories) {
        let dir = tempfile::tempdir().unwrap();
        let places = CacheDirectories { hub: dir.path().join("hub"), own: dir.path().join("own") };
        let model = places.hub.join("models--org--a--b");
        for directory in ["blobs", "snapshots/c0", "refs"] {
            std::fs::create_dir_all(model.join(directory)).unwrap();
        }
        std::fs::write(model.join("blobs/aa"), [7; 1000]).unwrap();
        std::fs::write(model.join("blobs/bb.incomplete"), [7; 10]).unwrap();
        symlink("../../blobs/aa", model.join("snapshots/c0/model.safetensors")).unwrap();
        std::fs::create_dir_all(places.own.join("calibration")).unwrap();
        std::fs::create_dir_all(places.hub.join("datasets--x")).unwrap();
        for name in ["roots.json", "calibration/x-bf16.json", "calibration/.1.tmp", "mine.txt"] {
            std::fs::write(places.own.join(name), "{}").unwrap();
        }
        (dir, places)
    }

    #[test]
    fn each_kind_finds_its_own_and_nothing_else() {
        let (_dir, places) = cache();
        assert_eq!(names(&places, "model"), ["org/a--b"]);
        assert_eq!(names(&places, "partial"), ["bb.incomplete"]);
        assert_eq!(names(&places, "calibration"), ["x-bf16.json"]);
        assert_eq!(names(&places, "remembered"), ["roots.json"]);
        assert_eq!(names(&places, "temporary"), [".1.tmp"]);
        let model = &find(&places, kind("model")).unwrap()[0];
        assert_eq!((model.bytes, &model.held), (1010, &None));
        assert!(model.used_ms > 1_600_000_000_000, "{model:?}");
        let none = CacheDirectories { hub: "/nowhere/hub".into(), own: "/nowhere/own".into() };
        assert!(KINDS.iter().all(|kind| find(&none, kind).unwrap().is_empty()));
    }

    #[test]
    fn what_is_removed_is_gone_and_the_rest_stays() {
        let (_dir, places) = cache();
        for kind in KINDS {
            for item in find(&places, kind).unwrap() {
                assert_eq!(remove(&places, &item).unwrap(), None, "{item:?}");
            }
        }
        assert!(KINDS.iter().all(|kind| find(&places, kind).unwrap().is_empty()));
        let left = |path: &Path| std::fs::read_dir(path).unwrap().count();
        assert_eq!((left(&places.hub), left(&places.own)), (1, 2));
        assert!(places.own.join("mine.txt").exists() && places.hub.join("datasets--x").exists());
    }

    #[test]
    fn links_lead_nowhere() {
        let (dir, places) = cache();
        let outside = dir.path().join("outside");
        std::fs::create_dir_all(outside.join("blobs")).unwrap();
        std::fs::write(outside.join("blobs/w.incomplete"), "precious").unwrap();
        symlink(&outside, places.hub.join("models--linked")).unwrap();
        symlink(&outside, places.hub.join("models--org--a--b/snapshots/out")).unwrap();
        let models = find(&places, kind("model")).unwrap();
        let linked = models.iter().find(|item| item.name == "linked").unwrap();
        assert_eq!((linked.bytes, &linked.held), (0, &Some(InUse::Link)));
        assert_eq!(remove(&places, linked).unwrap(), Some(InUse::Link));
        let real = models.iter().find(|item| item.name == "org/a--b").unwrap();
        assert_eq!(remove(&places, real).unwrap(), None);
        assert_eq!(names(&places, "partial"), Vec::<String>::new());
        assert_eq!(std::fs::read(outside.join("blobs/w.incomplete")).unwrap(), b"precious");
    }

    #[test]
    fn what_is_open_or_locked_is_held() {
        let (_dir, places) = cache();
        let model = &find(&places, kind("model")).unwrap()[0];
        let blob = File::open(model.path.join("blobs/aa")).unwrap();
        // A process that has the blob open as its input, until it is ended.
        let mut other = Command::new("sleep").arg("60").stdin(Stdio::from(blob)).spawn().unwrap();
        let held = remove(&places, model).unwrap();
        assert_eq!(held, Some(InUse::Process(other.id())));
        other.kill().unwrap();
        other.wait().unwrap();
        let lock = File::create(model.path.join("blobs/bb.lock")).unwrap();
        lock.lock().unwrap();
        let locked = Some(InUse::Lock(model.path.join("blobs/bb.lock")));
        assert_eq!(find(&places, kind("partial")).unwrap()[0].held, locked);
        assert_eq!(remove(&places, model).unwrap(), locked);
        drop(lock);
        assert_eq!(remove(&places, model).unwrap(), None);
    }
}
