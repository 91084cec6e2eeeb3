//! The description of the API at `/api-doc/openapi.json`, and a viewer at `/docs`.

use super::{handlers, metrics, status, tokens};
use crate::wire::openai::ErrorBody;
use utoipa::{IntoResponses, OpenApi, ToSchema};
use utoipa_swagger_ui::SwaggerUi;

/// Bodies of `/tokenize`.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, clippy::large_enum_variant, reason = "describes what `/tokenize` reads")]
pub(super) enum TokenizeForm {
    Text(tokens::TokenizeText),
    Chat(crate::wire::openai::ChatRequest),
}

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
    /// The body is too large.
    #[response(status = 413)]
    TooLarge(ErrorBody),
    /// The body is compressed.
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

/// The API.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "targon-engine",
        description = "OpenAI routes with token ids, true \
        log-probabilities, powv and hidden-state proofs."
    ),
    paths(
        handlers::chat,
        handlers::completions,
        tokens::tokenize,
        tokens::detokenize,
        tokens::tokenizer_info,
        status::models,
        status::model,
        status::health,
        status::decode,
        status::ready,
        status::version,
        status::load,
        metrics::metrics,
    )
)]
pub struct Api;

/// The description and its viewer, which works offline.
pub(super) fn viewer() -> SwaggerUi {
    SwaggerUi::new("/docs").url("/api-doc/openapi.json", Api::openapi())
}
