//! Defines what an operator sets, and may change while the server runs.

use axum::http::{HeaderMap, header};
use sha2::{Digest, Sha256};
use std::fmt;
use std::time::Duration;
use subtle::{Choice, ConstantTimeEq};

/// Settings of a running server; a reload replaces them as a whole.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Settings {
    /// The keys that open the API.
    pub keys: ApiKeys,
    /// What one client may cost.
    pub limits: HttpLimits,
    /// Origins whose pages may ask; read once, when the server starts.
    pub cors_origins: Vec<String>,
}

/// Limits on connections and bodies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HttpLimits {
    /// Bytes of a request body.
    pub body_bytes: usize,
    /// Connections that one client address may hold open at once.
    pub connections_per_address: usize,
    /// For a request's head to arrive, and between requests of a connection.
    pub header_time: Duration,
    /// For a request's body to arrive.
    pub body_time: Duration,
    /// For a client to take what is sent, at any point.
    pub write_time: Duration,
    /// Without a step of a busy engine, until `/health/decode` says that it hangs.
    pub stall_time: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            body_bytes: 8 << 20,
            connections_per_address: 1024,
            header_time: Duration::from_secs(30),
            body_time: Duration::from_secs(30),
            write_time: Duration::from_secs(30),
            stall_time: Duration::from_secs(60),
        }
    }
}

/// Keys that open the API; none means that it is open. Only their hashes are kept.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct ApiKeys(Vec<[u8; 32]>);

impl ApiKeys {
    /// From the keys themselves.
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a str>) -> Self {
        Self(keys.into_iter().map(|key| Sha256::digest(key.as_bytes()).into()).collect())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the API is open.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a request carries one of them. The time it takes does not tell how much of a key
    /// was right.
    pub fn admit(&self, headers: &HeaderMap) -> bool {
        self.is_empty() || self.owner(headers).is_some()
    }

    /// The hash of the key that a request carries, where it is one of them.
    pub fn owner(&self, headers: &HeaderMap) -> Option<[u8; 32]> {
        let (scheme, key) = headers.get(header::AUTHORIZATION)?.as_bytes().split_at_checked(7)?;
        if !scheme.eq_ignore_ascii_case(b"bearer ") {
            return None;
        }
        let hash: [u8; 32] = Sha256::digest(key.trim_ascii()).into();
        let is_known = self.0.iter().fold(Choice::from(0), |found, k| found | k.ct_eq(&hash));
        bool::from(is_known).then_some(hash)
    }
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keys", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[test]
    fn a_known_bearer_key_opens_and_nothing_else_does() {
        let keys = ApiKeys::new(["first", "second"]);
        let admits = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
            keys.admit(&headers)
        };
        assert!(admits("Bearer first") && admits("bearer second "));
        for wrong in ["Bearer firs", "Bearer firstt", "first", "Basic first", "Bearer", "Bearer "] {
            assert!(!admits(wrong), "{wrong}");
        }
        assert!(!keys.admit(&HeaderMap::new()));
        assert!(ApiKeys::default().admit(&HeaderMap::new()));
        assert_eq!(format!("{keys:?}"), "2 keys");
        let mut headers = HeaderMap::new();
        let owner = |headers: &HeaderMap| keys.owner(headers);
        assert_eq!(owner(&headers), None);
        headers.insert(header::AUTHORIZATION, HeaderValue::from_static("Bearer first"));
        let first = owner(&headers).unwrap();
        headers.insert(header::AUTHORIZATION, HeaderValue::from_static("Bearer second"));
        assert_ne!(owner(&headers).unwrap(), first);
    }
}
