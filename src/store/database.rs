//! Opens a store, and keeps the connections that write and read it.

use super::error::{Cause, StoreError};
use super::lock::Lock;
use super::place::{Location, sqlite_url};
use super::schema::{self, VERSIONS};
use super::session::{Access, ConnectionPool, LIMITS, Session, SessionLimits};
use crate::clock::Clock;
use crate::entropy::Entropy;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Connections that read, and with PostgreSQL those that write as well.
const CONNECTIONS_MAX: u32 = 4;
/// What is to be done while a store is opened.
const OPEN: &str = "open the store";

/// Rounds, verdicts, samples, weights and evidence in a database. Clones share its connections.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    place: Location,
    reads: Arc<ConnectionPool>,
    /// None where the store is only read.
    writer: Option<Writer>,
    clock: Clock,
    /// Device and inode of a SQLite file.
    file: Option<(u64, u64)>,
}

/// What writing takes.
struct Writer {
    connections: Arc<ConnectionPool>,
    /// Names this run of the program, as the one that may send the weights that it planned.
    planner: String,
    _lock: Option<Lock>,
}

impl Store {
    /// Opens a store to write it, and makes it where it does not exist: a path, `sqlite://PATH` or
    /// `postgres://USER:PASSWORD@HOST/DATABASE`. One process writes a SQLite file at a time;
    /// `entropy` gives this run of the program its name.
    ///
    /// # Errors
    /// When it cannot be reached, another process writes it, or a newer program has written it.
    pub async fn open(url: &str, entropy: &Entropy) -> Result<Self, StoreError> {
        Self::open_as(url, VERSIONS, LIMITS, entropy).await
    }

    /// Opens a store that exists to read it, beside the process that writes it.
    ///
    /// # Errors
    /// When it cannot be reached, or its schema is not the one of this program.
    pub async fn open_to_read(url: &str) -> Result<Self, StoreError> {
        let place = located(Location::parse(url)?)?;
        let refuse = |cause| failed(&place, cause);
        let (url, file) = match &place {
            Location::Sqlite(path) => {
                let file = identity(path).map_err(|e| refuse(Cause::File(e)))?;
                (sqlite_url(path, "ro").map_err(refuse)?, Some(file))
            }
            Location::Postgres(postgres) => (postgres.url.to_string(), None),
        };
        let reads = ConnectionPool::new(place.clone(), &url, Access::Read, CONNECTIONS_MAX, LIMITS);
        let reads = Arc::new(reads.map_err(refuse)?);
        let mut session = reads.begin(OPEN).await?;
        schema::check(&mut session, &place, VERSIONS).await?;
        session.commit().await?;
        Ok(Self::of(place, reads, None, file))
    }

    /// [`Store::open`] with a schema of these versions, and these limits.
    pub(super) async fn open_as(
        url: &str,
        versions: &[&str],
        limits: SessionLimits,
        entropy: &Entropy,
    ) -> Result<Self, StoreError> {
        let place = located(Location::parse(url)?)?;
        let refuse = |cause| failed(&place, cause);
        let (url, max, lock) = match &place {
            Location::Sqlite(path) => {
                let lock = Lock::take(path).map_err(refuse)?;
                create(path).map_err(|e| refuse(Cause::File(e)))?;
                (sqlite_url(path, "rw").map_err(refuse)?, 1, Some(lock))
            }
            Location::Postgres(postgres) => (postgres.url.to_string(), CONNECTIONS_MAX, None),
        };
        let writes = ConnectionPool::new(place.clone(), &url, Access::Write, max, limits);
        let writes = Arc::new(writes.map_err(refuse)?);
        let mut session = writes.begin(OPEN).await?;
        check_journal(&mut session, &place).await?;
        schema::migrate(&mut session, &place, versions).await?;
        session.commit().await?;
        let reads = ConnectionPool::new(place.clone(), &url, Access::Read, CONNECTIONS_MAX, limits);
        let reads = Arc::new(reads.map_err(refuse)?);
        let file = match &place {
            Location::Sqlite(path) => Some(identity(path).map_err(|e| refuse(Cause::File(e)))?),
            Location::Postgres(_) => None,
        };
        let planner = entropy.uuid().simple().to_string();
        let writer = Writer { connections: writes, planner, _lock: lock };
        Ok(Self::of(place, reads, Some(writer), file))
    }

    fn of(
        place: Location,
        reads: Arc<ConnectionPool>,
        writer: Option<Writer>,
        file: Option<(u64, u64)>,
    ) -> Self {
        Self(Arc::new(Inner { place, reads, writer, clock: Clock::system(), file }))
    }

    /// The same records, which cannot be written through it.
    pub fn reading(&self) -> Self {
        let Inner { place, reads, file, .. } = &*self.0;
        Self::of(place.clone(), Arc::clone(reads), None, *file)
    }

    /// Closes the connections once those in use have ended. A store that is dropped without it
    /// loses nothing that was committed.
    pub async fn close(&self) {
        self.0.reads.close().await;
        if let Some(writer) = &self.0.writer {
            writer.connections.close().await;
        }
    }

    /// The path, or the URL without its password and parameters.
    pub fn name(&self) -> String {
        self.0.place.shown()
    }

    /// Names this run of the program; a store that is only read has planned nothing.
    pub(super) fn planner(&self) -> &str {
        self.0.writer.as_ref().map_or("", |writer| &writer.planner)
    }

    pub(super) fn unix_ms(&self) -> u64 {
        self.0.clock.unix_ms()
    }

    /// Begins a transaction that reads; `operation` completes the sentence "cannot ...".
    pub(super) async fn read(&self, operation: &str) -> Result<Session, StoreError> {
        self.check_file(operation)?;
        self.0.reads.begin(operation).await
    }

    /// Begins a transaction that writes.
    pub(super) async fn write(&self, operation: &str) -> Result<Session, StoreError> {
        let Some(writer) = &self.0.writer else {
            let cause = Cause::Database("the store was opened to be read".into());
            return Err(self.error(operation, cause));
        };
        self.check_file(operation)?;
        writer.connections.begin(operation).await
    }

    pub(super) fn error(&self, operation: &str, cause: Cause) -> StoreError {
        StoreError { database: self.name(), operation: operation.to_owned(), cause }
    }

    /// SQLite would go on to write a file that was removed, and all would be lost with the process.
    fn check_file(&self, operation: &str) -> Result<(), StoreError> {
        let (Location::Sqlite(path), Some(opened)) = (&self.0.place, self.0.file) else {
            return Ok(());
        };
        match identity(path) {
            Ok(now) if now == opened => Ok(()),
            _ => Err(self.error(operation, Cause::Gone)),
        }
    }
}

fn failed(place: &Location, cause: Cause) -> StoreError {
    StoreError { database: place.shown(), operation: OPEN.to_owned(), cause }
}

/// An empty file is an empty database. No connection makes one, so none can put a new file in the
/// place of one that was removed.
fn create(path: &Path) -> std::io::Result<()> {
    std::fs::OpenOptions::new().append(true).create(true).open(path).map(|_| ())
}

fn identity(path: &Path) -> std::io::Result<(u64, u64)> {
    let metadata = std::fs::metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// One name for each file: absolute, through links, so that two names cannot mean two locks.
fn located(place: Location) -> Result<Location, StoreError> {
    let Location::Sqlite(path) = &place else { return Ok(place) };
    let found = std::fs::canonicalize(path).or_else(|_| {
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let name = path.file_name().ok_or_else(|| std::io::Error::other("it names no file"))?;
        Ok(std::fs::canonicalize(directory)?.join(name))
    });
    match found {
        Ok(path) => Ok(Location::Sqlite(path)),
        Err(e) => Err(failed(&place, Cause::File(e))),
    }
}

/// A file system without shared memory has no such journal, and SQLite says so only when asked.
async fn check_journal(session: &mut Session, place: &Location) -> Result<(), StoreError> {
    let Location::Sqlite(_) = place else { return Ok(()) };
    let rows = session.rows("PRAGMA journal_mode", Vec::new()).await?;
    let mode: Option<String> = rows.first().and_then(|row| sqlx::Row::try_get(row, 0).ok());
    match mode.as_deref() {
        Some("wal") => Ok(()),
        other => {
            let got = other.unwrap_or("none");
            let words = format!("its file system must allow a write-ahead log, got mode {got}");
            Err(session.error(Cause::Place(words)))
        }
    }
}
