//! Deletes old records: by age, by count, and captures earlier than verdicts.

use super::database::Store;
use super::error::{Cause, StoreError};
use super::rows::get;
use super::session::Bound;

/// Rounds, responses or samples that one transaction removes, so that none holds up a round.
const BATCH: u32 = 200;
/// Samples are small.
const SAMPLES_BATCH: u32 = 5_000;

/// Rows older than a time.
const OLD_ROUNDS: &str = "DELETE FROM rounds WHERE id IN
    (SELECT id FROM rounds WHERE started_ms < $1 ORDER BY started_ms, id LIMIT $2)";
/// The newest round that is one too many.
const SURPLUS: &str =
    "SELECT started_ms, id FROM rounds ORDER BY started_ms DESC, id DESC LIMIT 1 OFFSET $1";
const SURPLUS_ROUNDS: &str = "DELETE FROM rounds WHERE id IN
    (SELECT id FROM rounds WHERE (started_ms, id) <= ($1, $2) ORDER BY started_ms, id LIMIT $3)";
const SURPLUS_SAMPLES: &str = "DELETE FROM samples WHERE (round, uid) IN (
    SELECT round, uid FROM (
        SELECT round, uid, ROW_NUMBER() OVER (
            PARTITION BY netuid, uid, hotkey, model
            ORDER BY block DESC, at_ms DESC, round DESC) AS age
        FROM samples) aged
    WHERE age > $1 LIMIT $2)";
/// Samples of hotkeys that no longer hold their uid.
const FORMER_SAMPLES: &str = "DELETE FROM samples WHERE (round, uid) IN (
    SELECT s.round, s.uid FROM samples s
    WHERE s.at_ms < $1 AND (s.netuid, s.uid, s.hotkey) NOT IN (
        SELECT h.netuid, h.uid, h.hotkey FROM hotkeys h
        WHERE h.since_block = (SELECT MAX(l.since_block) FROM hotkeys l
            WHERE l.netuid = h.netuid AND l.uid = h.uid))
    LIMIT $2)";

/// Which records to delete; a kind without a limit stays.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Retention {
    /// Rounds that began earlier, with their responses, in milliseconds since 1970; and samples of
    /// hotkeys that no longer hold their uid. Samples of those that do stay.
    pub rounds_before_ms: Option<u64>,
    /// All but so many of the newest rounds.
    pub rounds_max: Option<u32>,
    /// Captures of rounds that began earlier; their verdicts and reports stay.
    pub captures_before_ms: Option<u64>,
    /// Reports of rounds that began earlier; their verdicts stay.
    pub reports_before_ms: Option<u64>,
    /// All but so many of the newest samples of each miner and model.
    pub samples_max: Option<u32>,
}

/// How many records were deleted.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Removed {
    /// Rounds with their responses.
    pub rounds: u64,
    /// Captured answers that were deleted.
    pub captures: u64,
    /// Reports of verification that were deleted.
    pub reports: u64,
    /// Samples that scores are made of.
    pub samples: u64,
}

impl Store {
    /// Forgets, in small steps; a step that was taken stays taken when a later one fails. Weights,
    /// evidence and hotkeys are never forgotten.
    ///
    /// # Errors
    /// When a step fails.
    pub async fn retain(&self, retention: &Retention) -> Result<Removed, StoreError> {
        let time = |ms: u64| i64::try_from(ms).unwrap_or(i64::MAX);
        let mut removed = Removed::default();
        if let Some(before) = retention.captures_before_ms {
            removed.captures = self.forget_column("capture", time(before)).await?;
        }
        if let Some(before) = retention.reports_before_ms {
            removed.reports = self.forget_column("report", time(before)).await?;
        }
        if let Some(before) = retention.rounds_before_ms {
            let before = time(before);
            removed.rounds += self.forget(OLD_ROUNDS, &[before.into()], BATCH).await?;
            removed.samples += self.forget(FORMER_SAMPLES, &[before.into()], SAMPLES_BATCH).await?;
        }
        if let Some(max) = retention.rounds_max {
            removed.rounds += self.forget_surplus(max).await?;
        }
        if let Some(max) = retention.samples_max {
            removed.samples += self.forget(SURPLUS_SAMPLES, &[max.into()], SAMPLES_BATCH).await?;
        }
        Ok(removed)
    }

    async fn forget_column(&self, column: &str, before: i64) -> Result<u64, StoreError> {
        let sql = format!(
            "UPDATE responses SET {column} = NULL WHERE (round, uid) IN (
                SELECT round, uid FROM responses WHERE started_ms < $1 AND {column} IS NOT NULL
                LIMIT $2)"
        );
        self.forget(&sql, &[before.into()], BATCH).await
    }

    async fn forget_surplus(&self, max: u32) -> Result<u64, StoreError> {
        let mut session = self.read("find the rounds to forget").await?;
        let rows = session.rows(SURPLUS, vec![max.into()]).await?;
        let read = |row| -> Result<(i64, String), Cause> {
            Ok((get(row, "started_ms")?, get(row, "id")?))
        };
        let newest = rows.first().map(read).transpose().map_err(|cause| session.error(cause))?;
        session.commit().await?;
        let Some((started, id)) = newest else { return Ok(0) };
        self.forget(SURPLUS_ROUNDS, &[started.into(), id.into()], BATCH).await
    }

    /// Runs a statement, whose last value is a batch's size, until nothing is left to do.
    async fn forget(&self, sql: &str, values: &[Bound<'_>], batch: u32) -> Result<u64, StoreError> {
        let mut removed = 0;
        loop {
            let mut session = self.write("forget old records").await?;
            let mut values = values.to_vec();
            values.push(batch.into());
            let count = session.execute(sql, values).await?;
            session.commit().await?;
            removed += count;
            if count == 0 {
                return Ok(removed);
            }
        }
    }
}
