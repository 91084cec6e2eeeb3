//! Creates and upgrades the schema. A version is never changed once it was released; the next one
//! is a file that changes what the last one made.

use super::error::{Cause, StoreError};
use super::place::Location;
use super::session::Session;

/// What makes each version of the one before it, the first of an empty database.
pub(super) const VERSIONS: &[&str] =
    &[include_str!("schema/1.sql"), include_str!("schema/2.sql"), include_str!("schema/3.sql")];

/// Key of the lock that keeps two processes from migrating a PostgreSQL database at once.
const MIGRATION_LOCK: i64 = 0x7461_7267_6f6e;

/// Brings the schema up to date.
///
/// # Errors
/// When the database was written by a newer program, or holds something else.
pub(super) async fn migrate(
    session: &mut Session,
    place: &Location,
    versions: &[&str],
) -> Result<(), StoreError> {
    if let Location::Postgres(_) = place {
        session
            .rows("SELECT 1 FROM pg_advisory_xact_lock($1)", vec![MIGRATION_LOCK.into()])
            .await?;
    }
    let found = version(session, place).await?;
    if found.is_none() {
        refuse_others(session, place).await?;
        session.script("CREATE TABLE targon_schema (version BIGINT NOT NULL PRIMARY KEY)").await?;
    }
    let (found, known) = (found.unwrap_or(0), versions.len() as u64);
    if found > known {
        return Err(session.error(Cause::NewerSchema { found, known }));
    }
    for (place, sql) in versions.iter().enumerate().skip(found as usize) {
        session.script(sql).await?;
        let version = place as i64 + 1;
        session.execute("INSERT INTO targon_schema VALUES ($1)", vec![version.into()]).await?;
    }
    Ok(())
}

/// Refuses a schema that this program does not read.
///
/// # Errors
/// When it is older or newer, or there is none.
pub(super) async fn check(
    session: &mut Session,
    place: &Location,
    versions: &[&str],
) -> Result<(), StoreError> {
    let known = versions.len() as u64;
    let Some(found) = version(session, place).await? else {
        let words = "it is not a store of this program: it has no table `targon_schema`";
        return Err(session.error(Cause::NotAStore(words.into())));
    };
    match found.cmp(&known) {
        std::cmp::Ordering::Less => Err(session.error(Cause::OlderSchema { found, known })),
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Greater => Err(session.error(Cause::NewerSchema { found, known })),
    }
}

/// The schema's version, if there is a schema.
async fn version(session: &mut Session, place: &Location) -> Result<Option<u64>, StoreError> {
    let exists = match place {
        Location::Sqlite(_) => {
            "SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name = 'targon_schema'"
        }
        Location::Postgres(_) => {
            "SELECT COUNT(*) FROM pg_class WHERE oid = to_regclass('targon_schema')"
        }
    };
    if session.integer(exists, Vec::new()).await?.unwrap_or(0) == 0 {
        return Ok(None);
    }
    let newest = session.integer("SELECT MAX(version) FROM targon_schema", Vec::new()).await?;
    let newest = newest.unwrap_or(0);
    u64::try_from(newest).map(Some).map_err(|_| {
        session.error(Cause::Stored(format!("the schema's version must not be {newest}")))
    })
}

/// A SQLite file has one owner; a PostgreSQL database may have several.
async fn refuse_others(session: &mut Session, place: &Location) -> Result<(), StoreError> {
    let Location::Sqlite(_) = place else { return Ok(()) };
    let tables = "SELECT COUNT(*) FROM sqlite_master";
    if session.integer(tables, Vec::new()).await?.unwrap_or(0) == 0 {
        return Ok(());
    }
    let words = "it is not a store of this program: it holds tables of another one";
    Err(session.error(Cause::NotAStore(words.into())))
}
