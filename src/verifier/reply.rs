//! Writes the responses of the routes, with the container's messages, and counts them.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use serde_json::{Value, json};
use std::fmt;

/// The word for a failure that the peer did not cause.
const INTERNAL_ERROR: &str = "INTERNAL_ERROR";

/// What `/verify` says about an answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum VerifyReply {
    /// No rule is broken.
    Verified,
    /// A rule is broken.
    Rejected {
        /// The rule that the answer breaks, and what it has.
        error: String,
        /// The word that Targon's container has for the rule.
        cause: &'static str,
    },
}

impl IntoResponse for VerifyReply {
    fn into_response(self) -> Response {
        Json(match self {
            Self::Verified => json!({"verified": true}),
            Self::Rejected { error, cause } => {
                json!({"verified": false, "error": error, "cause": cause})
            }
        })
        .into_response()
    }
}

/// Why a request says nothing about an answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum VerifierRefusal {
    /// The caller sent no request, and FastAPI says so.
    Detail(StatusCode, Value),
    /// Nothing can be said. Without `verified` the caller counts the answer neither way.
    Error(StatusCode, String),
}

impl VerifierRefusal {
    /// A request that cannot be read, in a sentence.
    pub(super) fn detail(status: StatusCode, what: String) -> Self {
        Self::Detail(status, what.into())
    }

    /// A field of the caller's that is missing or wrong: FastAPI's `type`, the path to it, and what
    /// it must be.
    pub(super) fn field(kind: &str, path: &[&str], what: &str) -> Self {
        Self::fields(vec![fault(kind, path, what)])
    }

    /// Several such fields.
    pub(super) fn fields(faults: Vec<Value>) -> Self {
        Self::Detail(StatusCode::UNPROCESSABLE_ENTITY, faults.into())
    }

    /// The answer cannot be checked.
    pub(super) fn unscored(why: impl Into<String>) -> Self {
        Self::Error(StatusCode::OK, why.into())
    }

    /// There is too much to do.
    pub(super) fn busy(why: String) -> Self {
        Self::Error(StatusCode::TOO_MANY_REQUESTS, why)
    }

    /// What the log says.
    pub(super) fn why(&self) -> String {
        match self {
            Self::Detail(status, what) => format!("{status}: {what}"),
            Self::Error(_, why) => why.clone(),
        }
    }

    /// The process is about to stop.
    pub(super) fn closing() -> Self {
        Self::Error(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down".into())
    }
}

/// One field in FastAPI's form.
pub(super) fn fault(kind: &str, path: &[&str], what: &str) -> Value {
    let path: Vec<&str> = std::iter::once("body").chain(path.iter().copied()).collect();
    json!({"type": kind, "loc": path, "msg": what})
}

/// FastAPI's form of an error that concerns no field.
pub(super) fn detail(status: StatusCode, what: &str) -> Response {
    (status, Json(json!({"detail": what}))).into_response()
}

impl IntoResponse for VerifierRefusal {
    fn into_response(self) -> Response {
        match self {
            Self::Detail(status, what) => (status, Json(json!({"detail": what}))).into_response(),
            Self::Error(status, why) => {
                let error = json!({"error": why, "cause": INTERNAL_ERROR});
                again_later((status, Json(error)).into_response())
            }
        }
    }
}

/// Says when to come back, where that makes sense.
pub(super) fn again_later(mut response: Response) -> Response {
    let is_busy = [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE];
    if is_busy.contains(&response.status()) {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

/// How many answers were verified, rejected, and neither.
#[derive(Clone, Default, Debug)]
pub(super) struct VerificationCounts(Family<Labels, Counter>);

#[derive(Clone, PartialEq, Eq, Hash, EncodeLabelSet, Debug)]
struct Labels {
    verdict: &'static str,
    cause: &'static str,
}

impl VerificationCounts {
    /// Counts an answer.
    pub(super) fn count(&self, outcome: &Result<VerifyReply, VerifierRefusal>) {
        let (verdict, cause) = match outcome {
            Ok(VerifyReply::Verified) => ("verified", ""),
            Ok(VerifyReply::Rejected { cause, .. }) => ("rejected", *cause),
            Err(VerifierRefusal::Error(..)) => ("unscored", INTERNAL_ERROR),
            Err(VerifierRefusal::Detail(..)) => ("refused", ""),
        };
        self.0.get_or_create(&Labels { verdict, cause }).inc();
    }
}

impl Collector for VerificationCounts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (name, help) = ("targon_verifications", "Answers by verdict and cause");
        self.0.encode(encoder.encode_descriptor(name, help, None, self.0.metric_type())?)
    }
}
