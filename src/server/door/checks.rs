//! Identifies the signer of a request: the checks of Targon's miner (protocol 1.3) in its order and
//! with its messages. Two of its faults are corrected: it crashed on some headers, and accepted
//! some requests twice.

use super::{Gate, Refused, SignedOutcome};
use crate::chain::btauth::{self, Age};
use crate::chain::epistula::{self, WINDOW_MS};
use crate::chain::keys::Hotkey;
use axum::http::{HeaderMap, Method, StatusCode, Uri};

/// A request whose signature is still to be checked, which needs its body.
pub struct Claimed {
    /// Who says to have signed it.
    pub signer: Hotkey,
    /// What names it among the signer's requests.
    pub name: String,
    signature: [u8; 64],
    kind: Kind,
}

enum Kind {
    Epistula { timestamp_ms: u64 },
    Btauth { method: String, path: String, nonce: u64 },
}

fn bad(outcome: SignedOutcome, detail: &str) -> Refused {
    Refused::new(StatusCode::BAD_REQUEST, outcome, detail)
}

fn malformed(detail: impl Into<String>) -> Refused {
    Refused::new(StatusCode::BAD_REQUEST, SignedOutcome::BadRequest, detail)
}

/// The only value of a header, as text.
fn header<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, Refused> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(malformed(format!("Header {name} is given more than once")));
    }
    let text = value.to_str().map_err(|_| malformed(format!("Header {name} is not text")))?;
    Ok(Some(text))
}

impl Claimed {
    /// Reads and checks the headers, all that can be checked before the body.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn read(
        gate: &Gate,
        headers: &HeaderMap,
        method: &Method,
        uri: &Uri,
    ) -> Result<Self, Refused> {
        let has = |name: &str| headers.contains_key(name);
        match has(btauth::HEADER_VERSION) && !has(epistula::HEADER_VERSION) {
            true => Self::btauth(gate, headers, method, uri),
            false => Self::epistula(gate, headers),
        }
    }

    fn epistula(gate: &Gate, headers: &HeaderMap) -> Result<Self, Refused> {
        if header(headers, epistula::HEADER_VERSION)? != Some(epistula::VERSION) {
            return Err(malformed("Unknown Epistula version"));
        }
        let now = gate.now_ms();
        let receiver = header(headers, epistula::HEADER_SIGNED_FOR)?;
        if receiver != Some(gate.own().to_string().as_str()) {
            return Err(malformed("Bad Request, message is not intended for self"));
        }
        let signer = header(headers, epistula::HEADER_SIGNED_BY)?;
        let signer = gate.member(signer)?;
        let signature = header(headers, epistula::HEADER_SIGNATURE)?;
        let signature = signature.and_then(epistula::signature);
        let signature = signature.ok_or_else(|| malformed("Invalid Signature"))?;
        let timestamp = header(headers, epistula::HEADER_TIMESTAMP)?;
        let timestamp_ms = timestamp.and_then(epistula::timestamp);
        let timestamp_ms = timestamp_ms.ok_or_else(|| malformed("Invalid timestamp"))?;
        let uuid = header(headers, epistula::HEADER_UUID)?.and_then(epistula::uuid);
        let name = uuid.ok_or_else(|| malformed("Invalid uuid"))?.to_owned();
        let claimed = Self { signer, name, signature, kind: Kind::Epistula { timestamp_ms } };
        claimed.check_age(now)?;
        Ok(claimed)
    }

    fn btauth(
        gate: &Gate,
        headers: &HeaderMap,
        method: &Method,
        uri: &Uri,
    ) -> Result<Self, Refused> {
        if header(headers, btauth::HEADER_VERSION)? != Some(btauth::VERSION) {
            return Err(malformed("Unknown btauth version"));
        }
        if header(headers, btauth::HEADER_CRYPTO)?.is_some_and(|c| c != btauth::SCHEME) {
            return Err(malformed("Only sr25519 signatures are accepted"));
        }
        let receiver = header(headers, btauth::HEADER_RECEIVER)?;
        if receiver != Some(gate.own().to_string().as_str()) {
            return Err(malformed("Bad Request, message is not intended for self"));
        }
        let nonce = header(headers, btauth::HEADER_NONCE)?.and_then(epistula::timestamp);
        let nonce = nonce.ok_or_else(|| malformed("Invalid nonce"))?;
        let signature = header(headers, btauth::HEADER_SIGNATURE)?.and_then(epistula::signature);
        let signature = signature.ok_or_else(|| malformed("Invalid Signature"))?;
        let signer = gate.member(header(headers, btauth::HEADER_HOTKEY)?)?;
        let path = uri.path_and_query().map_or("/", |p| p.as_str()).to_owned();
        let method = method.as_str().to_owned();
        let name = nonce.to_string();
        let claimed = Self { signer, name, signature, kind: Kind::Btauth { method, path, nonce } };
        claimed.check_age(gate.now_ms())?;
        Ok(claimed)
    }

    /// Whether the request may still be served at `now`. Asked before the body is read and again
    /// when it has come, for a slow body could outlast the memory of the first time.
    ///
    /// # Errors
    /// When it is too old or from the future.
    pub fn check_age(&self, now: u64) -> Result<(), Refused> {
        let age = match self.kind {
            Kind::Epistula { timestamp_ms } => {
                Age::within((WINDOW_MS, WINDOW_MS), timestamp_ms, now)
            }
            Kind::Btauth { nonce, .. } => Age::of(nonce, now),
        };
        match age {
            Age::Fresh => Ok(()),
            Age::Stale => Err(bad(SignedOutcome::Stale, "Request is too stale")),
            Age::Ahead => Err(bad(SignedOutcome::Stale, "Request is dated too far in the future")),
        }
    }

    /// Whether the signature is the signer's over this body.
    pub fn is_signed(&self, own: Hotkey, body: &[u8]) -> bool {
        match &self.kind {
            Kind::Epistula { timestamp_ms } => {
                let (timestamp_ms, uuid) = (*timestamp_ms, self.name.as_str());
                let envelope = epistula::Envelope { timestamp_ms, uuid, signed_for: Some(own) };
                envelope.verify(&self.signer, body, &self.signature)
            }
            Kind::Btauth { method, path, nonce } => {
                let (nonce, sender, receiver) = (*nonce, self.signer, Some(own));
                let envelope = btauth::RequestEnvelope { method, path, nonce, sender, receiver };
                envelope.verify(body, &self.signature)
            }
        }
    }
}
