//! Handles the `proof` field of a request: scheme, nonce, binding, and the end of the chain.

use super::error::{RequestError, echo};
use crate::chain::keys::Keypair;
use crate::engine::output::FinishReason;
use crate::engine::request::{ProofOptions, Request};
use crate::models::Identity;
use crate::ops::dtype::Dtype;
use crate::proof::codec::{Hash, HexError, from_hex, to_hex};
use crate::proof::commit::{Binding, ChunkProof, RequestTerms, RowProver, chunks_of, end_message};
use crate::proof::{Scheme, UnknownScheme};
use crate::wire::openai::request::ProofRequest;
use crate::wire::openai::response::{ProofChunk, ProofEnd};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::borrow::Cow;
use std::sync::Arc;

/// Proves the choices of one request: all of them in one scheme, under one nonce, by one signer.
#[derive(Clone)]
pub struct Prover {
    /// How hidden rows are proved.
    pub scheme: Scheme,
    /// The verifier's nonce, or one of the prover's own.
    pub nonce: Hash,
    /// Who signs; without a hotkey nobody does.
    pub signer: Option<Arc<Keypair>>,
}

impl Prover {
    /// Reads the field; `own_nonce` is taken where it names none. One that the server drew shows
    /// consistency, and binds nobody.
    ///
    /// # Errors
    /// 400 for an unknown scheme, a malformed nonce, or a scheme that the model cannot serve.
    pub fn read(
        field: &ProofRequest,
        dtype: Dtype,
        own_nonce: Hash,
        signer: Option<Arc<Keypair>>,
    ) -> Result<Self, RequestError> {
        let scheme: Scheme = field.scheme.parse().map_err(|rule: UnknownScheme| {
            RequestError::field("proof.scheme", format!("{rule}, got {}", echo(&field.scheme)))
        })?;
        if scheme == Scheme::Toploc && dtype != Dtype::Bf16 {
            let what = format!("toploc needs a bf16 model, this one is {dtype}");
            return Err(RequestError::field("proof.scheme", what));
        }
        let nonce = match &field.nonce {
            Some(text) => {
                from_hex(text).map_err(|e| RequestError::field("proof.nonce", e.to_string()))?
            }
            None => own_nonce,
        };
        Ok(Self { scheme, nonce, signer })
    }

    /// Binds one choice: its noise comes from the nonce, its rows are proved under its own root.
    pub fn bind(
        &self,
        request: &mut Request,
        identity: &Identity,
        seed: Option<i64>,
        choice: u32,
    ) -> ProofHead {
        let head = self.head(&request.terms(seed, choice), identity);
        request.sampling.noise_key = head.noise_key;
        request.proof = Some(ProofOptions { root: head.root, prover: head.rows(identity) });
        head
    }

    /// What the proof of the choice with these terms ([`Request::terms`]) is bound to.
    pub fn head(&self, terms: &RequestTerms, identity: &Identity) -> ProofHead {
        let hotkey = self.signer.as_ref().map(|s| s.hotkey().0);
        let model = identity.model_hash;
        let binding = Binding::new((self.scheme, self.nonce), terms, model, hotkey);
        ProofHead {
            prover: self.clone(),
            root: binding.root(),
            noise_key: binding.noise_key(),
            model,
            canon: identity.canon.clone(),
        }
    }
}

/// The proof of one choice, but for its rows.
pub struct ProofHead {
    prover: Prover,
    /// Root of the chain.
    pub root: Hash,
    /// Key of the noise that the choice is drawn with.
    pub noise_key: u64,
    model: Hash,
    canon: Cow<'static, str>,
}

impl ProofHead {
    /// What turns rows into chunks.
    pub fn rows(&self, identity: &Identity) -> RowProver {
        RowProver::new(self.prover.scheme, &self.root, Arc::clone(&identity.calibration))
    }

    /// The chunks that prove the rows of a whole output, whatever computed them: `rows` are 16-bit
    /// patterns of the model's type, one for each of `ids`, after a prompt of `prompt` tokens.
    pub fn chunks(
        &self,
        identity: &Identity,
        prompt: usize,
        (ids, rows): (&[u32], &[Vec<u16>]),
    ) -> Vec<ChunkProof> {
        let prover = self.rows(identity);
        let prove = |(position, (id, bits)): (u32, (&u32, &Vec<u16>))| {
            let values: Vec<f32> = bits.iter().map(|b| identity.dtype.widen(*b)).collect();
            (*id, prover.prove(position, bits, &values))
        };
        chunks_of(self.root, (prompt as u32 - 1..).zip(ids.iter().zip(rows)).map(prove))
    }

    /// The end of the proof of `tokens` tokens whose chain ends in `digest` (the root where it has
    /// no chunk), signed where there is a key.
    pub fn end(&self, digest: Option<Hash>, tokens: usize, reason: &FinishReason) -> ProofEnd {
        let Prover { scheme, nonce, signer } = &self.prover;
        let message = end_message(&digest.unwrap_or(self.root), tokens as u32, reason.tag());
        ProofEnd {
            scheme: scheme.name().into(),
            canon: self.canon.clone().into_owned(),
            nonce: to_hex(nonce),
            model: to_hex(&self.model),
            root: to_hex(&self.root),
            tokens,
            hotkey: signer.as_ref().map(|s| s.hotkey().to_string()),
            signature: signer.as_ref().map(|s| to_hex(&s.sign(&message))),
        }
    }
}

/// What cannot be read of a chunk.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ChunkError {
    /// The chunk's data is not in base64.
    #[error(transparent)]
    Data(#[from] base64::DecodeError),
    /// The chunk's digest is not in hexadecimal digits.
    #[error(transparent)]
    Digest(#[from] HexError),
}

/// Reads a chunk's proof.
///
/// # Errors
/// What is not base 64 or hexadecimal in it.
pub fn read_chunk(sent: &ProofChunk) -> Result<ChunkProof, ChunkError> {
    let data = STANDARD.decode(&sent.data)?;
    Ok(ChunkProof { index: sent.index, data, digest: from_hex(&sent.digest)? })
}

/// A chunk's proof as it is sent.
pub fn chunk(proof: &ChunkProof) -> ProofChunk {
    ProofChunk {
        index: proof.index,
        data: STANDARD.encode(&proof.data),
        digest: to_hex(&proof.digest),
    }
}
