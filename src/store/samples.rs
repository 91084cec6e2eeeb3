//! Reads what scores are made of: each miner's newest samples for each model.

use super::database::Store;
use super::error::{Cause, StoreError};
use super::record::Sample;
use super::rows::{get, get_number, number};
use sqlx::any::AnyRow;

/// The newest samples of the hotkey that holds the uid, from the block at which it took the uid
/// over. Of each miner and model the index finds the block of the oldest one that counts, so old
/// samples cost next to nothing.
const NEWEST: &str = "WITH held AS MATERIALIZED (
        SELECT h.uid, h.hotkey, h.since_block FROM hotkeys h
        WHERE h.netuid = $1 AND h.since_block = (SELECT MAX(l.since_block) FROM hotkeys l
            WHERE l.netuid = h.netuid AND l.uid = h.uid)
    ), parts AS MATERIALIZED (
        SELECT DISTINCT s.uid, s.hotkey, s.model, held.since_block FROM samples s
        JOIN held ON held.uid = s.uid AND held.hotkey = s.hotkey
        WHERE s.netuid = $1
    ), cut AS MATERIALIZED (
        SELECT p.uid, p.hotkey, p.model, COALESCE((SELECT t.block FROM samples t
            WHERE t.netuid = $1 AND t.uid = p.uid AND t.hotkey = p.hotkey AND t.model = p.model
                AND t.block >= p.since_block
            ORDER BY t.block DESC LIMIT 1 OFFSET $2 - 1), p.since_block) AS block
        FROM parts p
    ), aged AS (
        SELECT s.round, s.uid, s.hotkey, s.model, s.block, s.at_ms, s.tps, ROW_NUMBER() OVER (
            PARTITION BY s.uid, s.hotkey, s.model
            ORDER BY s.block DESC, s.at_ms DESC, s.round DESC) AS age
        FROM cut JOIN samples s ON s.netuid = $1 AND s.uid = cut.uid AND s.hotkey = cut.hotkey
            AND s.model = cut.model AND s.block >= cut.block
    )
    SELECT round, uid, hotkey, model, block, tps FROM aged
    WHERE age <= $2 AND EXISTS (SELECT 1 FROM rounds WHERE netuid = $1 AND block >= $3)
    ORDER BY uid, hotkey, model, block, at_ms, round";

impl Store {
    /// The newest `last` samples of each miner and model, by uid, hotkey and model, oldest first.
    /// Only who holds a uid now has samples there, and only those since then.
    ///
    /// All of them count or none: none where no round of the subnet began at or after
    /// `not_before_block`, for a validator that was away for longer starts anew (protocol 5.7: 360
    /// blocks). A single sample may be older.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn samples(
        &self,
        netuid: u16,
        last: u32,
        not_before_block: u64,
    ) -> Result<Vec<Sample>, StoreError> {
        let operation = format!("read the samples of netuid {netuid}");
        if last == 0 {
            return Ok(Vec::new());
        }
        // No round has a greater number than the databases can hold.
        let since = number("not_before_block", not_before_block).unwrap_or(i64::MAX);
        let session = self.read(&operation).await?;
        session.read(NEWEST, vec![netuid.into(), last.into(), since.into()], sample).await
    }
}

fn sample(row: &AnyRow) -> Result<Sample, Cause> {
    Ok(Sample {
        round: get(row, "round")?,
        uid: get_number(row, "uid")?,
        hotkey: get(row, "hotkey")?,
        model: get(row, "model")?,
        block: get_number(row, "block")?,
        tps: get(row, "tps")?,
    })
}
