//! The metagraph from storage, for runtimes whose own call is missing or changed. Stake here is the
//! subnet's own token only: what a validator has through the root network is not in storage.

use super::{At, Connection, RawAxon};
use crate::chain::error::ChainError;
use crate::chain::keys::Hotkey;
use crate::chain::metagraph::{Axon, Hyperparameters, Metagraph, Neuron, Rao, share};
use futures_util::StreamExt;
use futures_util::stream::iter;
use scale_decode::DecodeAsType;
use std::collections::{BTreeMap, HashMap};
use subxt::dynamic::storage;
use subxt::error::StorageError;
use subxt::utils::AccountId32;

const PALLET: &str = "SubtensorModule";
/// Entries that are asked for at once.
const AT_ONCE: usize = 16;

/// Reads storage at one block.
struct Reader<'a> {
    connection: &'a Connection,
    at: &'a At,
    netuid: u16,
}

pub(super) async fn metagraph(
    connection: &Connection,
    at: &At,
    netuid: u16,
) -> Result<Metagraph, ChainError> {
    let reader = Reader { connection, at, netuid };
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
    let keys = reader.by_second_key::<u16, AccountId32>("Keys").await?;
    let axons = reader.by_second_key::<AccountId32, RawAxon>("Axons").await?;
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
        async move { Ok((uid, key, reader.owner(key).await?, reader.stake(key).await?)) }
    }));
    let members: Vec<Result<_, ChainError>> = owned.buffered(AT_ONCE).collect().await;
    let mut neurons = Vec::new();
    for member in members {
        let (uid, hotkey, coldkey, stake) = member?;
        let axon = axons.get(&hotkey.0).copied().flatten();
        neurons.push(lists.neuron(uid, (hotkey, coldkey), stake, axon));
    }
    let whole = Metagraph::new(netuid, at.block_number(), hyperparameters, neurons);
    Ok(whole.with_partial_stake())
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

impl Reader<'_> {
    fn wrong(&self, entry: &str, why: impl std::fmt::Display) -> ChainError {
        let spec = self.at.spec_version();
        ChainError::Runtime { spec, why: format!("{PALLET}.{entry}: {why}") }
    }

    /// A broken connection is one; an entry that this runtime lacks is another matter.
    fn failed(&self, entry: &str, error: &StorageError) -> ChainError {
        match error {
            StorageError::CannotFetchValue(_)
            | StorageError::CannotIterateValues(_)
            | StorageError::StreamFailure(_) => self.connection.broken(error),
            _ => self.wrong(entry, error),
        }
    }

    async fn of_subnet<T: DecodeAsType>(&self, entry: &str) -> Result<Option<T>, ChainError> {
        let address = storage::<(u16,), T>(PALLET, entry);
        let value = self.at.storage().try_fetch(address, (self.netuid,)).await;
        let value = value.map_err(|e| self.failed(entry, &e))?;
        value.map(|v| v.decode()).transpose().map_err(|e| self.wrong(entry, e))
    }

    /// A list that is only shown: a runtime without it is none the worse.
    async fn shown<T: DecodeAsType + Default>(&self, entry: &str) -> Result<T, ChainError> {
        match self.of_subnet(entry).await {
            Err(ChainError::Runtime { why, .. }) => {
                tracing::warn!("not shown: {why}");
                Ok(T::default())
            }
            other => Ok(other?.unwrap_or_default()),
        }
    }

    /// The values of all second keys below the subnet.
    async fn by_second_key<K: DecodeAsType, T: DecodeAsType>(
        &self,
        entry: &str,
    ) -> Result<Vec<(K, T)>, ChainError> {
        let address = storage::<(u16, subxt::dynamic::Value), T>(PALLET, entry);
        let entries = self.at.storage().iter(address, (self.netuid,)).await;
        let mut entries = entries.map_err(|e| self.failed(entry, &e))?;
        let mut all = Vec::new();
        while let Some(found) = entries.next().await {
            let found = found.map_err(|e| self.failed(entry, &e))?;
            let key = found.key().map_err(|e| self.wrong(entry, e))?;
            let key = key.part(1).map(|part| part.decode_as::<K>());
            let key = key.transpose().map_err(|e| self.wrong(entry, e))?.flatten();
            let key = key.ok_or_else(|| self.wrong(entry, "a key cannot be read"))?;
            all.push((key, found.value().decode().map_err(|e| self.wrong(entry, e))?));
        }
        Ok(all)
    }

    async fn owner(&self, hotkey: AccountId32) -> Result<AccountId32, ChainError> {
        let address = storage::<(AccountId32,), AccountId32>(PALLET, "Owner");
        let value = self.at.storage().try_fetch(address, (hotkey,)).await;
        let value = value.map_err(|e| self.failed("Owner", &e))?;
        let owner = value.map(|v| v.decode()).transpose().map_err(|e| self.wrong("Owner", e))?;
        Ok(owner.unwrap_or(AccountId32([0; 32])))
    }

    async fn stake(&self, hotkey: AccountId32) -> Result<u64, ChainError> {
        let entry = "TotalHotkeyAlpha";
        let address = storage::<(AccountId32, u16), u64>(PALLET, entry);
        let value = self.at.storage().try_fetch(address, (hotkey, self.netuid)).await;
        let value = value.map_err(|e| self.failed(entry, &e))?;
        let stake = value.map(|v| v.decode()).transpose().map_err(|e| self.wrong(entry, e))?;
        Ok(stake.unwrap_or(0))
    }
}
