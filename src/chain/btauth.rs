//! Signs and checks requests by `btauth/1`, the signatures of the Bittensor SDK 11. They are
//! accepted beside Epistula.
//!
//! Unlike Epistula it covers the method and the path. The signed bytes are lines: `btauth/1`, the
//! scheme, the method, path and query, `sha256hex(body)`, the nonce, the sender's address, and the
//! receiver's or `-`.

use super::keys::{Hotkey, Keypair};
use sha2::{Digest, Sha256};

/// `X-Bittensor-Version`: always [`VERSION`].
pub const HEADER_VERSION: &str = "x-bittensor-version";
/// `X-Bittensor-Hotkey`: the sender's address.
pub const HEADER_HOTKEY: &str = "x-bittensor-hotkey";
/// `X-Bittensor-Receiver`: the receiver's address.
pub const HEADER_RECEIVER: &str = "x-bittensor-receiver";
/// `X-Bittensor-Nonce`: Unix time in nanoseconds.
pub const HEADER_NONCE: &str = "x-bittensor-nonce";
/// `X-Bittensor-Signature`: `0x` and hexadecimal digits.
pub const HEADER_SIGNATURE: &str = "x-bittensor-signature";
/// `X-Bittensor-Crypto`: the scheme, where it is not sr25519.
pub const HEADER_CRYPTO: &str = "x-bittensor-crypto";
/// The version of the protocol that is spoken here.
pub const VERSION: &str = "1";
/// The only scheme that hotkeys of subnets use.
pub const SCHEME: &str = "sr25519";
/// How old a nonce may be.
pub const AGE_MAX_MS: u64 = 10_000;
/// How far ahead it may be.
pub const AHEAD_MAX_MS: u64 = 2_000;

/// What is signed, besides the body.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RequestEnvelope<'a> {
    /// GET, POST, ...
    pub method: &'a str,
    /// Path and query.
    pub path: &'a str,
    /// Unix time in nanoseconds.
    pub nonce: u64,
    /// The hotkey that sends the request.
    pub sender: Hotkey,
    /// The hotkey that the request is for.
    pub receiver: Option<Hotkey>,
}

impl RequestEnvelope<'_> {
    /// The bytes that are signed: its fields, and the hash of the body.
    pub fn message(&self, body: &[u8]) -> Vec<u8> {
        let Self { method, path, nonce, sender, receiver } = self;
        let digest = hex::encode(Sha256::digest(body));
        let (method, nonce) = (method.to_uppercase(), nonce.to_string());
        let receiver = receiver.map_or("-".to_owned(), |key| key.to_string());
        let sender = sender.to_string();
        ["btauth/1", SCHEME, &method, path, &digest, &nonce, &sender, &receiver]
            .join("\n")
            .into_bytes()
    }

    /// The headers of a request with this body.
    pub fn sign(&self, signer: &Keypair, body: &[u8]) -> Vec<(&'static str, String)> {
        let signature = signer.sign(&self.message(body));
        let mut headers = vec![
            (HEADER_VERSION, VERSION.to_owned()),
            (HEADER_HOTKEY, self.sender.to_string()),
            (HEADER_NONCE, self.nonce.to_string()),
            (HEADER_SIGNATURE, format!("0x{}", hex::encode(signature))),
        ];
        headers.extend(self.receiver.map(|key| (HEADER_RECEIVER, key.to_string())));
        headers
    }

    /// Whether `signature` is the sender's over this envelope and `body`.
    pub fn verify(&self, body: &[u8], signature: &[u8; 64]) -> bool {
        self.sender.verify(&self.message(body), signature)
    }
}

/// How the time of a signature lies to the present.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Age {
    /// Within the window.
    Fresh,
    /// It was signed before the window.
    Stale,
    /// It names a time after the window.
    Ahead,
}

impl Age {
    /// Of a nonce at `now_ms`.
    pub fn of(nonce: u64, now_ms: u64) -> Self {
        Self::within((AGE_MAX_MS, AHEAD_MAX_MS), nonce / 1_000_000, now_ms)
    }

    /// Of something signed at `sent_ms`, which may be so old and so far ahead, in milliseconds.
    pub fn within((age_max, ahead_max): (u64, u64), sent_ms: u64, now_ms: u64) -> Self {
        match sent_ms {
            _ if sent_ms.saturating_add(age_max) < now_ms => Age::Stale,
            _ if sent_ms > now_ms.saturating_add(ahead_max) => Age::Ahead,
            _ => Age::Fresh,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::epistula::signature;
    use crate::chain::tests::vectors;

    #[test]
    fn vectors_of_the_sdk_verify() {
        for vector in vectors("auth_vectors.json")["btauth"].as_array().unwrap() {
            let header = |name: &str| vector["headers"][name].as_str();
            let text = |name: &str| vector[name].as_str().unwrap();
            let body = hex::decode(text("body_hex")).unwrap();
            let envelope = RequestEnvelope {
                method: text("method"),
                path: text("path"),
                nonce: header("X-Bittensor-Nonce").unwrap().parse().unwrap(),
                sender: text("caller").parse().unwrap(),
                receiver: header("X-Bittensor-Receiver").map(|key| key.parse().unwrap()),
            };
            assert_eq!(String::from_utf8(envelope.message(&body)).unwrap(), text("payload"));
            let sent = signature(header("X-Bittensor-Signature").unwrap()).unwrap();
            assert!(envelope.verify(&body, &sent));
            assert!(!envelope.verify(b"another", &sent));
            let elsewhere = RequestEnvelope { path: "/elsewhere", ..envelope.clone() };
            assert!(!elsewhere.verify(&body, &sent));
            let now = vector["verify_now_ns"].as_u64().unwrap() / 1_000_000;
            let age = |now| Age::of(envelope.nonce, now);
            assert_eq!((age(now), age(now + 9_000)), (Age::Fresh, Age::Fresh));
            assert_eq!((age(now + 9_001), age(now - 3_001)), (Age::Stale, Age::Ahead));
        }
    }

    #[test]
    fn what_is_signed_verifies() {
        let signer = Keypair::from_seed(&[7; 32]).unwrap();
        let sender = signer.hotkey();
        let envelope = RequestEnvelope {
            method: "POST",
            path: "/v1",
            nonce: 1,
            sender,
            receiver: Some(sender),
        };
        let headers = envelope.sign(&signer, b"x");
        let sent = &headers.iter().find(|(name, _)| *name == HEADER_SIGNATURE).unwrap().1;
        assert!(envelope.verify(b"x", &signature(sent).unwrap()));
        assert_eq!(headers.len(), 5);
    }
}
