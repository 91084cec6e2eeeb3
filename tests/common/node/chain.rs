//! The chain: blocks, the pool, and what extrinsics do to the subnet.

use super::drand;
use super::extrinsic::Extrinsic;
use super::runtime::{Hash, PALLET, Runtime, TX_VERSION, blake2_256};
use super::weights;
use super::{Axon, Call, Outcome, Subnet};
use serde_json::{Value as Json, json};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::Ipv4Addr;
use subxt::ext::codec::{Compact, Encode};
use subxt::ext::frame_decode::storage::encode_storage_key_prefix;
use subxt::utils::{Era, to_hex};
use tokio::sync::mpsc;

pub type Outbox = mpsc::Sender<String>;

/// Calls that a hotkey signs, by the beginnings of their names.
const BY_HOTKEY: [&str; 5] =
    ["serve_", "set_weights", "set_mechanism_weights", "commit_", "reveal_"];

/// A JSON-RPC error.
pub struct Fault {
    pub code: i64,
    pub message: String,
    pub data: Option<String>,
}

impl Fault {
    pub fn new(code: i64, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), data: None }
    }

    fn invalid(data: impl Into<String>) -> Self {
        Self { data: Some(data.into()), ..Self::new(1010, "Invalid Transaction") }
    }

    fn custom(number: u8) -> Self {
        Self::invalid(format!("Custom error: {number}"))
    }
}

/// Who is told something again and again.
pub struct Subscriber {
    pub id: String,
    pub method: &'static str,
    pub outbox: Outbox,
}

impl Subscriber {
    fn tell(&self, result: &Json) {
        let params = json!({"subscription": self.id, "result": result});
        let text = json!({"jsonrpc": "2.0", "method": self.method, "params": params}).to_string();
        // Lost where a client has left or does not read.
        let _ = self.outbox.try_send(text);
    }
}

pub struct Block {
    pub number: u64,
    pub hash: Hash,
    parent: Hash,
    state_root: Hash,
    extrinsics_root: Hash,
    pub extrinsics: Vec<Vec<u8>>,
    events: Vec<u8>,
}

impl Block {
    fn new(number: u64, parent: Hash, extrinsics: Vec<Vec<u8>>, events: Vec<u8>) -> Self {
        let state_root = blake2_256(&number.to_le_bytes());
        let extrinsics_root = blake2_256(&extrinsics.concat());
        let hash = [0; 32];
        let mut block =
            Self { number, hash, parent, state_root, extrinsics_root, extrinsics, events };
        block.hash = block.header_hash();
        block
    }

    /// What clients take for the hash when they are given the header only.
    fn header_hash(&self) -> Hash {
        let logs = Compact(0_u32);
        let number = Compact(self.number);
        let header = (self.parent, number, self.state_root, self.extrinsics_root, logs);
        blake2_256(&header.encode())
    }

    pub fn header(&self) -> Json {
        json!({
            "parentHash": to_hex(self.parent),
            "number": format!("0x{:x}", self.number),
            "stateRoot": to_hex(self.state_root),
            "extrinsicsRoot": to_hex(self.extrinsics_root),
            "digest": {"logs": []},
        })
    }
}

/// An extrinsic that waits for its block.
struct Pending {
    bytes: Vec<u8>,
    call: Call,
    nonce: u64,
    failure: Option<String>,
    watcher: Option<Subscriber>,
}

pub struct Chain {
    pub runtime: Runtime,
    pub blocks: Vec<Block>,
    pub calls: Vec<Call>,
    pub outcomes: VecDeque<Outcome>,
    pub counts: BTreeMap<String, usize>,
    pub has_metagraph_api: bool,
    /// The block number that is told in place of the true one.
    pub claimed_block: Option<u64>,
    subnet: Subnet,
    /// The subnet as storage, until it changes.
    storage: Option<BTreeMap<Vec<u8>, Vec<u8>>>,
    /// Blocks by hash.
    places: HashMap<Hash, usize>,
    nonces: HashMap<Hash, u64>,
    pool: Vec<Pending>,
    of_heads: Vec<Subscriber>,
    of_versions: Vec<Subscriber>,
    subscriptions: u64,
}

impl Chain {
    pub fn new(runtime: Runtime, genesis: Hash, subnet: Subnet) -> Self {
        let events = runtime.events(&[]);
        let mut chain = Self {
            runtime,
            blocks: vec![Block::new(0, [0; 32], Vec::new(), events)],
            calls: Vec::new(),
            outcomes: VecDeque::new(),
            counts: BTreeMap::new(),
            has_metagraph_api: true,
            claimed_block: None,
            subnet,
            storage: None,
            places: HashMap::new(),
            nonces: HashMap::new(),
            pool: Vec::new(),
            of_heads: Vec::new(),
            of_versions: Vec::new(),
            subscriptions: 0,
        };
        chain.set_genesis(genesis);
        chain
    }

    pub fn set_genesis(&mut self, hash: Hash) {
        assert_eq!(self.blocks.len(), 1, "the chain has begun");
        self.blocks[0].hash = hash;
        // A client that hashes the header itself finds block 0 as well.
        self.places = HashMap::from([(hash, 0), (self.blocks[0].header_hash(), 0)]);
    }

    pub fn set_metadata(&mut self, bytes: &[u8]) {
        self.runtime = Runtime::new(bytes, self.runtime.spec);
        self.storage = None;
    }

    pub fn upgrade(&mut self, spec: u32) {
        self.runtime.spec = spec;
        let version = self.runtime_version();
        self.of_versions.iter().for_each(|subscriber| subscriber.tell(&version));
    }

    pub fn subnet(&self) -> &Subnet {
        &self.subnet
    }

    pub fn subnet_mut(&mut self) -> &mut Subnet {
        self.storage = None;
        &mut self.subnet
    }

    pub fn head(&self) -> &Block {
        &self.blocks[self.blocks.len() - 1]
    }

    pub fn find(&self, hash: &[u8]) -> Option<&Block> {
        let hash = Hash::try_from(hash).ok()?;
        self.places.get(&hash).map(|place| &self.blocks[*place])
    }

    pub fn nonce(&self, account: &Hash) -> u64 {
        self.nonces.get(account).copied().unwrap_or(0)
    }

    /// The nonce after everything in the pool.
    pub fn next_nonce(&self, account: &Hash) -> u64 {
        let pending = self.pool.iter().filter(|p| p.call.signer == *account).map(|p| p.nonce + 1);
        pending.fold(self.nonce(account), u64::max)
    }

    pub fn runtime_version(&self) -> Json {
        json!({
            "specName": "node-subtensor", "implName": "node-subtensor", "authoringVersion": 1,
            "specVersion": self.runtime.spec, "implVersion": 1, "apis": [],
            "transactionVersion": TX_VERSION, "stateVersion": 1,
        })
    }

    /// All storage but the events.
    pub fn storage(&mut self) -> &BTreeMap<Vec<u8>, Vec<u8>> {
        self.storage.get_or_insert_with(|| self.runtime.storage(&self.subnet))
    }

    pub fn storage_value(&mut self, key: &[u8], block: u64) -> Option<Vec<u8>> {
        if key == encode_storage_key_prefix("System", "Events") {
            return Some(self.blocks[block as usize].events.clone());
        }
        if key == encode_storage_key_prefix("Timestamp", "Now") {
            return Some(drand::time_ms(block).encode());
        }
        if key == encode_storage_key_prefix("Drand", "LastStoredRound") {
            return Some(drand::stored_round(block).encode());
        }
        self.storage().get(key).cloned()
    }

    pub fn subscriber(&mut self, method: &'static str, outbox: &Outbox) -> Subscriber {
        self.subscriptions += 1;
        Subscriber { id: format!("fake{}", self.subscriptions), method, outbox: outbox.clone() }
    }

    /// Tells of every new head, the present one first.
    pub fn subscribe_heads(&mut self, subscriber: Subscriber) {
        subscriber.tell(&self.told(self.head().header()));
        self.of_heads.push(subscriber);
    }

    /// A header as subscribers are told of it.
    fn told(&self, mut header: Json) -> Json {
        if let Some(block) = self.claimed_block {
            header["number"] = format!("0x{block:x}").into();
        }
        header
    }

    /// Tells of every runtime version, the present one first.
    pub fn subscribe_versions(&mut self, subscriber: Subscriber) {
        subscriber.tell(&self.runtime_version());
        self.of_versions.push(subscriber);
    }

    pub fn unsubscribe(&mut self, id: &str) {
        self.of_heads.retain(|subscriber| subscriber.id != id);
        self.of_versions.retain(|subscriber| subscriber.id != id);
    }

    /// Takes an extrinsic into the pool.
    pub fn submit(&mut self, bytes: Vec<u8>, watcher: Option<Subscriber>) -> Result<Hash, Fault> {
        let read = Extrinsic::read(&self.runtime, &bytes);
        let read =
            read.map_err(|e| Fault::new(1001, format!("Extrinsic has invalid format: {e}")))?;
        if !self.verifies(&read) {
            return Err(Fault::invalid("Transaction has a bad signature"));
        }
        let outcome = self.outcomes.pop_front().unwrap_or(Outcome::Accept);
        if let Outcome::PoolError { code, message, data } = outcome {
            return Err(Fault { code, message, data });
        }
        self.check_nonce(&read)?;
        self.check_call(&read.call)?;
        self.calls.push(read.call.clone());
        let is_next = read.nonce == self.next_nonce(&read.call.signer);
        let tell = |status: &str| {
            if let Some(watcher) = &watcher {
                watcher.tell(&json!(status));
            }
        };
        tell(if is_next { "ready" } else { "future" });
        let hash = blake2_256(&bytes);
        let failure = match outcome {
            Outcome::Accept => None,
            Outcome::DispatchError(name) => Some(name),
            Outcome::Dropped => {
                tell("dropped");
                return Ok(hash);
            }
            Outcome::Never | Outcome::PoolError { .. } => return Ok(hash),
        };
        self.pool.push(Pending { bytes, call: read.call, nonce: read.nonce, failure, watcher });
        Ok(hash)
    }

    /// Whether the signature is over the block in which the extrinsic's era began.
    fn verifies(&self, extrinsic: &Extrinsic) -> bool {
        let birth = match extrinsic.era {
            Era::Immortal => 0,
            Era::Mortal { period, phase } => {
                (self.head().number.max(phase) - phase) / period * period + phase
            }
        };
        let Some(birth) = self.blocks.get(birth as usize) else { return false };
        let (spec, genesis) = (self.runtime.spec, &self.blocks[0].hash);
        // The two differ for block 0 only.
        let births = [birth.hash, birth.header_hash()];
        births.iter().any(|birth| extrinsic.verifies(spec, genesis, birth))
    }

    fn check_nonce(&self, extrinsic: &Extrinsic) -> Result<(), Fault> {
        let (signer, nonce) = (&extrinsic.call.signer, extrinsic.nonce);
        if nonce < self.nonce(signer) {
            return Err(Fault::invalid("Transaction is outdated"));
        }
        if self.pool.iter().any(|p| p.call.signer == *signer && p.nonce == nonce) {
            let data = "The transaction has too low priority to replace another transaction \
                already in the pool.";
            let fault = Fault::new(1014, "Priority is too low: (1 vs 1)");
            return Err(Fault { data: Some(data.into()), ..fault });
        }
        Ok(())
    }

    /// The few rules that the pool of a real node has as well.
    fn check_call(&self, call: &Call) -> Result<(), Fault> {
        let is_by_hotkey = BY_HOTKEY.iter().any(|begin| call.name.starts_with(begin));
        if call.pallet != PALLET || !is_by_hotkey {
            return Ok(());
        }
        let is_here = number(&call.args, "netuid") == u128::from(self.subnet.netuid);
        let is_member = self.subnet.neurons.iter().any(|n| n.hotkey == call.signer);
        if !is_here || !is_member {
            return Err(Fault::custom(10));
        }
        // The pool checks by the block that comes next.
        let next = self.head().number + 1;
        if let Some(code) = weights::pool_refusal(&self.subnet, call, next) {
            return Err(Fault::custom(code));
        }
        if call.name.starts_with("serve_axon") {
            let ip = number(&call.args, "ip");
            let loopback: u128 = match number(&call.args, "ip_type") {
                6 => 1,
                _ => u32::from(Ipv4Addr::LOCALHOST).into(),
            };
            if ip == loopback {
                return Err(Fault::custom(11));
            }
            if number(&call.args, "port") == 0 {
                return Err(Fault::custom(13));
            }
        }
        Ok(())
    }

    /// Makes a block of what is ready and tells of it.
    pub fn advance(&mut self) -> u64 {
        let ready = self.take_ready();
        let number = self.head().number + 1;
        weights::reveal(self.subnet_mut(), number);
        let results: Vec<Result<(), String>> =
            ready.iter().map(|pending| self.execute(pending, number)).collect();
        let events = self.runtime.events(&results);
        let extrinsics = ready.iter().map(|pending| pending.bytes.clone()).collect();
        let block = Block::new(number, self.head().hash, extrinsics, events);
        let (header, hash) = (self.told(block.header()), to_hex(block.hash));
        self.places.insert(block.hash, self.blocks.len());
        self.blocks.push(block);
        self.of_heads.retain(|subscriber| !subscriber.outbox.is_closed());
        self.of_heads.iter().for_each(|subscriber| subscriber.tell(&header));
        for watcher in ready.iter().filter_map(|pending| pending.watcher.as_ref()) {
            watcher.tell(&json!({"inBlock": hash}));
            watcher.tell(&json!({"finalized": hash}));
        }
        number
    }

    /// Of each signer, the pending extrinsics whose nonces follow without a gap.
    fn take_ready(&mut self) -> Vec<Pending> {
        let mut nonces = self.nonces.clone();
        let mut pool = std::mem::take(&mut self.pool);
        pool.sort_by_key(|pending| pending.nonce);
        let (ready, later) = pool.into_iter().partition(|pending| {
            let next = nonces.entry(pending.call.signer).or_default();
            let is_next = pending.nonce == *next;
            *next += u64::from(is_next);
            is_next
        });
        self.pool = later;
        ready
    }

    fn execute(&mut self, pending: &Pending, block: u64) -> Result<(), String> {
        *self.nonces.entry(pending.call.signer).or_default() += 1;
        match &pending.failure {
            Some(name) => Err(name.clone()),
            None => apply(self.subnet_mut(), &pending.call, block),
        }
    }
}

/// `Err` is the name of the pallet's error.
fn apply(subnet: &mut Subnet, call: &Call, block: u64) -> Result<(), String> {
    let place = subnet.neurons.iter().position(|n| n.hotkey == call.signer);
    let Some(uid) = place.filter(|_| call.pallet == PALLET) else { return Ok(()) };
    let neuron = &mut subnet.neurons[uid];
    let number = |name: &str| number(&call.args, name);
    match call.name.as_str() {
        "serve_axon" | "serve_axon_tls" => {
            neuron.axon = Some(Axon {
                ip: number("ip"),
                port: number("port") as u16,
                ip_type: number("ip_type") as u8,
                version: number("version") as u32,
                protocol: number("protocol") as u8,
                block,
            });
        }
        _ => return weights::run(subnet, call, block).map_err(str::to_owned),
    }
    Ok(())
}

/// A number among a call's arguments; 0 where there is none.
pub fn number(args: &Json, name: &str) -> u128 {
    match &args[name] {
        Json::String(text) => text.parse().unwrap_or(0),
        value => value.as_u64().unwrap_or(0).into(),
    }
}

pub fn numbers(args: &Json, name: &str) -> Vec<u16> {
    let values = args[name].as_array().into_iter().flatten();
    values.map(|value| value.as_u64().unwrap_or(0) as u16).collect()
}
