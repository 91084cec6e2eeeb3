//! Describes the API at `/api-doc/openapi.json`, with a viewer at `/docs`.

use super::operations::{metrics, status};
use super::{handlers, tokens};
use utoipa::OpenApi;
use utoipa_swagger_ui::SwaggerUi;

/// All routes and types of the open API, as an OpenAPI document.
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
