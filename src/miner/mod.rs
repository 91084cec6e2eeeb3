//! A subnet's miner on top of a running server: registered, announced on chain, and following it.
//!
//! [`Miner::join`] checks the registration, [`Miner::announce`] writes the address where it
//! changed, [`Miner::follow`] keeps the door's list of members fresh for as long as the program runs.

pub mod address;

use crate::chain::error::ChainError;
use crate::chain::keys::Keypair;
use crate::chain::metagraph::{Axon, Metagraph};
use crate::chain::{Chain, Head};
use crate::server::gate::Gate;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Wait after a passing failure of the announcement.
const AGAIN: Duration = Duration::from_secs(12);
/// How often it is tried again.
const TRIES_MAX: usize = 10;

/// What a miner is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// The subnet.
    pub netuid: u16,
    /// Blocks between two readings of the metagraph.
    pub epoch_length: u64,
    /// Where others reach this miner.
    pub axon: Axon,
    /// Whether the announcement is only shown.
    pub dry_run: bool,
}

/// Why a miner cannot go on.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MinerError {
    /// The hotkey is no member.
    #[error("the hotkey {hotkey} is not registered on subnet {netuid}")]
    NotRegistered {
        /// Whose.
        hotkey: String,
        /// Where.
        netuid: u16,
    },
    /// The chain says no.
    #[error(transparent)]
    Chain(#[from] ChainError),
}

/// A member of a subnet that serves.
pub struct Miner<C: Chain> {
    chain: C,
    gate: Gate,
    signer: Arc<Keypair>,
    options: Options,
}

impl<C: Chain> Miner<C> {
    /// Of `signer` behind `gate`.
    pub fn new(chain: C, gate: Gate, signer: Arc<Keypair>, options: Options) -> Self {
        Self { chain, gate, signer, options }
    }

    /// Reads the metagraph, in which the hotkey must be, and opens the door to its members.
    ///
    /// # Errors
    /// When the hotkey is not registered or the chain cannot be asked.
    pub async fn join(&self) -> Result<(), MinerError> {
        let metagraph = self.chain.metagraph(self.options.netuid).await?;
        let hotkey = self.signer.hotkey();
        let Some(own) = metagraph.neuron(&hotkey) else {
            let (hotkey, netuid) = (hotkey.to_string(), self.options.netuid);
            return Err(MinerError::NotRegistered { hotkey, netuid });
        };
        let members = metagraph.neurons().len();
        tracing::info!(uid = own.uid, stake = %own.stake, members, "registered");
        self.gate.set_metagraph(Arc::new(metagraph));
        Ok(())
    }

    /// Writes the address on chain, where another one stands there. What passes by itself is tried
    /// again.
    ///
    /// # Errors
    /// When the chain refuses it for good.
    pub async fn announce(&self, show: &(dyn Fn(&str) + Sync)) -> Result<(), MinerError> {
        let Options { netuid, axon, dry_run, .. } = self.options;
        let standing = self.gate.metagraph().neuron(&self.signer.hotkey()).and_then(|n| n.axon);
        if standing == Some(axon) {
            tracing::info!(axon = %axon.address, "the chain has this address already");
            return Ok(());
        }
        let is_sent = |words: &str| {
            show(words);
            !dry_run
        };
        for left in (0..TRIES_MAX).rev() {
            match self.chain.serve_axon(&self.signer, netuid, &axon, &is_sent).await {
                Ok(()) if dry_run => return Ok(()),
                Ok(()) => {
                    tracing::info!(axon = %axon.address, "announced on chain");
                    return Ok(());
                }
                Err(e) if left > 0 && will_pass(&e) => {
                    tracing::warn!(seconds = AGAIN.as_secs(), "{e}; announcing again");
                    tokio::time::sleep(AGAIN).await;
                }
                Err(e) => return Err(e.into()),
            }
        }
        unreachable!("the last try returns")
    }

    /// Follows the chain until the hotkey is gone from the subnet.
    ///
    /// # Errors
    /// When it is, or the chain turns out to be another one.
    pub async fn follow(&self) -> Result<(), MinerError> {
        let (sender, receiver) = watch::channel(Head::default());
        let on_head = |head: Head| {
            self.gate.set_head(head);
            // The receiver lives as long as this function.
            let _ = sender.send(head);
        };
        tokio::select! {
            followed = self.chain.follow(&on_head) => Ok(followed?),
            kept = self.keep_fresh(receiver) => kept,
        }
    }

    async fn keep_fresh(&self, mut heads: watch::Receiver<Head>) -> Result<(), MinerError> {
        let mut read_at = self.gate.metagraph().block;
        while heads.changed().await.is_ok() {
            let Head { block } = *heads.borrow_and_update();
            self.log(block);
            let is_due = block % self.options.epoch_length == 0
                || block.saturating_sub(read_at) >= self.options.epoch_length;
            if !is_due {
                continue;
            }
            match self.join().await {
                Ok(()) => read_at = block,
                Err(e @ MinerError::NotRegistered { .. }) => return Err(e),
                // The members of a while ago are better than none.
                Err(e) => tracing::warn!(block, "the metagraph is not refreshed: {e}"),
            }
        }
        Ok(())
    }

    /// What a miner's operator watches, once a block.
    fn log(&self, block: u64) {
        let metagraph: Arc<Metagraph> = self.gate.metagraph();
        let Some(own) = metagraph.neuron(&self.signer.hotkey()) else { return };
        tracing::info!(
            block,
            uid = own.uid,
            stake = %own.stake,
            incentive = own.incentive,
            consensus = own.consensus,
            emission = %own.emission,
            "chain"
        );
    }
}

fn will_pass(error: &ChainError) -> bool {
    match error {
        ChainError::Refused(refusal) => refusal.is_passing(),
        other => other.is_passing(),
    }
}
