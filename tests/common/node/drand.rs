//! The fake chain's clock, and a drand of which the secret is known, so that every commit can be
//! opened without the network.

use aes_gcm::aead::{Aead, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce};
use ark_bls12_381::{Bls12_381, Fr, G1Affine, G1Projective, G2Affine, G2Projective, g1};
use ark_ec::hashing::HashToCurve;
use ark_ec::hashing::curve_maps::wb::WBMap;
use ark_ec::hashing::map_to_curve_hasher::MapToCurveBasedHasher;
use ark_ec::pairing::Pairing;
use ark_ec::{CurveGroup, PrimeGroup};
use ark_ff::PrimeField;
use ark_ff::field_hashers::DefaultFieldHasher;
use ark_serialize::{CanonicalDeserialize, CanonicalSerialize};
use sha2::{Digest, Sha256};
use targon_engine::chain::timelock::{Drand, QUICKNET};

/// When block 0 was made, in seconds since 1970.
const BORN: u64 = 1_795_000_000;
/// Between two blocks, as the metadata says.
const BLOCK_SECONDS: u64 = 12;
const DOMAIN: &[u8] = b"BLS_SIG_BLS12381G1_XMD:SHA-256_SSWU_RO_NUL_";
/// Bytes of a compressed point of G2.
const POINT: usize = 96;

type Hasher =
    MapToCurveBasedHasher<G1Projective, DefaultFieldHasher<Sha256, 128>, WBMap<g1::Config>>;

/// A block's time, in milliseconds since 1970.
pub fn time_ms(block: u64) -> u64 {
    (BORN + block * BLOCK_SECONDS) * 1000
}

/// The newest round that the chain has at a block.
pub fn stored_round(block: u64) -> u64 {
    network().round_at(time_ms(block)).unwrap()
}

/// The fake's drand: rounds as those of quicknet, and a key of its own.
pub fn network() -> Drand {
    let mut key = Vec::new();
    let point = (G2Projective::generator() * secret()).into_affine();
    point.serialize_compressed(&mut key).unwrap();
    Drand { key: key.try_into().unwrap(), ..QUICKNET }
}

/// What the fake's drand signs a round with.
pub fn signature(round: u64) -> Vec<u8> {
    let hasher = Hasher::new(DOMAIN).unwrap();
    let identity: G1Affine = hasher.hash(&sha256(&[&round.to_be_bytes()])).unwrap();
    let mut bytes = Vec::new();
    (identity * secret()).into_affine().serialize_compressed(&mut bytes).unwrap();
    bytes
}

/// What was encrypted for the round of a signature.
pub fn decrypt(sealed: &[u8], signature: &[u8]) -> Option<Vec<u8>> {
    let signature = G1Affine::deserialize_compressed(signature).ok()?;
    let (point, mut rest) = sealed.split_at_checked(POINT)?;
    let point = G2Affine::deserialize_compressed(point).ok()?;
    let (v, w, mut body) = (take(&mut rest)?, take(&mut rest)?, take(&mut rest)?);
    let mut shared = Vec::new();
    Bls12_381::pairing(signature, point).0.serialize_compressed(&mut shared).ok()?;
    let sigma = xor(v.try_into().ok()?, &sha256(&[&shared]));
    let key = xor(w.try_into().ok()?, &sha256(&[&sigma]));
    let r = Fr::from_be_bytes_mod_order(&sha256(&[&sigma, &key]));
    if (G2Projective::generator() * r).into_affine() != point {
        return None;
    }
    let (text, nonce) = (take(&mut body)?, take(&mut body)?);
    let nonce: &[u8; 12] = nonce.try_into().ok()?;
    Aes256Gcm::new(&key.into()).decrypt(Nonce::from_slice(nonce), text).ok()
}

/// Bytes after their number.
fn take<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, after) = rest.split_at_checked(8)?;
    let length = u64::from_le_bytes(length.try_into().ok()?);
    let (bytes, after) = after.split_at_checked(usize::try_from(length).ok()?)?;
    *rest = after;
    Some(bytes)
}

/// Nobody else's: it guards nothing.
fn secret() -> Fr {
    Fr::from_be_bytes_mod_order(&sha256(&[b"the fake node's drand"]))
}

fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    parts.iter().fold(Sha256::new(), |hash, part| hash.chain_update(part)).finalize().into()
}

fn xor(a: &[u8; 32], b: &[u8; 32]) -> [u8; 32] {
    std::array::from_fn(|i| a[i] ^ b[i])
}
