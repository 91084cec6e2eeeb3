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
use crate::store::record::{Weights, WeightsState};
use std::time::Duration;

/// Blocks after which an extrinsic that was signed before cannot be in a block any more.
const MORTAL_BLOCKS: u64 = 64;
/// How often sent weights are looked up.
const LOOKS_MAX: usize = 3;

/// The result of settling weights.
#[derive(Clone, PartialEq, Debug)]
pub enum Settled {
    /// There were no weights to send, for this reason.
    None(String),
    /// The weights with their new state.
    Weights(Box<Weights>),
    /// It is to be tried again at a later block, for this reason.
    Later(String),
}

/// Where and when weights are settled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct When {
    /// The epoch.
    pub(super) epoch: u64,
    /// The newest block.
    pub(super) block: u64,
    /// How long to wait between two looks.
    pub(super) wait: Duration,
    /// Decide only: remember nothing, send nothing.
    pub(super) is_dry: bool,
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
    let found = if when.is_dry { None } else { ports.planned(when.epoch).await? };
    if let Some(weights) = found.filter(|weights| weights.state != WeightsState::Planned) {
        return follow(ports, weights, when).await;
    }
    let decided = ports.decide(subnet).await?;
    if let Some(why) = decided.none {
        return Ok(Settled::None(why));
    }
    let weights = Weights {
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
            let other = found.unwrap_or(Weights { state, ..weights });
            follow(ports, other, when).await
        }
    }
}

async fn send<P: Ports>(ports: &P, mut weights: Weights, when: When) -> anyhow::Result<Settled> {
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
async fn follow<P: Ports>(ports: &P, mut weights: Weights, when: When) -> anyhow::Result<Settled> {
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
            // For epochs, as the subnet has it; whoever settles a later epoch need not wait for it.
            Ok(Stand::Waiting) => return Ok(Settled::Weights(Box::new(weights))),
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
        if is_gone && when.block > weights.block + MORTAL_BLOCKS {
            break why;
        }
        return Ok(Settled::Later(format!("weights are not confirmed yet: {why}")));
    };
    weights.state = WeightsState::Failed { why };
    ports.mark(epoch, &weights.state).await?;
    Ok(Settled::Weights(Box::new(weights)))
}
