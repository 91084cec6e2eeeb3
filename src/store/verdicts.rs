//! Reads verdicts over time, without what makes answers large, and one answer as a whole.

use super::database::Store;
use super::error::{Cause, StoreError};
use super::record::{MinerResponse, ResponseCause, ResponseVerdict};
use super::rounds::{outcome, response, timing};
use super::rows::{get, get_number};
use sqlx::any::AnyRow;

/// Rounds whose verdicts one query returns at most.
const ROUNDS_MAX: u32 = 500;

/// Causes that one query returns at most.
const CAUSES_MAX: u32 = 1000;

const CAUSES: &str = "SELECT round, uid, cause, error FROM responses
    WHERE netuid = $1 AND uid = $2 AND cause IS NOT NULL
    ORDER BY started_ms DESC, round DESC LIMIT $3";
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

    /// Why the newest `last` answers of a uid that are not verified are not, newest first; of at
    /// most 1,000. Reports and captures, which make answers large, are not read.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn causes(
        &self,
        netuid: u16,
        uid: u16,
        last: u32,
    ) -> Result<Vec<ResponseCause>, StoreError> {
        let session = self.read(&format!("read the causes of uid {uid}")).await?;
        let values = vec![netuid.into(), uid.into(), last.min(CAUSES_MAX).into()];
        let cause = |row: &AnyRow| {
            Ok(ResponseCause {
                round: get(row, "round")?,
                uid: get_number(row, "uid")?,
                cause: get(row, "cause")?,
                error: get(row, "error")?,
            })
        };
        session.read(CAUSES, values, cause).await
    }

    /// What one miner did in a round.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn response(
        &self,
        round: &str,
        uid: u16,
    ) -> Result<Option<MinerResponse>, StoreError> {
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
