//! Connects to the Bittensor network: keys and wallets, signed requests, and the chain.
//!
//! [`Chain`] is what programs ask of a chain; [`subtensor`] asks a real one. Requests between
//! members of a subnet are signed by [`epistula`] or [`btauth`].

pub mod btauth;
pub mod epistula;
pub mod error;
pub mod keyfile;
pub mod keys;
pub mod metagraph;
pub mod network;
pub mod pace;
pub mod subtensor;
pub mod timelock;
pub mod wallet;
pub mod weights;

use error::ChainError;
use keys::{Hotkey, Keypair};
use metagraph::{Axon, Metagraph};
use std::future::Future;
use weights::outcome::{Approval, Order, ReadBack, SendError, SentWeights};
use weights::standing::Standing;

/// The head of the chain.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Head {
    /// Number of the newest block.
    pub block: u64,
}

/// A chain with subnets.
pub trait Chain: Send + Sync + 'static {
    /// The subnet as of now.
    ///
    /// # Errors
    /// When no endpoint answers, or the subnet does not exist.
    fn metagraph(&self, netuid: u16) -> impl Future<Output = Result<Metagraph, ChainError>> + Send;

    /// Registers where `signer` listens, and waits until that is final. What is sent is given to
    /// `show` in words before it is signed; nothing is signed where `show` says no, which gives
    /// `false`.
    ///
    /// # Errors
    /// When the chain refuses it.
    fn serve_axon(
        &self,
        signer: &Keypair,
        netuid: u16,
        axon: &Axon,
        show: &(dyn Fn(&str) -> bool + Sync),
    ) -> impl Future<Output = Result<bool, ChainError>> + Send;

    /// What the chain asks of weights that `hotkey` sets, as of now.
    ///
    /// # Errors
    /// When no endpoint answers, or the subnet does not exist.
    fn weight_standing(
        &self,
        netuid: u16,
        mechanism: u8,
        hotkey: &Hotkey,
    ) -> impl Future<Output = Result<Standing, ChainError>> + Send;

    /// Sets weights by the call that the chain wants now, and waits until it is final. `None` where
    /// `asked` says no. No extrinsic is followed by a second one that may be in a block as well.
    ///
    /// # Errors
    /// When a rule of the chain is not met or the chain refuses it; or when it is not known whether
    /// it arrived.
    fn set_weights(
        &self,
        signer: &Keypair,
        order: &Order,
        asked: &Approval<'_>,
    ) -> impl Future<Output = Result<Option<SentWeights>, SendError>> + Send;

    /// What stands on the chain, now, for weights that were sent.
    fn read_back(&self, sent: &SentWeights) -> impl Future<Output = ReadBack> + Send;

    /// Follows the chain for ever: calls `on_head` for every new block, reconnecting as often as it
    /// takes. Where `on_head` says no, the endpoint is not believed, and another one is followed.
    ///
    /// # Errors
    /// Only what no waiting mends, such as another chain behind the endpoint.
    fn follow(
        &self,
        on_head: &(dyn Fn(Head) -> bool + Sync),
    ) -> impl Future<Output = Result<(), ChainError>> + Send;

    /// Takes the next answer from another endpoint, where there is one: the last was not believed.
    fn doubt(&self) -> impl Future<Output = ()> + Send;
}

#[cfg(test)]
mod tests {
    /// A file of test vectors.
    pub(super) fn vectors(name: &str) -> serde_json::Value {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }
}
