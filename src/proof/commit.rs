//! Binds and chains proofs: rows to a request, chunks to each other, the end to a hotkey.
//!
//! `root = H("targon-engine/proof/1", scheme, nonce, request, model, hotkey)`. Keys of sketch and
//! exact hash derive from the root, the noise of the sampler from nonce and request alone, which
//! the prover does not choose. `digest_i = H(digest_{i-1}, i, ids of the chunk, data of the
//! chunk)` from `digest_{-1} = root`. The hotkey signs the last digest with the count of tokens
//! and the reason of the end.

use super::codec::{Encoder, Hash, first_u64};
use super::residue::{Calibration, ResidueBits, SKETCH_BYTES, Sketch, exact_hash, sketch};
use super::toploc::{self, TOP_K};
use super::{CHUNK_ROWS, Scheme};

/// Bytes of a chunk's exact hash.
pub const EXACT_BYTES: usize = 8;

/// What of a request decides its output.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct RequestTerms {
    /// The prompt's tokens, as ids.
    pub prompt: Vec<u32>,
    /// Temperature, top-p, min-p, top-a, repetition, presence and frequency penalty, in this order.
    pub floats: [f32; 7],
    /// Top-k; 0 keeps all.
    pub top_k: u32,
    /// Bias by token id, ascending ids.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed, where the request has one.
    pub seed: Option<i64>,
    /// Number of the choice within its request.
    pub choice: u32,
    /// Tokens of the output, at most.
    pub max_tokens: u32,
    /// No end before this many.
    pub min_tokens: u32,
    /// The model's own end does not count.
    pub ignore_eos: bool,
    /// Stop ids of the request, ascending.
    pub stop_ids: Vec<u32>,
    /// Stop strings in the order given.
    pub stop_strings: Vec<String>,
    /// What the output must look like: 1 for a JSON schema, 2 for a regular expression, 3 for a
    /// Lark grammar, and its text.
    pub constraint: Option<(u8, String)>,
}

impl RequestTerms {
    /// Hash of the canonical encoding.
    pub fn hash(&self) -> Hash {
        let mut e = Encoder::new("targon-engine/request/1");
        e.ids(&self.prompt);
        self.floats.iter().for_each(|f| {
            e.f32(*f);
        });
        e.u32(self.top_k).u32(self.logit_bias.len() as u32);
        for (id, bias) in &self.logit_bias {
            e.u32(*id).f32(*bias);
        }
        e.u8(u8::from(self.seed.is_some())).i64(self.seed.unwrap_or(0));
        e.u32(self.choice).u32(self.max_tokens).u32(self.min_tokens);
        e.u8(u8::from(self.ignore_eos)).ids(&self.stop_ids);
        e.u32(self.stop_strings.len() as u32);
        self.stop_strings.iter().for_each(|s| {
            e.bytes(s.as_bytes());
        });
        match &self.constraint {
            None => e.u8(0),
            Some((kind, text)) => e.u8(*kind).bytes(text.as_bytes()),
        };
        e.finish()
    }

    /// Key of the sampler's noise under a verifier's nonce.
    pub fn noise_key(&self, nonce: &Hash) -> u64 {
        noise_key(nonce, &self.hash())
    }
}

/// The hash by which a model's identity names its calibration (`docs/proofs.md`).
pub fn calibration_hash(calibration: &Calibration) -> Hash {
    let mut e = Encoder::new("targon-engine/calibration/1");
    e.u32(calibration.channels() as u32).u8(calibration.shift);
    calibration.exponents.iter().for_each(|x| {
        e.raw(&x.to_le_bytes());
    });
    calibration.means.iter().for_each(|x| {
        e.raw(&x.to_le_bytes());
    });
    e.finish()
}

/// Hash of a model: weights, the type and the canon they are computed in, and the calibration of
/// its sketch.
pub fn model_hash(weights_root: &Hash, dtype: &str, canon: &str, calibration: &Hash) -> Hash {
    let mut e = Encoder::new("targon-engine/model/2");
    e.raw(weights_root).bytes(dtype.as_bytes()).bytes(canon.as_bytes()).raw(calibration).finish()
}

fn noise_key(nonce: &Hash, request: &Hash) -> u64 {
    first_u64(&Encoder::new("targon-engine/sampler/nonce/1").raw(nonce).raw(request).finish())
}

/// A nonce made of a text that the other side chose (a signed request id).
pub fn nonce_of(text: &str) -> Hash {
    Encoder::new("targon-engine/nonce/1").bytes(text.as_bytes()).finish()
}

/// What a proof is bound to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Binding {
    /// How rows are proved.
    pub scheme: Scheme,
    /// Chosen by the verifier.
    pub nonce: Hash,
    /// [`RequestTerms::hash`].
    pub request: Hash,
    /// The model's weights and calibration, by [`model_hash`].
    pub model: Hash,
    /// Public key of the prover; zeros where there is none.
    pub hotkey: [u8; 32],
}

impl Binding {
    /// Binds the proof of a request with these terms; `hotkey` is the prover's public key, if it
    /// has one.
    pub fn new(
        (scheme, nonce): (Scheme, Hash),
        terms: &RequestTerms,
        model: Hash,
        hotkey: Option<[u8; 32]>,
    ) -> Self {
        Self { scheme, nonce, request: terms.hash(), model, hotkey: hotkey.unwrap_or_default() }
    }

    /// Key of the sampler's noise.
    pub fn noise_key(&self) -> u64 {
        noise_key(&self.nonce, &self.request)
    }

    /// The root of the chain.
    pub fn root(&self) -> Hash {
        let mut e = Encoder::new("targon-engine/proof/1");
        e.u8(self.scheme.tag()).raw(&self.nonce).raw(&self.request);
        e.raw(&self.model).raw(&self.hotkey).finish()
    }
}

/// Keys of the rows of one proof.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RowKeys {
    /// Signs of the sketch.
    pub sketch: u64,
    /// The key of exact hashes.
    pub exact: u64,
}

impl RowKeys {
    /// Derived from the root.
    pub fn new(root: &Hash) -> Self {
        let key = |name: &str| first_u64(&Encoder::new(name).raw(root).finish());
        Self { sketch: key("targon-engine/sketch/1"), exact: key("targon-engine/exact/1") }
    }
}

/// What one row contributes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RowData {
    /// Sketch and exact hash.
    Residue {
        /// Four bytes of projections.
        sketch: Sketch,
        /// The exact hash.
        exact: u64,
    },
    /// The row itself, which TOPLOC needs until its chunk is closed.
    Bits(Vec<u16>),
}

/// Computes what rows contribute; shared by all threads of a step.
#[derive(Clone, PartialEq, Debug)]
pub struct RowProver {
    scheme: Scheme,
    keys: RowKeys,
    calibration: std::sync::Arc<Calibration>,
}

impl RowProver {
    /// Derives the keys of sketch and exact hash from a root.
    pub fn new(scheme: Scheme, root: &Hash, calibration: std::sync::Arc<Calibration>) -> Self {
        Self { scheme, keys: RowKeys::new(root), calibration }
    }

    /// What a sketch and an exact hash are made with; `None` where the scheme has neither.
    pub fn residue(&self) -> Option<(ResidueBits, RowKeys, &std::sync::Arc<Calibration>)> {
        Some((ResidueBits::of(self.scheme)?, self.keys, &self.calibration))
    }

    /// What the row at absolute position `position` contributes.
    pub fn prove(&self, position: u32, row: &[u16], values: &[f32]) -> RowData {
        let Some((bits, keys, calibration)) = self.residue() else {
            return RowData::Bits(row.to_vec());
        };
        RowData::Residue {
            sketch: sketch(calibration, bits, keys.sketch, position, values),
            exact: exact_hash(keys.exact, position, row),
        }
    }
}

/// A closed chunk as it is sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChunkProof {
    /// The chunk's number, from 0.
    pub index: u32,
    /// Sketches and exact hash, or a TOPLOC proof.
    pub data: Vec<u8>,
    /// The chain up to and including it.
    pub digest: Hash,
}

/// The exact hash of a chunk: first 8 bytes of `H(name, root, row hashes)`.
pub fn chunk_hash(root: &Hash, rows: &[u64]) -> [u8; EXACT_BYTES] {
    let mut e = Encoder::new("targon-engine/chunk/1");
    e.raw(root).u32(rows.len() as u32);
    rows.iter().for_each(|x| {
        e.raw(&x.to_le_bytes());
    });
    let mut first = [0; EXACT_BYTES];
    first.copy_from_slice(&e.finish()[..EXACT_BYTES]);
    first
}

/// The next link of the chain.
pub fn link(previous: &Hash, index: u32, ids: &[u32], data: &[u8]) -> Hash {
    Encoder::after(previous).u32(index).ids(ids).bytes(data).finish()
}

/// What the hotkey signs at the end.
pub fn end_message(digest: &Hash, tokens: u32, reason: u8) -> Hash {
    Encoder::new("targon-engine/proof-end/1").raw(digest).u32(tokens).u8(reason).finish()
}

/// The chain of one output: takes rows in order, closes a chunk every [`CHUNK_ROWS`].
#[derive(Clone, Debug)]
pub struct ChunkChain {
    root: Hash,
    digest: Hash,
    index: u32,
    ids: Vec<u32>,
    rows: Vec<RowData>,
}

impl ChunkChain {
    /// Begins at the root.
    pub fn new(root: Hash) -> Self {
        Self { root, digest: root, index: 0, ids: Vec::new(), rows: Vec::new() }
    }

    /// The last digest (the root before the first chunk).
    pub fn digest(&self) -> &Hash {
        &self.digest
    }

    /// Adds the row that `id` was drawn from; a full chunk is closed.
    pub fn push(&mut self, id: u32, row: RowData) -> Option<ChunkProof> {
        self.ids.push(id);
        self.rows.push(row);
        if self.rows.len() == CHUNK_ROWS { self.close() } else { None }
    }

    /// Closes a last, shorter chunk. A TOPLOC chunk with fewer values than points has no proof.
    pub fn close(&mut self) -> Option<ChunkProof> {
        if self.rows.is_empty() {
            return None;
        }
        let data = chunk_data(&self.root, &self.rows);
        self.digest = link(&self.digest, self.index, &self.ids, &data);
        let proof = ChunkProof { index: self.index, data, digest: self.digest };
        self.index += 1;
        self.ids.clear();
        self.rows.clear();
        Some(proof)
    }
}

/// The chunks of a whole output: each row with the token that was drawn from it.
pub fn chunks_of(root: Hash, rows: impl IntoIterator<Item = (u32, RowData)>) -> Vec<ChunkProof> {
    let mut chain = ChunkChain::new(root);
    let mut chunks: Vec<ChunkProof> =
        rows.into_iter().filter_map(|(id, row)| chain.push(id, row)).collect();
    chunks.extend(chain.close());
    chunks
}

fn chunk_data(root: &Hash, rows: &[RowData]) -> Vec<u8> {
    let mut data = Vec::with_capacity(rows.len() * SKETCH_BYTES + EXACT_BYTES);
    let (mut hashes, mut activations) = (Vec::new(), Vec::new());
    for row in rows {
        match row {
            RowData::Residue { sketch, exact } => {
                data.extend_from_slice(sketch);
                hashes.push(*exact);
            }
            RowData::Bits(bits) => activations.extend_from_slice(bits),
        }
    }
    if !activations.is_empty() {
        let proof = toploc::Proof::build(&activations, TOP_K);
        return proof.map(|p| p.to_bytes()).unwrap_or_default();
    }
    data.extend_from_slice(&chunk_hash(root, &hashes));
    data
}

/// A received chunk of a residue scheme, taken apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ResidueChunk {
    /// One sketch for each row.
    pub sketches: Vec<Sketch>,
    /// The exact hash.
    pub exact: [u8; EXACT_BYTES],
}

/// Data of a chunk that is longer or shorter than its rows take.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a chunk of {rows} rows has {want} bytes, got {got}")]
pub struct ChunkLength {
    /// Rows of the chunk.
    pub rows: usize,
    /// Bytes that they take.
    pub want: usize,
    /// Bytes that there are.
    pub got: usize,
}

impl ResidueChunk {
    /// Reads the data of a chunk of `rows` rows.
    ///
    /// # Errors
    /// The rule, when the length is another.
    pub fn from_bytes(data: &[u8], rows: usize) -> Result<Self, ChunkLength> {
        let want = rows * SKETCH_BYTES + EXACT_BYTES;
        if rows == 0 || rows > CHUNK_ROWS || data.len() != want {
            return Err(ChunkLength { rows, want, got: data.len() });
        }
        let (sketches, hash) = data.split_at(rows * SKETCH_BYTES);
        let mut exact = [0; EXACT_BYTES];
        exact.copy_from_slice(hash);
        let sketches = sketches.chunks_exact(SKETCH_BYTES).map(|s| [s[0], s[1], s[2], s[3]]);
        Ok(Self { sketches: sketches.collect(), exact })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proof::codec::to_hex;
    use proptest::prelude::*;
    use std::sync::Arc;

    fn terms() -> RequestTerms {
        RequestTerms {
            prompt: vec![1, 2, 3],
            floats: [0.8, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0],
            seed: Some(42),
            max_tokens: 64,
            stop_strings: vec!["END".into()],
            ..RequestTerms::default()
        }
    }

    fn binding() -> Binding {
        Binding {
            scheme: Scheme::Residue,
            nonce: [7; 32],
            request: terms().hash(),
            model: model_hash(&[1; 32], "bf16", "canon-2", &[2; 32]),
            hotkey: [3; 32],
        }
    }

    fn calibration() -> Arc<Calibration> {
        let exponents = (0..40).map(|c| (c % 5) as i8 - 2).collect();
        let means = (0..40).map(|c| (c * 7 % 50) as i16 - 25).collect();
        Arc::new(Calibration { exponents, means, shift: 4 })
    }

    /// Rows whose values are exact in bf16.
    fn row(seed: u32) -> (Vec<u16>, Vec<f32>) {
        let bits: Vec<u16> =
            (0..40_u32).map(|c| (0x3f00 + (seed * 131 + c * 57) % 256) as u16).collect();
        let values = bits.iter().map(|b| f32::from_bits(u32::from(*b) << 16)).collect();
        (bits, values)
    }

    fn run(scheme: Scheme, root: Hash, count: u32) -> (Vec<ChunkProof>, Hash) {
        let prover = RowProver::new(scheme, &root, calibration());
        let rows = (0..count).map(|i| {
            let (bits, values) = row(i);
            (100 + i, prover.prove(10 + i, &bits, &values))
        });
        let chunks = chunks_of(root, rows);
        let last = chunks.last().map_or(root, |chunk| chunk.digest);
        (chunks, last)
    }

    /// Vectors that another implementer can use; `docs/proofs.md` shows them.
    #[test]
    fn hashes_are_pinned() {
        let root = binding().root();
        let keys = RowKeys::new(&root);
        let (chunks, _) = run(Scheme::Residue, root, 3);
        for (got, want) in [
            (to_hex(&terms().hash()), REQUEST),
            (to_hex(&calibration_hash(&calibration())), CALIBRATION),
            (to_hex(&binding().model), MODEL),
            (to_hex(&root), ROOT),
            (format!("{:016x} {:016x}", keys.sketch, keys.exact), KEYS),
            (format!("{:016x}", noise_key(&[7; 32], &terms().hash())), NOISE),
            (to_hex(&chunks[0].data), CHUNK),
            (to_hex(&chunks[0].digest), DIGEST),
            (to_hex(&end_message(&chunks[0].digest, 3, 4)), END),
            (to_hex(&nonce_of("0d5c1a4e-8f0b-4a8e-9c1d-2b3c4d5e6f70")), NONCE),
        ] {
            assert_eq!(got, want);
        }
    }

    // Computed by an independent implementation of docs/proofs.md.
    const REQUEST: &str = "bf076e96f6daa802117932b9528138cb0903a1cf029c9bbe5b30ea57f8060541";
    const CALIBRATION: &str = "c1beae48a5eea0fc7fa227e6671f465c0a94a5cab97d059113c758cdd42e8f32";
    const MODEL: &str = "d76519c2dc0e29c5b7f2dc755b55b336cc8866f0ea9b54b02fc528d8d01f0552";
    const ROOT: &str = "ec1689324a1edcee788d39601667f5b71eff7d4c9921179fe42b7bd7be1ae4e9";
    const KEYS: &str = "3d17dd595db4f189 9da37d925edb57c0";
    const NOISE: &str = "4676ad2f934cebe3";
    const CHUNK: &str = "47ebf751562a43e046c23eb70a28bd87440e3a09";
    const DIGEST: &str = "5cef9aade6d0ac42cf6140b5c3fec39e9caab7a0f53198c6a3c05009575b1b2e";
    const END: &str = "6ce589210d0369d374c25395346092506590795e84db2671ce4a08058fc8b9cb";
    const NONCE: &str = "880c1a43471b2efc7234edfc56fe446573b1e125000f73de4d8960002142d669";

    #[test]
    fn every_term_of_the_binding_changes_the_root() {
        let base = binding();
        let mut roots = vec![base.root()];
        roots.push(Binding { scheme: Scheme::ResidueU4, ..base }.root());
        roots.push(Binding { nonce: [8; 32], ..base }.root());
        roots.push(Binding { model: [8; 32], ..base }.root());
        roots.push(Binding { hotkey: [8; 32], ..base }.root());
        let variants = [
            RequestTerms { prompt: vec![1, 2, 4], ..terms() },
            RequestTerms { floats: [0.9, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0], ..terms() },
            RequestTerms { constraint: Some((2, "a".into())), ..terms() },
            RequestTerms { top_k: 1, ..terms() },
            RequestTerms { logit_bias: vec![(1, 1.0)], ..terms() },
            RequestTerms { seed: None, ..terms() },
            RequestTerms { seed: Some(43), ..terms() },
            RequestTerms { choice: 1, ..terms() },
            RequestTerms { max_tokens: 65, ..terms() },
            RequestTerms { min_tokens: 1, ..terms() },
            RequestTerms { ignore_eos: true, ..terms() },
            RequestTerms { stop_ids: vec![1], ..terms() },
            RequestTerms { stop_strings: vec!["EN".into(), "D".into()], ..terms() },
        ];
        roots.extend(variants.map(|t| Binding { request: t.hash(), ..base }.root()));
        for (i, a) in roots.iter().enumerate() {
            assert!(roots[i + 1..].iter().all(|b| a != b), "variant {i}");
        }
    }

    #[test]
    fn chunks_close_every_32_rows_and_sizes_are_as_promised() {
        let (chunks, last) = run(Scheme::Residue, [9; 32], 70);
        let sizes: Vec<usize> = chunks.iter().map(|c| c.data.len()).collect();
        assert_eq!(sizes, [136, 136, 32]);
        assert_eq!(chunks[2].digest, last);
        let (chunks, _) = run(Scheme::Toploc, [9; 32], 33);
        let sizes: Vec<usize> = chunks.iter().map(|c| c.data.len()).collect();
        assert_eq!(sizes, [258, 0], "a row of 40 values cannot hold 128 points");
    }

    #[test]
    fn a_verifier_with_the_same_rows_gets_the_same_bytes() {
        for scheme in Scheme::ALL {
            assert_eq!(run(scheme, [5; 32], 40), run(scheme, [5; 32], 40));
            assert_ne!(run(scheme, [5; 32], 40).1, run(scheme, [6; 32], 40).1);
        }
    }

    #[test]
    fn reordered_or_dropped_chunks_break_the_chain() {
        let root = [5; 32];
        let (chunks, _) = run(Scheme::Residue, root, 64);
        let ids = |i: u32| (100 + 32 * i..132 + 32 * i).collect::<Vec<u32>>();
        let first = link(&root, 0, &ids(0), &chunks[0].data);
        assert_eq!(first, chunks[0].digest);
        assert_eq!(link(&first, 1, &ids(1), &chunks[1].data), chunks[1].digest);
        assert_ne!(link(&root, 0, &ids(1), &chunks[1].data), chunks[0].digest);
        let mut other_ids = ids(0);
        other_ids[5] += 1;
        assert_ne!(link(&root, 0, &other_ids, &chunks[0].data), chunks[0].digest);
    }

    proptest! {
        #[test]
        fn chunk_bytes_are_refused_or_read_back(
            data in proptest::collection::vec(any::<u8>(), 0..150), rows in 0..40_usize,
        ) {
            match ResidueChunk::from_bytes(&data, rows) {
                Ok(chunk) => {
                    let flat: Vec<u8> = chunk.sketches.concat();
                    prop_assert_eq!([flat, chunk.exact.to_vec()].concat(), data);
                }
                Err(e) => prop_assert!(e.to_string().contains("bytes, got")),
            }
        }
    }
}
