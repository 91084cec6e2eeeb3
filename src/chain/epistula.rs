//! Signs and checks requests by Epistula v2: HTTP requests signed by a hotkey, as Targon's programs
//! exchange them (protocol 2).
//!
//! The signed message is `sha256hex(body).uuid.timestamp.signed_for`, with an empty last part where
//! there is no receiver; the signature is sr25519 in the context `substrate`. Method, path and the
//! other headers are not covered.

use super::keys::{Hotkey, Keypair};
use sha2::{Digest, Sha256};

/// `Epistula-Version`: always [`VERSION`].
pub const HEADER_VERSION: &str = "epistula-version";
/// `Epistula-Timestamp`: Unix time in milliseconds.
pub const HEADER_TIMESTAMP: &str = "epistula-timestamp";
/// `Epistula-Uuid`: names the request.
pub const HEADER_UUID: &str = "epistula-uuid";
/// `Epistula-Signed-By`: the sender's address.
pub const HEADER_SIGNED_BY: &str = "epistula-signed-by";
/// `Epistula-Signed-For`: the receiver's address.
pub const HEADER_SIGNED_FOR: &str = "epistula-signed-for";
/// `Epistula-Request-Signature`: `0x` and 128 hexadecimal digits.
pub const HEADER_SIGNATURE: &str = "epistula-request-signature";
/// `Epistula-Secret-Signature-0` to `-2`: sent, never relied on (implementations differ).
const HEADERS_SECRET: [&str; 3] =
    ["epistula-secret-signature-0", "epistula-secret-signature-1", "epistula-secret-signature-2"];
/// The version of the protocol that is spoken here.
pub const VERSION: &str = "2";
/// How far a timestamp may lie from now, either way.
pub const WINDOW_MS: u64 = 8_000;
/// Characters of a uuid: the canonical form has 36.
const UUID_CHARS_MAX: usize = 64;
/// Length of the windows that secret signatures name.
const SECRET_WINDOW_MS: u64 = 10_000;

/// What is signed, besides the body.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Envelope<'a> {
    /// Unix time in milliseconds.
    pub timestamp_ms: u64,
    /// Names the request.
    pub uuid: &'a str,
    /// Who must receive it.
    pub signed_for: Option<Hotkey>,
}

impl Envelope<'_> {
    /// The bytes that are signed: its fields, and the hash of the body.
    pub fn message(&self, body: &[u8]) -> Vec<u8> {
        let receiver = self.signed_for.map(|key| key.to_string()).unwrap_or_default();
        let digest = hex::encode(Sha256::digest(body));
        format!("{digest}.{}.{}.{receiver}", self.uuid, self.timestamp_ms).into_bytes()
    }

    /// The headers of a request with this body.
    pub fn sign(&self, signer: &Keypair, body: &[u8]) -> Vec<(&'static str, String)> {
        let signed = |message: &[u8]| format!("0x{}", hex::encode(signer.sign(message)));
        let mut headers = vec![
            (HEADER_VERSION, VERSION.to_owned()),
            (HEADER_TIMESTAMP, self.timestamp_ms.to_string()),
            (HEADER_UUID, self.uuid.to_owned()),
            (HEADER_SIGNED_BY, signer.hotkey().to_string()),
            (HEADER_SIGNATURE, signed(&self.message(body))),
        ];
        if let Some(receiver) = self.signed_for {
            headers.push((HEADER_SIGNED_FOR, receiver.to_string()));
            let window = self.timestamp_ms.div_ceil(SECRET_WINDOW_MS);
            let windows = [window.saturating_sub(1), window, window + 1];
            for (name, window) in HEADERS_SECRET.into_iter().zip(windows) {
                headers.push((name, signed(format!("{window}.{receiver}").as_bytes())));
            }
        }
        headers
    }

    /// Whether `signature` is `signer`'s over this envelope and `body`, plain or wrapped in
    /// `<Bytes>` as wallets in browsers do.
    pub fn verify(&self, signer: &Hotkey, body: &[u8], signature: &[u8; 64]) -> bool {
        let message = self.message(body);
        let wrapped = || [b"<Bytes>", message.as_slice(), b"</Bytes>"].concat();
        signer.verify(&message, signature) || signer.verify(&wrapped(), signature)
    }
}

/// A timestamp header: a decimal integer, as the original reads it (spaces and a plus are allowed).
pub fn timestamp(text: &str) -> Option<u64> {
    let digits = text.trim();
    let digits = digits.strip_prefix('+').unwrap_or(digits);
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())?
}

/// A uuid header: short visible text without the dots that separate the signed parts.
pub fn uuid(text: &str) -> Option<&str> {
    let is_fit = (1..=UUID_CHARS_MAX).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_graphic() && b != b'.');
    is_fit.then_some(text)
}

/// A signature header.
pub fn signature(text: &str) -> Option<[u8; 64]> {
    let mut bytes = [0; 64];
    hex::decode_to_slice(text.strip_prefix("0x")?, &mut bytes).ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::tests::vectors;
    use proptest::prelude::*;

    #[test]
    fn vectors_of_an_independent_implementation_verify() {
        for vector in vectors("auth_vectors.json")["epistula_v2"].as_array().unwrap() {
            let header = |name: &str| vector["headers"][name].as_str();
            let body = hex::decode(vector["body_hex"].as_str().unwrap()).unwrap();
            let envelope = Envelope {
                timestamp_ms: timestamp(header("Epistula-Timestamp").unwrap()).unwrap(),
                uuid: uuid(header("Epistula-Uuid").unwrap()).unwrap(),
                signed_for: header("Epistula-Signed-For").map(|key| key.parse().unwrap()),
            };
            let message = vector["message"].as_str().unwrap();
            assert_eq!(String::from_utf8(envelope.message(&body)).unwrap(), message);
            let signer: Hotkey = header("Epistula-Signed-By").unwrap().parse().unwrap();
            let signature = signature(header("Epistula-Request-Signature").unwrap()).unwrap();
            assert!(envelope.verify(&signer, &body, &signature));
            assert!(!envelope.verify(&signer, b"another", &signature));
            let later = Envelope { timestamp_ms: envelope.timestamp_ms + 1, ..envelope };
            assert!(!later.verify(&signer, &body, &signature));
        }
    }

    #[test]
    fn what_is_signed_verifies_plain_and_wrapped() {
        let signer = Keypair::from_seed(&[7; 32]).unwrap();
        let receiver = Keypair::from_seed(&[8; 32]).unwrap().hotkey();
        let envelope = Envelope { timestamp_ms: 5, uuid: "u", signed_for: Some(receiver) };
        let headers = envelope.sign(&signer, b"body");
        let header = |name| &headers.iter().find(|(n, _)| *n == name).unwrap().1;
        let sent = signature(header(HEADER_SIGNATURE)).unwrap();
        assert!(envelope.verify(&signer.hotkey(), b"body", &sent));
        assert!(!envelope.verify(&receiver, b"body", &sent));
        let wrapped = [b"<Bytes>".as_slice(), &envelope.message(b"body"), b"</Bytes>"].concat();
        assert!(envelope.verify(&signer.hotkey(), b"body", &signer.sign(&wrapped)));
        assert_eq!(headers.len(), 9);
        let unbound = Envelope { signed_for: None, ..envelope };
        assert_eq!(unbound.sign(&signer, b"body").len(), 5);
    }

    #[test]
    fn headers_are_read_strictly() {
        assert_eq!(timestamp(" 0123 "), Some(123));
        assert_eq!(timestamp("+7"), Some(7));
        for bad in ["", " ", "-1", "1.0", "0x10", "1e3", "１", "99999999999999999999999"] {
            assert_eq!(timestamp(bad), None, "{bad}");
        }
        for bad in ["", "a b", "a.b", "é", &"x".repeat(65)] {
            assert_eq!(uuid(bad), None, "{bad}");
        }
        for bad in ["", "0x", &"ab".repeat(64), &format!("0x{}", "zz".repeat(64))] {
            assert_eq!(signature(bad), None, "{bad}");
        }
        assert_eq!(signature(&format!("0x{}", "Ab".repeat(64))), Some([0xab; 64]));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,200}") {
            let _ = (timestamp(&text), uuid(&text), signature(&text));
        }

        #[test]
        fn timestamps_survive_python_style_padding(value in any::<u64>(), spaces in 0..4_usize) {
            let pad = " ".repeat(spaces);
            prop_assert_eq!(timestamp(&format!("{pad}{value}{pad}")), Some(value));
        }
    }
}
