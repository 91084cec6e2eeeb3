//! Sets weights on the chain: reads whether they may be set, makes the call that this runtime
//! wants, sends one extrinsic for it, and reads what stands there afterwards.

use super::client::Subtensor;
use super::connection::{ClientAtBlock, Connection, FINAL_TIMEOUT, current};
use super::reader::{PALLET, StorageReader};
use super::{commit, send};
use crate::chain::error::ChainError;
use crate::chain::keys::{Hotkey, Keypair};
use crate::chain::metagraph::Rao;
use crate::chain::weights::outcome::{Approval, Call, ChainFacts, Order, SendError, SentWeights};
use crate::chain::weights::standing::Standing;
use crate::chain::weights::storage_index;
use subxt::dynamic::{self, Value};
use subxt::ext::scale_value::Composite;
use subxt::utils::AccountId32;

/// Extrinsics that are sent for one order at most, each where the pool refused the one before.
const TRIES: usize = 3;
/// The stake that weights need where the runtime does not say.
const NO_THRESHOLD: u64 = 0;

impl Subtensor {
    /// What the chain says of a hotkey's right to set weights, at one block.
    pub(super) async fn standing_at(
        &self,
        connection: &Connection,
        at: &ClientAtBlock,
        (netuid, mechanism): (u16, u8),
        hotkey: &Hotkey,
    ) -> Result<Standing, ChainError> {
        let metagraph = self.metagraph_at(connection, at, netuid).await?;
        let reader = StorageReader::new(connection, at, netuid);
        let mechanisms = match reader.has("MechanismCountCurrent") {
            true => reader.of_subnet("MechanismCountCurrent").await?.unwrap_or(1),
            false => 1,
        };
        let threshold = reader.value("StakeThreshold", ()).await?.unwrap_or(NO_THRESHOLD);
        let owner: Option<AccountId32> = match reader.has("SubnetOwnerHotkey") {
            true => reader.of_subnet("SubnetOwnerHotkey").await?,
            false => None,
        };
        let own = metagraph.neuron(hotkey);
        let uid = own.map(|own| own.uid);
        let is_owner = own.is_some() && owner.is_some_and(|owner| owner.0 == hotkey.0);
        let last_update = match (own, mechanism) {
            (Some(own), 0) => own.last_update,
            (own, _) => last_update(&reader, mechanism, own.map(|own| own.uid)).await?,
        };
        let asked = metagraph.hyperparameters;
        Ok(Standing {
            netuid,
            mechanism,
            mechanisms,
            hotkey: *hotkey,
            block: at.block_number(),
            neurons: metagraph.neurons().len() as u16,
            uid,
            stake: own.map_or(Rao(0), |own| own.stake),
            is_stake_partial: metagraph.is_stake_partial,
            stake_threshold: Rao(threshold),
            is_owner,
            permit: own.is_some_and(|own| own.permit),
            weights_version: asked.weights_version,
            rate_limit: asked.weights_rate_limit,
            last_update,
            min_allowed: asked.min_allowed_weights,
            max_limit: asked.max_weights_limit,
            commit_reveal: asked.commit_reveal,
            commits: match asked.commit_reveal {
                true => commit::waiting(at, &reader, index(&reader, mechanism)?, hotkey).await?,
                false => 0,
            },
        })
    }

    /// Sends weights in one extrinsic, or in another one where the pool refused the last for what
    /// passes within seconds.
    pub(super) async fn send_weights(
        &self,
        signer: &Keypair,
        order: &Order,
        asked: &Approval<'_>,
    ) -> Result<Option<SentWeights>, SendError> {
        let mut tries = 1;
        loop {
            match self.send_once(signer, order, asked).await {
                Err(SendError::Chain(ChainError::Refused(refusal)))
                    if refusal.is_momentary() && tries < TRIES =>
                {
                    let seconds = self.endpoints.again.as_secs();
                    tracing::warn!(seconds, "{refusal}; setting weights again");
                }
                other => return other,
            }
            tries += 1;
            tokio::time::sleep(self.endpoints.again).await;
        }
    }

    async fn send_once(
        &self,
        signer: &Keypair,
        order: &Order,
        asked: &Approval<'_>,
    ) -> Result<Option<SentWeights>, SendError> {
        let hotkey = signer.hotkey();
        let which = (order.netuid, order.mechanism);
        let reading = self.ask(|connection| async move {
            let at = current(&connection).await?;
            let standing = self.standing_at(&connection, &at, which, &hotkey).await?;
            Ok((connection, at, standing))
        });
        let (connection, at, standing) = reading.await?;
        let version = order.version_key.unwrap_or(standing.weights_version);
        standing.check(&order.vector, version)?;
        let call = choose(&at, standing.commit_reveal)?;
        let preparing = self.fields(&connection, &at, call, &hotkey, (order, version));
        let prepared = tokio::time::timeout(self.endpoints.timeout, preparing).await;
        let (fields, reveal_round) =
            prepared.map_err(|_| connection.broken("no answer while preparing"))??;
        let payload = dynamic::tx(PALLET, call.name(), fields);
        if !(asked.show)(&send::describe(&at, &payload)?) {
            return Ok(None);
        }
        let signing = send::sign(&connection, &at, &payload, signer);
        let signed = match tokio::time::timeout(self.endpoints.timeout, signing).await {
            Ok(signed) => signed?,
            Err(_) => return Err(connection.broken("no answer while signing").into()),
        };
        let block = at.block_number();
        let sent = SentWeights {
            netuid: order.netuid,
            mechanism: order.mechanism,
            hotkey,
            vector: order.vector.clone(),
            hash: format!("0x{}", hex::encode(signed.hash().0)),
            call,
            block,
            until: block + send::MORTAL_BLOCKS,
            reveal_round,
        };
        if !(asked.signed)(&sent) {
            return Ok(None);
        }
        self.submit_weights(&connection, &signed, sent).await.map(Some)
    }

    /// The call's fields by name, and the round that reveals them where it is a commit.
    async fn fields(
        &self,
        connection: &Connection,
        at: &ClientAtBlock,
        call: Call,
        hotkey: &Hotkey,
        (order, version): (&Order, u64),
    ) -> Result<(Composite<()>, Option<u64>), ChainError> {
        if matches!(call, Call::Set | Call::SetMechanism) {
            return Ok((set_fields(call, order, version), None));
        }
        let reader = StorageReader::new(connection, at, order.netuid);
        let message = commit::message(call, hotkey, order, version);
        let made = commit::make(at, &reader, &self.endpoints.drand, call, message).await?;
        Ok((made.fields(call, order), Some(made.round)))
    }

    async fn submit_weights(
        &self,
        connection: &Connection,
        signed: &send::Signed,
        sent: SentWeights,
    ) -> Result<SentWeights, SendError> {
        let submitting = send::submit(connection, signed);
        let why = match tokio::time::timeout(FINAL_TIMEOUT, submitting).await {
            Ok(Ok(())) => return Ok(sent),
            Ok(Err(failed)) if !failed.may_be_included => return Err(failed.error.into()),
            Ok(Err(failed)) => failed.error.to_string(),
            Err(_) => format!("not final within {} s", FINAL_TIMEOUT.as_secs()),
        };
        self.give_up(connection).await;
        Err(SendError::Uncertain { sent: Box::new(sent), why })
    }
}

/// The call that this runtime wants for weights.
fn choose(at: &ClientAtBlock, is_commit: bool) -> Result<Call, ChainError> {
    let pallet = at.metadata_ref().pallet_by_name(PALLET);
    let has = |call: &Call| {
        pallet.as_ref().is_some_and(|p| p.call_variant_by_name(call.name()).is_some())
    };
    let known: &[Call] = match is_commit {
        true => &[Call::CommitMechanism, Call::Commit, Call::CommitCrv3],
        false => &[Call::SetMechanism, Call::Set],
    };
    known.iter().copied().find(has).ok_or_else(|| {
        let names: Vec<&str> = known.iter().map(|call| call.name()).collect();
        let why = format!("it has none of the calls {}", names.join(", "));
        ChainError::Runtime { spec: at.spec_version(), why }
    })
}

fn set_fields(call: Call, order: &Order, version: u64) -> Composite<()> {
    let list = |values: Vec<u16>| {
        Value::unnamed_composite(values.into_iter().map(|value| Value::u128(value.into())))
    };
    let mut fields = vec![("netuid", Value::u128(order.netuid.into()))];
    if call == Call::SetMechanism {
        fields.push(("mecid", Value::u128(order.mechanism.into())));
    }
    fields.extend([
        ("dests", list(order.vector.uids())),
        ("weights", list(order.vector.weights())),
        ("version_key", Value::u128(version.into())),
    ]);
    Composite::named(fields)
}

/// What stands on the chain, now, for what was sent.
pub(super) async fn find(
    connection: &Connection,
    sent: &SentWeights,
) -> Result<ChainFacts, ChainError> {
    let at = current(connection).await?;
    let reader = StorageReader::new(connection, &at, sent.netuid);
    let index = index(&reader, sent.mechanism)?;
    let uid: Option<u16> = reader.value("Uids", (sent.netuid, AccountId32(sent.hotkey.0))).await?;
    let weights = match uid {
        Some(uid) => reader.value("Weights", (index, uid)).await?.unwrap_or_default(),
        None => Vec::new(),
    };
    Ok(ChainFacts {
        block: at.block_number(),
        uid,
        last_update: last_update(&reader, sent.mechanism, uid).await?,
        weights,
        commit_epoch: commit::find(&reader, index, sent).await?,
        period: reader.of_subnet("RevealPeriodEpochs").await?.unwrap_or_default(),
    })
}

fn index(reader: &StorageReader<'_>, mechanism: u8) -> Result<u16, ChainError> {
    storage_index(reader.netuid, mechanism).map_err(|e| reader.wrong("Weights", e))
}

/// Block of the last weights for a mechanism; 0 where there were none.
async fn last_update(
    reader: &StorageReader<'_>,
    mechanism: u8,
    uid: Option<u16>,
) -> Result<u64, ChainError> {
    let Some(uid) = uid else { return Ok(0) };
    let blocks: Option<Vec<u64>> = reader.value("LastUpdate", (index(reader, mechanism)?,)).await?;
    Ok(blocks.and_then(|blocks| blocks.get(usize::from(uid)).copied()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::commit::Commit;
    use super::*;
    use crate::chain::weights::Vector;
    use subxt::Metadata;
    use subxt::ext::frame_decode::extrinsics::encode_call_data;

    fn bytes(call: Call, fields: &Composite<()>) -> String {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/data/subtensor_metadata_spec365_v16_finney.scale"
        );
        let metadata = Metadata::decode_from(&std::fs::read(path).unwrap()).unwrap();
        let types = metadata.types();
        let data = encode_call_data(PALLET, call.name(), fields, &metadata, types).unwrap();
        hex::encode(data)
    }

    /// The bytes that other encoders give for the same calls on specs 365 and 424.
    #[test]
    fn calls_have_the_golden_bytes() {
        let vector = Vector::new(vec![(1, 100), (2, 65_535)]).unwrap();
        let order = Order { netuid: 4, mechanism: 0, vector, version_key: None };
        for (call, golden) in [
            (Call::Set, "070004000801000200086400ffff0700000000000000"),
            (Call::SetMechanism, "07770400000801000200086400ffff0700000000000000"),
        ] {
            assert_eq!(bytes(call, &set_fields(call, &order, 7)), golden, "{}", call.name());
        }
        let made = Commit { bytes: vec![0xaa, 0xbb], round: 1000, version: 4 };
        let call = Call::CommitMechanism;
        let golden = "077604000008aabbe8030000000000000400";
        assert_eq!(bytes(call, &made.fields(call, &order)), golden);
        let call = Call::Commit;
        let golden = "0771040008aabbe8030000000000000400";
        assert_eq!(bytes(call, &made.fields(call, &order)), golden);
    }
}
