//! The routes that generate.

use super::access::{REQUEST_ID, REQUEST_ID_MAX, is_request_id};
use super::constraint::{Tooling, grammar};
use super::error::{ApiError, echo};
use super::generate::{Endpoint, Job, run};
use super::openapi::Refusals;
use super::prompt::{chat_prompt, completion_prompts};
use super::proof::Prover;
use super::registry::{Routed, Served};
use super::state::ServerState;
use super::translate::{Ask, COMPLETION_TOKENS_DEFAULT, Report, refuse_unsupported, report, whole};
use crate::models::chat::ChatTemplate;
use crate::wire::openai::request::{Common, Logprobs};
use crate::wire::openai::response::{ChatChoice, CompletionChoice, Response as Answer};
use crate::wire::openai::{ChatRequest, CompletionRequest};
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use serde::de::DeserializeOwned;

/// The header by which Targon's validators say which model they mean.
const MODEL_HEADER: &str = "x-targon-model";

/// `POST /v1/chat/completions`.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    request_body = ChatRequest,
    responses(
        (status = 200, description = "The answer; with `stream` as server-sent events",
            content((Answer<ChatChoice> = "application/json"), (String = "text/event-stream"))),
        Refusals
    )
)]
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
        request_id: request_id(&headers, common)?,
        routed,
    };
    run(&state, job).await
}

/// `POST /v1/completions`.
#[utoipa::path(
    post,
    path = "/v1/completions",
    request_body = CompletionRequest,
    responses(
        (status = 200, description = "The continuation; with `stream` as server-sent events",
            content(
                (Answer<CompletionChoice> = "application/json"),
                (String = "text/event-stream")
            )),
        Refusals
    )
)]
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
        request_id: request_id(&headers, common)?,
        routed,
    };
    run(&state, job).await
}

/// The request's name: the client's own, or the one it has in the log.
fn request_id(headers: &HeaderMap, common: &Common) -> Result<Option<String>, ApiError> {
    match &common.request_id {
        Some(id) if !is_request_id(id) => {
            let what = format!("must have 1 to {REQUEST_ID_MAX} visible ASCII characters");
            Err(ApiError::field("request_id", what))
        }
        Some(id) => Ok(Some(id.clone())),
        None => {
            let id = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok());
            Ok(id.filter(|id| is_request_id(id)).map(str::to_owned))
        }
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
    let routed = route(state, headers, common.model.as_deref())?;
    refuse_unsupported(&common.unknown)?;
    state.note_unknown(&common.unknown);
    Ok(routed)
}

/// The model that a body and its headers name.
///
/// # Errors
/// As for [`Registry::route`](super::registry::Registry::route).
pub fn route(
    state: &ServerState,
    headers: &HeaderMap,
    model: Option<&str>,
) -> Result<Routed, ApiError> {
    let header = match headers.get(MODEL_HEADER) {
        Some(value) => Some(value.to_str().map_err(|_| {
            ApiError::bad_request(format!("the header {MODEL_HEADER} must be visible ASCII"))
        })?),
        None => None,
    };
    state.registry().route(model, header)
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
///
/// # Errors
/// 400 for anything else.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
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
