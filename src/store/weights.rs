//! Stores weights before they are sent, so that no crash and no second process sends twice.

use super::database::Store;
use super::error::{Cause, StoreError};
use super::record::{EpochWeights, SentBlocks, WeightsState};
use super::rows::{get, get_json, get_number, get_number_or_none, json, number};
use super::session::{Bound, Session};
use sqlx::any::AnyRow;

const COLUMNS: &str = "netuid, epoch, block, state, extrinsic, after_block, until_block,
    reveal_round, why, planner, weights, explanation";
const PLAN: &str = "INSERT INTO weights
        (netuid, epoch, block, planned_ms, progress, state, planner, weights, explanation)
    VALUES ($1, $2, $3, $4, 0, 'planned', $5, $6, $7)
    ON CONFLICT (netuid, epoch) DO UPDATE SET
        block = excluded.block, planned_ms = excluded.planned_ms, planner = excluded.planner,
        weights = excluded.weights, explanation = excluded.explanation
    WHERE weights.progress = 0";
/// Forwards only; and what is planned is sent by the run that planned it last.
const MARK: &str = "UPDATE weights SET progress = $3, state = $4,
        extrinsic = COALESCE($5, extrinsic), reveal_round = COALESCE($6, reveal_round),
        why = COALESCE($7, why), after_block = COALESCE($9, after_block),
        until_block = COALESCE($10, until_block)
    WHERE netuid = $1 AND epoch = $2 AND progress < $3
        AND (progress > 0 OR $3 = 3 OR planner = $8)";
/// Only what this run has sent, and only in the place of what it was told was refused.
const REPLACE: &str = "UPDATE weights SET extrinsic = $3, reveal_round = $4, after_block = $5,
        until_block = $6
    WHERE netuid = $1 AND epoch = $2 AND progress = 1 AND planner = $7 AND extrinsic = $8";

/// The same, back to what is planned.
const WITHDRAW: &str = "UPDATE weights SET progress = 0, state = 'planned', extrinsic = NULL,
        reveal_round = NULL, after_block = NULL, until_block = NULL
    WHERE netuid = $1 AND epoch = $2 AND progress = 1 AND planner = $3 AND extrinsic = $4";

/// Whether a step was taken.
#[must_use = "weights may be sent only by the process that took the step"]
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WeightsClaim {
    /// It was, by this run of the program.
    Ours,
    /// It was not, for the entry has come this far by another run, or further. Planned means that
    /// another run has planned since.
    Taken(WeightsState),
}

impl Store {
    /// Plans the weights of an epoch. A plan of the same epoch that was not sent is replaced, one
    /// that went any further stays: nothing is to be sent then.
    ///
    /// # Errors
    /// When they cannot be kept, or are more than planned already.
    pub async fn plan_weights(&self, weights: &EpochWeights) -> Result<WeightsClaim, StoreError> {
        let EpochWeights { netuid, epoch, .. } = *weights;
        let operation = format!("plan the weights of netuid {netuid}, epoch {epoch}");
        let values = self.plan(weights).map_err(|cause| self.error(&operation, cause))?;
        self.claim(&operation, (netuid, epoch), (PLAN, values)).await
    }

    fn plan(&self, weights: &EpochWeights) -> Result<Vec<Bound<'_>>, Cause> {
        if weights.state != WeightsState::Planned {
            return Err(Cause::Record("`state` must be planned where weights are planned".into()));
        }
        if let Some(pair) = weights.values.windows(2).find(|pair| pair[0].0 >= pair[1].0) {
            let words = format!(
                "`values` must be by ascending uid, got {} before {}",
                pair[0].0, pair[1].0
            );
            return Err(Cause::Record(words));
        }
        Ok(vec![
            weights.netuid.into(),
            number("epoch", weights.epoch)?.into(),
            number("block", weights.block)?.into(),
            number("planned_ms", self.unix_ms())?.into(),
            self.planner().into(),
            json("values", &weights.values)?.into(),
            json("explanation", &weights.explanation)?.into(),
        ])
    }

    /// Says how far the weights of an epoch are. They are marked as sent *before* they are sent,
    /// and sent only where that was [`WeightsClaim::Ours`]. The same step once more by the same run
    /// is `Ours` again, for an answer that was lost.
    ///
    /// # Errors
    /// When it cannot be kept, or nothing is planned for the epoch.
    pub async fn mark_weights(
        &self,
        netuid: u16,
        epoch: u64,
        state: &WeightsState,
    ) -> Result<WeightsClaim, StoreError> {
        let operation = format!("mark the weights of netuid {netuid}, epoch {epoch}");
        let values = self.mark(netuid, epoch, state);
        let values = values.map_err(|cause| self.error(&operation, cause))?;
        let mut session = self.write(&operation).await?;
        let claim = match session.execute(MARK, values).await? {
            0 => {
                let (weights, planner) = found(&mut session, netuid, epoch).await?;
                match weights.state == *state && planner == self.planner() {
                    true => WeightsClaim::Ours,
                    false => WeightsClaim::Taken(weights.state),
                }
            }
            _ => WeightsClaim::Ours,
        };
        session.commit().await?;
        Ok(claim)
    }

    /// Another extrinsic goes out in place of the one with hash `refused`, which is in no block for
    /// certain. It is sent only where this was [`WeightsClaim::Ours`].
    ///
    /// # Errors
    /// When it cannot be kept, or nothing is planned for the epoch.
    pub async fn replace_sent_weights(
        &self,
        (netuid, epoch): (u16, u64),
        refused: &str,
        state: &WeightsState,
    ) -> Result<WeightsClaim, StoreError> {
        let operation = format!("mark the weights of netuid {netuid}, epoch {epoch}");
        let refuse = |cause| self.error(&operation, cause);
        let WeightsState::Sent { hash, blocks, reveal_round } = state else {
            return Err(refuse(Cause::Record("`state` must be sent in place of another".into())));
        };
        let [after, until] = block_values(*blocks).map_err(refuse)?;
        let reveal = reveal_value(*reveal_round).map_err(refuse)?;
        let epoch_value = number("epoch", epoch).map_err(refuse)?;
        let mut values: Vec<Bound<'_>> = vec![netuid.into(), epoch_value.into()];
        values.extend([hash.as_str().into(), reveal, after, until]);
        values.extend([self.planner().into(), refused.into()]);
        self.claim(&operation, (netuid, epoch), (REPLACE, values)).await
    }

    /// The weights of an epoch are planned again, and no more: the extrinsic with hash `refused`,
    /// by which this run sent them, is in no block for certain.
    ///
    /// # Errors
    /// When it cannot be kept, or nothing is planned for the epoch.
    pub async fn withdraw_sent_weights(
        &self,
        (netuid, epoch): (u16, u64),
        refused: &str,
    ) -> Result<WeightsClaim, StoreError> {
        let operation = format!("mark the weights of netuid {netuid}, epoch {epoch}");
        let epoch_value = number("epoch", epoch).map_err(|cause| self.error(&operation, cause))?;
        let values: Vec<Bound<'_>> =
            vec![netuid.into(), epoch_value.into(), self.planner().into(), refused.into()];
        self.claim(&operation, (netuid, epoch), (WITHDRAW, values)).await
    }

    /// Takes a step by a statement that changes the entry of an epoch, or nothing where it has come
    /// another way.
    async fn claim(
        &self,
        operation: &str,
        (netuid, epoch): (u16, u64),
        (statement, values): (&'static str, Vec<Bound<'_>>),
    ) -> Result<WeightsClaim, StoreError> {
        let mut session = self.write(operation).await?;
        let claim = match session.execute(statement, values).await? {
            0 => WeightsClaim::Taken(found(&mut session, netuid, epoch).await?.0.state),
            _ => WeightsClaim::Ours,
        };
        session.commit().await?;
        Ok(claim)
    }

    fn mark<'a>(
        &'a self,
        netuid: u16,
        epoch: u64,
        state: &'a WeightsState,
    ) -> Result<Vec<Bound<'a>>, Cause> {
        let (progress, name, extrinsic, reveal_round, why) = match state {
            WeightsState::Planned => {
                return Err(Cause::Record("`state` must be more than planned".into()));
            }
            WeightsState::Sent { hash, reveal_round, .. } => {
                (1, "sent", Some(hash), *reveal_round, None)
            }
            WeightsState::Committed { hash, reveal_round, .. } => {
                (2, "committed", Some(hash), Some(*reveal_round), None)
            }
            WeightsState::Failed { why } => (3, "failed", None, None, Some(why)),
            WeightsState::Confirmed => (4, "confirmed", None, None, None),
        };
        let [after, until] = block_values(state.sent_blocks())?;
        Ok(vec![
            netuid.into(),
            number("epoch", epoch)?.into(),
            i64::from(progress).into(),
            name.into(),
            extrinsic.map(String::as_str).into(),
            reveal_value(reveal_round)?,
            why.map(String::as_str).into(),
            self.planner().into(),
            after,
            until,
        ])
    }

    /// The weights of an epoch, if there are any.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn weights_of(
        &self,
        netuid: u16,
        epoch: u64,
    ) -> Result<Option<EpochWeights>, StoreError> {
        let operation = format!("read the weights of netuid {netuid}, epoch {epoch}");
        let epoch = number("epoch", epoch).map_err(|cause| self.error(&operation, cause))?;
        let sql = format!("SELECT {COLUMNS} FROM weights WHERE netuid = $1 AND epoch = $2");
        Ok(self.weights(&operation, &sql, vec![netuid.into(), epoch.into()]).await?.pop())
    }

    /// The newest weights of a subnet, if there are any.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn last_weights(&self, netuid: u16) -> Result<Option<EpochWeights>, StoreError> {
        let sql = format!(
            "SELECT {COLUMNS} FROM weights WHERE netuid = $1
             ORDER BY block DESC, epoch DESC LIMIT 1"
        );
        let operation = format!("read the last weights of netuid {netuid}");
        Ok(self.weights(&operation, &sql, vec![netuid.into()]).await?.pop())
    }

    /// The newest weights of a subnet that were read back from the chain, if there are any.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn confirmed_weights(&self, netuid: u16) -> Result<Option<EpochWeights>, StoreError> {
        let sql = format!(
            "SELECT {COLUMNS} FROM weights WHERE netuid = $1 AND progress = 4
             ORDER BY block DESC, epoch DESC LIMIT 1"
        );
        let operation = format!("read the confirmed weights of netuid {netuid}");
        Ok(self.weights(&operation, &sql, vec![netuid.into()]).await?.pop())
    }

    /// All weights whose end is not known: planned, sent or committed; oldest first.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn unfinished_weights(&self) -> Result<Vec<EpochWeights>, StoreError> {
        let sql =
            format!("SELECT {COLUMNS} FROM weights WHERE progress < 3 ORDER BY block, netuid");
        self.weights("read the unfinished weights", &sql, Vec::new()).await
    }

    async fn weights(
        &self,
        operation: &str,
        sql: &str,
        values: Vec<Bound<'_>>,
    ) -> Result<Vec<EpochWeights>, StoreError> {
        let session = self.read(operation).await?;
        session.read(sql, values, |row| weights(row).map(|(weights, _)| weights)).await
    }
}

fn block_values(blocks: Option<SentBlocks>) -> Result<[Bound<'static>; 2], Cause> {
    let Some(SentBlocks { after, until }) = blocks else {
        return Ok([Bound::Integer(None), Bound::Integer(None)]);
    };
    Ok([number("after", after)?.into(), number("until", until)?.into()])
}

fn reveal_value(round: Option<u64>) -> Result<Bound<'static>, Cause> {
    Ok(Bound::Integer(round.map(|round| number("reveal_round", round)).transpose()?))
}

/// The entry of an epoch, and who planned it.
async fn found(
    session: &mut Session,
    netuid: u16,
    epoch: u64,
) -> Result<(EpochWeights, String), StoreError> {
    let epoch = number("epoch", epoch).map_err(|cause| session.error(cause))?;
    let sql = format!("SELECT {COLUMNS} FROM weights WHERE netuid = $1 AND epoch = $2");
    let rows = session.rows(&sql, vec![netuid.into(), epoch.into()]).await?;
    let none = || Cause::Record("nothing is planned for this epoch".into());
    let found = rows.first().ok_or_else(none).and_then(weights);
    found.map_err(|cause| session.error(cause))
}

fn weights(row: &AnyRow) -> Result<(EpochWeights, String), Cause> {
    let hash = || get::<Option<String>>(row, "extrinsic").map(Option::unwrap_or_default);
    let blocks = || -> Result<_, Cause> {
        let pair =
            get_number_or_none(row, "after_block")?.zip(get_number_or_none(row, "until_block")?);
        Ok(pair.map(|(after, until)| SentBlocks { after, until }))
    };
    let name: String = get(row, "state")?;
    let state = match name.as_str() {
        "planned" => WeightsState::Planned,
        "sent" => WeightsState::Sent {
            hash: hash()?,
            blocks: blocks()?,
            reveal_round: get_number_or_none(row, "reveal_round")?,
        },
        "committed" => WeightsState::Committed {
            hash: hash()?,
            blocks: blocks()?,
            reveal_round: get_number(row, "reveal_round")?,
        },
        "failed" => {
            WeightsState::Failed { why: get::<Option<String>>(row, "why")?.unwrap_or_default() }
        }
        "confirmed" => WeightsState::Confirmed,
        other => return Err(Cause::Stored(format!("column `state`: unknown state {other:?}"))),
    };
    let weights = EpochWeights {
        netuid: get_number(row, "netuid")?,
        epoch: get_number(row, "epoch")?,
        block: get_number(row, "block")?,
        values: get_json(row, "weights")?,
        explanation: get_json(row, "explanation")?,
        state,
    };
    Ok((weights, get(row, "planner")?))
}
