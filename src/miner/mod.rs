//! Runs the miner of a subnet on top of a running server: it is registered, announced on the chain,
//! and follows the chain.
//!
//! [`Miner::join`] checks the registration, [`Miner::announce`] writes the address if it changed,
//! and [`Miner::follow`] updates the list of members that may send requests for as long as the
//! program runs. Temporary failures are retried; only a failure that an operator must correct ends
//! a miner.

pub mod address;

use crate::chain::error::ChainError;
use crate::chain::keys::Keypair;
use crate::chain::metagraph::{Axon, Metagraph};
use crate::chain::pace::{self, Doubt, Pace};
use crate::chain::{Chain, Head};
use crate::server::door::Gate;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Waits between two tries of the announcement, at first and at most.
const AGAIN: (Duration, Duration) = (Duration::from_secs(6), Duration::from_secs(300));

/// What a miner is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MinerOptions {
    /// The number of the subnet.
    pub netuid: u16,
    /// Blocks between two readings of the metagraph.
    pub epoch_length: u64,
    /// Where others reach this miner.
    pub axon: Axon,
}

/// What became of an address that was to be announced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Announced {
    /// The chain has it already; nothing was sent.
    Already,
    /// It was sent, and is final.
    Sent,
    /// It was shown and not to be sent.
    Withheld,
}

/// Why a miner cannot go on.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MinerError {
    /// The hotkey is not a member.
    #[error("the hotkey {hotkey} is not registered on subnet {netuid}")]
    NotRegistered {
        /// The hotkey that was looked for.
        hotkey: String,
        /// The subnet that lacks it.
        netuid: u16,
    },
    /// What the chain's endpoints say is not believed.
    #[error("the metagraph is not taken: {0}")]
    Doubted(#[from] Doubt),
    /// The chain says no.
    #[error(transparent)]
    Chain(#[from] ChainError),
}

impl MinerError {
    /// Whether it passes by itself.
    pub fn is_passing(&self) -> bool {
        match self {
            MinerError::NotRegistered { .. } => false,
            MinerError::Doubted(_) => true,
            MinerError::Chain(ChainError::Refused(refusal)) => refusal.is_passing(),
            MinerError::Chain(e) => e.is_passing(),
        }
    }
}

/// A member of a subnet that serves.
pub struct Miner<C: Chain> {
    chain: C,
    gate: Gate,
    signer: Arc<Keypair>,
    options: MinerOptions,
    pace: Mutex<Pace>,
}

impl<C: Chain> Miner<C> {
    /// Of `signer` behind `gate`.
    pub fn new(chain: C, gate: Gate, signer: Arc<Keypair>, options: MinerOptions) -> Self {
        Self { chain, gate, signer, options, pace: Mutex::default() }
    }

    /// Reads the metagraph, checks that the hotkey is a member, and admits requests of its members.
    /// What would end a miner must be said by another endpoint as well, where there is one.
    ///
    /// # Errors
    /// When the hotkey is not registered, or the chain cannot be asked or is not believed. The
    /// members of before are kept then.
    pub async fn join(&self) -> Result<(), MinerError> {
        pace::confirm(|| self.join_once(), MinerError::is_passing, self.chain.doubt()).await
    }

    /// The same by one endpoint's word.
    async fn join_once(&self) -> Result<(), MinerError> {
        self.admit(self.read_metagraph().await?)
    }

    /// Takes the members of a metagraph that has this hotkey.
    fn admit(&self, metagraph: Metagraph) -> Result<(), MinerError> {
        let hotkey = self.signer.hotkey();
        let Some((uid, stake)) = metagraph.neuron(&hotkey).map(|own| (own.uid, own.stake)) else {
            let (hotkey, netuid) = (hotkey.to_string(), self.options.netuid);
            return Err(MinerError::NotRegistered { hotkey, netuid });
        };
        let members = metagraph.neurons().len();
        self.gate.set_metagraph(Arc::new(metagraph));
        tracing::info!(uid, %stake, members, "registered");
        Ok(())
    }

    /// The metagraph of an endpoint whose block is believed.
    async fn read_metagraph(&self) -> Result<Metagraph, MinerError> {
        let known = (self.gate.metagraph().block, self.gate.clock());
        let ask = || self.chain.metagraph(self.options.netuid);
        pace::read_metagraph(&self.pace, known, ask, || self.chain.doubt()).await
    }

    /// Writes the address on chain, where another one stands there, and says what became of it.
    /// What passes by itself is tried again for as long as it takes; `show` is given what is sent,
    /// and says whether it is.
    ///
    /// # Errors
    /// When the chain refuses it for good.
    pub async fn announce(
        &self,
        show: &(dyn Fn(&str) -> bool + Sync),
    ) -> Result<Announced, MinerError> {
        let MinerOptions { netuid, axon, .. } = self.options;
        let mut wait = AGAIN.0;
        loop {
            if self.announced() == Some(axon) {
                tracing::info!(axon = %axon.address, "the chain has this address");
                self.gate.set_refused_axon(None);
                return Ok(Announced::Already);
            }
            match self.chain.serve_axon(&self.signer, netuid, &axon, show).await {
                Ok(true) => {
                    self.gate.set_refused_axon(None);
                    return Ok(Announced::Sent);
                }
                Ok(false) => return Ok(Announced::Withheld),
                Err(e) => {
                    let e = MinerError::from(e);
                    if !e.is_passing() {
                        self.gate.set_refused_axon(Some(format!("{}: {e}", axon.address)));
                        return Err(e);
                    }
                    tracing::warn!(seconds = wait.as_secs(), "{e}; announcing again");
                }
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(AGAIN.1);
            // It may have arrived although its confirmation was lost.
            if let Err(e) = self.join().await {
                tracing::warn!("the metagraph is not refreshed: {e}");
            }
        }
    }

    /// What the chain says of this miner's address, as far as it was read.
    fn announced(&self) -> Option<Axon> {
        self.gate.metagraph().neuron(&self.signer.hotkey()).and_then(|own| own.axon)
    }

    /// Follows the chain until the hotkey is gone from the subnet.
    ///
    /// # Errors
    /// When it is, or the chain turns out to be another one.
    pub async fn follow(&self) -> Result<(), MinerError> {
        let (sender, receiver) = watch::channel(Head::default());
        let on_head = |head: Head| {
            if let Err(doubt) = self.pace.lock().head(head.block, self.gate.clock().unix_ms()) {
                tracing::warn!("{doubt}; following another endpoint");
                return false;
            }
            self.gate.set_head(head);
            // The receiver lives as long as this function.
            let _ = sender.send(head);
            true
        };
        tokio::select! {
            followed = self.chain.follow(&on_head) => Ok(followed?),
            kept = self.keep_fresh(receiver) => kept,
        }
    }

    async fn keep_fresh(&self, mut heads: watch::Receiver<Head>) -> Result<(), MinerError> {
        let mut read_at = self.gate.metagraph().block;
        let (mut is_missing, mut is_owed) = (false, false);
        while heads.changed().await.is_ok() {
            let Head { block } = *heads.borrow_and_update();
            self.log(block);
            let is_due = block % self.options.epoch_length == 0
                || block.abs_diff(read_at) >= self.options.epoch_length;
            if !is_due && !is_missing && !is_owed {
                continue;
            }
            let joined = self.join_once().await;
            if joined.as_ref().is_err_and(|e| !e.is_passing()) {
                self.chain.doubt().await;
            }
            is_owed = joined.is_err();
            match joined {
                Ok(()) => (read_at, is_missing) = (block, false),
                // One node's word is not enough to give up: the next block asks another.
                Err(MinerError::NotRegistered { .. }) if !is_missing => is_missing = true,
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
