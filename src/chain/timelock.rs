//! Encrypts a text to a round of drand: nobody can decrypt it before the network has signed the
//! round, and everybody can afterwards.
//!
//! The scheme is Boneh and Franklin's identity-based encryption (FullIdent) on BLS12-381 with the
//! round as identity, around AES-256-GCM. The bytes are those of the chain's commits (drand's
//! `tlock` and the `tle` crate that the chain uses). Only the chain decrypts.

use aes_gcm::aead::rand_core::RngCore;
use aes_gcm::aead::{Aead, KeyInit, OsRng};
use aes_gcm::{Aes256Gcm, Nonce};
use ark_bls12_381::{Bls12_381, Fr, G1Affine, G1Projective, G2Affine, G2Projective, g1};
use ark_ec::hashing::HashToCurve;
use ark_ec::hashing::curve_maps::wb::WBMap;
use ark_ec::hashing::map_to_curve_hasher::MapToCurveBasedHasher;
use ark_ec::pairing::Pairing;
use ark_ec::{AffineRepr, CurveGroup, PrimeGroup};
use ark_ff::PrimeField;
use ark_ff::field_hashers::DefaultFieldHasher;
use ark_serialize::{CanonicalDeserialize, CanonicalSerialize};
use sha2::{Digest, Sha256};

/// Domain of hashing to the curve, as drand's `bls-unchained-g1-rfc9380` signs.
const DOMAIN: &[u8] = b"BLS_SIG_BLS12381G1_XMD:SHA-256_SSWU_RO_NUL_";
/// What the chain's ciphertexts end with: the name of their cipher.
const CIPHER: &[u8] = b"AES_GCM_";
/// Public key of quicknet (<https://api.drand.sh>, chain
/// `52db9ba70e0cc0f6eaf7803dd07447a1f5477735fd3f661792ba94600c84e971`).
const QUICKNET_KEY: [u8; 96] = [
    0x83, 0xcf, 0x0f, 0x28, 0x96, 0xad, 0xee, 0x7e, 0xb8, 0xb5, 0xf0, 0x1f, 0xca, 0xd3, 0x91, 0x22,
    0x12, 0xc4, 0x37, 0xe0, 0x07, 0x3e, 0x91, 0x1f, 0xb9, 0x00, 0x22, 0xd3, 0xe7, 0x60, 0x18, 0x3c,
    0x8c, 0x4b, 0x45, 0x0b, 0x6a, 0x0a, 0x6c, 0x3a, 0xc6, 0xa5, 0x77, 0x6a, 0x2d, 0x10, 0x64, 0x51,
    0x0d, 0x1f, 0xec, 0x75, 0x8c, 0x92, 0x1c, 0xc2, 0x2b, 0x0e, 0x17, 0xe6, 0x3a, 0xaf, 0x4b, 0xcb,
    0x5e, 0xd6, 0x63, 0x04, 0xde, 0x9c, 0xf8, 0x09, 0xbd, 0x27, 0x4c, 0xa7, 0x3b, 0xab, 0x4a, 0xf5,
    0xa6, 0xe9, 0xc7, 0x6a, 0x4b, 0xc0, 0x9e, 0x76, 0xea, 0xe8, 0x99, 0x1e, 0xf5, 0xec, 0xe4, 0x5a,
];

/// A drand network: who signs rounds, and when.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Drand {
    /// When its first round was, in seconds since 1970.
    pub genesis: u64,
    /// Seconds between two rounds.
    pub period: u64,
    /// Its public key: a point of G2, compressed.
    pub key: [u8; 96],
}

/// Quicknet of the League of Entropy, whose rounds the chain takes.
pub const QUICKNET: Drand = Drand { genesis: 1_692_803_367, period: 3, key: QUICKNET_KEY };

type Hasher =
    MapToCurveBasedHasher<G1Projective, DefaultFieldHasher<Sha256, 128>, WBMap<g1::Config>>;

/// Why nothing can be encrypted to a round.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct TimelockError {
    /// The step that failed.
    pub what: &'static str,
    /// What the library answered.
    pub why: String,
}

impl Drand {
    /// The round of a time in milliseconds since 1970, as the SDK counts: drand itself is one
    /// further. `None` before the network began.
    pub fn round_at(&self, unix_ms: u64) -> Option<u64> {
        (unix_ms / 1000).checked_sub(self.genesis)?.checked_div(self.period)
    }

    /// Encrypts a message to a round. Takes some 20 ms.
    ///
    /// # Errors
    /// When the network's key is not a point of its curve.
    pub fn encrypt(&self, message: &[u8], round: u64) -> Result<Vec<u8>, TimelockError> {
        let wrong = |what, why| TimelockError { what, why };
        let network = G2Affine::deserialize_compressed(&self.key[..])
            .map_err(|e| wrong("drand's public key", e.to_string()))?;
        let hasher = Hasher::new(DOMAIN).map_err(|e| wrong("hashing to G1", e.to_string()))?;
        let identity = hasher
            .hash(&sha256(&[&round.to_be_bytes()]))
            .map_err(|e| wrong("hashing to G1", e.to_string()))?;
        let (mut key, mut sigma, mut nonce) = ([0; 32], [0; 32], [0; 12]);
        [&mut key[..], &mut sigma, &mut nonce].into_iter().for_each(|b| OsRng.fill_bytes(b));
        let r = Fr::from_be_bytes_mod_order(&sha256(&[&sigma, &key]));
        let body = Aes256Gcm::new(&key.into())
            .encrypt(Nonce::from_slice(&nonce), message)
            .map_err(|e| wrong("encrypting", e.to_string()))?;
        let mut sealed = Vec::new();
        (G2Projective::generator() * r)
            .into_affine()
            .serialize_compressed(&mut sealed)
            .map_err(|e| wrong("a point of G2", e.to_string()))?;
        let shared = pairing(identity, (network.into_group() * r).into_affine())?;
        put(&mut sealed, &xor(&sigma, &shared));
        put(&mut sealed, &xor(&key, &sha256(&[&sigma])));
        let mut parts = Vec::new();
        put(&mut parts, &body);
        put(&mut parts, &nonce);
        put(&mut sealed, &parts);
        put(&mut sealed, CIPHER);
        Ok(sealed)
    }
}

/// The hash of a pairing's value.
fn pairing(p: G1Affine, q: G2Affine) -> Result<[u8; 32], TimelockError> {
    let mut bytes = Vec::new();
    let value = Bls12_381::pairing(p, q).0;
    value
        .serialize_compressed(&mut bytes)
        .map_err(|e| TimelockError { what: "a pairing's value", why: e.to_string() })?;
    Ok(sha256(&[&bytes]))
}

fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    parts.iter().fold(Sha256::new(), |hash, part| hash.chain_update(part)).finalize().into()
}

fn xor(a: &[u8; 32], b: &[u8; 32]) -> [u8; 32] {
    std::array::from_fn(|i| a[i] ^ b[i])
}

/// Bytes after their number.
fn put(all: &mut Vec<u8>, bytes: &[u8]) {
    all.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    all.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_follow_the_clock() {
        assert_eq!(QUICKNET.round_at(1_692_803_367_000), Some(0));
        assert_eq!(QUICKNET.round_at(1_692_803_369_999), Some(0));
        assert_eq!(QUICKNET.round_at(1_692_803_370_000), Some(1));
        assert_eq!(QUICKNET.round_at(1_692_803_366_999), None);
    }

    #[test]
    fn quicknet_is_the_network_of_the_vectors() {
        let vectors = crate::chain::tests::vectors("tlock_vectors.json");
        let network = &vectors["drand_quicknet"];
        assert_eq!(network["public_key"], hex::encode(QUICKNET.key));
        assert_eq!(network["genesis_time"], QUICKNET.genesis);
        assert_eq!(network["period_s"], QUICKNET.period);
    }

    #[test]
    fn ciphertexts_have_the_shape_of_the_official_ones_and_never_repeat() {
        let vectors = crate::chain::tests::vectors("tlock_vectors.json");
        for name in ["crv4_payload", "legacy_payload_spec293"] {
            let text = |field: &str| hex::decode(vectors[name][field].as_str().unwrap()).unwrap();
            let (plain, official) = (text("plaintext_hex"), text("inner_hex"));
            let ours = QUICKNET.encrypt(&plain, 1000).unwrap();
            assert_eq!(ours.len(), official.len());
            assert!(ours.ends_with(CIPHER));
            assert_ne!(ours, QUICKNET.encrypt(&plain, 1000).unwrap());
        }
        let none = Drand { key: [0; 96], ..QUICKNET };
        assert!(none.encrypt(b"", 1).unwrap_err().to_string().contains("drand's public key"));
    }
}
