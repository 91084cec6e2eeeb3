//! Makes commits of weights, encrypted to the drand round that reveals them, and finds them again
//! while they wait.

use super::connection::ClientAtBlock;
use super::reader::{PALLET, StorageReader};
use crate::chain::error::ChainError;
use crate::chain::keys::Hotkey;
use crate::chain::timelock::{Drand, QUICKNET};
use crate::chain::weights::outcome::{Call, Order, SentWeights};
use crate::chain::weights::reveal::{Retries, RevealEpochs, Schedule, payload};
use subxt::constants;
use subxt::dynamic::Value;
use subxt::ext::scale_value::Composite;
use subxt::utils::AccountId32;

/// Bytes that the chain takes for a commit.
const COMMIT_MAX: usize = 5000;
/// Where commits wait, since August 2025.
const COMMITS: &str = "TimelockedWeightCommits";
/// Where they waited before, and before that.
const COMMITS_BEFORE: [&str; 2] = ["CRV3WeightCommitsV2", "CRV3WeightCommits"];

/// Committed by whom, at which block, what, for which round.
type Waiting = (AccountId32, u64, Vec<u8>, u64);
/// The same before there was a block.
type WaitingBefore = (AccountId32, Vec<u8>, u64);

/// Weights that are encrypted.
pub(super) struct Commit {
    /// As they go to the chain.
    pub(super) bytes: Vec<u8>,
    /// The drand round that reveals them.
    pub(super) round: u64,
    /// Version of commits that the chain wants.
    pub(super) version: u16,
}

impl Commit {
    /// The call's fields by name.
    pub(super) fn fields(&self, call: Call, order: &Order) -> Composite<()> {
        let mut fields = vec![("netuid", Value::u128(order.netuid.into()))];
        if call == Call::CommitMechanism {
            fields.push(("mecid", Value::u128(order.mechanism.into())));
        }
        fields.push(("commit", Value::from_bytes(&self.bytes)));
        fields.push(("reveal_round", Value::u128(self.round.into())));
        if call != Call::CommitCrv3 {
            fields.push(("commit_reveal_version", Value::u128(self.version.into())));
        }
        Composite::named(fields)
    }
}

/// What a commit encrypts: the weights, and whose they are where the call wants it.
pub(super) fn message(call: Call, hotkey: &Hotkey, order: &Order, version: u64) -> Vec<u8> {
    payload((call != Call::CommitCrv3).then_some(hotkey), &order.vector, version)
}

/// Encrypts a message so that the chain can read it when it reveals it.
pub(super) async fn make(
    at: &ClientAtBlock,
    reader: &StorageReader<'_>,
    drand: &Drand,
    call: Call,
    message: Vec<u8>,
) -> Result<Commit, ChainError> {
    let wrong = |why: String| ChainError::Runtime { spec: at.spec_version(), why };
    let schedule = schedule(at, reader).await?;
    let (version, retries) = match call {
        Call::CommitCrv3 => (0, Retries::Once),
        _ => {
            let version = reader.known(PALLET, "CommitRevealWeightsVersion", ()).await?;
            (version, Retries::EachBlock)
        }
    };
    let round = schedule.reveal(drand, retries).map_err(|e| wrong(e.to_string()))?.round;
    let drand = *drand;
    let encrypting = tokio::task::spawn_blocking(move || drand.encrypt(&message, round));
    let bytes = encrypting.await.map_err(|e| wrong(e.to_string()))?;
    let bytes = bytes.map_err(|e| wrong(e.to_string()))?;
    if bytes.len() > COMMIT_MAX {
        let why = format!("the commit has {} bytes: at most {COMMIT_MAX}", bytes.len());
        return Err(wrong(why));
    }
    Ok(Commit { bytes, round, version })
}

/// The subnet's epochs as of now.
async fn schedule(at: &ClientAtBlock, reader: &StorageReader<'_>) -> Result<Schedule, ChainError> {
    let wrong = |why: String| ChainError::Runtime { spec: at.spec_version(), why };
    let slot = constants::dynamic::<u64>("Aura", "SlotDuration");
    let block_ms = at.constants().entry(slot).map_err(|e| wrong(e.to_string()))?;
    let epochs = match reader.has("LastEpochBlock") {
        true => RevealEpochs::Counted {
            last: reader.of_subnet("LastEpochBlock").await?.unwrap_or_default(),
            pending: reader.of_subnet("PendingEpochAt").await?.unwrap_or_default(),
            index: reader.of_subnet("SubnetEpochIndex").await?.unwrap_or_default(),
            since_step: reader.of_subnet("BlocksSinceLastStep").await?.unwrap_or_default(),
        },
        false => RevealEpochs::Modular,
    };
    Ok(Schedule {
        netuid: reader.netuid,
        block: at.block_number(),
        unix_ms: reader.known("Timestamp", "Now", ()).await?,
        block_ms,
        tempo: reader.known(PALLET, "Tempo", (reader.netuid,)).await?,
        period: reader.known(PALLET, "RevealPeriodEpochs", (reader.netuid,)).await?,
        epochs,
    })
}

/// Commits of a hotkey in the epoch to which another one would belong now.
pub(super) async fn waiting(
    at: &ClientAtBlock,
    reader: &StorageReader<'_>,
    index: u16,
    hotkey: &Hotkey,
) -> Result<usize, ChainError> {
    if !reader.has(COMMITS) {
        return Ok(0);
    }
    // The epoch does not depend on whose rounds reveal.
    let reveal = schedule(at, reader).await?.reveal(&QUICKNET, Retries::EachBlock);
    let reveal = reveal.map_err(|why| reader.wrong("Tempo", why))?;
    let queue: Option<Vec<Waiting>> = reader.value(COMMITS, (index, reveal.epoch)).await?;
    Ok(queue.unwrap_or_default().iter().filter(|commit| commit.0.0 == hotkey.0).count())
}

/// The epoch of a commit that was sent, where it still waits.
pub(super) async fn find(
    reader: &StorageReader<'_>,
    index: u16,
    sent: &SentWeights,
) -> Result<Option<u64>, ChainError> {
    let Some(round) = sent.reveal_round else { return Ok(None) };
    let is_own = |hotkey: &AccountId32, its: u64| hotkey.0 == sent.hotkey.0 && its == round;
    if let Some(entry) = [COMMITS, COMMITS_BEFORE[0]].into_iter().find(|entry| reader.has(entry)) {
        let queues = reader.below::<u64, Vec<Waiting>>(entry, index).await?;
        let own = queues.into_iter().find(|(_, queue)| queue.iter().any(|c| is_own(&c.0, c.3)));
        return Ok(own.map(|(epoch, _)| epoch));
    }
    let queues = reader.below::<u64, Vec<WaitingBefore>>(COMMITS_BEFORE[1], index).await?;
    let own = queues.into_iter().find(|(_, queue)| queue.iter().any(|c| is_own(&c.0, c.2)));
    Ok(own.map(|(epoch, _)| epoch))
}
