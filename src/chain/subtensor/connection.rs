//! Opens one connection to a node, and reads a block through it.

use crate::chain::error::ChainError;
use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;
use subxt::OnlineClient;
use subxt::client::OnlineClientAtBlock;
use subxt::config::SubstrateConfig;

/// How long an extrinsic may take to be final: some ten block times.
pub(super) const FINAL_TIMEOUT: Duration = Duration::from_secs(180);

/// The chain at one block, with the metadata of its runtime.
pub(super) type ClientAtBlock = OnlineClientAtBlock<SubstrateConfig>;

/// An open connection.
#[derive(Clone)]
pub(super) struct Connection {
    pub(super) url: Arc<str>,
    /// Which of the endpoints it goes to.
    pub(super) place: usize,
    pub(super) client: OnlineClient<SubstrateConfig>,
}

impl Connection {
    pub(super) fn broken(&self, why: impl Display) -> ChainError {
        ChainError::Broken { endpoint: self.url.to_string(), why: why.to_string() }
    }
}

/// The newest final block, with the metadata of its runtime.
pub(super) async fn current(connection: &Connection) -> Result<ClientAtBlock, ChainError> {
    connection.client.at_current_block().await.map_err(|e| connection.broken(e))
}
