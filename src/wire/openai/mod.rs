//! Defines the OpenAI HTTP interface with Targon's extensions, as serde types.
//!
//! Requests are lenient where clients are known to be loose (a boolean where an integer belongs, a
//! string where a list does, `16.0` where an integer does) and keep unknown fields for the server
//! to count. Responses are exact.

mod loose;
pub mod request;
pub mod response;
pub mod tools;

pub use request::{ChatRequest, Common, CompletionRequest, Content, Message, Prompt};
pub use response::{ErrorBody, ErrorCode, ErrorObject, Usage};

/// JSON has no infinity: log-probabilities below this are written as it.
pub const LOGPROB_MIN: f64 = -9999.0;

/// A log-probability as JSON can hold it.
pub fn json_logprob(logprob: f64) -> f64 {
    if logprob.is_finite() { logprob.max(LOGPROB_MIN) } else { LOGPROB_MIN }
}
