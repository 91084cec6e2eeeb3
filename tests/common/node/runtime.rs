//! The runtime as its metadata describes it: answers are encoded as the metadata's own types.

use super::weights::{index, last_updates};
use super::{Axon, Commit, Neuron, Subnet};
use blake2::digest::consts::U32;
use blake2::{Blake2b, Digest};
use scale_value::scale::{decode_as_type, encode_as_type};
use scale_value::{Composite, Value};
use std::collections::BTreeMap;
use subxt::Metadata;
use subxt::ext::codec::Encode;
use subxt::ext::frame_decode::storage::encode_storage_key;

pub type Hash = [u8; 32];
type Blake2b256 = Blake2b<U32>;

pub const PALLET: &str = "SubtensorModule";
pub const TX_VERSION: u32 = 1;
/// More zero bytes than the zero value of any type that is asked for.
const ZEROS: usize = 4096;

pub fn blake2_256(bytes: &[u8]) -> Hash {
    Blake2b256::digest(bytes).into()
}

pub struct Runtime {
    pub metadata: Metadata,
    pub bytes: Vec<u8>,
    pub spec: u32,
}

impl Runtime {
    pub fn new(bytes: &[u8], spec: u32) -> Self {
        Self { metadata: Metadata::decode_from(bytes).unwrap(), bytes: bytes.to_vec(), spec }
    }

    /// Version of the metadata format, after the four bytes `meta`.
    pub fn metadata_version(&self) -> u32 {
        self.bytes[4].into()
    }

    /// The answer of `Core_version`.
    pub fn version(&self) -> Vec<u8> {
        let apis: Vec<([u8; 8], u32)> = Vec::new();
        let name = "node-subtensor";
        (name, name, 1_u32, self.spec, 1_u32, apis, TX_VERSION, 1_u8).encode()
    }

    /// The pallet's storage.
    ///
    /// Stake is kept in `TotalHotkeyAlpha(hotkey, netuid)`: of the entries that spec 365 has
    /// (`Alpha` holds shares per coldkey, `TotalHotkeyShares` their sum), it alone gives a hotkey's
    /// stake on a subnet as an amount, by one key.
    pub fn storage(&self, subnet: &Subnet) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let neurons = (0_u16..).zip(&subnet.neurons);
        let of_neurons = neurons.flat_map(|(uid, neuron)| neuron_entries(subnet, uid, neuron));
        let entries = subnet_entries(subnet).into_iter().chain(of_neurons);
        let encoded = entries.filter_map(|(entry, keys, value)| {
            let ty = self.entry_ty(PALLET, entry)?;
            let (metadata, types) = (&self.metadata, self.metadata.types());
            let key = encode_storage_key(PALLET, entry, keys, metadata, types).unwrap();
            Some((key, self.encode(&value, ty)))
        });
        encoded.collect()
    }

    /// `System.Events` of a block whose extrinsics ended so; an `Err` names an error of the pallet.
    pub fn events(&self, results: &[Result<(), String>]) -> Vec<u8> {
        let records = (0_u32..).zip(results).map(|(index, result)| {
            let event = match result {
                Ok(()) => {
                    Value::named_variant("ExtrinsicSuccess", [("dispatch_info", dispatch_info())])
                }
                Err(name) => Value::named_variant(
                    "ExtrinsicFailed",
                    [
                        ("dispatch_error", self.module_error(name)),
                        ("dispatch_info", dispatch_info()),
                    ],
                ),
            };
            Value::named_composite([
                ("phase", Value::unnamed_variant("ApplyExtrinsic", [number(index)])),
                ("event", Value::unnamed_variant("System", [event])),
                ("topics", list(Vec::new())),
            ])
        });
        self.encode(&list(records), self.entry_ty("System", "Events").unwrap())
    }

    /// Where the pallet has this error.
    pub fn error_index(&self, name: &str) -> Option<u8> {
        let errors = self.metadata.pallet_by_name(PALLET)?.error_variants()?;
        errors.iter().find(|error| error.name == name).map(|error| error.index)
    }

    fn module_error(&self, name: &str) -> Value {
        let pallet = self.metadata.pallet_by_name(PALLET).unwrap().error_index();
        let error = self.error_index(name).unwrap();
        let module = Value::named_composite([
            ("index", number(pallet)),
            ("error", Value::from_bytes([error, 0, 0, 0])),
        ]);
        Value::unnamed_variant("Module", [module])
    }

    fn entry_ty(&self, pallet: &str, entry: &str) -> Option<u32> {
        let storage = self.metadata.pallet_by_name(pallet)?.storage()?;
        Some(storage.entry_by_name(entry)?.value_ty())
    }

    pub fn encode(&self, value: &Value, ty: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode_as_type(value, ty, self.metadata.types(), &mut bytes).unwrap();
        bytes
    }

    /// What `head` and then zeros decode to: numbers 0, options `None`, lists empty, enums their
    /// first variant.
    pub fn zero(&self, head: &[u8], ty: u32) -> Value {
        let mut bytes = [0_u8; ZEROS];
        bytes[..head.len()].copy_from_slice(head);
        let value = decode_as_type(&mut &bytes[..], ty, self.metadata.types()).unwrap();
        value.remove_context()
    }
}

/// Entry, keys and value.
type Entry = (&'static str, Vec<Value>, Value);

fn subnet_entries(subnet: &Subnet) -> Vec<Entry> {
    let values = vec![
        ("NetworksAdded", Value::bool(true)),
        ("SubnetworkN", number(subnet.neurons.len() as u16)),
        ("MaxAllowedUids", number(subnet.max_uids)),
        ("Tempo", number(subnet.tempo)),
        ("WeightsVersionKey", number(subnet.weights_version)),
        ("WeightsSetRateLimit", number(subnet.weights_rate_limit)),
        ("MinAllowedWeights", number(subnet.min_allowed_weights)),
        ("MaxWeightsLimit", number(subnet.max_weights_limit)),
        ("ServingRateLimit", number(subnet.serving_rate_limit)),
        ("CommitRevealWeightsEnabled", Value::bool(subnet.commit_reveal)),
        ("RevealPeriodEpochs", number(subnet.commit_reveal_period)),
        ("MechanismCountCurrent", number(subnet.mechanisms)),
        ("Active", each(subnet, |_| Value::bool(true))),
        ("ValidatorPermit", each(subnet, |n| Value::bool(n.permit))),
        ("Incentive", each(subnet, |n| number(n.incentive))),
        ("Consensus", each(subnet, |n| number(n.consensus))),
        ("Emission", each(subnet, |n| number(n.emission))),
    ];
    let of_netuid = |(entry, value)| (entry, vec![number(subnet.netuid)], value);
    let mut entries: Vec<Entry> = values.into_iter().map(of_netuid).collect();
    let threshold = number(subnet.stake_threshold_rao);
    entries.push(("StakeThreshold", Vec::new(), threshold));
    let version = number(subnet.commit_reveal_version);
    entries.push(("CommitRevealWeightsVersion", Vec::new(), version));
    if let Some(owner) = subnet.owner {
        let owner = Value::from_bytes(owner);
        entries.push(("SubnetOwnerHotkey", vec![number(subnet.netuid)], owner));
    }
    entries.extend((0..subnet.mechanisms).map(|mechanism| {
        let updates = last_updates(subnet, mechanism).into_iter().map(number);
        ("LastUpdate", vec![number(index(subnet, mechanism))], list(updates))
    }));
    let pair = |(uid, weight): &(u16, u16)| list([number(*uid), number(*weight)]);
    entries.extend(subnet.weights.iter().map(|((index, uid), weights)| {
        ("Weights", vec![number(*index), number(*uid)], list(weights.iter().map(pair)))
    }));
    entries.extend(commits(subnet));
    entries
}

/// Commits by storage index and epoch.
fn commits(subnet: &Subnet) -> Vec<Entry> {
    let mut queues: BTreeMap<(u16, u64), Vec<&Commit>> = BTreeMap::new();
    for commit in &subnet.commits {
        queues.entry((commit.index, commit.epoch)).or_default().push(commit);
    }
    let value = |commit: &&Commit| {
        let (hotkey, bytes) = (Value::from_bytes(commit.hotkey), Value::from_bytes(&commit.bytes));
        list([hotkey, number(commit.block), bytes, number(commit.round)])
    };
    let entry = |((index, epoch), queue): ((u16, u64), Vec<&Commit>)| {
        let keys = vec![number(index), number(epoch)];
        ("TimelockedWeightCommits", keys, list(queue.iter().map(value)))
    };
    queues.into_iter().map(entry).collect()
}

fn neuron_entries(subnet: &Subnet, uid: u16, neuron: &Neuron) -> Vec<Entry> {
    let (netuid, hotkey) = (number(subnet.netuid), Value::from_bytes(neuron.hotkey));
    let of_uid = vec![netuid.clone(), number(uid)];
    let of_hotkey = vec![netuid.clone(), hotkey.clone()];
    let mut entries = vec![
        ("Keys", of_uid.clone(), hotkey.clone()),
        ("Uids", of_hotkey.clone(), number(uid)),
        ("BlockAtRegistration", of_uid, number(0_u64)),
        ("Owner", vec![hotkey.clone()], Value::from_bytes(neuron.coldkey)),
        ("TotalHotkeyAlpha", vec![hotkey, netuid], number(neuron.stake_rao)),
    ];
    if neuron.axon.is_some() {
        entries.push(("Axons", of_hotkey, axon(neuron.axon.as_ref())));
    }
    entries
}

pub fn axon(axon: Option<&Axon>) -> Value {
    let none = Axon { ip: 0, port: 0, ip_type: 0, version: 0, protocol: 0, block: 0 };
    let axon = axon.unwrap_or(&none);
    Value::named_composite([
        ("block", number(axon.block)),
        ("version", number(axon.version)),
        ("ip", number(axon.ip)),
        ("port", number(axon.port)),
        ("ip_type", number(axon.ip_type)),
        ("protocol", number(axon.protocol)),
        ("placeholder1", number(0_u8)),
        ("placeholder2", number(0_u8)),
    ])
}

fn dispatch_info() -> Value {
    let weight =
        Value::named_composite([("ref_time", number(0_u64)), ("proof_size", number(0_u64))]);
    Value::named_composite([
        ("weight", weight),
        ("class", unit("Normal")),
        ("pays_fee", unit("No")),
    ])
}

pub fn each(subnet: &Subnet, value: impl Fn(&Neuron) -> Value) -> Value {
    list(subnet.neurons.iter().map(value))
}

pub fn number(value: impl Into<u128>) -> Value {
    Value::u128(value.into())
}

pub fn list(values: impl IntoIterator<Item = Value>) -> Value {
    Value::unnamed_composite(values)
}

pub fn unit(name: &str) -> Value {
    Value::variant(name, Composite::Unnamed(Vec::new()))
}
