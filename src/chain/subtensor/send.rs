//! Sends an extrinsic: describes it, signs it with a hotkey, sends it once, and follows it to a
//! final block.

use super::connection::{ClientAtBlock, Connection};
use crate::chain::error::{ChainError, ExtrinsicRefusal, ExtrinsicStage};
use crate::chain::keys::Keypair;
use subxt::client::OnlineClientAtBlockImpl;
use subxt::config::{DefaultExtrinsicParamsBuilder, SubstrateConfig};
use subxt::error::{
    BackendError, DispatchError, ExtrinsicError, RpcError, TransactionEventsError,
    TransactionFinalizedSuccessError, TransactionProgressError,
};
use subxt::ext::scale_value::scale::decode_as_type;
use subxt::rpcs;
use subxt::tx::{Payload, Signer, SubmittableTransaction};
use subxt::utils::{AccountId32, MultiSignature};

/// Blocks within which an extrinsic is in a block or never.
pub(super) const MORTAL_BLOCKS: u64 = 32;

/// An extrinsic that can be sent.
pub(super) type Signed =
    SubmittableTransaction<SubstrateConfig, OnlineClientAtBlockImpl<SubstrateConfig>>;

/// An extrinsic that did not succeed, as far as is known.
pub(super) struct Failed {
    /// What is known of the failure.
    pub(super) error: ChainError,
    /// Whether it may be in a block all the same, now or later.
    pub(super) may_be_included: bool,
}

impl Failed {
    fn certain(refusal: ExtrinsicRefusal) -> Self {
        Self { error: refusal.into(), may_be_included: false }
    }

    fn lost(word: String) -> Self {
        Self {
            error: ExtrinsicRefusal { stage: ExtrinsicStage::Lost, word }.into(),
            may_be_included: true,
        }
    }
}

/// The hotkey as subxt wants it.
struct Signing<'a>(&'a Keypair);

impl Signer<SubstrateConfig> for Signing<'_> {
    fn account_id(&self) -> AccountId32 {
        AccountId32(self.0.hotkey().0)
    }

    fn sign(&self, payload: &[u8]) -> MultiSignature {
        MultiSignature::Sr25519(self.0.sign(payload))
    }
}

/// A call in words, by the metadata that will read it.
pub(super) fn describe(at: &ClientAtBlock, call: &impl Payload) -> Result<String, ChainError> {
    let unreadable = |why: String| ChainError::Runtime { spec: at.spec_version(), why };
    let data = at.tx().call_data(call).map_err(|e| unreadable(e.to_string()))?;
    let metadata = at.metadata_ref();
    let kind = metadata.outer_enums().call_enum_ty();
    let value = decode_as_type(&mut &data[..], kind, metadata.types());
    Ok(value.map_err(|e| unreadable(e.to_string()))?.to_string())
}

/// A call as an extrinsic that may be in one of the next [`MORTAL_BLOCKS`] blocks.
pub(super) async fn sign(
    connection: &Connection,
    at: &ClientAtBlock,
    call: &impl Payload,
    signer: &Keypair,
) -> Result<Signed, ChainError> {
    let params = DefaultExtrinsicParamsBuilder::new().mortal(MORTAL_BLOCKS).build();
    let signed = at.tx().create_signed(call, &Signing(signer), params).await;
    signed.map_err(|e| match e {
        ExtrinsicError::AccountNonceError { .. } => connection.broken(e),
        e => ChainError::Runtime { spec: at.spec_version(), why: e.to_string() },
    })
}

/// Sends an extrinsic, once, and waits until it is in a final block and has succeeded.
pub(super) async fn submit(connection: &Connection, signed: &Signed) -> Result<(), Failed> {
    let progress = signed.submit_and_watch().await.map_err(|e| not_taken(connection, &e))?;
    let done = progress.wait_for_finalized_success().await;
    done.map(drop).map_err(|e| not_done(connection, &e))
}

/// The pool's answer is certain; anything else that happened on the way to it is not.
fn not_taken(connection: &Connection, error: &ExtrinsicError) -> Failed {
    let backend = match error {
        ExtrinsicError::ErrorSubmittingTransaction(e)
        | ExtrinsicError::TransactionStatusStreamError(e) => e,
        other => return Failed::lost(other.to_string()),
    };
    match backend {
        BackendError::Rpc(RpcError::ClientError(rpcs::Error::User(e))) => {
            let data = e.data.as_ref().map(|d| format!(": {}", d.get())).unwrap_or_default();
            let text = format!("{}{data} ({})", e.message, e.code);
            let (refusal, is_certain) = ExtrinsicRefusal::of_node(e.code, &text);
            Failed { may_be_included: !is_certain, ..Failed::certain(refusal) }
        }
        e => Failed { error: connection.broken(e), may_be_included: true },
    }
}

/// A failure that a final block tells is certain. A pool that dropped an extrinsic may have passed
/// it on before.
fn not_done(connection: &Connection, error: &TransactionFinalizedSuccessError) -> Failed {
    use TransactionFinalizedSuccessError as E;
    match error {
        E::SuccessError(TransactionEventsError::ExtrinsicFailed(e)) => {
            let word = match e {
                DispatchError::Module(module) => module.details_string(),
                other => other.to_string(),
            };
            Failed::certain(ExtrinsicRefusal { stage: ExtrinsicStage::Dispatch, word })
        }
        E::FinalizationError(TransactionProgressError::TransactionStatusError(e)) => {
            Failed::lost(e.to_string())
        }
        other => Failed { error: connection.broken(other), may_be_included: true },
    }
}
