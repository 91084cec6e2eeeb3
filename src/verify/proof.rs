//! Checks hidden-state proofs: what they are bound to, their chain, and how far their rows are from
//! ours.

use super::answer::Answer;
use super::structure::End;
use super::{Challenge, ChunkEvidence, Claim, Limits, Reason, Rejection, Stop};
use crate::chain::keys::Hotkey;
use crate::engine::output::FinishReason;
use crate::models::arithmetic::Arithmetic;
use crate::models::{Identity, Model};
use crate::proof::codec::{Hash, from_hex, to_hex};
use crate::proof::commit::{
    Binding, ResidueChunk, RowData, RowProver, chunk_hash, end_message, link,
};
use crate::proof::residue::{ResidueBits, Sketch, row_energy};
use crate::proof::{CHUNK_ROWS, Scheme, toploc};
use crate::wire::openai::response::ProofEnd;
use std::sync::Arc;

/// Bytes of a canon's name.
const CANON_BYTES_MAX: usize = 40;

/// A proof whose binding, chain and signature hold.
pub struct BoundProof {
    /// The scheme, which decides how rows are compared.
    pub scheme: Scheme,
    /// How we compute rows of its canon, where we can: only these can be equal bit for bit.
    pub arithmetic: Option<Arithmetic>,
    /// Root of the chain.
    pub root: Hash,
    /// Key of the sampler's noise.
    pub noise_key: u64,
    chunks: Vec<Vec<u8>>,
}

fn reject(reason: Reason, what: impl Into<String>) -> Stop {
    Stop::Rejected(Rejection::new(reason, what))
}

/// Checks everything about a proof that does not need our own rows.
///
/// # Errors
/// The first rule that it breaks.
pub fn bind(
    claim: &Claim<'_>,
    end: &End,
    (model, identity): (&Model, &Identity),
) -> Result<BoundProof, Stop> {
    let End::Sent(reason) = end else {
        return Err(reject(Reason::EarlyEnd, "a proved output sends its end"));
    };
    let Some(asked) = claim.proof else {
        return Err(Stop::Fault("the request asked for no proof".into()));
    };
    let end = claim.answer.end.as_ref();
    let end = end.ok_or_else(|| reject(Reason::BadProof, "the answer has no proof_end"))?;
    if end.scheme != asked.scheme.name() {
        let got: String = end.scheme.chars().take(40).collect();
        let what = format!("{} was asked for, got {got:?}", asked.scheme);
        return Err(reject(Reason::BadProof, what));
    }
    let hex = |field: &str, text: &str| {
        from_hex::<32>(text).map_err(|rule| reject(Reason::BadProof, format!("{field} {rule}")))
    };
    let nonce = hex("nonce", &end.nonce)?;
    if asked.nonce.is_some_and(|own| own != nonce) {
        return Err(reject(Reason::WrongRoot, "the nonce is not the one that was sent"));
    }
    let model_hash = model_hash(end, identity)?;
    let hotkey = match &end.hotkey {
        Some(text) => Some(text.parse::<Hotkey>().map_err(|rule| {
            reject(Reason::BadSignature, format!("the hotkey cannot be read: {rule}"))
        })?),
        None => None,
    };
    if asked.hotkey.is_some() && asked.hotkey != hotkey {
        return Err(reject(Reason::BadSignature, "another hotkey, or none, has signed"));
    }
    let terms = claim.request.terms(claim.seed, claim.choice);
    let binding = Binding::new((asked.scheme, nonce), &terms, model_hash, hotkey.map(|h| h.0));
    let root = binding.root();
    if hex("root", &end.root)? != root {
        return Err(reject(Reason::WrongRoot, "the root is not that of this request"));
    }
    let digest = chain(claim.answer, root)?;
    check_signature(claim, &digest, reason, hotkey)?;
    let chunks = claim.answer.chunks.iter().map(|c| c.data.clone()).collect();
    let (scheme, arithmetic) = (asked.scheme, model.arithmetic_of(&end.canon));
    Ok(BoundProof { scheme, arithmetic, root, noise_key: binding.noise_key(), chunks })
}

/// The hash of our model in the canon that the prover names, which must be the one that it sent.
fn model_hash(end: &ProofEnd, identity: &Identity) -> Result<Hash, Stop> {
    let canon = &end.canon;
    let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if !(1..=CANON_BYTES_MAX).contains(&canon.len()) || !canon.chars().all(is_name) {
        let what = format!("canon must have 1 to {CANON_BYTES_MAX} of a-z, 0-9 and `-`");
        return Err(reject(Reason::BadProof, what));
    }
    let model = match *canon == identity.canon {
        true => identity.model_hash,
        false => identity.hash_under(canon),
    };
    let sent = from_hex::<32>(&end.model)
        .map_err(|rule| reject(Reason::BadProof, format!("model {rule}")))?;
    if sent != model {
        let what = format!("the model in {canon} is {}, got {}", to_hex(&model), end.model);
        return Err(reject(Reason::WrongRoot, what));
    }
    Ok(model)
}

/// A proof binds only to a nonce that the verifier chose: an answer to any other may be as old as
/// the prover likes, and be sold twice.
///
/// # Errors
/// A fault, because it is the request that named none.
pub fn check_nonce(claim: &Claim<'_>) -> Result<(), Stop> {
    match claim.proof {
        Some(Challenge { nonce: None, .. }) => {
            let what = "the request named no `proof.nonce`, so this may be the answer to another \
                        request: send a fresh nonce with every one";
            Err(Stop::Fault(what.into()))
        }
        _ => Ok(()),
    }
}

/// Follows the chain from the root to its last digest.
fn chain(answer: &Answer, root: Hash) -> Result<Hash, Stop> {
    let want = answer.ids.len().div_ceil(CHUNK_ROWS);
    if answer.chunks.len() != want {
        let what =
            format!("{} tokens have {want} chunks, got {}", answer.ids.len(), answer.chunks.len());
        return Err(reject(Reason::BadProof, what));
    }
    let mut digest = root;
    for (place, (chunk, ids)) in answer.chunks.iter().zip(answer.ids.chunks(CHUNK_ROWS)).enumerate()
    {
        digest = link(&digest, place as u32, ids, &chunk.data);
        if chunk.index as usize != place || chunk.digest != digest {
            let what = format!("chunk {place} does not follow from those before it");
            return Err(reject(Reason::ChainBreak, what));
        }
    }
    Ok(digest)
}

fn check_signature(
    claim: &Claim<'_>,
    digest: &Hash,
    reason: &FinishReason,
    hotkey: Option<Hotkey>,
) -> Result<(), Stop> {
    let Some(end) = &claim.answer.end else { return Ok(()) };
    if end.tokens != claim.answer.ids.len() {
        let what =
            format!("the proof ends after {} tokens, not {}", end.tokens, claim.answer.ids.len());
        return Err(reject(Reason::BadProof, what));
    }
    let Some(hotkey) = hotkey else { return Ok(()) };
    let signature = end.signature.as_deref().unwrap_or_default();
    let signature = from_hex::<64>(signature)
        .map_err(|rule| reject(Reason::BadSignature, format!("the signature {rule}")))?;
    let message = end_message(digest, end.tokens as u32, reason.tag());
    match hotkey.verify(&message, &signature) {
        true => Ok(()),
        false => Err(reject(Reason::BadSignature, format!("it is not {hotkey}'s"))),
    }
}

impl BoundProof {
    /// Computes what our own rows would contribute.
    pub fn prover(&self, identity: &Identity) -> RowProver {
        RowProver::new(self.scheme, &self.root, Arc::clone(&identity.calibration))
    }

    /// Sketches of so many rows, in order; none in chunks that are equal bit for bit.
    pub(super) fn sketches(&self, chunks: &[ChunkEvidence], rows: usize) -> Vec<Option<Sketch>> {
        let mut sketches = vec![None; rows];
        let places = sketches.chunks_mut(CHUNK_ROWS).zip(&self.chunks).zip(chunks);
        for ((places, data), _) in places.filter(|(_, chunk)| !chunk.is_exact) {
            let chunk = ResidueChunk::from_bytes(data, places.len());
            let sketches = chunk.map_or_else(|_| Vec::new(), |chunk| chunk.sketches);
            places.iter_mut().zip(sketches).for_each(|(place, sketch)| *place = Some(sketch));
        }
        sketches
    }

    /// Sets what our own rows contribute beside the proof, chunk by chunk; also returns the
    /// energies of the rows of chunks that are not equal bit for bit.
    pub fn compare(&self, rows: &[RowData]) -> (Vec<ChunkEvidence>, Vec<f64>) {
        let (mut chunks, mut energies) = (Vec::new(), Vec::new());
        for (index, (rows, data)) in rows.chunks(CHUNK_ROWS).zip(&self.chunks).enumerate() {
            let (chunk, of_rows) = compare(index, self, rows, data);
            energies.extend(of_rows.into_iter().filter(|_| !chunk.is_exact));
            chunks.push(chunk);
        }
        (chunks, energies)
    }
}

fn compare(
    index: usize,
    bound: &BoundProof,
    rows: &[RowData],
    data: &[u8],
) -> (ChunkEvidence, Vec<f64>) {
    let none = ChunkEvidence { index, rows: rows.len(), ..ChunkEvidence::default() };
    let Some(bits) = ResidueBits::of(bound.scheme) else {
        return (compare_toploc(none, bound.arithmetic.is_some(), rows, data), Vec::new());
    };
    let Ok(theirs) = ResidueChunk::from_bytes(data, rows.len()) else {
        return (none, Vec::new());
    };
    let (mut hashes, mut energies) = (Vec::new(), Vec::new());
    for (row, sketch) in rows.iter().zip(&theirs.sketches) {
        if let RowData::Residue { sketch: own, exact } = row {
            hashes.push(*exact);
            energies.push(row_energy(bits, own, sketch));
        }
    }
    let is_exact = bound.arithmetic.is_some() && chunk_hash(&bound.root, &hashes) == theirs.exact;
    let energy = energies.iter().sum::<f64>() / rows.len() as f64;
    (ChunkEvidence { is_exact, energy: Some(energy), ..none }, energies)
}

fn compare_toploc(
    none: ChunkEvidence,
    is_our_canon: bool,
    rows: &[RowData],
    data: &[u8],
) -> ChunkEvidence {
    let mut activations = Vec::new();
    for row in rows {
        if let RowData::Bits(bits) = row {
            activations.extend_from_slice(bits);
        }
    }
    let own = toploc::Proof::build(&activations, toploc::TOP_K);
    match (own, toploc::Proof::from_bytes(data, toploc::TOP_K)) {
        // Fewer values than points: neither side has a proof.
        (None, _) => ChunkEvidence { is_exact: data.is_empty(), ..none },
        (Some(own), Ok(theirs)) => ChunkEvidence {
            is_exact: is_our_canon && own == theirs,
            distance: Some(theirs.distance(&activations)),
            ..none
        },
        (Some(_), Err(_)) => none,
    }
}

/// Rows of two canons are never equal bit for bit, so nobody can demand it of them.
///
/// # Errors
/// The canon, where equal bits are demanded and it is none that we compute in.
pub fn check_canon(canon: Option<&str>, limits: &Limits) -> Result<(), Stop> {
    match canon {
        Some(canon) if limits.exact => {
            let what = format!(
                "rows must be equal bit for bit, so they must be of a canon that this device \
                 computes in, not of {canon}"
            );
            Err(reject(Reason::SketchEnergy, what))
        }
        _ => Ok(()),
    }
}

/// Checks the chunks of a proof.
///
/// # Errors
/// The first chunk that is too far from ours.
pub fn check(chunks: &[ChunkEvidence], scheme: Scheme, limits: &Limits) -> Result<(), Stop> {
    let Some(chunk) = chunks.iter().find(|chunk| limits.is_over(scheme, chunk)) else {
        return Ok(());
    };
    let index = chunk.index;
    if limits.exact {
        let what = format!("rows must be equal bit for bit, those of chunk {index} are not");
        return Err(reject(Reason::SketchEnergy, what));
    }
    let Some(limit) = limits.chunk_energy(scheme, chunk) else { return Err(too_far(chunk)) };
    let Some(energy) = chunk.energy else {
        let what = format!("chunk {index} has the wrong length");
        return Err(reject(Reason::BadProof, what));
    };
    let limit = (limit * 10.0).round() / 10.0;
    let why = match chunk.rounding {
        Some(rounding) => format!("; rounding alone gives it {rounding:.1}"),
        None => String::new(),
    };
    let what = format!("chunk {index} has energy {energy:.1}, at most {limit}{why}");
    Err(reject(Reason::SketchEnergy, what))
}

/// What is said of a TOPLOC chunk that is too far.
fn too_far(chunk: &ChunkEvidence) -> Stop {
    let index = chunk.index;
    match chunk.distance {
        Some(d) => {
            let what = format!(
                "chunk {index} is too far: {} exponents differ (at most 38), mantissas by {:.1} \
                 on average (10) and {:.1} at the median (8)",
                d.exponent_mismatches, d.mantissa_mean, d.mantissa_median
            );
            reject(Reason::SketchEnergy, what)
        }
        None => reject(Reason::BadProof, format!("chunk {index} is not a TOPLOC proof")),
    }
}
