//! Reads the chain over WebSocket RPC. What is read is decoded by field name with the metadata of
//! the runtime that answers, so that most runtime upgrades need no new program.
//!
//! A connection that breaks or stalls is replaced by one to the next endpoint. The metagraph comes
//! from one runtime call; where a runtime lacks it, from storage (`fallback`).

mod client;
mod commit;
mod connection;
mod fallback;
mod raw;
mod reader;
mod send;
mod weights;

use super::error::{ChainError, ExtrinsicRefusal, ExtrinsicStage};
use super::keys::{Hotkey, Keypair};
use super::metagraph::{Axon, Metagraph};
use super::weights::outcome::{Approval, Order, ReadBack, SendError, SentWeights};
use super::weights::standing::Standing;
use super::{Chain, Head};
pub use client::Subtensor;
use connection::{Connection, FINAL_TIMEOUT, current};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use subxt::dynamic;

/// Waits between two tries of following the chain.
const BACK_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

impl Subtensor {
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
    ) -> Result<bool, ChainError> {
        // Asked once: what was sent may have arrived although the connection broke.
        let connection = self.connection().await?;
        let sending = serve(&connection, signer, netuid, axon, show);
        let sent = tokio::time::timeout(FINAL_TIMEOUT, sending).await;
        let sent = sent.unwrap_or_else(|_| {
            let word = format!("not final within {} s", FINAL_TIMEOUT.as_secs());
            Err(ExtrinsicRefusal { stage: ExtrinsicStage::Lost, word }.into())
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
        asked: &Approval<'_>,
    ) -> Result<Option<SentWeights>, SendError> {
        self.send_weights(signer, order, asked).await
    }

    async fn read_back(&self, sent: &SentWeights) -> ReadBack {
        let found = self.ask(|connection| async move { weights::find(&connection, sent).await });
        match found.await {
            Ok(found) => ReadBack::of(sent, found),
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

/// Announces an axon; `false` where `show` says no.
async fn serve(
    connection: &Connection,
    signer: &Keypair,
    netuid: u16,
    axon: &Axon,
    show: &(dyn Fn(&str) -> bool + Sync),
) -> Result<bool, ChainError> {
    let at = current(connection).await?;
    let (ip, ip_type) = axon.chain_ip();
    let (version, port, protocol) = (axon.version, axon.address.port(), axon.protocol);
    // The chain's last two fields mean nothing yet.
    let unused = 0_u8;
    let fields = (netuid, version, ip, port, ip_type, protocol, unused, unused);
    let call = dynamic::tx("SubtensorModule", "serve_axon", fields);
    if !show(&send::describe(&at, &call)?) {
        return Ok(false);
    }
    let signed = send::sign(connection, &at, &call, signer).await?;
    send::submit(connection, &signed).await.map_err(|failed| failed.error)?;
    Ok(true)
}
