//! Decides who can be asked, and whether this validator may validate (protocol 5.1 and 5.2).

use crate::chain::keys::Hotkey;
use crate::chain::metagraph::{Metagraph, Neuron};
use std::net::{IpAddr, SocketAddr};

/// Which members are miners.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct MinerRules {
    /// The hotkey of this validator, which does not ask itself.
    pub own: Hotkey,
    /// A member with a permit and more stake than this, in TAO, is a validator and is not asked.
    pub vpermit_tao_limit: f64,
    /// Whether addresses are asked that no public network has: those of this machine, of private
    /// networks and of links. Anybody can announce them, and what listens there is not a miner.
    pub private_axons: bool,
}

/// A member that can be asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Member {
    /// The uid it holds on the subnet.
    pub uid: u16,
    /// What it signs with.
    pub hotkey: Hotkey,
    /// The coldkey that owns its hotkey.
    pub coldkey: Hotkey,
    /// Where its axon takes requests, as the chain has it.
    pub address: SocketAddr,
}

impl MinerRules {
    /// The miners of a subnet, by ascending uid.
    pub fn members(&self, metagraph: &Metagraph) -> Vec<Member> {
        let mut members: Vec<Member> =
            metagraph.neurons().iter().filter_map(|neuron| self.member(neuron)).collect();
        members.sort_by_key(|member| member.uid);
        members
    }

    fn member(&self, neuron: &Neuron) -> Option<Member> {
        let Neuron { uid, hotkey, coldkey, .. } = *neuron;
        let address = neuron.axon?.address;
        let is_validator = neuron.permit && neuron.stake.tao() > self.vpermit_tao_limit;
        let is_reachable = self.private_axons || is_public(address.ip());
        let is_miner = hotkey != self.own && !is_validator && is_reachable;
        is_miner.then_some(Member { uid, hotkey, coldkey, address })
    }
}

/// Whether an address can be anybody's on the internet.
fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, ..] = ip.octets();
            // Shared between a provider's customers (RFC 6598), and what is reserved.
            let is_shared = a == 100 && (64..128).contains(&b);
            let is_special = ip.is_loopback() || ip.is_private() || ip.is_link_local();
            !(is_special || is_shared || a == 0 || a >= 224)
        }
        IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
            Some(ip) => is_public(ip.into()),
            // Global unicast is 2000::/3.
            None => ip.segments()[0] & 0xe000 == 0x2000,
        },
    }
}

/// Why a key may not validate.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum NoPermit {
    /// It is not a member.
    #[error("the hotkey {hotkey} is not registered on subnet {netuid}")]
    NotRegistered {
        /// The hotkey that was to validate.
        hotkey: Hotkey,
        /// The number of the subnet.
        netuid: u16,
    },
    /// It is a member like any other.
    #[error(
        "uid {uid} ({hotkey}) has no validator permit on subnet {netuid}: its stake is {stake} \
         TAO, and the chain gives permits to the members with the most stake"
    )]
    NoPermit {
        /// The uid that the hotkey holds.
        uid: u16,
        /// The hotkey that was to validate.
        hotkey: Hotkey,
        /// The number of the subnet.
        netuid: u16,
        /// The stake that it has, in TAO.
        stake: String,
    },
}

/// The place of `own`, if it may validate; without `is_permit_needed` every member may.
///
/// # Errors
/// What is missing.
pub fn validator(
    metagraph: &Metagraph,
    own: &Hotkey,
    is_permit_needed: bool,
) -> Result<u16, NoPermit> {
    let netuid = metagraph.netuid;
    let neuron = metagraph.neuron(own).ok_or(NoPermit::NotRegistered { hotkey: *own, netuid })?;
    if is_permit_needed && !neuron.permit {
        let (uid, stake) = (neuron.uid, neuron.stake.to_string());
        return Err(NoPermit::NoPermit { uid, hotkey: *own, netuid, stake });
    }
    Ok(neuron.uid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::metagraph::{AXON_PROTOCOL, Axon, Hyperparameters, Rao};

    fn neuron(uid: u16, tao: u64, permit: bool, address: Option<&str>) -> Neuron {
        let axon = address.map(|address| Axon {
            address: address.parse().unwrap(),
            version: 1,
            protocol: AXON_PROTOCOL,
        });
        let stake = Rao(tao * 1_000_000_000);
        let neuron = Neuron::new(uid, Hotkey([uid as u8; 32]), stake);
        Neuron { coldkey: Hotkey([200; 32]), permit, axon, ..neuron }
    }

    fn subnet() -> Metagraph {
        let public = Some("8.8.8.8:1");
        let neurons = vec![
            neuron(0, 20_000, true, public),  // this validator
            neuron(1, 0, false, public),      // a miner
            neuron(2, 4096, true, public),    // a permit at the limit
            neuron(3, 4097, true, public),    // another validator
            neuron(4, 90_000, false, public), // stake without a permit
            neuron(5, 0, false, None),        // serves nothing
            neuron(6, 0, false, Some("127.0.0.2:1")),
        ];
        Metagraph::new(4, 9, Hyperparameters::default(), neurons)
    }

    #[test]
    fn miners_serve_are_not_this_validator_and_not_another_one() {
        let own = Hotkey([0; 32]);
        let uids = |private_axons| {
            let rules = MinerRules { own, vpermit_tao_limit: 4096.0, private_axons };
            let members = rules.members(&subnet());
            members.iter().map(|member| member.uid).collect::<Vec<_>>()
        };
        assert_eq!(uids(false), [1, 2, 4]);
        assert_eq!(uids(true), [1, 2, 4, 6]);
    }

    #[test]
    fn an_address_is_public_or_it_is_not_asked() {
        for (address, expected) in [
            ("8.8.8.8", true),
            ("10.0.0.1", false),
            ("169.254.169.254", false),
            ("100.64.0.1", false),
            ("224.0.0.1", false),
            ("0.1.2.3", false),
            ("2001:db8::1", true),
            ("::1", false),
            ("fe80::1", false),
            ("fd00::1", false),
            ("::ffff:127.0.0.1", false),
            ("::ffff:8.8.8.8", true),
        ] {
            assert_eq!(is_public(address.parse().unwrap()), expected, "{address}");
        }
    }

    #[test]
    fn without_a_permit_the_error_says_what_is_missing() {
        let graph = subnet();
        assert_eq!(validator(&graph, &Hotkey([0; 32]), true), Ok(0));
        assert_eq!(validator(&graph, &Hotkey([1; 32]), false), Ok(1));
        let text = validator(&graph, &Hotkey([4; 32]), true).unwrap_err().to_string();
        assert!(text.contains("uid 4") && text.contains("its stake is 90000.000 TAO"), "{text}");
        let text = validator(&graph, &Hotkey([77; 32]), false).unwrap_err().to_string();
        assert!(text.contains("is not registered on subnet 4"), "{text}");
    }
}
