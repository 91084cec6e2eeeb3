//! The routes of Targon's verifier container (4.2 to 4.4): a validator uses this process by
//! changing a URL. Several models are served, told apart by `model`.
//!
//! Whoever calls `/verify` is trusted, whoever gave the answer in it is not: `model`,
//! `request_type` and `request_params` are the caller's, and what is wrong with them is said to it
//! (`asked`); all of `output_sequence` is the peer's, and whatever is wrong with it is a
//! rejection (`sent`). `judge` brings both together.

mod asked;
mod body;
mod generate;
mod judge;
mod lead;
mod reply;
mod scan;
mod sent;

use crate::clock::Clock;
use crate::intake::translate::Defaults;
use crate::ops::pool::Pool;
use crate::server::door::access::observe;
use crate::server::error::ApiError;
use crate::server::operations::metrics::metrics;
use crate::server::operations::status;
use crate::server::registry::{Registry, Served, State as ModelState};
use crate::server::settings::{ApiKeys, Settings};
use crate::server::state::ServerState;
use crate::verify::{self, Verifier};
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use body::Bodies;
use reply::{Counts, detail};
use serde::Deserialize;
use serde_json::json;
use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tower_http::catch_panic::CatchPanicLayer;

/// Answers that wait or are verified at once; more are told to come back.
const REQUESTS_MAX: usize = 64;
/// Answers that are verified at once: each has a KV cache of its own, and they share all cores.
const RUNNING_MAX: usize = 2;

/// The service over the models of a registry.
#[derive(Clone)]
pub struct Service {
    state: ServerState,
    pool: Pool,
    bodies: Bodies,
    slots: Arc<Semaphore>,
    running: Arc<Semaphore>,
    counts: Counts,
    /// Bytes of the longest token of each model, once they were counted.
    longest: Arc<parking_lot::Mutex<HashMap<String, usize>>>,
}

impl Service {
    /// Over the models of `registry` as they become ready. Of `settings` only the limits count: the
    /// container has no keys, and no pages ask it.
    pub fn new(registry: Registry, settings: &Settings, clock: Clock, pool: &Pool) -> Self {
        let counts = Counts::default();
        let state = ServerState::new(registry, Defaults::TARGON, clock);
        let state = state.counting(Box::new(counts.clone()));
        let (keys, cors_origins) = (ApiKeys::default(), Vec::new());
        state.set(Settings { keys, cors_origins, limits: settings.limits });
        Self {
            state,
            // One account of compute time for all that is verified, beside the engines' own.
            pool: pool.separate(),
            bodies: Bodies::new(),
            slots: Arc::new(Semaphore::new(REQUESTS_MAX)),
            running: Arc::new(Semaphore::new(RUNNING_MAX)),
            counts,
            longest: Arc::default(),
        }
    }

    /// What drains when the process stops.
    pub fn state(&self) -> &ServerState {
        &self.state
    }

    /// The routes.
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
            .route("/verify", post(judge::verify))
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

    /// The model of that name; without a name the only one.
    fn model(&self, name: Option<&str>) -> Result<Served, ApiError> {
        self.state.registry().route(name, None).map(|routed| routed.served)
    }

    fn verifier(&self, served: &Served) -> Verifier {
        Verifier {
            model: Arc::clone(served.engine.model()),
            identity: Arc::clone(&served.identity),
            pool: self.pool.clone(),
            limits: verify::Limits::default(),
            context_max: served.engine.options().context_max,
        }
    }

    /// Bytes of the longest token of the model `name`.
    fn longest_token(&self, name: &str, served: &Served) -> usize {
        let mut known = self.longest.lock();
        *known.entry(name.to_owned()).or_insert_with(|| {
            let model = served.engine.model();
            let bytes = |id| model.tokenizer.bytes_of(id).len();
            (0..model.decoder.spec.vocab as u32).map(bytes).max().unwrap_or(0)
        })
    }

    /// Bytes that a body may have: the caller's part as for any server, and the longest answer that
    /// any model here can give, which fills its context with its longest token.
    fn body_bytes_max(&self) -> usize {
        let entries = self.state.registry().entries();
        let longest = entries.iter().filter_map(|entry| {
            let ModelState::Ready(served) = &entry.state else { return None };
            let token = self.longest_token(&entry.name, served);
            Some(sent::bytes_max(served.engine.options().context_max, token))
        });
        self.state.settings().limits.body_bytes.saturating_add(longest.max().unwrap_or(0))
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
    Ok(match served.engine.model().chat {
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
