//! Holds a chain behind its endpoints: every caller gets the open connection, or one to the next
//! endpoint.

use super::connection::{ClientAtBlock, Connection};
use super::fallback;
use super::raw::RawMetagraph;
use crate::chain::error::ChainError;
use crate::chain::metagraph::Metagraph;
use crate::chain::network::Endpoints;
use crate::endpoint::{scrubbed, shown};
use crate::tls;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use subxt::backend::LegacyBackend;
use subxt::config::SubstrateConfig;
use subxt::dynamic;
use subxt::error::{BackendError, RpcError, RuntimeApiError};
use subxt::{OnlineClient, rpcs};
use tokio::sync::Mutex;

/// A chain behind one or more endpoints.
pub struct Subtensor {
    pub(super) endpoints: Endpoints,
    preferred: AtomicUsize,
    reads_storage: AtomicBool, // the last metagraph came from there
    pub(super) connection: Mutex<Option<Connection>>,
}

impl Subtensor {
    /// Behind these endpoints; nothing is connected yet.
    pub fn new(endpoints: Endpoints) -> Self {
        tls::install();
        Self {
            endpoints,
            preferred: AtomicUsize::new(0),
            reads_storage: AtomicBool::new(false),
            connection: Mutex::new(None),
        }
    }

    /// The open connection, or a new one to the first endpoint that answers.
    pub(super) async fn connection(&self) -> Result<Connection, ChainError> {
        let mut open = self.connection.lock().await;
        if let Some(connection) = &*open {
            return Ok(connection.clone());
        }
        let (urls, start) = (&self.endpoints.urls, self.preferred.load(Ordering::SeqCst));
        let (mut faults, mut wrong) = (Vec::new(), Vec::new());
        for place in (0..urls.len()).map(|i| (start + i) % urls.len()) {
            let connecting = self.connect(place);
            match tokio::time::timeout(self.endpoints.timeout, connecting).await {
                Ok(Ok(connection)) => {
                    tracing::info!(endpoint = %connection.url, "connected to the chain");
                    self.preferred.store(place, Ordering::SeqCst);
                    *open = Some(connection.clone());
                    return Ok(connection);
                }
                Ok(Err(e)) => {
                    faults.push(e.to_string());
                    wrong.extend(matches!(e, ChainError::WrongChain { .. }).then_some(e));
                }
                Err(_) => faults.push(format!("{} does not answer", shown(&urls[place]))),
            }
        }
        match wrong.pop() {
            // No waiting mends that.
            Some(e) if wrong.len() + 1 == urls.len() => Err(e),
            _ => Err(ChainError::Unreachable(faults.join("; "))),
        }
    }

    async fn connect(&self, place: usize) -> Result<Connection, ChainError> {
        let url = &self.endpoints.urls[place];
        let broken = |why: String| {
            let why = scrubbed(&why, url);
            ChainError::Broken { endpoint: shown(url), why }
        };
        let rpc = rpcs::RpcClient::from_insecure_url(url).await;
        let rpc = rpc.map_err(|e| broken(e.to_string()))?;
        // The default backend hides why an extrinsic was refused; this one tells.
        let backend = LegacyBackend::<SubstrateConfig>::builder().build(rpc);
        let client = OnlineClient::<SubstrateConfig>::from_backend(Arc::new(backend)).await;
        let client = client.map_err(|e| broken(e.to_string()))?;
        let genesis = client.genesis_hash().0;
        if let Some(expected) = self.endpoints.genesis.filter(|g| *g != genesis) {
            return Err(ChainError::WrongChain {
                endpoint: shown(url),
                got: format!("0x{}", hex::encode(genesis)),
                expected: format!("0x{}", hex::encode(expected)),
            });
        }
        Ok(Connection { url: shown(url).into(), place, client })
    }

    /// Gives a connection up; the next one is tried at the next endpoint.
    pub(super) async fn give_up(&self, connection: &Connection) {
        let mut open = self.connection.lock().await;
        // Somebody else may have replaced it already.
        if open.as_ref().is_some_and(|o| Arc::ptr_eq(&o.url, &connection.url)) {
            *open = None;
            let next = (connection.place + 1) % self.endpoints.urls.len();
            self.preferred.store(next, Ordering::SeqCst);
        }
    }

    /// Asks, at another endpoint if need be. `what` must be safe to ask twice.
    pub(super) async fn ask<T, F>(&self, what: impl Fn(Connection) -> F) -> Result<T, ChainError>
    where
        F: Future<Output = Result<T, ChainError>>,
    {
        let mut last = None;
        for _ in 0..=self.endpoints.urls.len() {
            let connection = self.connection().await?;
            let asked = tokio::time::timeout(self.endpoints.timeout, what(connection.clone()));
            let answer = asked.await.unwrap_or_else(|_| {
                let seconds = self.endpoints.timeout.as_secs();
                Err(connection.broken(format!("no answer within {seconds} s")))
            });
            match answer {
                Err(e) if e.is_passing() => {
                    tracing::warn!("{e}");
                    self.give_up(&connection).await;
                    last = Some(e);
                }
                other => return other,
            }
        }
        Err(last.unwrap_or_else(|| ChainError::Unreachable("no endpoint".into())))
    }

    /// The subnet at one block.
    pub(super) async fn metagraph_at(
        &self,
        connection: &Connection,
        at: &ClientAtBlock,
        netuid: u16,
    ) -> Result<Metagraph, ChainError> {
        let call = dynamic::runtime_api_call::<_, Option<RawMetagraph>>(
            "SubnetInfoRuntimeApi",
            "get_metagraph",
            (netuid,),
        );
        match at.runtime_apis().call(call).await {
            Ok(raw) => {
                if self.reads_storage.swap(false, Ordering::Relaxed) {
                    tracing::info!("the metagraph is read in one call again");
                }
                raw.ok_or(ChainError::NoSubnet(netuid))?.read(netuid, at)
            }
            Err(e) if is_missing(&e) => {
                // Once, not at every reading.
                if !self.reads_storage.swap(true, Ordering::Relaxed) {
                    tracing::warn!("the metagraph is read from storage: {e}");
                }
                fallback::metagraph(connection, at, netuid).await
            }
            Err(e) => Err(connection.broken(e)),
        }
    }
}

/// Whether a runtime lacks a call, or answers something else than it used to.
fn is_missing(error: &RuntimeApiError) -> bool {
    match error {
        RuntimeApiError::CannotCallApi(BackendError::Rpc(RpcError::ClientError(e))) => {
            // A node that is busy or behind says something else.
            matches!(e, rpcs::Error::User(e) if e.message.contains("not found"))
        }
        RuntimeApiError::CannotCallApi(_) => false,
        _ => true,
    }
}
