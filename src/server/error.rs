//! Writes failures as OpenAI error objects with the right status.

use crate::engine::SubmitError;
use crate::engine::output::Fault;
use crate::engine::scheduler::Refusal;
pub use crate::intake::error::echo;
use crate::intake::error::{CONTEXT_LENGTH, FaultKind, RequestError};
use crate::wire::openai::{ErrorBody, ErrorCode, ErrorObject};
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

/// Why a request got no answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ApiError {
    /// The status of the response.
    pub status: StatusCode,
    /// A sentence: rule, then fact.
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
    /// The word by which clients know this case; the status where there is none.
    pub code: Option<&'static str>,
}

impl ApiError {
    /// An error with this status.
    pub fn with_status(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None }
    }

    /// A field is wrong.
    pub fn field(field: &str, what: impl Into<String>) -> Self {
        let message = format!("`{field}` {}", what.into());
        Self { param: Some(field.into()), ..Self::with_status(StatusCode::BAD_REQUEST, message) }
    }

    /// The request as a whole is wrong.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::with_status(StatusCode::BAD_REQUEST, message)
    }

    /// There is no such thing.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::with_status(StatusCode::NOT_FOUND, message)
    }

    /// A failure that may pass: 503.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::with_status(StatusCode::SERVICE_UNAVAILABLE, message)
    }

    /// The error as it is sent, in a response or in a stream.
    pub fn body(&self) -> ErrorBody {
        let kind = match self.status {
            StatusCode::NOT_FOUND => "NotFoundError",
            StatusCode::UNAUTHORIZED => "AuthenticationError",
            StatusCode::TOO_MANY_REQUESTS => "RateLimitError",
            StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailableError",
            status if status.is_server_error() => "InternalServerError",
            _ => "BadRequestError",
        };
        let error = ErrorObject {
            message: self.message.clone(),
            kind,
            param: self.param.clone(),
            code: self.code.map_or(ErrorCode::Status(self.status.as_u16()), ErrorCode::Word),
        };
        ErrorBody { error }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let is_busy =
            matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
        if is_busy {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<RequestError> for ApiError {
    fn from(e: RequestError) -> Self {
        let error = match e.kind {
            FaultKind::Wrong => ApiError::bad_request(e.message),
            FaultKind::ContextLength => {
                Self { code: Some(CONTEXT_LENGTH), ..ApiError::bad_request(e.message) }
            }
            FaultKind::Busy => ApiError::with_status(StatusCode::TOO_MANY_REQUESTS, e.message),
            FaultKind::Ours => ApiError::with_status(StatusCode::INTERNAL_SERVER_ERROR, e.message),
        };
        Self { param: e.param, ..error }
    }
}

impl From<Fault> for ApiError {
    fn from(fault: Fault) -> Self {
        let status = match fault {
            Fault::Grammar(_) => StatusCode::BAD_REQUEST,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        ApiError::with_status(status, fault.to_string())
    }
}

impl From<SubmitError> for ApiError {
    fn from(e: SubmitError) -> Self {
        match e {
            SubmitError::Invalid(e) => RequestError::from(e).into(),
            SubmitError::Fault(fault) => fault.into(),
            SubmitError::Refused(
                refusal @ (Refusal::EngineFull { .. }
                | Refusal::OwnerFull { .. }
                | Refusal::QueueFull { .. }),
            ) => ApiError::with_status(StatusCode::TOO_MANY_REQUESTS, refusal.to_string()),
            SubmitError::Refused(refusal) => ApiError::bad_request(refusal.to_string()),
        }
    }
}
