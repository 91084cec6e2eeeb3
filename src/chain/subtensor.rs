//! The chain itself, over WebSocket RPC: what is read is decoded by field name with the metadata of
//! the runtime that answers, so that runtime upgrades pass unnoticed.
//!
//! A connection that breaks or stalls is replaced by one to the next endpoint. The metagraph comes
//! from one runtime call; where a runtime lacks it, from storage (`fallback`).

mod commit;
mod fallback;
mod raw;
mod reader;
mod send;
mod weights;

use super::error::{ChainError, Refusal, Stage};
use super::keys::{Hotkey, Keypair};
use super::metagraph::{Axon, Metagraph};
use super::network::Endpoints;
use super::weights::outcome::{Asked, Order, ReadBack, SendError, Sent};
use super::weights::standing::Standing;
use super::{Chain, Head};
use raw::RawMetagraph;
use std::fmt::Display;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use subxt::backend::LegacyBackend;
use subxt::client::OnlineClientAtBlock;
use subxt::config::SubstrateConfig;
use subxt::dynamic;
use subxt::error::{BackendError, RpcError, RuntimeApiError};
use subxt::{OnlineClient, rpcs};
use tokio::sync::Mutex;

/// How long an extrinsic may take to be final: some ten block times.
const FINAL_TIMEOUT: Duration = Duration::from_secs(180);
/// Waits between two tries of following the chain.
const BACK_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

type At = OnlineClientAtBlock<SubstrateConfig>;

/// A chain behind one or more endpoints.
pub struct Subtensor {
    endpoints: Endpoints,
    preferred: AtomicUsize,
    reads_storage: AtomicBool, // the last metagraph came from there
    connection: Mutex<Option<Connection>>,
}

#[derive(Clone)]
struct Connection {
    url: Arc<str>,
    place: usize,
    client: OnlineClient<SubstrateConfig>,
}

impl Connection {
    fn broken(&self, why: impl Display) -> ChainError {
        ChainError::Broken { endpoint: self.url.to_string(), why: why.to_string() }
    }
}

impl Subtensor {
    /// Behind these endpoints; nothing is connected yet.
    pub fn new(endpoints: Endpoints) -> Self {
        // Fails only where a provider is installed already, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Self {
            endpoints,
            preferred: AtomicUsize::new(0),
            reads_storage: AtomicBool::new(false),
            connection: Mutex::new(None),
        }
    }

    /// The open connection, or a new one to the first endpoint that answers.
    async fn connection(&self) -> Result<Connection, ChainError> {
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
        let broken = |why: String| ChainError::Broken { endpoint: shown(url), why };
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
    async fn give_up(&self, connection: &Connection) {
        let mut open = self.connection.lock().await;
        // Somebody else may have replaced it already.
        if open.as_ref().is_some_and(|o| Arc::ptr_eq(&o.url, &connection.url)) {
            *open = None;
            let next = (connection.place + 1) % self.endpoints.urls.len();
            self.preferred.store(next, Ordering::SeqCst);
        }
    }

    /// Asks, at another endpoint if need be. `what` must be safe to ask twice.
    async fn ask<T, F>(&self, what: impl Fn(Connection) -> F) -> Result<T, ChainError>
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
    async fn metagraph_at(
        &self,
        connection: &Connection,
        at: &At,
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

    /// One connection's blocks, until it breaks, stalls or ends.
    async fn follow_one(
        &self,
        connection: &Connection,
        on_head: &(dyn Fn(Head) -> bool + Sync),
    ) -> Result<(), ChainError> {
        let opening = connection.client.stream_best_blocks();
        let opened = tokio::time::timeout(self.endpoints.timeout, opening).await;
        let mut blocks = opened
            .map_err(|_| connection.broken("blocks cannot be subscribed to in time"))?
            .map_err(|e| connection.broken(e))?;
        loop {
            match tokio::time::timeout(self.endpoints.stall, blocks.next()).await {
                Ok(Some(Ok(block))) => {
                    if !on_head(Head { block: block.number() }) {
                        return Err(connection.broken("its block is not believed"));
                    }
                }
                Ok(Some(Err(e))) => return Err(connection.broken(e)),
                Ok(None) => return Err(connection.broken("the subscription has ended")),
                Err(_) => {
                    let seconds = self.endpoints.stall.as_secs();
                    return Err(connection.broken(format!("no new block for {seconds} s")));
                }
            }
        }
    }
}

impl Chain for Subtensor {
    async fn metagraph(&self, netuid: u16) -> Result<Metagraph, ChainError> {
        self.ask(|connection| async move {
            let at = current(&connection).await?;
            self.metagraph_at(&connection, &at, netuid).await
        })
        .await
    }

    async fn serve_axon(
        &self,
        signer: &Keypair,
        netuid: u16,
        axon: &Axon,
        show: &(dyn Fn(&str) -> bool + Sync),
    ) -> Result<(), ChainError> {
        // Asked once: what was sent may have arrived although the connection broke.
        let connection = self.connection().await?;
        let sending = serve(&connection, signer, netuid, axon, show);
        let sent = tokio::time::timeout(FINAL_TIMEOUT, sending).await;
        let sent = sent.unwrap_or_else(|_| {
            let word = format!("not final within {} s", FINAL_TIMEOUT.as_secs());
            Err(Refusal { stage: Stage::Lost, word }.into())
        });
        if sent.as_ref().is_err_and(ChainError::is_passing) {
            self.give_up(&connection).await;
        }
        sent
    }

    async fn weight_standing(
        &self,
        netuid: u16,
        mechanism: u8,
        hotkey: &Hotkey,
    ) -> Result<Standing, ChainError> {
        self.ask(|connection| async move {
            let at = current(&connection).await?;
            self.standing_at(&connection, &at, (netuid, mechanism), hotkey).await
        })
        .await
    }

    async fn set_weights(
        &self,
        signer: &Keypair,
        order: &Order,
        asked: &Asked<'_>,
    ) -> Result<Option<Sent>, SendError> {
        self.send_weights(signer, order, asked).await
    }

    async fn read_back(&self, sent: &Sent) -> ReadBack {
        let found = self.ask(|connection| async move { weights::find(&connection, sent).await });
        match found.await {
            Ok(found) => ReadBack::judge(sent, found),
            Err(e) => ReadBack::Unreadable(e),
        }
    }

    async fn follow(&self, on_head: &(dyn Fn(Head) -> bool + Sync)) -> Result<(), ChainError> {
        let mut wait = BACK_OFF.0;
        loop {
            let outcome = match self.connection().await {
                Ok(connection) => {
                    let has_begun = AtomicBool::new(false);
                    let note = |head| {
                        let is_believed = on_head(head);
                        has_begun.fetch_or(is_believed, Ordering::Relaxed);
                        is_believed
                    };
                    let outcome = self.follow_one(&connection, &note).await;
                    if has_begun.into_inner() {
                        wait = BACK_OFF.0;
                    }
                    self.give_up(&connection).await;
                    outcome
                }
                Err(e) => Err(e),
            };
            if let Err(e) = outcome {
                if !e.is_passing() {
                    return Err(e);
                }
                tracing::warn!(seconds = wait.as_secs(), "{e}; following again");
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(BACK_OFF.1);
        }
    }

    async fn doubt(&self) {
        let open = self.connection.lock().await.clone();
        if let Some(connection) = open {
            self.give_up(&connection).await;
        }
    }
}

/// An endpoint without what may be a key: scheme, host and port.
fn shown(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("ws", url));
    let host = rest.split(['/', '?']).next().unwrap_or_default();
    let host = host.rsplit('@').next().unwrap_or_default();
    format!("{scheme}://{host}")
}

/// The newest final block, with the metadata of its runtime.
async fn current(connection: &Connection) -> Result<At, ChainError> {
    connection.client.at_current_block().await.map_err(|e| connection.broken(e))
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

/// Announces an axon; `show` may say no.
async fn serve(
    connection: &Connection,
    signer: &Keypair,
    netuid: u16,
    axon: &Axon,
    show: &(dyn Fn(&str) -> bool + Sync),
) -> Result<(), ChainError> {
    let at = current(connection).await?;
    let (ip, ip_type) = axon.chain_ip();
    let (version, port, protocol) = (axon.version, axon.address.port(), axon.protocol);
    // The chain's last two fields mean nothing yet.
    let unused = 0_u8;
    let fields = (netuid, version, ip, port, ip_type, protocol, unused, unused);
    let call = dynamic::tx("SubtensorModule", "serve_axon", fields);
    if !show(&send::describe(&at, &call)?) {
        return Ok(());
    }
    let signed = send::sign(connection, &at, &call, signer).await?;
    send::submit(connection, &signed).await.map_err(|failed| failed.error)
}
