//! Names the outcome of a signed request, and makes the response to a refused one.

use super::bodies::BodyError;
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

/// The outcome of a signed request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum SignedOutcome {
    /// It was let in.
    Accepted,
    /// A header is missing or malformed, or the request is for somebody else.
    BadRequest,
    /// The signer is not a member, or denied.
    UnknownSigner,
    /// The signer has too little stake.
    LowStake,
    /// Too old, or from the future.
    Stale,
    /// The signature is not the signer's.
    BadSignature,
    /// It was served already.
    Replayed,
    /// The signer asks too often.
    Limited,
    /// Too many of the signer's requests wait, or one has waited too long.
    Busy,
}

impl SignedOutcome {
    /// The word in metrics.
    pub fn word(self) -> &'static str {
        match self {
            SignedOutcome::Accepted => "accepted",
            SignedOutcome::BadRequest => "bad_request",
            SignedOutcome::UnknownSigner => "unknown_signer",
            SignedOutcome::LowStake => "low_stake",
            SignedOutcome::Stale => "stale",
            SignedOutcome::BadSignature => "bad_signature",
            SignedOutcome::Replayed => "replayed",
            SignedOutcome::Limited => "limited",
            SignedOutcome::Busy => "busy",
        }
    }
}

/// A refused request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refused {
    /// The status of the response.
    pub status: StatusCode,
    /// Why, for the counters.
    pub outcome: SignedOutcome,
    /// Why, for the caller.
    pub detail: String,
    /// Seconds after which it may work.
    pub retry_after: Option<u64>,
}

impl Refused {
    /// With a status and a message.
    pub fn new(status: StatusCode, outcome: SignedOutcome, detail: impl Into<String>) -> Self {
        Self { status, outcome, detail: detail.into(), retry_after: None }
    }
}

impl From<BodyError> for Refused {
    fn from(error: BodyError) -> Self {
        let (status, retry_after) = match error {
            BodyError::Large(_) => (StatusCode::PAYLOAD_TOO_LARGE, None),
            BodyError::Slow { .. } | BodyError::Late(_) => (StatusCode::REQUEST_TIMEOUT, None),
            BodyError::Crowded => (StatusCode::SERVICE_UNAVAILABLE, Some(1)),
            BodyError::Waiting => (StatusCode::TOO_MANY_REQUESTS, Some(1)),
            BodyError::Broken(_) => (StatusCode::BAD_REQUEST, None),
        };
        let outcome = match error {
            BodyError::Waiting => SignedOutcome::Busy,
            _ => SignedOutcome::BadRequest,
        };
        Self { retry_after, ..Self::new(status, outcome, error.to_string()) }
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        // The shape in which validators expect it.
        let mut response = (self.status, Json(json!({"detail": self.detail}))).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
