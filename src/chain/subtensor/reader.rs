//! Reads the pallet's storage at one block.

use super::connection::{ClientAtBlock, Connection};
use crate::chain::error::ChainError;
use scale_decode::DecodeAsType;
use subxt::dynamic::{Value, storage};
use subxt::error::StorageError;
use subxt::ext::frame_decode::storage::{IntoDecodableValues, IntoEncodableValues};

/// Where everything about subnets is.
pub(super) const PALLET: &str = "SubtensorModule";

/// Storage of one subnet at one block.
pub(super) struct StorageReader<'a> {
    connection: &'a Connection,
    at: &'a ClientAtBlock,
    pub(super) netuid: u16,
}

impl<'a> StorageReader<'a> {
    pub(super) fn new(connection: &'a Connection, at: &'a ClientAtBlock, netuid: u16) -> Self {
        Self { connection, at, netuid }
    }

    pub(super) fn wrong(&self, entry: &str, why: impl std::fmt::Display) -> ChainError {
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

    /// Whether this runtime has the entry.
    pub(super) fn has(&self, entry: &str) -> bool {
        let storage = self.at.metadata_ref().pallet_by_name(PALLET).and_then(|p| p.storage());
        storage.is_some_and(|storage| storage.entry_by_name(entry).is_some())
    }

    /// The value below these keys, or the entry's default; `None` where it has none.
    pub(super) async fn value<K, T>(&self, entry: &str, keys: K) -> Result<Option<T>, ChainError>
    where
        K: IntoEncodableValues + IntoDecodableValues,
        T: DecodeAsType,
    {
        self.value_in(PALLET, entry, keys).await
    }

    /// The same of another pallet.
    pub(super) async fn value_in<K, T>(
        &self,
        pallet: &str,
        entry: &str,
        keys: K,
    ) -> Result<Option<T>, ChainError>
    where
        K: IntoEncodableValues + IntoDecodableValues,
        T: DecodeAsType,
    {
        let value = self.at.storage().try_fetch(storage::<K, T>(pallet, entry), keys).await;
        let value = value.map_err(|e| self.failed(entry, &e))?;
        value.map(|v| v.decode()).transpose().map_err(|e| self.wrong(entry, e))
    }

    /// The value below these keys, which must be there.
    pub(super) async fn known<K, T>(
        &self,
        pallet: &str,
        entry: &str,
        keys: K,
    ) -> Result<T, ChainError>
    where
        K: IntoEncodableValues + IntoDecodableValues,
        T: DecodeAsType,
    {
        let value = self.value_in(pallet, entry, keys).await?;
        value.ok_or_else(|| self.wrong(entry, "there is no value"))
    }

    /// The subnet's value.
    pub(super) async fn of_subnet<T: DecodeAsType>(
        &self,
        entry: &str,
    ) -> Result<Option<T>, ChainError> {
        self.value(entry, (self.netuid,)).await
    }

    /// A list that is only shown: a runtime without it is none the worse.
    pub(super) async fn shown<T: DecodeAsType + Default>(
        &self,
        entry: &str,
    ) -> Result<T, ChainError> {
        match self.of_subnet(entry).await {
            Err(ChainError::Runtime { why, .. }) => {
                tracing::warn!("not shown: {why}");
                Ok(T::default())
            }
            other => Ok(other?.unwrap_or_default()),
        }
    }

    /// The values of all second keys below a first one.
    pub(super) async fn below<K: DecodeAsType, T: DecodeAsType>(
        &self,
        entry: &str,
        first: u16,
    ) -> Result<Vec<(K, T)>, ChainError> {
        let address = storage::<(u16, Value), T>(PALLET, entry);
        let entries = self.at.storage().iter(address, (first,)).await;
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
}
