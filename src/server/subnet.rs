//! The routes of a subnet's miner, behind its [`gate`](super::gate).

use super::access;
use super::gate::report::Asked;
use super::gate::{Caller, Gate, guard};
use super::handlers;
use super::registry::{Served, State as ModelState};
use super::state::ServerState;
use super::status;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Extension, State};
use axum::http::StatusCode;
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
        .layer(super::catch_panics())
        .layer(from_fn_with_state(state.clone(), access::observe))
        .with_state(state)
}

/// `GET /models`: the models that answer, in the shape in which this validator speaks of them.
async fn models(
    State(state): State<ServerState>,
    Extension(gate): Extension<Gate>,
    Extension(caller): Extension<Caller>,
) -> Json<Value> {
    let entries = state.registry().entries();
    let ready = entries.iter().filter_map(|e| match &e.state {
        ModelState::Ready(served) if !served.engine.is_dead() => Some((&e.name, &**served)),
        _ => None,
    });
    if gate.asked(&caller.hotkey).is_some_and(|asked| asked.is_map) {
        // Protocol 5 wants queries a second; what is known is how many run at once.
        let each = |(name, served): (&String, &Served)| {
            (name.clone(), json!(served.engine.options().sequences_max))
        };
        return Json(Value::Object(ready.map(each).collect::<Map<_, _>>()));
    }
    Json(ready.map(|(name, _)| name.as_str()).collect())
}

/// `POST /models`: what a validator wants served.
async fn note_models(
    State(state): State<ServerState>,
    Extension(gate): Extension<Gate>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Response {
    match Asked::read(&body, state.clock().unix_ms()) {
        Ok(asked) => {
            tracing::info!(validator = %caller.hotkey, models = ?asked.models, "wants served");
            gate.note_models(caller.hotkey, asked);
            Json("").into_response()
        }
        Err(rule) => (StatusCode::BAD_REQUEST, Json(json!({"detail": rule}))).into_response(),
    }
}

/// `GET /targon/status`: how the miner stands on its subnet, for its operator.
pub async fn subnet_status(State(state): State<ServerState>) -> Response {
    match state.gate() {
        Some(gate) => Json(gate.status()).into_response(),
        None => {
            let what = "this server is no subnet miner: it was started without --wallet.hotkey";
            super::error::ApiError::not_found(what).into_response()
        }
    }
}
