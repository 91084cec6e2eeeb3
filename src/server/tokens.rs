//! Texts to ids and back, without the model.

use super::error::ApiError;
use super::handlers::{parse, route};
use super::openapi::{Refusals, TokenizeForm};
use super::state::ServerState;
use crate::intake::prompt::{chat_prompt, encode};
use crate::intake::translate::ids;
use crate::models::Model;
use crate::wire::openai::ChatRequest;
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::HeaderMap;
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

/// Body of `/tokenize` with a text; with `messages` it is a chat's.
#[derive(Deserialize, ToSchema)]
pub(super) struct TokenizeText {
    model: Option<String>,
    prompt: String,
    add_special_tokens: Option<bool>,
    return_token_strs: Option<bool>,
}

/// What tells the two bodies of `/tokenize` apart.
#[derive(Deserialize)]
struct Form {
    messages: Option<serde::de::IgnoredAny>,
    return_token_strs: Option<bool>,
}

/// `POST /tokenize`.
#[utoipa::path(
    post,
    path = "/tokenize",
    request_body = TokenizeForm,
    responses((status = 200,
        description = "`tokens`, their `count`, and their texts if asked for", body = Object),
        Refusals)
)]
pub async fn tokenize(
    State(state): State<ServerState>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Value>, ApiError> {
    let form: Form = parse(&body)?;
    let (engine, tokens, shows) = if form.messages.is_some() {
        let request: ChatRequest = parse(&body)?;
        let engine = route(&state, &headers, request.common.model.as_deref())?.served.engine;
        let tokens = chat_prompt(engine.model(), &request)?;
        (engine, tokens, form.return_token_strs)
    } else {
        let request: TokenizeText = parse(&body)?;
        let engine = route(&state, &headers, request.model.as_deref())?.served.engine;
        let special = request.add_special_tokens.unwrap_or(true);
        let tokens = encode(engine.model(), "prompt", &request.prompt, special)?;
        (engine, tokens, request.return_token_strs)
    };
    let text_of = |id: &u32| engine.model().tokenizer.text_of(*id);
    let texts = shows.unwrap_or(false).then(|| tokens.iter().map(text_of).collect::<Vec<_>>());
    Ok(Json(json!({
        "count": tokens.len(),
        "max_model_len": engine.options().context_max,
        "tokens": tokens,
        "token_strs": texts,
    })))
}

/// Body of `/detokenize`.
#[derive(Deserialize, ToSchema)]
pub(super) struct Detokenize {
    model: Option<String>,
    tokens: Vec<i64>,
}

/// `POST /detokenize`.
#[utoipa::path(
    post,
    path = "/detokenize",
    request_body = Detokenize,
    responses((status = 200, description = "The text as `prompt`", body = Object), Refusals)
)]
pub async fn detokenize(
    State(state): State<ServerState>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Value>, ApiError> {
    let request: Detokenize = parse(&body)?;
    let engine = route(&state, &headers, request.model.as_deref())?.served.engine;
    let tokens = ids("tokens", &request.tokens)?;
    let tokenizer = &engine.model().tokenizer;
    let vocab = engine.model().decoder.spec.vocab;
    if let Some(id) = tokens.iter().find(|id| **id as usize >= vocab) {
        return Err(ApiError::field(
            "tokens",
            format!("holds {id}, but the vocabulary has {vocab}"),
        ));
    }
    Ok(Json(json!({"prompt": tokenizer.decode(&tokens)})))
}

/// Which model's tokenizer is asked about.
#[derive(Deserialize)]
pub struct InfoQuery {
    model: Option<String>,
}

/// `GET /tokenizer_info`.
#[utoipa::path(
    get,
    path = "/tokenizer_info",
    params(("model" = Option<String>, Query, description = "Which model")),
    responses((status = 200,
        description = "Special tokens, stop ids, chat template", body = Object), Refusals)
)]
pub async fn tokenizer_info(
    State(state): State<ServerState>,
    headers: HeaderMap,
    Query(query): Query<InfoQuery>,
) -> Result<Json<Value>, ApiError> {
    let engine = route(&state, &headers, query.model.as_deref())?.served.engine;
    Ok(Json(info(engine.model(), engine.options().context_max)))
}

fn info(model: &Model, context_max: usize) -> Value {
    let (begin, end) = model.chat.as_ref().map_or(("", ""), |chat| chat.special_tokens());
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let stop = || model.stop_ids.first().map(|id| model.tokenizer.text_of(*id));
    json!({
        "vocab_size": model.decoder.spec.vocab,
        "model_max_length": context_max,
        "bos_token": some(begin),
        "eos_token": some(end).or_else(stop),
        "stop_token_ids": model.stop_ids,
        "chat_template": model.chat.as_ref().map(|c| c.source()),
    })
}
