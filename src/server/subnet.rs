//! Defines the routes of a subnet's miner, behind its [`Gate`].

use super::door::access;
use super::door::models::{ListShape, WantedModels};
use super::door::{Caller, Gate, guard};
use super::handlers;
use super::operations::status;
use super::registry::{ModelState, Served};
use super::state::ServerState;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Extension, State};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Map, Value, json};

/// The signed routes. Only `GET /` answers without a signature.
pub fn router(state: ServerState, gate: Gate) -> Router {
    let models = get(models).post(note_models);
    let signed = Router::new()
        .route("/v1/chat/completions", post(handlers::chat))
        .route("/v1/completions", post(handlers::completions))
        .route("/models", models)
        .fallback(status::no_route)
        .method_not_allowed_fallback(status::wrong_method)
        .layer(DefaultBodyLimit::disable()) // the gate's
        .layer(Extension(gate.clone()))
        .layer(from_fn_with_state((state.clone(), gate), guard));
    Router::new()
        .route("/", get(|| async { StatusCode::OK }))
        .merge(signed)
        .layer(super::layers::catch_panics())
        .layer(from_fn_with_state(state.clone(), access::observe))
        .with_state(state)
}

/// `GET /models`: the models that answer, in the shape in which this validator last asked for some.
async fn models(
    State(state): State<ServerState>,
    Extension(gate): Extension<Gate>,
    Extension(caller): Extension<Caller>,
) -> Json<Value> {
    let shape = gate.asked(&caller.hotkey).map_or(ListShape::List, |asked| asked.shape);
    Json(served(&state, shape))
}

/// `POST /models`: what a validator wants served. Versions from 5.0 on read what is served out of
/// the answer.
async fn note_models(
    State(state): State<ServerState>,
    Extension(gate): Extension<Gate>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    match WantedModels::read(&headers, &body, state.clock().unix_ms()) {
        Ok(asked) => {
            tracing::info!(validator = %caller.hotkey, models = ?asked.models, "wants served");
            let shape = asked.shape;
            gate.note_models(caller.hotkey, asked);
            Json(served(&state, shape)).into_response()
        }
        Err(rule) => {
            (StatusCode::BAD_REQUEST, Json(json!({"detail": rule.to_string()}))).into_response()
        }
    }
}

/// The models that answer.
fn served(state: &ServerState, shape: ListShape) -> Value {
    let entries = state.registry().entries();
    let ready = entries.iter().filter_map(|e| match &e.state {
        ModelState::Ready(served) if !served.engine.is_dead() => Some((&e.name, &**served)),
        _ => None,
    });
    match shape {
        ListShape::List => ready.map(|(name, _)| name.as_str()).collect(),
        ListShape::Map => {
            // They want queries a second; what is known is how many run at once.
            let each = |(name, served): (&String, &Served)| {
                (name.clone(), json!(served.engine.options().sequences_max))
            };
            Value::Object(ready.map(each).collect::<Map<_, _>>())
        }
    }
}

/// `GET /targon/status`: how the miner stands on its subnet, for its operator.
pub async fn subnet_status(State(state): State<ServerState>) -> Response {
    match state.gate() {
        Some(gate) => Json(gate.status()).into_response(),
        None => {
            let what = "this server is not a subnet miner: it was started without --wallet.hotkey";
            super::error::ApiError::not_found(what).into_response()
        }
    }
}
