//! The `proof` field of a request: scheme, nonce, binding, and the end of the chain.

use super::error::{RequestError, echo};
use crate::chain::keys::Keypair;
use crate::engine::output::Finish;
use crate::engine::request::{ProofOptions, Request};
use crate::models::Identity;
use crate::ops::dtype::Dtype;
use crate::proof::Scheme;
use crate::proof::codec::{Hash, from_hex, to_hex};
use crate::proof::commit::{Binding, ChunkProof, RowProver, end_message, noise_key};
use crate::wire::openai::request::ProofRequest;
use crate::wire::openai::response::{ProofChunk, ProofEnd};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::sync::Arc;

/// Proves the choices of one request.
pub struct Prover {
    scheme: Scheme,
    nonce: Hash,
    signer: Option<Arc<Keypair>>,
}

impl Prover {
    /// Reads the field; `own_nonce` is taken where it names none, else one is drawn.
    ///
    /// # Errors
    /// 400 for an unknown scheme, a malformed nonce, or a scheme that the model cannot serve.
    pub fn new(
        field: &ProofRequest,
        dtype: Dtype,
        own_nonce: Option<Hash>,
        signer: Option<Arc<Keypair>>,
    ) -> Result<Self, RequestError> {
        let scheme: Scheme = field.scheme.parse().map_err(|rule: String| {
            RequestError::field("proof.scheme", format!("{rule}, got {}", echo(&field.scheme)))
        })?;
        if scheme == Scheme::Toploc && dtype != Dtype::Bf16 {
            let what = format!("toploc needs a bf16 model, this one is {dtype}");
            return Err(RequestError::field("proof.scheme", what));
        }
        let nonce = match &field.nonce {
            Some(text) => {
                from_hex(text).map_err(|rule| RequestError::field("proof.nonce", rule))?
            }
            None => own_nonce.unwrap_or_else(random_nonce),
        };
        Ok(Self { scheme, nonce, signer })
    }

    /// Binds one choice: its noise comes from the nonce, its rows are proved under its own root.
    pub fn bind(&self, request: &mut Request, identity: &Identity, seed: Option<i64>, choice: u32) {
        let terms = request.terms(seed, choice).hash();
        request.sampling.noise_key = noise_key(&self.nonce, &terms);
        let binding = Binding {
            scheme: self.scheme,
            nonce: self.nonce,
            request: terms,
            model: identity.model_hash,
            hotkey: self.signer.as_ref().map_or([0; 32], |s| s.hotkey().0),
        };
        let root = binding.root();
        let prover = RowProver::new(self.scheme, &root, Arc::clone(&identity.calibration));
        request.proof = Some(ProofOptions { root, prover });
    }

    /// What the end of a choice's proof repeats.
    pub fn head(&self, options: &ProofOptions, identity: &Identity) -> ProofHead {
        ProofHead {
            scheme: self.scheme,
            nonce: self.nonce,
            root: options.root,
            model: identity.model_hash,
            signer: self.signer.clone(),
        }
    }
}

/// A nonce of the server's own: it shows consistency, and binds nobody.
fn random_nonce() -> Hash {
    let mut nonce = [0; 32];
    nonce[..16].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    nonce[16..].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    nonce
}

/// The proof of one choice, but for its rows.
pub struct ProofHead {
    scheme: Scheme,
    nonce: Hash,
    root: Hash,
    model: Hash,
    signer: Option<Arc<Keypair>>,
}

impl ProofHead {
    /// The end of the proof, signed where there is a key.
    pub fn end(&self, finish: &Finish) -> ProofEnd {
        let tokens = finish.completion_tokens;
        let digest = finish.digest.unwrap_or(self.root);
        let message = end_message(&digest, tokens as u32, finish.reason.tag());
        ProofEnd {
            scheme: self.scheme.name().into(),
            nonce: to_hex(&self.nonce),
            model: to_hex(&self.model),
            root: to_hex(&self.root),
            tokens,
            hotkey: self.signer.as_ref().map(|s| s.hotkey().to_string()),
            signature: self.signer.as_ref().map(|s| to_hex(&s.sign(&message))),
        }
    }
}

/// A chunk's proof as it is sent.
pub fn chunk(proof: &ChunkProof) -> ProofChunk {
    ProofChunk {
        index: proof.index,
        data: STANDARD.encode(&proof.data),
        digest: to_hex(&proof.digest),
    }
}
