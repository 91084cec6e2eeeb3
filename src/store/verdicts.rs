//! Reads verdicts over time, without what makes answers large, and one answer as a whole.

use super::database::Store;
use super::error::{Cause, StoreError};
use super::record::{Response, ResponseVerdict};
use super::rounds::{outcome, response, timing};
use super::rows::{get, get_number};
use sqlx::any::AnyRow;

/// Rounds whose verdicts one query returns at most.
const ROUNDS_MAX: u32 = 500;

const NEWEST: &str = "SELECT p.round, p.started_ms, p.uid, p.hotkey, p.first_token, p.all_tokens,
        p.total, p.tps, p.tokens, p.outcome, p.cause,
        CAST(CASE WHEN p.capture IS NULL THEN 0 ELSE 1 END AS BIGINT) AS is_kept
    FROM responses p JOIN (SELECT id FROM rounds WHERE netuid = $1
        ORDER BY started_ms DESC, id DESC LIMIT $2) r ON r.id = p.round
    ORDER BY p.started_ms, p.round, p.uid";

impl Store {
    /// The verdicts of the newest `rounds` rounds of a subnet, oldest first; of at most 500.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn verdicts(
        &self,
        netuid: u16,
        rounds: u32,
    ) -> Result<Vec<ResponseVerdict>, StoreError> {
        let session = self.read(&format!("read the verdicts of netuid {netuid}")).await?;
        let values = vec![netuid.into(), rounds.min(ROUNDS_MAX).into()];
        session.read(NEWEST, values, verdict).await
    }

    /// What one miner did in a round.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn response(&self, round: &str, uid: u16) -> Result<Option<Response>, StoreError> {
        let session = self.read(&format!("read the answer of uid {uid}")).await?;
        let sql = "SELECT * FROM responses WHERE round = $1 AND uid = $2";
        let found = session.read(sql, vec![round.into(), uid.into()], response).await?;
        Ok(found.into_iter().next())
    }
}

fn verdict(row: &AnyRow) -> Result<ResponseVerdict, Cause> {
    Ok(ResponseVerdict {
        round: get(row, "round")?,
        started_ms: get_number(row, "started_ms")?,
        uid: get_number(row, "uid")?,
        hotkey: get(row, "hotkey")?,
        timing: timing(row)?,
        outcome: outcome(row)?,
        cause: get(row, "cause")?,
        is_kept: get_number::<u8>(row, "is_kept")? == 1,
    })
}
