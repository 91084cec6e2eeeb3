//! Adds a subnet to `serve`: the signed listener, the chain, and messages to the service manager.

use super::Failure;
use super::out::outln;
use super::subnet_args::{AxonArgs, ChainArgs, WalletArgs};
use crate::chain::error::ChainError;
use crate::chain::keys::Keypair;
use crate::chain::metagraph::{AXON_PROTOCOL, Axon};
use crate::chain::subtensor::Subtensor;
use crate::clock::Clock;
use crate::miner::address::is_private;
use crate::miner::{Announced, Miner, MinerError, MinerOptions};
use crate::server::door::Gate;
use crate::server::registry::{ModelState, Registry};
use sd_notify::NotifyState;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;

/// Version that is registered with the axon.
const AXON_VERSION: u32 = 1;

/// A miner before its models are loaded.
pub(super) struct PreparedMiner {
    pub(super) signer: Arc<Keypair>,
    pub(super) gate: Gate,
    pub(super) listener: TcpListener,
    pub(super) local: SocketAddr,
    miner: Miner<Subtensor>,
}

impl PreparedMiner {
    /// Whether the flags ask for one.
    pub(super) fn is_wanted(wallet: &WalletArgs, chain: &ChainArgs) -> bool {
        wallet.is_named() || chain.netuid.is_some()
    }

    /// Reads the wallet, takes the port, and checks that the hotkey is registered.
    pub(super) async fn open(
        (wallet, chain, axon): (&WalletArgs, &ChainArgs, &AxonArgs),
        slots: usize,
        clock: Clock,
    ) -> Result<Self, Failure> {
        let signer = Arc::new(wallet.keypair()?);
        let hotkey = signer.hotkey();
        let address = axon.listen()?;
        let listener = TcpListener::bind(&address)
            .await
            .map_err(|e| Failure::user(format!("--axon.port: cannot listen on {address}: {e}")))?;
        let local = listener.local_addr().map_err(Failure::ours)?;
        let external = axon.external(local.port()).await?;
        if is_private(external.ip()) {
            tracing::warn!(
                %external, "the address lies in a private network: no validator reaches it"
            );
        }
        tracing::info!(%hotkey, netuid = chain.netuid(), %external, "subnet miner");
        let gate = Gate::new(hotkey, axon.policy(slots), clock);
        let options = MinerOptions {
            netuid: chain.netuid(),
            epoch_length: axon.epoch_length,
            axon: Axon { address: external, version: AXON_VERSION, protocol: AXON_PROTOCOL },
        };
        let subtensor = Subtensor::new(chain.endpoints()?);
        let miner = Miner::new(subtensor, gate.clone(), Arc::clone(&signer), options);
        miner.join().await.map_err(miner_failure)?;
        Ok(Self { signer, gate, listener, local, miner })
    }
}

/// The miner's part that runs once models answer.
pub(super) struct RunningMiner(Miner<Subtensor>);

impl PreparedMiner {
    /// What listens, and what goes on to run.
    pub(super) fn split(self) -> (TcpListener, RunningMiner) {
        (self.listener, RunningMiner(self.miner))
    }
}

impl RunningMiner {
    /// Announces the address and follows the chain for ever.
    pub(super) async fn run(self) -> Result<(), Failure> {
        let show = |words: &str| {
            tracing::info!("extrinsic: {words}");
            true
        };
        let announced = async {
            match self.0.announce(&show).await {
                Ok(Announced::Sent) => {
                    tracing::info!("announced on chain");
                    // So that `status` shows it.
                    if let Err(e) = self.0.join().await {
                        tracing::warn!("the metagraph is not refreshed: {e}");
                    }
                }
                Ok(Announced::Already | Announced::Withheld) => {}
                // What was announced before may still be right: serving goes on.
                Err(e) => tracing::error!("the address is not announced: {e}"),
            }
            tell(NotifyState::Ready);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            followed = self.0.follow() => followed.map_err(miner_failure),
            () = announced => Ok(()),
        }
    }
}

impl PreparedMiner {
    /// Prints the extrinsic that would be sent.
    pub(super) async fn dry_run(&self) -> Result<(), Failure> {
        let show = |words: &str| {
            outln!("{words}");
            false
        };
        if self.miner.announce(&show).await.map_err(miner_failure)? == Announced::Already {
            outln!("nothing: the chain has this address already");
        }
        Ok(())
    }
}

fn miner_failure(e: MinerError) -> Failure {
    let hint = match &e {
        MinerError::NotRegistered { netuid, .. } => {
            Some(format!("btcli subnets register --netuid {netuid}, with the wallet's coldkey"))
        }
        MinerError::Chain(e) if e.is_passing() => {
            Some("other endpoints can be given by --subtensor.chain_endpoint".into())
        }
        MinerError::Chain(ChainError::WrongChain { .. }) => {
            Some("--subtensor.network local or test takes other chains".into())
        }
        MinerError::Doubted(_) => {
            Some("other endpoints can be given by --subtensor.chain_endpoint".into())
        }
        MinerError::Chain(_) => None,
    };
    // What passes by itself is worth another start; what does not is the user's to mend.
    let failure = if e.is_passing() { Failure::ours(&e) } else { Failure::user(&e) };
    failure.with_hint(hint)
}

/// Tells systemd, where it listens.
pub(super) fn tell(state: NotifyState<'_>) {
    if let Err(e) = sd_notify::notify(&[state]) {
        tracing::debug!("the service manager does not listen: {e}");
    }
}

/// Feeds the service manager's watchdog for as long as every engine with work makes progress.
pub(super) async fn feed_watchdog(
    registry: Registry,
    stall: impl Fn() -> Duration + Send + 'static,
) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    loop {
        if is_alive(&registry, stall()) {
            tell(NotifyState::Watchdog);
        }
        tokio::time::sleep(limit / 2).await;
    }
}

fn is_alive(registry: &Registry, stall: Duration) -> bool {
    registry.entries().iter().all(|entry| match &entry.state {
        ModelState::Ready(served) => !served.hangs(stall),
        ModelState::Loading | ModelState::Failed(_) => true,
    })
}
