//! Reads the metagraph from storage, for runtimes whose own call is missing or changed. Stake here
//! is the subnet's own token only: what a validator has through the root network is not in storage.

use super::connection::{ClientAtBlock, Connection};
use super::raw::RawAxon;
use super::reader::StorageReader;
use crate::chain::error::ChainError;
use crate::chain::keys::Hotkey;
use crate::chain::metagraph::{Axon, Hyperparameters, Metagraph, Neuron, Rao, share};
use futures_util::StreamExt;
use futures_util::stream::iter;
use std::collections::{BTreeMap, HashMap};
use subxt::utils::AccountId32;

/// Entries that are asked for at once.
const AT_ONCE: usize = 16;

pub(super) async fn metagraph(
    connection: &Connection,
    at: &ClientAtBlock,
    netuid: u16,
) -> Result<Metagraph, ChainError> {
    let reader = StorageReader::new(connection, at, netuid);
    if !reader.of_subnet::<bool>("NetworksAdded").await?.unwrap_or(false) {
        return Err(ChainError::NoSubnet(netuid));
    }
    let hyperparameters = Hyperparameters {
        tempo: reader.of_subnet("Tempo").await?.unwrap_or_default(),
        min_allowed_weights: reader.of_subnet("MinAllowedWeights").await?.unwrap_or_default(),
        max_weights_limit: reader.of_subnet("MaxWeightsLimit").await?.unwrap_or(u16::MAX),
        weights_version: reader.of_subnet("WeightsVersionKey").await?.unwrap_or_default(),
        weights_rate_limit: reader.of_subnet("WeightsSetRateLimit").await?.unwrap_or_default(),
        commit_reveal: reader.of_subnet("CommitRevealWeightsEnabled").await?.unwrap_or_default(),
    };
    let keys = reader.below::<u16, AccountId32>("Keys", netuid).await?;
    let axons = reader.below::<AccountId32, RawAxon>("Axons", netuid).await?;
    let axons: HashMap<[u8; 32], Option<Axon>> =
        axons.into_iter().map(|(key, axon)| (key.0, axon.read())).collect();
    let lists = Lists {
        permits: reader.of_subnet("ValidatorPermit").await?.unwrap_or_default(),
        updates: reader.shown("LastUpdate").await?,
        incentives: reader.shown("Incentive").await?,
        consensus: reader.shown("Consensus").await?,
        emission: reader.shown("Emission").await?,
    };
    let ordered: BTreeMap<u16, AccountId32> = keys.into_iter().collect();
    let owned = iter(ordered.into_iter().map(|(uid, key)| {
        let reader = &reader;
        async move { Ok((uid, key, owner(reader, key).await?, stake(reader, key).await?)) }
    }));
    let members: Vec<Result<_, ChainError>> = owned.buffered(AT_ONCE).collect().await;
    let mut neurons = Vec::new();
    for member in members {
        let (uid, hotkey, coldkey, stake) = member?;
        let axon = axons.get(&hotkey.0).copied().flatten();
        neurons.push(lists.neuron(uid, (hotkey, coldkey), stake, axon));
    }
    // The runtime's own spelling.
    let last_step = reader.of_subnet("LastMechansimStepBlock").await?.unwrap_or_default();
    let whole = Metagraph::new(netuid, at.block_number(), hyperparameters, neurons);
    Ok(whole.stepped_at(last_step).with_partial_stake())
}

/// Storage entries that list a value for each uid.
struct Lists {
    permits: Vec<bool>,
    updates: Vec<u64>,
    incentives: Vec<u16>,
    consensus: Vec<u16>,
    emission: Vec<u64>,
}

impl Lists {
    fn neuron(
        &self,
        uid: u16,
        (hotkey, coldkey): (AccountId32, AccountId32),
        stake: u64,
        axon: Option<Axon>,
    ) -> Neuron {
        let place = usize::from(uid);
        Neuron {
            uid,
            hotkey: Hotkey(hotkey.0),
            coldkey: Hotkey(coldkey.0),
            stake: Rao(stake),
            permit: self.permits.get(place).copied().unwrap_or(false),
            axon,
            incentive: self.incentives.get(place).copied().map_or(0.0, share),
            consensus: self.consensus.get(place).copied().map_or(0.0, share),
            emission: Rao(self.emission.get(place).copied().unwrap_or(0)),
            last_update: self.updates.get(place).copied().unwrap_or(0),
        }
    }
}

async fn owner(reader: &StorageReader<'_>, hotkey: AccountId32) -> Result<AccountId32, ChainError> {
    Ok(reader.value("Owner", (hotkey,)).await?.unwrap_or(AccountId32([0; 32])))
}

async fn stake(reader: &StorageReader<'_>, hotkey: AccountId32) -> Result<u64, ChainError> {
    let stake = reader.value("TotalHotkeyAlpha", (hotkey, reader.netuid)).await?;
    Ok(stake.unwrap_or(0))
}
