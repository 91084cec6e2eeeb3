//! Settles the weights of one epoch: they are decided, recorded, sent, and read back. They are
//! never sent twice for one epoch, whenever the program ends.
//!
//! Decided weights are recorded as planned, and recorded as sent before they are sent
//! ([`Ports::send`]). A process that finds planned weights may send them; a process that finds sent
//! ones only reads them back. If the program ended between the record and the sending, and the
//! weights are not on the chain after the last block that could include them, they are lost for
//! that epoch.

use super::ports::{NotSent, Ports, Stand};
use super::subnet::Subnet;
use crate::store::record::{EpochWeights, SentBlocks, WeightsState};
use std::time::Duration;

/// Blocks after weights were decided from which on no extrinsic with them can be in a block, where
/// the record does not say it: it may be signed some 30 blocks later, and is in one of the 32 after
/// that or in none.
const LATEST_BLOCKS: u64 = 64;
/// How often sent weights are looked up.
const LOOKS_MAX: usize = 3;
/// Weights of earlier epochs that are looked up again, the newest of those whose end is not known.
const EARLIER_MAX: usize = 4;

/// How long settling weights may take in all.
const WEIGHTS_TIME: Duration = Duration::from_secs(600);

/// The result of settling weights.
#[derive(Clone, PartialEq, Debug)]
pub enum Settled {
    /// There were no weights to send, for this reason.
    None(String),
    /// The weights with their new state.
    Weights(Box<EpochWeights>),
    /// It is to be tried again at a later block, for this reason.
    Later(String),
}

/// Where and when weights are settled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct When {
    /// The epoch that the weights are for.
    pub(super) epoch: u64,
    /// The newest block that is known.
    pub(super) block: u64,
    /// How long to wait between two looks.
    pub(super) wait: Duration,
    /// Decide only: remember nothing, send nothing.
    pub(super) is_dry: bool,
}

/// The block at which the newest weights were decided that were read back from the chain.
pub(super) async fn confirmed_at<P: Ports>(ports: &P) -> Option<u64> {
    let known = ports.confirmed().await;
    let known = known.map_err(|e| tracing::warn!("confirmed weights cannot be read: {e}"));
    known.ok().flatten().map(|weights| weights.block)
}

/// Settles weights, within a limit of time.
pub(super) async fn settle_in_time<P: Ports>(
    ports: &P,
    subnet: &Subnet,
    when: When,
) -> anyhow::Result<Settled> {
    let settling = tokio::time::timeout(WEIGHTS_TIME, settle(ports, subnet, when));
    let late = || Ok(Settled::Later(format!("weights are not settled after {WEIGHTS_TIME:?}")));
    settling.await.unwrap_or_else(|_| late())
}

/// Moves the weights of an epoch as far as possible now.
///
/// # Errors
/// When the records cannot be read or written.
pub(super) async fn settle<P: Ports>(
    ports: &P,
    subnet: &Subnet,
    when: When,
) -> anyhow::Result<Settled> {
    if !when.is_dry
        && let Err(e) = finish_earlier(ports, when).await
    {
        tracing::warn!("the weights of earlier epochs are not looked up: {e}");
    }
    let found = if when.is_dry { None } else { ports.planned(when.epoch).await? };
    if let Some(weights) = found.filter(|weights| weights.state != WeightsState::Planned) {
        return follow(ports, weights, when).await;
    }
    let decided = ports.decide(subnet).await?;
    if let Some(why) = decided.none {
        return Ok(Settled::None(why));
    }
    let weights = EpochWeights {
        netuid: subnet.metagraph.netuid,
        epoch: when.epoch,
        block: when.block,
        values: decided.values,
        explanation: decided.explanation,
        state: WeightsState::Planned,
    };
    if when.is_dry {
        return Ok(Settled::Weights(Box::new(weights)));
    }
    match ports.plan(&weights).await? {
        None => send(ports, weights, when).await,
        Some(state) => {
            // Another process was faster: its weights count.
            let found = ports.planned(when.epoch).await?;
            let other = found.unwrap_or(EpochWeights { state, ..weights });
            follow(ports, other, when).await
        }
    }
}

/// The blocks that may contain an epoch's weights, as remembered or as far as they can be known.
pub(super) fn sent_blocks(weights: &EpochWeights) -> SentBlocks {
    let after = weights.block;
    let guessed = SentBlocks { after, until: after.saturating_add(LATEST_BLOCKS) };
    weights.state.sent_blocks().unwrap_or(guessed)
}

/// The next state of a commit that was sent, and that the chain has been seen to hold.
fn seen_waiting(state: &WeightsState) -> Option<WeightsState> {
    let WeightsState::Sent { hash, blocks, reveal_round: Some(reveal_round) } = state else {
        return None;
    };
    let (hash, blocks, reveal_round) = (hash.clone(), *blocks, *reveal_round);
    Some(WeightsState::Committed { hash, blocks, reveal_round })
}

/// Reads back what earlier epochs sent or committed, and marks what has become of it: a commit is
/// revealed epochs later, or never. Whatever still waits is left for the next epoch.
async fn finish_earlier<P: Ports>(ports: &P, when: When) -> anyhow::Result<()> {
    let mut earlier = ports.unfinished().await?;
    earlier.retain(|weights| weights.epoch < when.epoch);
    let newest = earlier.last().map(|weights| weights.epoch);
    for weights in earlier.iter().rev().take(EARLIER_MAX) {
        let epoch = weights.epoch;
        let why = match ports.look_up(weights).await {
            Ok(Stand::Confirmed) => {
                ports.mark(epoch, &WeightsState::Confirmed).await?;
                tracing::info!(epoch, "the weights stand on the chain");
                continue;
            }
            Ok(Stand::Waiting) => {
                if let Some(state) = seen_waiting(&weights.state) {
                    ports.mark(epoch, &state).await?;
                }
                continue;
            }
            Ok(Stand::Others(found)) => format!("the chain has other weights: {found:?}"),
            Ok(Stand::NotThere(why)) => why,
            Err(why) => {
                tracing::warn!(epoch, "the weights cannot be looked up: {why}");
                continue;
            }
        };
        if when.block <= sent_blocks(weights).until {
            continue;
        }
        // Of several, only the newest can stand on the chain.
        let why = match newest == Some(epoch) {
            true => why,
            false => format!("they were not seen before later weights were sent: {why}"),
        };
        tracing::error!(epoch, "the weights do not stand on the chain: {why}");
        ports.mark(epoch, &WeightsState::Failed { why }).await?;
    }
    Ok(())
}

async fn send<P: Ports>(
    ports: &P,
    mut weights: EpochWeights,
    when: When,
) -> anyhow::Result<Settled> {
    match ports.send(&weights).await {
        Ok(state) => {
            ports.mark(weights.epoch, &state).await?;
            weights.state = state;
            follow(ports, weights, when).await
        }
        Err(NotSent::Later(why) | NotSent::Unknown(why)) => Ok(Settled::Later(why)),
        Err(NotSent::Never(why)) => {
            weights.state = WeightsState::Failed { why };
            ports.mark(weights.epoch, &weights.state).await?;
            Ok(Settled::Weights(Box::new(weights)))
        }
    }
}

/// Reads back weights that were sent.
async fn follow<P: Ports>(
    ports: &P,
    mut weights: EpochWeights,
    when: When,
) -> anyhow::Result<Settled> {
    let is_sent =
        matches!(weights.state, WeightsState::Sent { .. } | WeightsState::Committed { .. });
    if !is_sent {
        return Ok(Settled::Weights(Box::new(weights)));
    }
    let epoch = weights.epoch;
    let mut looks = 1;
    let why = loop {
        let (why, is_gone) = match ports.look_up(&weights).await {
            Ok(Stand::Confirmed) => {
                weights.state = WeightsState::Confirmed;
                ports.mark(epoch, &weights.state).await?;
                return Ok(Settled::Weights(Box::new(weights)));
            }
            // The subnet may reveal commits some epochs later: a later epoch's work looks again.
            Ok(Stand::Waiting) => {
                if let Some(state) = seen_waiting(&weights.state) {
                    ports.mark(epoch, &state).await?;
                    weights.state = state;
                }
                return Ok(Settled::Weights(Box::new(weights)));
            }
            Ok(Stand::Others(found)) => (format!("the chain has other weights: {found:?}"), true),
            Ok(Stand::NotThere(why)) => (why, true),
            Err(why) => (why.to_string(), false),
        };
        if looks < LOOKS_MAX {
            tracing::debug!(epoch, "weights are not confirmed yet: {why}");
            looks += 1;
            tokio::time::sleep(when.wait).await;
            continue;
        }
        if is_gone && when.block > sent_blocks(&weights).until {
            break why;
        }
        return Ok(Settled::Later(format!("weights are not confirmed yet: {why}")));
    };
    weights.state = WeightsState::Failed { why };
    ports.mark(epoch, &weights.state).await?;
    Ok(Settled::Weights(Box::new(weights)))
}
