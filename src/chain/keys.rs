//! Implements sr25519 keys as Substrate chains use them: hotkeys, their SS58 addresses, and
//! signatures.
//!
//! `Debug` does not print a secret, and a secret is wiped when it is dropped (by schnorrkel).
//! Signatures are randomised, so tests compare only the result of a verification.

use blake2::{Blake2b512, Digest};
use schnorrkel::{
    ExpansionMode, Keypair as Inner, MiniSecretKey, PublicKey, SecretKey, Signature, SignatureError,
};
use std::fmt;
use std::str::FromStr;
use zeroize::Zeroizing;

/// Signing context of Substrate.
const CONTEXT: &[u8] = b"substrate";
/// SS58 prefix of generic Substrate addresses, which Bittensor uses.
const PREFIX: u8 = 42;

/// A public key, written as its SS58 address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hotkey(pub [u8; 32]);

/// Why a text is not an address.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AddressError {
    /// Not base 58, or of another length.
    #[error("not an SS58 address")]
    Format,
    /// Another chain's prefix.
    #[error("an SS58 address of prefix {0}, expected 42")]
    Prefix(u8),
    /// A mistyped address.
    #[error("the checksum of the SS58 address does not match")]
    Checksum,
}

impl Hotkey {
    /// Whether `signature` is this key's over `message`.
    pub fn verify(&self, message: &[u8], signature: &[u8; 64]) -> bool {
        let (Ok(key), Ok(signature)) =
            (PublicKey::from_bytes(&self.0), Signature::from_bytes(signature))
        else {
            return false;
        };
        key.verify_simple(CONTEXT, message, &signature).is_ok()
    }
}

fn checksum(payload: &[u8]) -> [u8; 2] {
    let hash = Blake2b512::new().chain_update(b"SS58PRE").chain_update(payload).finalize();
    [hash[0], hash[1]]
}

impl fmt::Display for Hotkey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = vec![PREFIX];
        bytes.extend_from_slice(&self.0);
        bytes.extend_from_slice(&checksum(&bytes));
        f.write_str(&bs58::encode(bytes).into_string())
    }
}

impl fmt::Debug for Hotkey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Hotkey {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        // An address has 48 characters; anything much longer is not decoded at all.
        if text.len() > 64 {
            return Err(AddressError::Format);
        }
        let bytes = bs58::decode(text).into_vec().map_err(|_| AddressError::Format)?;
        if bytes.len() != 35 {
            return Err(AddressError::Format);
        }
        if bytes[0] != PREFIX {
            return Err(AddressError::Prefix(bytes[0]));
        }
        if checksum(&bytes[..33]) != bytes[33..] {
            return Err(AddressError::Checksum);
        }
        let mut key = [0; 32];
        key.copy_from_slice(&bytes[1..33]);
        Ok(Hotkey(key))
    }
}

/// A secret key with its public key.
#[derive(Clone)]
pub struct Keypair(Inner);

/// Bytes that cannot be read as a key pair.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PairError {
    /// The bytes cannot be read as a seed.
    #[error("not a seed: {0}")]
    Seed(SignatureError),
    /// Not an expanded secret.
    #[error("not a secret key: {0}")]
    Secret(SignatureError),
}

impl Keypair {
    /// From the 32 bytes of a seed.
    ///
    /// # Errors
    /// When they are not a seed.
    pub fn from_seed(seed: &[u8; 32]) -> Result<Self, PairError> {
        let mini = MiniSecretKey::from_bytes(seed).map_err(PairError::Seed)?;
        Ok(Self(mini.expand_to_keypair(ExpansionMode::Ed25519)))
    }

    /// From the 64 bytes of an expanded secret.
    ///
    /// # Errors
    /// When they are not a secret.
    pub fn from_secret(secret: &[u8; 64]) -> Result<Self, PairError> {
        let secret = SecretKey::from_bytes(secret).map_err(PairError::Secret)?;
        Ok(Self(secret.to_keypair()))
    }

    /// The 64 bytes of the expanded secret, as key files hold them.
    pub(super) fn to_secret(&self) -> Zeroizing<[u8; 64]> {
        Zeroizing::new(self.0.secret.to_bytes())
    }

    /// The public key, which is the hotkey's address.
    pub fn hotkey(&self) -> Hotkey {
        Hotkey(self.0.public.to_bytes())
    }

    /// A signature over `message`.
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign_simple(CONTEXT, message).to_bytes()
    }
}

impl fmt::Debug for Keypair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keypair({}, secret)", self.hotkey())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The well-known development account.
    const ALICE: &str = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY";
    const ALICE_SEED: &str = "e5be9a5092b81bca64be81d212e7f2f9eba183bb7a90954f7b76361f6edb5c0a";

    fn alice() -> Keypair {
        let seed: Vec<u8> = (0..32)
            .map(|i| u8::from_str_radix(&ALICE_SEED[2 * i..2 * i + 2], 16).unwrap())
            .collect();
        Keypair::from_seed(&seed.try_into().unwrap()).unwrap()
    }

    #[test]
    fn addresses_round_trip_and_mistakes_are_named() {
        assert_eq!(alice().hotkey().to_string(), ALICE);
        assert_eq!(ALICE.parse(), Ok(alice().hotkey()));
        let parse = |text: &str| text.parse::<Hotkey>().unwrap_err();
        assert_eq!(parse("5Grw"), AddressError::Format);
        assert_eq!(parse(&"5".repeat(10_000)), AddressError::Format);
        assert_eq!(parse(&ALICE.replace("zX", "zY")), AddressError::Checksum);
        let polkadot = "15oF4uVJwmo4TdGW7VfQxNLavjCXviqxT9S1MgbjMNHr6Sp5";
        assert_eq!(parse(polkadot), AddressError::Prefix(0));
    }

    #[test]
    fn signatures_verify_and_secrets_stay_mute() {
        let alice = alice();
        let signature = alice.sign(b"message");
        assert!(alice.hotkey().verify(b"message", &signature));
        assert!(!alice.hotkey().verify(b"massage", &signature));
        assert!(!Hotkey([0xff; 32]).verify(b"message", &signature));
        assert!(!alice.hotkey().verify(b"message", &[0xff; 64]));
        assert_eq!(format!("{alice:?}"), format!("Keypair({ALICE}, secret)"));
    }
}
