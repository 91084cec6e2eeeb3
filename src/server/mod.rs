//! The HTTP surface over running engines: OpenAI routes with Targon's rules.
//!
//! [`router`] makes the routes (tests call them without a socket), [`serve`] runs them on a
//! listener until it is told to stop, then drains. Handlers parse and check ([`translate`]), submit
//! to the engine, and write what comes back ([`generate`], [`mod@format`]).

pub mod constraint;
pub mod error;
pub mod format;
pub mod generate;
pub mod handlers;
pub mod prompt;
pub mod proof;
pub mod registry;
pub mod state;
pub mod stream;
pub mod tools;
pub mod translate;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use error::ApiError;
use state::ServerState;
use std::future::Future;
use std::time::Duration;
use tokio::net::TcpListener;
use tower_http::catch_panic::CatchPanicLayer;

/// Bytes of a request body.
pub const BODY_BYTES_MAX: usize = 8 << 20;
/// How long answers may still be written once all requests have ended.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// The routes.
pub fn router(state: ServerState) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(handlers::chat))
        .route("/v1/completions", post(handlers::completions))
        .route("/v1/models", get(handlers::models))
        .route("/v1/models/{*id}", get(handlers::model))
        .route("/health", get(handlers::health))
        .route("/ready", get(handlers::ready))
        .fallback(handlers::no_route)
        .method_not_allowed_fallback(handlers::wrong_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn(as_error_objects))
        .layer(CatchPanicLayer::custom(|_: Box<dyn std::any::Any + Send>| {
            ApiError::with_status(StatusCode::INTERNAL_SERVER_ERROR, "a handler failed")
                .into_response()
        }))
        .with_state(state)
}

/// Failures that axum itself answers (a body too large, say) get the error object too.
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
    let message = match status {
        StatusCode::PAYLOAD_TOO_LARGE => {
            format!("the body must have at most {BODY_BYTES_MAX} bytes")
        }
        _ => status.canonical_reason().unwrap_or("refused").to_lowercase(),
    };
    ApiError::with_status(status, message).into_response()
}

/// Serves until `stop` completes, then refuses new requests, lets running ones end for up to
/// `drain_timeout`, and aborts the rest.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    listener: TcpListener,
    state: ServerState,
    stop: impl Future<Output = ()> + Send + 'static,
    drain_timeout: Duration,
) -> std::io::Result<()> {
    let draining = state.clone();
    let (closed, close) = tokio::sync::oneshot::channel::<()>();
    let drained = async move {
        stop.await;
        drain(&draining, drain_timeout).await;
        // The receiver is gone only if serving has already failed.
        let _ = closed.send(());
    };
    let serving = axum::serve(listener, router(state)).with_graceful_shutdown(drained);
    let close = async {
        if close.await.is_ok() {
            tokio::time::sleep(CLOSE_TIMEOUT).await;
        } else {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        outcome = serving => outcome,
        () = close => Ok(()),
    }
}

async fn drain(state: &ServerState, timeout: Duration) {
    state.drain();
    tracing::info!(requests = state.in_flight(), "draining");
    let idle = async {
        while state.in_flight() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if tokio::time::timeout(timeout, idle).await.is_err() {
        tracing::warn!(requests = state.in_flight(), "aborting what still runs");
        state.abort();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
