//! The routes of the open server.

use super::error::{ApiError, echo};
use super::generate::{Endpoint, Job, run};
use super::proof::Prover;
use super::registry::{Entry, Routed, Served, State as ModelState};
use super::state::ServerState;
use super::translate::{
    COMPLETION_TOKENS_DEFAULT, ids, refuse_unsupported, report, requests, whole,
};
use crate::models::Model;
use crate::wire::openai::request::{Common, Logprobs, Message};
use crate::wire::openai::response::ModelCard;
use crate::wire::openai::{ChatRequest, CompletionRequest, Content, Prompt};
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// Prompts of one completion request.
const PROMPTS_MAX: usize = 128;
/// The header by which Targon's validators say which model they mean.
const MODEL_HEADER: &str = "x-targon-model";

/// `POST /v1/chat/completions`.
pub async fn chat(
    State(state): State<ServerState>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, ApiError> {
    let request: ChatRequest = parse(&body)?;
    let routed = admit(&state, &headers, &request.common)?;
    let report = report(&request.common, request.top_logprobs, state.defaults())?;
    let max_tokens = match whole("max_completion_tokens", request.max_completion_tokens, 1)? {
        Some(max) => Some(max),
        None => whole("max_tokens", request.common.max_tokens, 1)?,
    };
    let served = &routed.served;
    let prover = prover(&state, served, &request.common)?;
    let prompts = vec![chat_prompt(served.engine.model(), &request)?];
    let requests =
        requests(served, prover.as_ref(), &request.common, prompts, max_tokens, &report)?;
    let job = Job {
        endpoint: Endpoint::Chat,
        n: requests.len(),
        requests,
        routed,
        report,
        prover,
        stream: request.common.stream.unwrap_or(false),
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
    let routed = admit(&state, &headers, &request.common)?;
    refuse_completion_fields(&request)?;
    let report = report(&request.common, None, state.defaults())?;
    let max_tokens = whole("max_tokens", request.common.max_tokens, 1)?;
    let max_tokens = max_tokens.unwrap_or(COMPLETION_TOKENS_DEFAULT);
    let served = &routed.served;
    let prover = prover(&state, served, &request.common)?;
    let prompts = completion_prompts(served.engine.model(), &request.prompt)?;
    let (count, max_tokens) = (prompts.len(), Some(max_tokens));
    let requests =
        requests(served, prover.as_ref(), &request.common, prompts, max_tokens, &report)?;
    let job = Job {
        endpoint: Endpoint::Completion,
        n: requests.len() / count,
        requests,
        routed,
        report,
        prover,
        stream: request.common.stream.unwrap_or(false),
    };
    run(&state, job).await
}

fn refuse_completion_fields(request: &CompletionRequest) -> Result<(), ApiError> {
    if request.echo == Some(true) {
        return Err(ApiError::field("echo", "is not supported by this server"));
    }
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

fn chat_prompt(model: &Model, request: &ChatRequest) -> Result<Vec<u32>, ApiError> {
    let template = model
        .chat
        .as_ref()
        .ok_or_else(|| ApiError::bad_request("this model has no chat template"))?;
    if request.messages.is_empty() {
        return Err(ApiError::field("messages", "must hold at least one message"));
    }
    let messages = request.messages.iter().enumerate().map(|(i, m)| flatten(i, m));
    let messages: Vec<Value> = messages.collect::<Result<_, _>>()?;
    let mut variables = Map::new();
    variables.insert("messages".into(), messages.into());
    let opening = request.add_generation_prompt.unwrap_or(true);
    variables.insert("add_generation_prompt".into(), opening.into());
    variables.extend(request.chat_template_kwargs.clone().unwrap_or_default());
    let text = template.render(variables)?;
    encode(model, "messages", &text, false)
}

/// A message with its text parts joined.
fn flatten(index: usize, message: &Message) -> Result<Value, ApiError> {
    let mut map = Map::new();
    map.insert("role".into(), message.role.clone().into());
    let text = match &message.content {
        None => String::new(),
        Some(Content::Text(text)) => text.clone(),
        Some(Content::Parts(parts)) => {
            let texts = parts.iter().map(|part| {
                let text = part["text"].as_str().filter(|_| part["type"] == "text");
                text.ok_or_else(|| {
                    let field = format!("messages.{index}.content");
                    ApiError::field(&field, "supports only parts of type text")
                })
            });
            texts.collect::<Result<Vec<_>, _>>()?.concat()
        }
    };
    map.insert("content".into(), text.into());
    map.extend(message.rest.clone());
    Ok(map.into())
}

fn completion_prompts(model: &Model, prompt: &Prompt) -> Result<Vec<Vec<u32>>, ApiError> {
    let prompts: Vec<Vec<u32>> = match prompt {
        Prompt::Texts(texts) => {
            texts.iter().map(|t| encode(model, "prompt", t, true)).collect::<Result<_, _>>()?
        }
        Prompt::Ids(lists) => {
            lists.iter().map(|list| ids("prompt", list)).collect::<Result<_, _>>()?
        }
    };
    if !(1..=PROMPTS_MAX).contains(&prompts.len()) {
        let what = format!("must hold 1 to {PROMPTS_MAX} prompts, got {}", prompts.len());
        return Err(ApiError::field("prompt", what));
    }
    if prompts.iter().any(Vec::is_empty) {
        return Err(ApiError::field("prompt", "must have at least one token"));
    }
    Ok(prompts)
}

fn encode(model: &Model, field: &str, text: &str, special: bool) -> Result<Vec<u32>, ApiError> {
    let ids = model.tokenizer.encode(text, special);
    ids.map_err(|e| {
        ApiError::field(field, format!("cannot be tokenised: {}", echo(&e.to_string())))
    })
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
