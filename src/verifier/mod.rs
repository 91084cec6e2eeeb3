//! Serves the routes of Targon's verifier container (4.2 to 4.4): a validator uses this process by
//! changing a URL. It serves several models, which `model` distinguishes.
//!
//! The caller of `/verify` is trusted, and the peer that gave the answer is not. `model`,
//! `request_type` and `request_params` come from the caller, who is told what is wrong with them
//! (`asked`). All of `output_sequence` comes from the peer, and any error in it is a rejection
//! (`sent`). `check` uses both.

mod asked;
mod body;
mod check;
mod generate;
mod lead;
mod reply;
mod scan;
mod sent;
mod service;

use crate::server::door::access::observe;
use crate::server::error::ApiError;
use crate::server::operations::metrics::metrics;
use crate::server::operations::status;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use reply::detail;
use serde::Deserialize;
use serde_json::json;
pub use service::Service;
use std::any::Any;
use tower_http::catch_panic::CatchPanicLayer;

impl Service {
    /// The routes of Targon's container.
    pub fn router(&self) -> Router {
        let shared = Router::new()
            .route("/health", get(status::health))
            .route("/health/decode", get(status::decode))
            .route("/ready", get(status::ready))
            .route("/version", get(status::version))
            .route("/load", get(status::load))
            .route("/metrics", get(metrics))
            .with_state(self.state.clone());
        Router::new()
            .route("/", get(root))
            .route("/endpoints", get(endpoints))
            .route("/metadata", get(metadata))
            .route("/generate", post(generate::generate))
            .route("/verify", post(check::verify))
            .with_state(self.clone())
            .merge(shared)
            .fallback(|| async { detail(StatusCode::NOT_FOUND, "Not Found") })
            .method_not_allowed_fallback(|| async {
                detail(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed")
            })
            .layer(DefaultBodyLimit::disable()) // `body` has ours
            .layer(CatchPanicLayer::custom(on_panic))
            .layer(from_fn_with_state(self.state.clone(), observe))
    }
}

/// Answers for a handler that panics; without `verified` it counts neither way.
fn on_panic(_: Box<dyn Any + Send>) -> Response {
    let error = json!({"error": "a handler failed", "cause": "INTERNAL_ERROR"});
    (StatusCode::INTERNAL_SERVER_ERROR, Json(error)).into_response()
}

/// The container answers here once its model is loaded, which is its health check.
async fn root(State(service): State<Service>) -> Response {
    let is_ready = service.state.registry().entries().iter().all(|e| e.state.word() == "ready");
    let status = match is_ready && !service.state.is_draining() {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, Json(json!(["", status.as_u16()]))).into_response()
}

#[derive(Deserialize)]
struct ModelQuery {
    model: Option<String>,
}

fn endpoint_names(service: &Service, query: &ModelQuery) -> Result<Vec<&'static str>, ApiError> {
    let served = service.model(query.model.as_deref())?;
    Ok(match served.engine.text().chat {
        Some(_) => vec!["completion", "chat"],
        None => vec!["completion"],
    })
}

/// A model that is not here is the caller's mistake, one that is not ready yet is not.
fn no_model(e: ApiError) -> Response {
    let status = if e.status.is_server_error() { e.status } else { StatusCode::BAD_REQUEST };
    (status, Json(json!({"error": e.message}))).into_response()
}

async fn endpoints(State(service): State<Service>, Query(query): Query<ModelQuery>) -> Response {
    endpoint_names(&service, &query).map_or_else(no_model, |names| Json(names).into_response())
}

async fn metadata(State(service): State<Service>, Query(query): Query<ModelQuery>) -> Response {
    let names = endpoint_names(&service, &query);
    names.map_or_else(no_model, |n| Json(json!({"endpoints": n})).into_response())
}
