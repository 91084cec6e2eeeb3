//! Decodes what the runtime's own call answers about a subnet, by field name.

use super::connection::ClientAtBlock;
use crate::chain::error::ChainError;
use crate::chain::keys::Hotkey;
use crate::chain::metagraph::{Axon, Hyperparameters, Metagraph, Neuron, Rao, share};
use scale_decode::DecodeAsType;
use subxt::utils::AccountId32;

#[derive(DecodeAsType)]
pub(super) struct RawAxon {
    version: u32,
    ip: u128,
    port: u16,
    ip_type: u8,
    protocol: u8,
}

impl RawAxon {
    pub(super) fn read(&self) -> Option<Axon> {
        Axon::from_chain(self.ip, self.port, self.ip_type, self.version, self.protocol)
    }
}

/// The fields that are used; others may come and go.
#[derive(DecodeAsType)]
pub(super) struct RawMetagraph {
    block: u64,
    tempo: u16,
    last_step: u64,
    min_allowed_weights: u16,
    max_weights_limit: u16,
    weights_version: u64,
    weights_rate_limit: u64,
    commit_reveal_weights_enabled: bool,
    hotkeys: Vec<AccountId32>,
    coldkeys: Vec<AccountId32>,
    axons: Vec<RawAxon>,
    validator_permit: Vec<bool>,
    last_update: Vec<u64>,
    incentives: Vec<u16>,
    consensus: Vec<u16>,
    emission: Vec<u64>,
    total_stake: Vec<u64>,
}

impl RawMetagraph {
    pub(super) fn read(self, netuid: u16, at: &ClientAtBlock) -> Result<Metagraph, ChainError> {
        let count = self.hotkeys.len();
        let lengths = [
            self.coldkeys.len(),
            self.axons.len(),
            self.validator_permit.len(),
            self.total_stake.len(),
        ];
        if lengths.iter().any(|l| *l != count) {
            let why = format!("{count} hotkeys come with lists of {lengths:?}");
            return Err(ChainError::Runtime { spec: at.spec_version(), why });
        }
        let neuron = |i: usize| Neuron {
            uid: i as u16,
            hotkey: Hotkey(self.hotkeys[i].0),
            coldkey: Hotkey(self.coldkeys[i].0),
            stake: Rao(self.total_stake[i]),
            permit: self.validator_permit[i],
            axon: self.axons[i].read(),
            incentive: self.incentives.get(i).copied().map_or(0.0, share),
            consensus: self.consensus.get(i).copied().map_or(0.0, share),
            emission: Rao(self.emission.get(i).copied().unwrap_or(0)),
            last_update: self.last_update.get(i).copied().unwrap_or(0),
        };
        let neurons = (0..count).map(neuron).collect();
        let hyperparameters = Hyperparameters {
            tempo: self.tempo,
            min_allowed_weights: self.min_allowed_weights,
            max_weights_limit: self.max_weights_limit,
            weights_version: self.weights_version,
            weights_rate_limit: self.weights_rate_limit,
            commit_reveal: self.commit_reveal_weights_enabled,
        };
        let whole = Metagraph::new(netuid, self.block, hyperparameters, neurons);
        Ok(whole.stepped_at(self.last_step))
    }
}
