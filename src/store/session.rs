//! Opens connections to a database, and runs transactions on them.
//!
//! Every statement runs in a transaction and is prepared without a name, so that poolers that hand
//! out connections by session or by transaction both work. Every wait has a limit. A transaction
//! that is not finished, for whatever reason, closes its connection: nothing of it remains.

use super::error::{Cause, StoreError};
use super::place::Location;
use parking_lot::Mutex;
use sqlx::any::{AnyArguments, AnyConnectOptions, AnyRow};
use sqlx::query::Query;
use sqlx::{Any, AnyConnection, Connection, Executor, Row};
use std::borrow::Cow;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How long a store waits.
#[derive(Clone, Copy)]
pub(super) struct SessionLimits {
    /// For a connection that others use.
    turn: Duration,
    /// For a connection to be made.
    connect: Duration,
    /// How long an idle connection may take to answer a test.
    ping: Duration,
    /// For one statement. The server's own limit is a little less.
    statement: Duration,
    /// For a connection to be closed.
    close: Duration,
}

/// How long a store waits unless a test has no time for it.
pub(super) const LIMITS: SessionLimits = SessionLimits {
    turn: Duration::from_secs(30),
    connect: Duration::from_secs(10),
    ping: Duration::from_secs(5),
    statement: Duration::from_secs(30),
    close: Duration::from_secs(5),
};

impl SessionLimits {
    /// The same limit for everything.
    #[cfg(test)]
    pub(super) fn all(limit: Duration) -> Self {
        Self { turn: limit, connect: limit, ping: limit, statement: limit, close: limit }
    }
}

/// What each connection to a SQLite file that is written begins with: readers go on while a round
/// is written, and a committed transaction is on the disk.
const SQLITE_WRITER: &str = "PRAGMA busy_timeout = 5000; PRAGMA journal_mode = WAL; \
                             PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; \
                             PRAGMA cell_size_check = ON";
/// The same where it is only read.
const SQLITE_READER: &str = "PRAGMA busy_timeout = 5000; PRAGMA cell_size_check = ON";
/// Beginnings of transactions.
const SQLITE_WRITE: &str = "BEGIN IMMEDIATE";
const SQLITE_READ: &str = "BEGIN";
/// The server's own limits, a little below ours, so that a statement ends there too.
const POSTGRES_WRITE: &str = "BEGIN; SET LOCAL statement_timeout = '25s'; \
                              SET LOCAL lock_timeout = '20s'; \
                              SET LOCAL idle_in_transaction_session_timeout = '60s'";
const POSTGRES_READ: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; \
                             SET LOCAL statement_timeout = '25s'; \
                             SET LOCAL idle_in_transaction_session_timeout = '60s'";

/// A value of a statement.
#[derive(Clone, Debug)]
pub(super) enum Bound<'a> {
    Integer(Option<i64>),
    Real(Option<f64>),
    Text(Option<Cow<'a, str>>),
}

impl From<u16> for Bound<'_> {
    fn from(value: u16) -> Self {
        Self::Integer(Some(value.into()))
    }
}

impl From<u32> for Bound<'_> {
    fn from(value: u32) -> Self {
        Self::Integer(Some(value.into()))
    }
}

impl From<i64> for Bound<'_> {
    fn from(value: i64) -> Self {
        Self::Integer(Some(value))
    }
}

impl From<f64> for Bound<'_> {
    fn from(value: f64) -> Self {
        Self::Real(Some(value))
    }
}

impl From<Option<f64>> for Bound<'_> {
    fn from(value: Option<f64>) -> Self {
        Self::Real(value)
    }
}

impl<'a> From<&'a str> for Bound<'a> {
    fn from(value: &'a str) -> Self {
        Self::from(Some(value))
    }
}

impl<'a> From<Option<&'a str>> for Bound<'a> {
    /// PostgreSQL has no place for NUL in a text.
    fn from(value: Option<&'a str>) -> Self {
        Self::Text(value.map(|text| match text.contains('\0') {
            true => Cow::Owned(text.replace('\0', "\u{fffd}")),
            false => Cow::Borrowed(text),
        }))
    }
}

impl From<String> for Bound<'_> {
    fn from(value: String) -> Self {
        Self::Text(Some(Cow::Owned(value)))
    }
}

/// Whether a session may change what is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Access {
    Read,
    Write,
}

/// Connections of one kind to one database.
pub(super) struct ConnectionPool {
    place: Location,
    options: AnyConnectOptions,
    setup: Option<&'static str>,
    begin: &'static str,
    idle: Mutex<Vec<AnyConnection>>,
    permits: Arc<Semaphore>,
    /// How many there may be.
    max: u32,
    limits: SessionLimits,
}

impl ConnectionPool {
    /// Up to `max` connections for `access` by the driver's `url`; none is made yet.
    pub(super) fn new(
        place: Location,
        url: &str,
        access: Access,
        max: u32,
        limits: SessionLimits,
    ) -> Result<Self, Cause> {
        sqlx::any::install_default_drivers();
        let options: AnyConnectOptions =
            url.parse().map_err(|e: sqlx::Error| Cause::Place(place.scrub(e.to_string())))?;
        let options = sqlx::ConnectOptions::disable_statement_logging(options);
        let (setup, begin) = match (&place, access) {
            (Location::Sqlite(_), Access::Write) => (Some(SQLITE_WRITER), SQLITE_WRITE),
            (Location::Sqlite(_), Access::Read) => (Some(SQLITE_READER), SQLITE_READ),
            (Location::Postgres(_), Access::Write) => (None, POSTGRES_WRITE),
            (Location::Postgres(_), Access::Read) => (None, POSTGRES_READ),
        };
        let permits = Arc::new(Semaphore::new(max as usize));
        let idle = Mutex::new(Vec::new());
        Ok(Self { place, options, setup, begin, idle, permits, max, limits })
    }

    /// Begins a transaction, waiting for a free connection; `operation` completes "cannot ...".
    pub(super) async fn begin(self: &Arc<Self>, operation: &str) -> Result<Session, StoreError> {
        let refuse = |cause| self.error(operation, cause);
        let turn = self.permits.clone().acquire_owned();
        let permit = match tokio::time::timeout(self.limits.turn, turn).await {
            Ok(Ok(permit)) => permit,
            Ok(Err(_)) => return Err(refuse(Cause::Database("the store is closed".into()))),
            Err(_) => {
                return Err(refuse(Cause::TooSlow { what: "others", limit: self.limits.turn }));
            }
        };
        let connection = self.connection().await.map_err(refuse)?;
        let mut session = Session {
            connections: self.clone(),
            operation: operation.to_owned(),
            connection: Some(connection),
            _permit: permit,
        };
        session.script(self.begin).await?;
        Ok(session)
    }

    fn error(&self, operation: &str, cause: Cause) -> StoreError {
        StoreError { database: self.place.shown(), operation: operation.to_owned(), cause }
    }

    /// A working connection: an idle one, or a new one.
    async fn connection(&self) -> Result<AnyConnection, Cause> {
        loop {
            let Some(mut idle) = self.idle.lock().pop() else { return self.connect().await };
            if matches!(tokio::time::timeout(self.limits.ping, idle.ping()).await, Ok(Ok(()))) {
                return Ok(idle);
            }
        }
    }

    async fn connect(&self) -> Result<AnyConnection, Cause> {
        let made = AnyConnection::connect_with(&self.options);
        let mut connection = self.within("connecting", self.limits.connect, made).await?;
        if let Some(setup) = self.setup {
            let run = connection.execute(setup);
            self.within("setting up a connection", self.limits.statement, run).await?;
        }
        Ok(connection)
    }

    async fn within<T>(
        &self,
        what: &'static str,
        limit: Duration,
        work: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, Cause> {
        match tokio::time::timeout(limit, work).await {
            Ok(done) => done.map_err(|e| Cause::Database(self.place.scrub(words(&e)))),
            Err(_) => Err(Cause::TooSlow { what, limit }),
        }
    }

    /// Waits for those that are in use, and closes all; nothing can begin then.
    pub(super) async fn close(&self) {
        let all = tokio::time::timeout(self.limits.turn, self.permits.acquire_many(self.max)).await;
        self.permits.close();
        drop(all);
        let idle: Vec<_> = std::mem::take(&mut *self.idle.lock());
        for connection in idle {
            // What is committed is safe without it.
            let _ = tokio::time::timeout(self.limits.close, connection.close()).await;
        }
    }
}

/// The driver's words, without what it puts in front of the database's.
fn words(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(e) => e.message().to_owned(),
        other => other.to_string(),
    }
}

/// A transaction under way; where it is not finished, its connection is closed.
pub(super) struct Session {
    connections: Arc<ConnectionPool>,
    operation: String,
    connection: Option<AnyConnection>,
    _permit: OwnedSemaphorePermit,
}

impl Session {
    /// An error of the operation that the session is for.
    pub(super) fn error(&self, cause: Cause) -> StoreError {
        self.connections.error(&self.operation, cause)
    }

    /// Runs statements that take no values.
    pub(super) async fn script(&mut self, sql: &str) -> Result<(), StoreError> {
        let (connections, connection) = self.parts()?;
        let run = connection.execute(sql);
        let done = connections.within("a statement", connections.limits.statement, run).await;
        done.map(|_| ()).map_err(|cause| self.error(cause))
    }

    /// Runs a statement and says how many rows it changed.
    pub(super) async fn execute(
        &mut self,
        sql: &str,
        values: Vec<Bound<'_>>,
    ) -> Result<u64, StoreError> {
        let (connections, connection) = self.parts()?;
        let run = connection.execute(query(sql, values));
        let done = connections.within("a statement", connections.limits.statement, run).await;
        done.map(|done| done.rows_affected()).map_err(|cause| self.error(cause))
    }

    /// Runs a query.
    pub(super) async fn rows(
        &mut self,
        sql: &str,
        values: Vec<Bound<'_>>,
    ) -> Result<Vec<AnyRow>, StoreError> {
        let (connections, connection) = self.parts()?;
        let run = connection.fetch_all(query(sql, values));
        let done = connections.within("a query", connections.limits.statement, run).await;
        done.map_err(|cause| self.error(cause))
    }

    /// The first column of the first row, as an integer.
    pub(super) async fn integer(
        &mut self,
        sql: &str,
        values: Vec<Bound<'_>>,
    ) -> Result<Option<i64>, StoreError> {
        let rows = self.rows(sql, values).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        row.try_get(0).map_err(|e| self.error(Cause::Stored(e.to_string())))
    }

    /// Runs a query, reads each of its rows, and ends the transaction.
    pub(super) async fn read<T>(
        mut self,
        sql: &str,
        values: Vec<Bound<'_>>,
        read: impl Fn(&AnyRow) -> Result<T, Cause>,
    ) -> Result<Vec<T>, StoreError> {
        let rows = self.rows(sql, values).await?;
        let read = rows.iter().map(read).collect::<Result<_, _>>();
        let read = read.map_err(|cause| self.error(cause))?;
        self.commit().await?;
        Ok(read)
    }

    /// Makes what was done last, and gives the connection back.
    pub(super) async fn commit(mut self) -> Result<(), StoreError> {
        self.script("COMMIT").await?;
        if let Some(connection) = self.connection.take() {
            self.connections.idle.lock().push(connection);
        }
        Ok(())
    }

    fn parts(&mut self) -> Result<(&Arc<ConnectionPool>, &mut AnyConnection), StoreError> {
        match &mut self.connection {
            Some(connection) => Ok((&self.connections, connection)),
            None => {
                let cause = Cause::Database("the transaction has ended".into());
                Err(self.connections.error(&self.operation, cause))
            }
        }
    }
}

fn query<'q>(sql: &'q str, values: Vec<Bound<'q>>) -> Query<'q, Any, AnyArguments<'q>> {
    // A named statement would belong to a connection that a pooler may give to somebody else.
    values.into_iter().fold(sqlx::query(sql).persistent(false), |query, value| match value {
        Bound::Integer(value) => query.bind(value),
        Bound::Real(value) => query.bind(value),
        Bound::Text(None) => query.bind(None::<String>),
        Bound::Text(Some(Cow::Borrowed(text))) => query.bind(text),
        Bound::Text(Some(Cow::Owned(text))) => query.bind(text),
    })
}
