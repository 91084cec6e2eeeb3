//! The chain's rules for weights, in its order and with its errors: what the pool refuses, what
//! fails in a block, what is stored, and what becomes of commits at the epoch.

use super::chain::{number, numbers};
use super::drand;
use super::{Call, Commit, Subnet};
use subxt::ext::codec::Decode;

/// Storage of a subnet's mechanisms beyond the first lies behind all subnets.
const SUBNETS: u16 = 4096;
/// Commits of one hotkey in one epoch.
const COMMITS_MAX: usize = 10;

/// A call that sets or commits weights.
pub struct Weights {
    pub mechanism: u8,
    pub what: What,
}

pub enum What {
    Set { uids: Vec<u16>, values: Vec<u16>, version_key: u64 },
    Commit { bytes: Vec<u8>, round: u64, version: Option<u16> },
}

impl Weights {
    pub fn of(call: &Call) -> Option<Self> {
        let what = match call.name.as_str() {
            "set_weights" | "set_mechanism_weights" => What::Set {
                uids: numbers(&call.args, "dests"),
                values: numbers(&call.args, "weights"),
                version_key: number(&call.args, "version_key") as u64,
            },
            "commit_timelocked_weights"
            | "commit_timelocked_mechanism_weights"
            | "commit_crv3_weights" => {
                let digits = call.args["commit"].as_str().unwrap().trim_start_matches("0x");
                let version = call.args.get("commit_reveal_version");
                What::Commit {
                    bytes: hex::decode(digits).unwrap(),
                    round: number(&call.args, "reveal_round") as u64,
                    version: version.map(|_| number(&call.args, "commit_reveal_version") as u16),
                }
            }
            _ => return None,
        };
        Some(Self { mechanism: number(&call.args, "mecid") as u8, what })
    }
}

/// What the pool of a new runtime refuses: the number of its custom error.
pub fn pool_refusal(subnet: &Subnet, call: &Call, block: u64) -> Option<u8> {
    let weights = Weights::of(call).filter(|_| subnet.checks_in_pool)?;
    if !has_stake(subnet, &call.signer) {
        return Some(1);
    }
    match weights.what {
        What::Set { .. } if !subnet.commit_reveal => {
            let uid = uid_of(subnet, &call.signer)?;
            (!may_again(subnet, weights.mechanism, uid, block)).then_some(6)
        }
        What::Commit { round, .. } => (round < drand::stored_round(block)).then_some(15),
        What::Set { .. } => None,
    }
}

/// Runs a call in a block. `Err` is the name of the pallet's error.
pub fn run(subnet: &mut Subnet, call: &Call, block: u64) -> Result<(), &'static str> {
    let Some(Weights { mechanism, what }) = Weights::of(call) else { return Ok(()) };
    match what {
        What::Set { uids, values, version_key } => {
            if subnet.commit_reveal {
                return Err("CommitRevealEnabled");
            }
            let pairs = (uids, values);
            set(subnet, &call.signer, mechanism, pairs, version_key, block)
        }
        What::Commit { bytes, round, version } => {
            let commit = Commit {
                hotkey: call.signer,
                index: index(subnet, mechanism),
                epoch: epoch(subnet, block),
                block,
                bytes,
                round,
            };
            take(subnet, commit, mechanism, version)
        }
    }
}

fn set(
    subnet: &mut Subnet,
    hotkey: &[u8; 32],
    mechanism: u8,
    (uids, values): (Vec<u16>, Vec<u16>),
    version_key: u64,
    block: u64,
) -> Result<(), &'static str> {
    let rule = |holds: bool, name| if holds { Ok(()) } else { Err(name) };
    let neurons = subnet.neurons.len();
    rule(subnet.netuid != 0, "CanNotSetRootNetworkWeights")?;
    rule(uids.len() == values.len(), "WeightVecNotEqualSize")?;
    rule(mechanism < subnet.mechanisms, "MechanismDoesNotExist")?;
    rule(uids.len() <= neurons, "UidsLengthExceedUidsInSubNet")?;
    let uid = uid_of(subnet, hotkey).ok_or("HotKeyNotRegisteredInSubNet")?;
    rule(has_stake(subnet, hotkey), "NotEnoughStakeToSetWeights")?;
    rule(version_key >= subnet.weights_version, "IncorrectWeightVersionKey")?;
    let may = subnet.commit_reveal || may_again(subnet, mechanism, uid, block);
    rule(may, "SettingWeightsTooFast")?;
    let is_own = uids == [uid];
    let permit = subnet.neurons[usize::from(uid)].permit || subnet.owner == Some(*hotkey);
    rule(permit || is_own, "NeuronNoValidatorPermit")?;
    let mut sorted = uids.clone();
    sorted.sort_unstable();
    sorted.dedup();
    rule(sorted.len() == uids.len(), "DuplicateUids")?;
    rule(uids.iter().all(|uid| usize::from(*uid) < neurons), "UidVecContainInvalidOne")?;
    let least = usize::from(subnet.min_allowed_weights).min(neurons);
    rule(uids.len() >= least || is_own, "WeightVecLengthIsLow")?;
    let largest = values.iter().copied().max().unwrap_or(0);
    let scale = |value: u16| match largest {
        0 => 0,
        _ => (f64::from(value) * 65_535.0 / f64::from(largest)).round() as u16,
    };
    let values: Vec<u16> = values.into_iter().map(scale).collect();
    let sum: u64 = values.iter().copied().map(u64::from).sum();
    let is_limited = subnet.max_weights_limit != u16::MAX && !is_own;
    let is_large = 65_535 * 65_535 > u64::from(subnet.max_weights_limit) * sum;
    rule(!(is_limited && is_large && largest > 0), "MaxWeightExceeded")?;
    let index = index(subnet, mechanism);
    subnet.weights.insert((index, uid), uids.into_iter().zip(values).collect());
    if !subnet.commit_reveal {
        update(subnet, index, uid, block);
    }
    Ok(())
}

/// Stores a commit.
fn take(
    subnet: &mut Subnet,
    commit: Commit,
    mechanism: u8,
    version: Option<u16>,
) -> Result<(), &'static str> {
    let rule = |holds: bool, name| if holds { Ok(()) } else { Err(name) };
    rule(mechanism < subnet.mechanisms, "MechanismDoesNotExist")?;
    rule(subnet.commit_reveal, "CommitRevealDisabled")?;
    let is_version = version.is_none_or(|version| version == subnet.commit_reveal_version);
    rule(is_version, "IncorrectCommitRevealVersion")?;
    let uid = uid_of(subnet, &commit.hotkey).ok_or("HotKeyNotRegisteredInSubNet")?;
    let may = may_again(subnet, mechanism, uid, commit.block);
    rule(may, "CommittingWeightsTooFast")?;
    let is_like = |other: &&Commit| {
        (other.hotkey, other.index, other.epoch) == (commit.hotkey, commit.index, commit.epoch)
    };
    let waiting = subnet.commits.iter().filter(is_like).count();
    rule(waiting < COMMITS_MAX, "TooManyUnrevealedCommits")?;
    update(subnet, commit.index, uid, commit.block);
    subnet.commits.push(commit);
    Ok(())
}

/// Reveals what is due at this block and forgets what is too late. A commit whose weights break a
/// rule is gone without a word.
pub fn reveal(subnet: &mut Subnet, block: u64) {
    let now = epoch(subnet, block);
    let period = subnet.commit_reveal_period;
    let stored = drand::stored_round(block);
    for commit in std::mem::take(&mut subnet.commits) {
        let due = commit.epoch + period;
        if due > now || (due == now && commit.round > stored) {
            subnet.commits.push(commit);
        } else if due == now && subnet.reveals {
            let is_set = open(subnet, &commit, block).is_some();
            subnet.revealed.extend(is_set.then_some((commit.block, block)));
        }
    }
}

#[derive(Decode)]
#[codec(crate = subxt::ext::codec)]
struct Payload {
    hotkey: Vec<u8>,
    uids: Vec<u16>,
    values: Vec<u16>,
    version_key: u64,
}

/// The payload before commits named their hotkey.
#[derive(Decode)]
#[codec(crate = subxt::ext::codec)]
struct OldPayload {
    uids: Vec<u16>,
    values: Vec<u16>,
    version_key: u64,
}

fn open(subnet: &mut Subnet, commit: &Commit, block: u64) -> Option<()> {
    let bytes = drand::decrypt(&commit.bytes, &drand::signature(commit.round))?;
    let (uids, values, version_key) = match Payload::decode(&mut &bytes[..]) {
        Ok(new) if new.hotkey == commit.hotkey => (new.uids, new.values, new.version_key),
        Ok(_) => return None,
        Err(_) => {
            let old = OldPayload::decode(&mut &bytes[..]).ok()?;
            (old.uids, old.values, old.version_key)
        }
    };
    let mechanism = (commit.index / SUBNETS) as u8;
    set(subnet, &commit.hotkey, mechanism, (uids, values), version_key, block).ok()
}

/// The modular epochs of runtimes before May 2026.
pub fn epoch(subnet: &Subnet, block: u64) -> u64 {
    (block + u64::from(subnet.netuid) + 1) / (u64::from(subnet.tempo) + 1)
}

pub fn index(subnet: &Subnet, mechanism: u8) -> u16 {
    u16::from(mechanism) * SUBNETS + subnet.netuid
}

/// Block of the last weights of each uid for a mechanism.
pub fn last_updates(subnet: &Subnet, mechanism: u8) -> Vec<u64> {
    let index = index(subnet, mechanism);
    let neurons = (0_u16..).zip(&subnet.neurons);
    let update = |(uid, neuron): (u16, &super::Neuron)| match mechanism {
        0 => neuron.last_update,
        _ => subnet.updates.get(&(index, uid)).copied().unwrap_or(0),
    };
    neurons.map(update).collect()
}

fn update(subnet: &mut Subnet, index: u16, uid: u16, block: u64) {
    if index == subnet.netuid {
        subnet.neurons[usize::from(uid)].last_update = block;
    } else {
        subnet.updates.insert((index, uid), block);
    }
}

fn uid_of(subnet: &Subnet, hotkey: &[u8; 32]) -> Option<u16> {
    subnet.neurons.iter().position(|n| n.hotkey == *hotkey).map(|uid| uid as u16)
}

fn has_stake(subnet: &Subnet, hotkey: &[u8; 32]) -> bool {
    let neuron = subnet.neurons.iter().find(|n| n.hotkey == *hotkey);
    let stake = neuron.map_or(0, |n| n.stake_rao);
    subnet.owner == Some(*hotkey) || stake >= subnet.stake_threshold_rao
}

fn may_again(subnet: &Subnet, mechanism: u8, uid: u16, block: u64) -> bool {
    let last = last_updates(subnet, mechanism)[usize::from(uid)];
    last == 0 || block.saturating_sub(last) >= subnet.weights_rate_limit
}
