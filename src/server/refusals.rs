//! Lists the refusals of the API, for its description.

use crate::wire::openai::ErrorBody;
use utoipa::IntoResponses;

/// What any route of the API may answer in place of what was asked for.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "describes the answers")]
pub(super) enum Refusals {
    /// The request is wrong; `param` names the field.
    #[response(status = 400)]
    BadRequest(ErrorBody),
    /// The server has keys and the request has none of them.
    #[response(status = 401)]
    Unauthorized(ErrorBody),
    /// There is no such model.
    #[response(status = 404)]
    NotFound(ErrorBody),
    /// The body took too long.
    #[response(status = 408)]
    Timeout(ErrorBody),
    /// The body has more bytes than the server takes.
    #[response(status = 413)]
    TooLarge(ErrorBody),
    /// The body has a `Content-Encoding`: it must come as it is.
    #[response(status = 415)]
    Compressed(ErrorBody),
    /// The queue is full: try again after `Retry-After` seconds.
    #[response(status = 429)]
    Busy(ErrorBody),
    /// The engine failed.
    #[response(status = 500)]
    Failed(ErrorBody),
    /// The model is loading, or the server is about to stop.
    #[response(status = 503)]
    Unavailable(ErrorBody),
}
