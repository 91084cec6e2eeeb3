//! The HTTP surface over running engines: OpenAI routes with Targon's rules.
//!
//! [`router`] makes the routes (tests call them without a socket), [`serve`](listen::serve) runs
//! them on a listener until it is told to stop, then drains. Requests pass [`access`]; handlers
//! read them ([`intake`](crate::intake)), submit them to the engine, and send what
//! [`reply`](crate::reply) writes ([`generate`], [`stream`]).

pub mod access;
pub mod connections;
pub mod error;
pub mod gate;
pub mod generate;
pub mod handlers;
pub mod listen;
pub mod metrics;
pub mod openapi;
pub mod page;
pub mod registry;
pub mod settings;
pub mod state;
pub mod status;
pub mod stream;
pub mod subnet;
pub mod tokens;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{HeaderValue, StatusCode, Uri};
use axum::middleware::{self, Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use error::ApiError;
use state::ServerState;
use tower::util::MapRequest;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{Any, CorsLayer};

/// The routes.
pub fn router(state: ServerState) -> Router {
    let router = Router::new()
        .route("/v1/chat/completions", post(handlers::chat))
        .route("/v1/completions", post(handlers::completions))
        .route("/v1/models", get(status::models))
        .route("/v1/models/{*id}", get(status::model))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/tokenizer_info", get(tokens::tokenizer_info))
        .route("/health", get(status::health))
        .route("/health/decode", get(status::decode))
        .route("/ready", get(status::ready))
        .route("/version", get(status::version))
        .route("/load", get(status::load))
        .route("/targon/status", get(subnet::subnet_status))
        .route("/metrics", get(metrics::metrics))
        .merge(openapi::viewer())
        .route("/", get(page::index))
        .route("/page/style.css", get(page::style))
        .route("/page/page.js", get(page::script))
        .fallback(status::no_route)
        .method_not_allowed_fallback(status::wrong_method)
        .layer(DefaultBodyLimit::disable()) // `limit_body` is ours
        .layer(from_fn_with_state(state.clone(), access::limit_body))
        .layer(from_fn_with_state(state.clone(), access::authenticate))
        .layer(middleware::from_fn(as_error_objects))
        .layer(catch_panics());
    let origins = state.settings().cors_origins.clone();
    let router = if origins.is_empty() { router } else { router.layer(cors(&origins)) };
    let router = router.layer(from_fn_with_state(state.clone(), access::observe));
    // Around the routes, because what it changes decides which of them is meant.
    let router = MapRequest::new(router.with_state(state), tidy_path);
    Router::new().fallback_service(router)
}

/// Takes `//v1/models/` for `/v1/models`: base URLs come with and without a slash at their end.
/// The API's viewer has relative links, for which its own slash matters.
fn tidy_path(mut request: Request) -> Request {
    let path = request.uri().path();
    let parts = path.split('/').filter(|part| !part.is_empty()).flat_map(|part| ["/", part]);
    let mut tidy: String = parts.collect();
    if tidy.is_empty() || (path.ends_with('/') && tidy.starts_with(access::OPEN_VIEWER)) {
        tidy.push('/');
    }
    if tidy == path {
        return request;
    }
    if let Some(query) = request.uri().query() {
        tidy.push('?');
        tidy.push_str(query);
    }
    let mut parts = request.uri().clone().into_parts();
    parts.path_and_query = tidy.parse().ok();
    if let Ok(uri) = Uri::from_parts(parts) {
        *request.uri_mut() = uri;
    }
    request
}

type OnPanic = fn(Box<dyn std::any::Any + Send>) -> Response;

/// Answers for a handler that panics.
fn catch_panics() -> CatchPanicLayer<OnPanic> {
    CatchPanicLayer::custom(|_| {
        ApiError::with_status(StatusCode::INTERNAL_SERVER_ERROR, "a handler failed").into_response()
    })
}

/// Lets pages of other origins ask; `*` stands for all.
fn cors(origins: &[String]) -> CorsLayer {
    let layer =
        CorsLayer::new().allow_methods(Any).allow_headers(Any).expose_headers([access::REQUEST_ID]);
    match origins.iter().any(|o| o == "*") {
        true => layer.allow_origin(Any),
        false => {
            let values = origins.iter().filter_map(|o| HeaderValue::from_str(o).ok());
            layer.allow_origin(values.collect::<Vec<_>>())
        }
    }
}

/// Failures that axum itself answers get the error object too.
async fn as_error_objects(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let status = response.status();
    let is_json = response
        .headers()
        .get(axum::http::header::CONTENT_TYPE)
        .is_some_and(|t| t.as_bytes().starts_with(b"application/json"));
    if is_json || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let message = status.canonical_reason().unwrap_or("refused").to_lowercase();
    ApiError::with_status(status, message).into_response()
}
