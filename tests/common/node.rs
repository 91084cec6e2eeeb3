//! A fake subtensor node: JSON-RPC over WebSocket, one subnet, blocks on demand.
//!
//! It serves the metadata of finney's spec 365 and everything that subxt's `LegacyBackend` asks
//! for, decodes what is submitted, checks signatures, and fails on request: refused extrinsics,
//! dropped or silent connections, runtime upgrades. State is the newest whatever block is asked
//! about; only headers, bodies and events have a history. It proves encodings and control flow; of
//! the chain's rules it has those for weights.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test uses its part")]

// Named, for this file is also included by `fake_node/program.rs`.
#[path = "node/apis.rs"]
mod apis;
#[path = "node/chain.rs"]
mod chain;
#[path = "node/drand.rs"]
pub mod drand;
#[path = "node/extrinsic.rs"]
mod extrinsic;
#[path = "node/metadata.rs"]
mod metadata;
#[path = "node/rpc.rs"]
mod rpc;
#[path = "node/runtime.rs"]
mod runtime;
#[path = "node/weights.rs"]
mod weights;

use chain::Chain;
use futures_util::{SinkExt, StreamExt};
use parking_lot::Mutex;
use runtime::Runtime;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::Message;

const METADATA: &[u8] = include_bytes!("../data/subtensor_metadata_spec365_v16_finney.scale");
/// The spec version of `METADATA`.
pub const SPEC: u32 = 365;
/// Genesis of finney.
pub const GENESIS: [u8; 32] = [
    0x2f, 0x05, 0x55, 0xcc, 0x76, 0xfc, 0x28, 0x40, 0xa2, 0x5a, 0x6e, 0xa3, 0xb9, 0x63, 0x71, 0x46,
    0x80, 0x6f, 0x1f, 0x44, 0xb0, 0x90, 0xc1, 0x75, 0xff, 0xde, 0x2a, 0x7e, 0x5a, 0xb3, 0x6c, 0x03,
];
/// Messages that may wait for one client; later ones are lost.
const OUTBOX_MAX: usize = 1024;
/// Tries of binding a port that a node before may not have left yet.
const BIND_TRIES: usize = 200;

/// The one subnet of the chain.
#[derive(Clone, Debug)]
pub struct Subnet {
    pub netuid: u16,
    pub name: String,
    /// In the order of their uids.
    pub neurons: Vec<Neuron>,
    pub tempo: u16,
    pub weights_version: u64,
    pub weights_rate_limit: u64,
    pub min_allowed_weights: u16,
    pub max_weights_limit: u16,
    pub commit_reveal: bool,
    pub commit_reveal_period: u64,
    pub serving_rate_limit: u64,
    pub max_uids: u16,
    /// Stake from which on weights may be set.
    pub stake_threshold_rao: u64,
    /// The hotkey that owns the subnet.
    pub owner: Option<[u8; 32]>,
    pub mechanisms: u8,
    pub commit_reveal_version: u16,
    /// Whether the pool checks stake, rate and reveal round, as new runtimes do; else these are
    /// errors of the call.
    pub checks_in_pool: bool,
    /// Whether commits are revealed; else they are forgotten when they are due.
    pub reveals: bool,
    /// Commits that wait for their revelation.
    pub commits: Vec<Commit>,
    /// Those whose weights were stored: their blocks and the blocks of their revelation.
    pub revealed: Vec<(u64, u64)>,
    /// The last weights for each mechanism's storage index and uid: other uids and values.
    pub weights: BTreeMap<(u16, u16), Vec<(u16, u16)>>,
    /// Blocks of the last weights for mechanisms beyond the first, likewise.
    pub updates: BTreeMap<(u16, u16), u64>,
}

/// Weights that are revealed later.
#[derive(Clone, PartialEq, Debug)]
pub struct Commit {
    pub hotkey: [u8; 32],
    /// The mechanism's storage index.
    pub index: u16,
    pub epoch: u64,
    pub block: u64,
    pub bytes: Vec<u8>,
    pub round: u64,
}

impl Subnet {
    pub fn new(netuid: u16, neurons: Vec<Neuron>) -> Self {
        Self {
            netuid,
            name: "fake".into(),
            neurons,
            tempo: 360,
            weights_version: 0,
            weights_rate_limit: 100,
            min_allowed_weights: 1,
            max_weights_limit: u16::MAX,
            commit_reveal: false,
            commit_reveal_period: 1,
            serving_rate_limit: 50,
            max_uids: 256,
            stake_threshold_rao: 0,
            owner: None,
            mechanisms: 1,
            commit_reveal_version: 4,
            checks_in_pool: true,
            reveals: true,
            commits: Vec::new(),
            revealed: Vec::new(),
            weights: BTreeMap::new(),
            updates: BTreeMap::new(),
        }
    }
}

/// A member of the subnet.
#[derive(Clone, Debug)]
pub struct Neuron {
    pub hotkey: [u8; 32],
    pub coldkey: [u8; 32],
    /// All of it alpha: `total_stake` and `TotalHotkeyAlpha` are the same.
    pub stake_rao: u64,
    pub permit: bool,
    pub axon: Option<Axon>,
    pub last_update: u64,
    pub incentive: u16,
    pub consensus: u16,
    pub emission: u64,
}

impl Neuron {
    /// Without stake, permit or axon; its coldkey is the hotkey's complement.
    pub fn new(hotkey: [u8; 32]) -> Self {
        Self {
            hotkey,
            coldkey: hotkey.map(|byte| !byte),
            stake_rao: 0,
            permit: false,
            axon: None,
            last_update: 0,
            incentive: 0,
            consensus: 0,
            emission: 0,
        }
    }
}

/// Where a neuron listens, as it registered it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Axon {
    pub ip: u128,
    pub port: u16,
    pub ip_type: u8,
    pub version: u32,
    pub protocol: u8,
    /// When it was registered.
    pub block: u64,
}

impl Axon {
    /// At an IPv4 address.
    pub fn new(ip: Ipv4Addr, port: u16) -> Self {
        let ip = u128::from(u32::from(ip));
        Self { ip, port, ip_type: 4, version: 1, protocol: 4, block: 0 }
    }
}

/// What becomes of an extrinsic with a good signature.
#[derive(Clone, PartialEq, Debug)]
pub enum Outcome {
    /// Refused only for what the fake knows to be wrong; else in the next block.
    Accept,
    /// The pool refuses it.
    PoolError { code: i64, message: String, data: Option<String> },
    /// In the next block, where it fails with this error of `SubtensorModule`.
    DispatchError(String),
    /// In the pool, and never in a block. It does not hold its nonce.
    Never,
    /// In the pool, and dropped from it at once.
    Dropped,
}

impl Outcome {
    /// The pool refuses it with a number of subtensor's own.
    pub fn custom(number: u8) -> Self {
        let message = "Invalid Transaction".into();
        Self::PoolError { code: 1010, message, data: Some(format!("Custom error: {number}")) }
    }
}

/// A decoded extrinsic. In `args` bytes are hexadecimal, numbers above 64 bits decimal texts.
#[derive(Clone, PartialEq, Debug)]
pub struct Call {
    pub signer: [u8; 32],
    pub pallet: String,
    pub name: String,
    pub args: serde_json::Value,
}

/// What connections and the ticker share.
struct Shared {
    chain: Mutex<Chain>,
    mode: watch::Sender<Mode>,
    connections: AtomicUsize,
}

#[derive(Clone, Copy, Default)]
struct Mode {
    stalled: bool,
    refusing: bool,
    /// How often all connections were dropped.
    drops: u64,
}

/// A running node; it stops when dropped.
pub struct FakeNode {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
    ticking: Mutex<Option<JoinHandle<()>>>,
}

impl FakeNode {
    /// On a free port of 127.0.0.1, at genesis.
    pub async fn start(subnet: Subnet) -> Self {
        Self::start_on(0, subnet).await
    }

    pub async fn start_on(port: u16, subnet: Subnet) -> Self {
        let listener = bind(port).await;
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            chain: Mutex::new(Chain::new(Runtime::new(METADATA, SPEC), GENESIS, subnet)),
            mode: watch::Sender::new(Mode::default()),
            connections: AtomicUsize::new(0),
        });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Self { address, shared, accepting, ticking: Mutex::new(None) }
    }

    pub fn url(&self) -> String {
        format!("ws://{}", self.address)
    }

    /// Reads or changes the subnet.
    pub fn subnet<T>(&self, change: impl FnOnce(&mut Subnet) -> T) -> T {
        change(self.shared.chain.lock().subnet_mut())
    }

    /// Makes the next block, best and final at once, and returns its number.
    pub fn advance(&self) -> u64 {
        self.shared.chain.lock().advance()
    }

    /// The number of the newest block.
    pub fn head(&self) -> u64 {
        self.shared.chain.lock().head().number
    }

    /// Makes a block every so often, except while stalled. Must be called inside tokio.
    pub fn auto_blocks(&self, every: Duration) {
        let shared = Arc::clone(&self.shared);
        let task = tokio::spawn(async move {
            loop {
                tokio::time::sleep(every).await;
                let stalled = shared.mode.borrow().stalled;
                if !stalled {
                    shared.chain.lock().advance();
                }
            }
        });
        if let Some(before) = self.ticking.lock().replace(task) {
            before.abort();
        }
    }

    /// What becomes of the next extrinsic. Outcomes queue; when none is left, `Accept` holds.
    pub fn set_next(&self, outcome: Outcome) {
        let mut chain = self.shared.chain.lock();
        if let Outcome::DispatchError(name) = &outcome {
            assert!(chain.runtime.error_index(name).is_some(), "the pallet has no error {name}");
        }
        chain.outcomes.push_back(outcome);
    }

    /// Everything that was accepted into the pool, in order.
    pub fn calls(&self) -> Vec<Call> {
        self.shared.chain.lock().calls.clone()
    }

    /// With `false`, `get_metagraph` is missing as on an older node.
    pub fn set_runtime_api(&self, present: bool) {
        self.shared.chain.lock().has_metagraph_api = present;
    }

    /// A number that heads and metagraphs name in place of that of their block.
    pub fn claim_block(&self, number: Option<u64>) {
        self.shared.chain.lock().claimed_block = number;
    }

    /// Another chain. Only before the first block.
    pub fn set_genesis(&self, hash: [u8; 32]) {
        self.shared.chain.lock().set_genesis(hash);
    }

    /// A runtime upgrade. The metadata stays.
    pub fn upgrade(&self, spec_version: u32) {
        self.shared.chain.lock().upgrade(spec_version);
    }

    /// Other metadata; clients look at it only when the spec version is new to them.
    pub fn set_metadata(&self, bytes: &[u8]) {
        self.shared.chain.lock().set_metadata(bytes);
    }

    /// Closes every socket at once.
    pub fn drop_connections(&self) {
        self.shared.mode.send_modify(|mode| mode.drops += 1);
    }

    /// Whether new connections are closed before they say anything.
    pub fn refuse(&self, refusing: bool) {
        self.shared.mode.send_modify(|mode| mode.refusing = refusing);
    }

    /// Whether sockets stay open and nothing is read or sent. What was asked meanwhile is answered
    /// afterwards.
    pub fn stall(&self, stalled: bool) {
        self.shared.mode.send_modify(|mode| mode.stalled = stalled);
    }

    /// How many requests were read.
    pub fn requests(&self) -> usize {
        self.shared.chain.lock().counts.values().sum()
    }

    /// How many requests were read, by method.
    pub fn method_counts(&self) -> BTreeMap<String, usize> {
        self.shared.chain.lock().counts.clone()
    }

    /// How many connections there have been.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        self.accepting.abort();
        if let Some(task) = self.ticking.get_mut().take() {
            task.abort();
        }
        self.drop_connections();
    }
}

async fn bind(port: u16) -> TcpListener {
    for _ in 1..BIND_TRIES {
        if let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await {
            return listener;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.unwrap()
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let mode = *shared.mode.borrow();
        if !mode.refusing {
            shared.connections.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(serve(stream, Arc::clone(&shared), mode.drops));
        }
    }
}

/// One connection, until the client leaves or all are dropped.
async fn serve(stream: TcpStream, shared: Arc<Shared>, drops: u64) {
    let _ = stream.set_nodelay(true);
    let Ok(mut socket) = tokio_tungstenite::accept_async(stream).await else { return };
    let (sender, mut outbox) = mpsc::channel(OUTBOX_MAX);
    let mut modes = shared.mode.subscribe();
    loop {
        let mode = *modes.borrow_and_update();
        if mode.drops != drops {
            return;
        }
        if mode.stalled {
            if modes.changed().await.is_err() {
                return;
            }
            continue;
        }
        tokio::select! {
            changed = modes.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            Some(text) = outbox.recv() => {
                if socket.send(Message::text(text)).await.is_err() {
                    return;
                }
            }
            message = socket.next() => {
                let Some(Ok(message)) = message else { return };
                let Message::Text(text) = message else { continue };
                // The answer goes out before anything that it put into the outbox.
                let answer = rpc::answer(&mut shared.chain.lock(), text.as_str(), &sender);
                let Some(answer) = answer else { continue };
                if socket.send(Message::text(answer)).await.is_err() {
                    return;
                }
            }
        }
    }
}
