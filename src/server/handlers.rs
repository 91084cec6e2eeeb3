//! The routes of the open server.

use super::constraint::{Tooling, grammar};
use super::error::{ApiError, echo};
use super::generate::{Endpoint, Job, run};
use super::prompt::{chat_prompt, completion_prompts};
use super::proof::Prover;
use super::registry::{Entry, Routed, Served, State as ModelState};
use super::state::ServerState;
use super::translate::{Ask, COMPLETION_TOKENS_DEFAULT, Report, refuse_unsupported, report, whole};
use crate::models::chat::ChatTemplate;
use crate::wire::openai::request::{Common, Logprobs};
use crate::wire::openai::response::ModelCard;
use crate::wire::openai::{ChatRequest, CompletionRequest};
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// Characters of a client's name for a request.
const REQUEST_ID_MAX: usize = 128;
/// The header by which Targon's validators say which model they mean.
const MODEL_HEADER: &str = "x-targon-model";

/// `POST /v1/chat/completions`.
pub async fn chat(
    State(state): State<ServerState>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, ApiError> {
    let request: ChatRequest = parse(&body)?;
    let common = &request.common;
    let routed = admit(&state, &headers, common)?;
    let report = report(common, request.top_logprobs, state.defaults())?;
    let max_tokens = match whole("max_completion_tokens", request.max_completion_tokens, 1)? {
        Some(max) => Some(max),
        None => whole("max_tokens", common.max_tokens, 1)?,
    };
    let served = &routed.served;
    let model = served.engine.model();
    let prover = prover(&state, served, common)?;
    let tooling = Tooling::new(&request, model.chat.as_ref().and_then(ChatTemplate::tool_format))?;
    let prompts = vec![chat_prompt(model, &request)?];
    let grammar = grammar(model.clone(), common, &tooling).await?;
    let ask = Ask { served, prover: prover.as_ref(), common, max_tokens, grammar, report: &report };
    let requests = ask.requests(prompts)?;
    let job = Job {
        endpoint: Endpoint::Chat,
        n: requests.len(),
        requests,
        report,
        prover,
        tools: tooling.parser(),
        stream: common.stream.unwrap_or(false),
        request_id: request_id(common)?,
        routed,
    };
    run(&state, job).await
}

/// `POST /v1/completions`.
pub async fn completions(
    State(state): State<ServerState>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, ApiError> {
    let mut request: CompletionRequest = parse(&body)?;
    // Here `true` has always meant one alternative.
    if request.common.logprobs == Some(Logprobs::Flag(true)) {
        request.common.logprobs = Some(Logprobs::Count(1));
    }
    let common = &request.common;
    let routed = admit(&state, &headers, common)?;
    refuse_completion_fields(&request)?;
    let report =
        Report { echo: request.echo == Some(true), ..report(common, None, state.defaults())? };
    // Nothing need be generated where the prompt is what is asked about.
    let low = i64::from(!report.echo && report.prompt_logprobs.is_none());
    let max_tokens = whole("max_tokens", common.max_tokens, low)?;
    let max_tokens = Some(max_tokens.unwrap_or(COMPLETION_TOKENS_DEFAULT));
    let served = &routed.served;
    let model = served.engine.model();
    let prover = prover(&state, served, common)?;
    let prompts = completion_prompts(model, &request.prompt)?;
    let count = prompts.len();
    let grammar = grammar(model.clone(), common, &Tooling::default()).await?;
    let ask = Ask { served, prover: prover.as_ref(), common, max_tokens, grammar, report: &report };
    let requests = ask.requests(prompts)?;
    let job = Job {
        endpoint: Endpoint::Completion,
        n: requests.len() / count,
        requests,
        report,
        prover,
        tools: None,
        stream: common.stream.unwrap_or(false),
        request_id: request_id(common)?,
        routed,
    };
    run(&state, job).await
}

/// The client's own name for the request.
fn request_id(common: &Common) -> Result<Option<String>, ApiError> {
    let is_fine = |id: &str| {
        (1..=REQUEST_ID_MAX).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
    };
    match &common.request_id {
        Some(id) if !is_fine(id) => {
            let what = format!("must have 1 to {REQUEST_ID_MAX} visible ASCII characters");
            Err(ApiError::field("request_id", what))
        }
        id => Ok(id.clone()),
    }
}

fn refuse_completion_fields(request: &CompletionRequest) -> Result<(), ApiError> {
    if request.suffix.as_ref().is_some_and(|s| !s.is_empty()) {
        return Err(ApiError::field("suffix", "is not supported by this server"));
    }
    let n = request.common.n.unwrap_or(1);
    match request.best_of {
        Some(best_of) if best_of != n => {
            Err(ApiError::field("best_of", format!("must equal n = {n}, got {best_of}")))
        }
        _ => Ok(()),
    }
}

/// Checks that hold for both endpoints, and the model.
fn admit(state: &ServerState, headers: &HeaderMap, common: &Common) -> Result<Routed, ApiError> {
    let header = match headers.get(MODEL_HEADER) {
        Some(value) => Some(value.to_str().map_err(|_| {
            ApiError::bad_request(format!("the header {MODEL_HEADER} must be visible ASCII"))
        })?),
        None => None,
    };
    let routed = state.registry().route(common.model.as_deref(), header)?;
    refuse_unsupported(&common.unknown)?;
    state.note_unknown(&common.unknown);
    Ok(routed)
}

/// What proves the request's choices, where it asks for that.
fn prover(
    state: &ServerState,
    served: &Served,
    common: &Common,
) -> Result<Option<Prover>, ApiError> {
    let dtype = served.engine.model().decoder.dtype;
    common.proof.as_ref().map(|p| Prover::new(p, dtype, state.signer())).transpose()
}

/// A JSON body, with errors that name the field.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let parsed = serde_path_to_error::deserialize(&mut deserializer).map_err(|e| {
        let path = e.path().to_string();
        let message = echo(&format!("the body is not a valid request: {}", e.inner()));
        let param = (path != "." && !e.inner().is_syntax()).then_some(path);
        ApiError { param, ..ApiError::bad_request(message) }
    })?;
    deserializer.end().map_err(|e| ApiError::bad_request(format!("the body goes on: {e}")))?;
    Ok(parsed)
}

/// `GET /v1/models`.
pub async fn models(State(state): State<ServerState>) -> Json<Value> {
    let cards: Vec<ModelCard> =
        state.registry().entries().iter().map(|e| card(&state, e)).collect();
    Json(json!({"object": "list", "data": cards}))
}

/// `GET /v1/models/{id}`.
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

fn card(state: &ServerState, entry: &Entry) -> ModelCard {
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
        dtype: engine.map(|e| e.model().decoder.dtype.to_string()),
        revision: entry.revision.clone(),
        error: match &entry.state {
            ModelState::Failed(why) => Some(why.clone()),
            ModelState::Loading | ModelState::Ready(_) => None,
        },
    }
}

/// `GET /health`: the process is alive.
pub async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// Which model a readiness question is about.
#[derive(Deserialize)]
pub struct ReadyQuery {
    model: Option<String>,
}

/// `GET /ready`: all models answer, or the one that was asked about.
pub async fn ready(State(state): State<ServerState>, Query(query): Query<ReadyQuery>) -> Response {
    let entries = state.registry().entries();
    let asked: Vec<&Entry> = match &query.model {
        Some(name) => entries.iter().filter(|e| e.name == *name).collect(),
        None => entries.iter().collect(),
    };
    if asked.is_empty() && query.model.is_some() {
        return ApiError::not_found("no such model").into_response();
    }
    let is_ready = !state.is_draining() && asked.iter().all(|e| e.state.word() == "ready");
    let describe = |e: &&Entry| {
        let why = match &e.state {
            ModelState::Failed(why) => Some(why.clone()),
            ModelState::Loading | ModelState::Ready(_) => None,
        };
        (e.name.clone(), json!({"status": e.state.word(), "error": why}))
    };
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
