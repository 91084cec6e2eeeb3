//! Answers `/generate`: writes text for a validator's own prompts.

use super::Service;
use super::asked::understand;
use super::reply::{VerifierRefusal, again_later};
use crate::intake::error::echo;
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};

#[derive(Deserialize)]
struct Generate {
    model: Option<String>,
    messages: Vec<Value>,
    #[serde(default)]
    sampling_params: Map<String, Value>,
}

/// `POST /generate`; null where the text cannot be had, as in the container.
pub(super) async fn generate(
    State(service): State<Service>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    match generated(&service, &headers, body).await {
        Ok(text) => Json(json!({"text": text})).into_response(),
        Err(VerifierRefusal::Error(status, why)) => {
            tracing::warn!("/generate: {why}");
            again_later((status, Json(json!({"text": null}))).into_response())
        }
        Err(refusal) => refusal.into_response(),
    }
}

async fn generated(
    service: &Service,
    headers: &HeaderMap,
    body: Body,
) -> Result<String, VerifierRefusal> {
    if service.state.is_draining() {
        return Err(VerifierRefusal::closing());
    }
    let limits = service.state.settings().limits;
    let bounds = (limits.body_bytes, limits.body_time);
    let held = service.bodies.read(headers, body, bounds).await?;
    let _in_flight = service.state.begin().map_err(|_| VerifierRefusal::closing())?;
    let bytes = held.bytes.as_deref().ok_or_else(|| {
        let what = format!("the body must have at most {} bytes", limits.body_bytes);
        VerifierRefusal::detail(StatusCode::PAYLOAD_TOO_LARGE, what)
    })?;
    let request: Generate = serde_json::from_slice(bytes)
        .map_err(|e| VerifierRefusal::field("value_error", &[], &echo(&e.to_string())))?;
    let served = service
        .model(request.model.as_deref())
        .map_err(|e| VerifierRefusal::unscored(e.message))?;
    let is_chat = served.engine.text().chat.is_some();
    let mut params = request.sampling_params;
    match is_chat {
        true => params.insert("messages".into(), request.messages.into()),
        false => params.insert("prompt".into(), lines(&request.messages).into()),
    };
    let (state, path) = (&service.state, "sampling_params");
    let surroundings = (state.entropy(), state.clock().unix_ms());
    let request = understand(&served, is_chat, params, path, surroundings).await?;
    let generation = served.engine.submit(request);
    let generation = generation.map_err(|e| VerifierRefusal::unscored(e.to_string()))?;
    let abort = service.state.abort_token();
    tokio::select! {
        ended = generation.collect() => match ended {
            Ok(ended) => Ok(ended.text()),
            Err(fault) => Err(VerifierRefusal::unscored(fault.to_string())),
        },
        () = abort.cancelled() => Err(VerifierRefusal::closing()),
    }
}

/// A conversation for a model without a template.
fn lines(messages: &[Value]) -> String {
    let line = |m: &Value| {
        let word = |key: &str| m[key].as_str().unwrap_or_default().to_owned();
        format!("{}: {}\n", word("role"), word("content"))
    };
    let lines: String = messages.iter().map(line).collect();
    format!("{lines}\nResponse: ")
}
