//! Describes a subnet as the chain does: who is in it, with what stake, and reachable where.

use super::keys::Hotkey;
use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The chain's unit: 10^-9 TAO.
const RAO: f64 = 1e9;
/// Weights of consensus are shares of this.
const SHARE: f64 = 65_535.0;
/// `protocol` of an axon as the SDK registers it: HTTP.
pub const AXON_PROTOCOL: u8 = 4;

/// Stake or emission in rao.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
pub struct Rao(pub u64);

impl Rao {
    /// The amount in TAO.
    pub fn tao(self) -> f64 {
        self.0 as f64 / RAO
    }
}

impl fmt::Display for Rao {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3}", self.tao())
    }
}

/// Where a neuron says that it listens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Axon {
    /// Where it takes requests over HTTP.
    pub address: SocketAddr,
    /// Version that was registered with it.
    pub version: u32,
    /// The number of the protocol that was registered; nothing here depends on it.
    pub protocol: u8,
}

impl Axon {
    /// From the chain's fields; `None` where the neuron serves nothing.
    pub fn from_chain(
        ip: u128,
        port: u16,
        ip_type: u8,
        version: u32,
        protocol: u8,
    ) -> Option<Self> {
        let ip = match ip_type {
            4 => IpAddr::V4(Ipv4Addr::from(u32::try_from(ip).ok()?)),
            6 => IpAddr::V6(Ipv6Addr::from(ip)),
            _ => return None,
        };
        let is_somewhere = port != 0 && !ip.is_unspecified();
        is_somewhere.then(|| Self { address: SocketAddr::new(ip, port), version, protocol })
    }

    /// The chain's `ip` and `ip_type`.
    pub fn chain_ip(&self) -> (u128, u8) {
        match self.address.ip() {
            IpAddr::V4(ip) => (u32::from(ip).into(), 4),
            IpAddr::V6(ip) => (u128::from(ip), 6),
        }
    }
}

/// A member of a subnet.
#[derive(Clone, PartialEq, Debug)]
pub struct Neuron {
    /// The member's number on the subnet.
    pub uid: u16,
    /// What it signs with.
    pub hotkey: Hotkey,
    /// The coldkey that owns the hotkey.
    pub coldkey: Hotkey,
    /// Total stake: what counts for a validator's power.
    pub stake: Rao,
    /// Whether it may validate.
    pub permit: bool,
    /// The address that it has announced.
    pub axon: Option<Axon>,
    /// Share of the miners' rewards.
    pub incentive: f64,
    /// What validators agree on.
    pub consensus: f64,
    /// Rewards of the last epoch.
    pub emission: Rao,
    /// Block of its last weights.
    pub last_update: u64,
}

impl Neuron {
    /// A member that may validate, listens nowhere, and was paid nothing yet.
    pub fn new(uid: u16, hotkey: Hotkey, stake: Rao) -> Self {
        Self {
            uid,
            hotkey,
            coldkey: Hotkey([0; 32]),
            stake,
            permit: true,
            axon: None,
            incentive: 0.0,
            consensus: 0.0,
            emission: Rao(0),
            last_update: 0,
        }
    }
}

/// What the subnet asks of members that set weights or serve.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Hyperparameters {
    /// Blocks of an epoch.
    pub tempo: u16,
    /// Weights that a vector must at least have.
    pub min_allowed_weights: u16,
    /// Largest share of one weight, of 65535.
    pub max_weights_limit: u16,
    /// Version that weights must name.
    pub weights_version: u64,
    /// Blocks between two settings of weights.
    pub weights_rate_limit: u64,
    /// Whether weights are committed first and revealed later.
    pub commit_reveal: bool,
}

/// A subnet at one block.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct Metagraph {
    /// The number of the subnet.
    pub netuid: u16,
    /// The block at which all of it was read.
    pub block: u64,
    /// The rules that the subnet's owner has set.
    pub hyperparameters: Hyperparameters,
    /// The block of the subnet's last epoch, as the chain counts; 0 where it had none.
    pub last_step: u64,
    /// Whether stake may be more than is known: it was read from storage, where that of the root
    /// network is missing.
    pub is_stake_partial: bool,
    neurons: Vec<Neuron>,
    uids: HashMap<Hotkey, usize>,
}

impl Metagraph {
    /// Of neurons in order of their uids.
    pub fn new(
        netuid: u16,
        block: u64,
        hyperparameters: Hyperparameters,
        neurons: Vec<Neuron>,
    ) -> Self {
        let uids = neurons.iter().enumerate().map(|(place, n)| (n.hotkey, place)).collect();
        let (last_step, is_stake_partial) = (0, false);
        Self { netuid, block, hyperparameters, last_step, is_stake_partial, neurons, uids }
    }

    /// The same, with the block of the subnet's last epoch.
    pub fn stepped_at(self, last_step: u64) -> Self {
        Self { last_step, ..self }
    }

    /// The same with stake of which a part is not known.
    pub fn with_partial_stake(self) -> Self {
        Self { is_stake_partial: true, ..self }
    }

    /// Miners and validators of the subnet, in order of their uids.
    pub fn neurons(&self) -> &[Neuron] {
        &self.neurons
    }

    /// The member with this hotkey.
    pub fn neuron(&self, hotkey: &Hotkey) -> Option<&Neuron> {
        self.uids.get(hotkey).map(|place| &self.neurons[*place])
    }

    /// The member with this uid.
    pub fn uid(&self, uid: u16) -> Option<&Neuron> {
        self.neurons.iter().find(|n| n.uid == uid)
    }
}

/// A share as the chain stores it.
pub(super) fn share(value: u16) -> f64 {
    f64::from(value) / SHARE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axons_are_read_as_the_chain_writes_them() {
        let axon = Axon::from_chain(0x7f00_0002, 8091, 4, 1, 4).unwrap();
        assert_eq!(axon.address.to_string(), "127.0.0.2:8091");
        assert_eq!(axon.chain_ip(), (0x7f00_0002, 4));
        let six = Axon::from_chain(1, 8091, 6, 1, 4).unwrap();
        assert_eq!((six.address.to_string().as_str(), six.chain_ip()), ("[::1]:8091", (1, 6)));
        for (ip, port, kind) in [(0, 8091, 4), (1, 0, 4), (1, 1, 5), (u128::MAX, 1, 4)] {
            assert_eq!(Axon::from_chain(ip, port, kind, 1, 4), None, "{ip} {port} {kind}");
        }
    }

    #[test]
    fn members_are_found_by_hotkey_and_uid() {
        let stake = |uid: u16| Rao(u64::from(uid) * 1_500_000_000);
        let neuron = |uid: u16| Neuron::new(uid, Hotkey([uid as u8; 32]), stake(uid));
        let graph = Metagraph::new(4, 7, Hyperparameters::default(), vec![neuron(0), neuron(1)]);
        assert_eq!(graph.neuron(&Hotkey([1; 32])).unwrap().uid, 1);
        assert_eq!(graph.uid(1).unwrap().stake.to_string(), "1.500");
        assert!(graph.neuron(&Hotkey([2; 32])).is_none() && graph.uid(2).is_none());
    }
}
