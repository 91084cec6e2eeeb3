//! Answers the routes that tell how the server and its models are.

use crate::ops::CANON;
use crate::server::error::{ApiError, echo};
use crate::server::refusals::Refusals;
use crate::server::registry::{ModelEntry, ModelState};
use crate::server::state::ServerState;
use crate::wire::openai::ErrorBody;
use crate::wire::openai::response::ModelCard;
use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// `GET /v1/models`.
#[utoipa::path(
    get,
    path = "/v1/models",
    responses((status = 200, description = "All models", body = Object), Refusals)
)]
pub async fn models(State(state): State<ServerState>) -> Json<Value> {
    let cards: Vec<ModelCard> =
        state.registry().entries().iter().map(|e| card(&state, e)).collect();
    Json(json!({"object": "list", "data": cards}))
}

/// `GET /v1/models/{id}`.
#[utoipa::path(
    get,
    path = "/v1/models/{id}",
    params(("id" = String, Path, description = "Its name")),
    responses((status = 200, body = ModelCard), Refusals)
)]
pub async fn model(
    State(state): State<ServerState>,
    Path(name): Path<String>,
) -> Result<Json<ModelCard>, ApiError> {
    let entries = state.registry().entries();
    let entry = entries.iter().find(|e| e.name == name).ok_or_else(|| {
        ApiError::not_found(format!("the model `{}` does not exist", echo(&name)))
    })?;
    Ok(Json(card(&state, entry)))
}

fn card(state: &ServerState, entry: &ModelEntry) -> ModelCard {
    let engine = match &entry.state {
        ModelState::Ready(served) => Some(&served.engine),
        ModelState::Loading | ModelState::Failed(_) => None,
    };
    ModelCard {
        id: entry.name.clone(),
        object: "model",
        created: state.clock().unix_ms() / 1000,
        owned_by: "targon-engine",
        status: entry.state.word(),
        max_model_len: engine.map(|e| e.options().context_max),
        dtype: engine.map(|e| e.info().dtype.to_string()),
        revision: entry.revision.clone(),
        error: failure(entry),
    }
}

fn failure(entry: &ModelEntry) -> Option<String> {
    match &entry.state {
        ModelState::Failed(why) => Some(why.clone()),
        ModelState::Loading | ModelState::Ready(_) => None,
    }
}

/// `GET /health`: the process runs.
#[utoipa::path(
    get,
    path = "/health",
    responses((status = 200, description = "The process is alive", body = Object))
)]
pub async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// `GET /version`.
#[utoipa::path(
    get,
    path = "/version",
    responses((status = 200, description = "The version and the numeric canon", body = Object))
)]
pub async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION"), "canon": CANON}))
}

/// `GET /load`: requests that run.
#[utoipa::path(
    get,
    path = "/load",
    responses((status = 200, description = "How many requests run", body = Object))
)]
pub async fn load(State(state): State<ServerState>) -> Json<Value> {
    Json(json!({"server_load": state.in_flight()}))
}

/// `GET /health/decode`: every engine that has work makes progress.
#[utoipa::path(
    get,
    path = "/health/decode",
    responses((status = 200,
        description = "Every engine with work makes progress", body = Object),
        (status = 503, description = "One does not", body = Object))
)]
pub async fn decode(State(state): State<ServerState>) -> Response {
    let limit = state.settings().limits.stall_time;
    let mut is_fine = true;
    let mut models = Map::new();
    for entry in state.registry().entries() {
        let ModelState::Ready(served) = &entry.state else { continue };
        let stalled = served.engine.stalled_for();
        let hangs = served.hangs(limit);
        is_fine &= !hangs;
        let status = json!({
            "status": if hangs { "stalled" } else { "ok" },
            "steps": served.engine.stats().snapshot().steps,
            "seconds_since_step": stalled.map(|s| s.as_secs_f64()),
        });
        models.insert(entry.name, status);
    }
    let status = if is_fine { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(json!({"decoding": is_fine, "models": models}))).into_response()
}

/// Which model a readiness question is about.
#[derive(Deserialize)]
pub struct ReadyQuery {
    model: Option<String>,
}

/// `GET /ready`: all models answer, or the one that was asked about.
#[utoipa::path(
    get,
    path = "/ready",
    params(("model" = Option<String>, Query, description = "Which model")),
    responses((status = 200,
        description = "All models answer, or the one that was asked about", body = Object),
        (status = 503, description = "They do not",
        body = Object), (status = 404, body = ErrorBody), (status = 400, body = ErrorBody))
)]
pub async fn ready(State(state): State<ServerState>, Query(query): Query<ReadyQuery>) -> Response {
    let entries = state.registry().entries();
    let asked: Vec<&ModelEntry> = match &query.model {
        Some(name) => entries.iter().filter(|e| e.name == *name).collect(),
        None => entries.iter().collect(),
    };
    if asked.is_empty() && query.model.is_some() {
        return ApiError::not_found("no such model").into_response();
    }
    let is_ready = !state.is_draining() && asked.iter().all(|e| e.state.word() == "ready");
    let describe =
        |e: &&ModelEntry| (e.name.clone(), json!({"status": e.state.word(), "error": failure(e)}));
    let models: Map<String, Value> = asked.iter().map(describe).collect();
    let body = Json(json!({
        "ready": is_ready, "draining": state.is_draining(), "models": models,
    }));
    let status = if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, body).into_response()
}

/// Any other path.
pub async fn no_route() -> ApiError {
    ApiError::not_found("no such route")
}

/// A known path with the wrong method.
pub async fn wrong_method() -> ApiError {
    ApiError::with_status(StatusCode::METHOD_NOT_ALLOWED, "this route does not take that method")
}
