//! Serves running engines over HTTP: OpenAI routes with Targon's rules.
//!
//! [`router`] makes the routes (tests call them without a socket), [`serve`](listen::serve) runs
//! them on a listener until it is told to stop, then drains. Requests pass the [`door`]; handlers
//! read them ([`intake`](crate::intake)), submit them to the engine, and send what
//! [`reply`](crate::reply) writes ([`generate`], [`stream`]).

pub mod connections;
pub mod door;
pub mod error;
pub mod generate;
pub mod handlers;
mod keeping;
pub mod layers;
pub mod listen;
pub mod openapi;
pub mod operations;
pub mod page;
mod refusals;
pub mod registry;
pub mod settings;
pub mod state;
pub mod stream;
pub mod subnet;
pub mod tokens;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::{self, from_fn_with_state};
use axum::routing::{get, post};
use door::access;
use layers::{as_error_objects, catch_panics, cors, tidy_path};
use operations::{metrics, status};
use state::ServerState;
use tower::util::MapRequest;

/// The routes of the API and for operators.
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
