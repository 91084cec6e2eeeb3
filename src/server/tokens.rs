//! Turns texts into ids and back over HTTP, without running the model.

use super::error::ApiError;
use super::handlers::route;
use super::refusals::Refusals;
use super::state::ServerState;
use crate::engine::Engine;
use crate::intake::body;
use crate::intake::error::RequestError;
use crate::intake::prompt::{Room, chat_prompt, encode};
use crate::intake::translate::ids;
use crate::intake::work;
use crate::models::text::Text;
use crate::wire::openai::ChatRequest;
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
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

/// Bodies of `/tokenize`.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, clippy::large_enum_variant, reason = "describes what `/tokenize` reads")]
pub(super) enum TokenizeForm {
    Text(TokenizeText),
    Chat(ChatRequest),
}

/// A body of `/tokenize`, told apart by whether it has `messages`.
enum Form {
    Text(TokenizeText),
    Chat(Box<ChatRequest>, Option<bool>),
}

/// What tells the two apart.
#[derive(Deserialize)]
struct Mark {
    messages: Option<serde::de::IgnoredAny>,
    return_token_strs: Option<bool>,
}

impl Form {
    fn parse(body: &[u8]) -> Result<Self, RequestError> {
        let mark: Mark = body::parse(body)?;
        match mark.messages {
            Some(_) => Ok(Self::Chat(Box::new(body::parse(body)?), mark.return_token_strs)),
            None => body::parse(body).map(Self::Text),
        }
    }

    fn model(&self) -> Option<&str> {
        match self {
            Self::Text(text) => text.model.as_deref(),
            Self::Chat(chat, _) => chat.common.model.as_deref(),
        }
    }

    /// The answer.
    fn tokenize(&self, engine: &Engine, now_ms: u64) -> Result<Bytes, RequestError> {
        let (model, context_max) = (engine.text(), engine.options().context_max);
        let room = Room::Free(context_max);
        let (tokens, shows) = match self {
            Self::Text(text) => {
                let special = text.add_special_tokens.unwrap_or(true);
                (encode(model, "prompt", &text.prompt, special, room)?, text.return_token_strs)
            }
            Self::Chat(chat, shows) => (chat_prompt(model, chat, room, now_ms)?, *shows),
        };
        let text_of = |id: &u32| model.tokenizer.text_of(*id);
        let texts = shows.unwrap_or(false).then(|| tokens.iter().map(text_of).collect::<Vec<_>>());
        json_bytes(&json!({
            "count": tokens.len(),
            "max_model_len": context_max,
            "tokens": tokens,
            "token_strs": texts,
        }))
    }
}

/// Written where it is computed: a long list takes a while.
fn json_bytes(value: &Value) -> Result<Bytes, RequestError> {
    let bytes = serde_json::to_vec(value).map_err(|e| RequestError::ours(e.to_string()))?;
    Ok(bytes.into())
}

fn json_response(bytes: Bytes) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], bytes).into_response()
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
) -> Result<Response, ApiError> {
    let size = body.len();
    let form = work::run(size, move || Form::parse(&body)).await?;
    let engine = route(&state, &headers, form.model())?.served.engine;
    let now_ms = state.clock().unix_ms();
    Ok(json_response(work::run(size, move || form.tokenize(&engine, now_ms)).await?))
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
) -> Result<Response, ApiError> {
    let size = body.len();
    let request: Detokenize = body::read(body).await?;
    let engine = route(&state, &headers, request.model.as_deref())?.served.engine;
    let answer = work::run(size, move || {
        let model = engine.text();
        let tokens = ids("tokens", &request.tokens)?;
        let vocab = model.vocab;
        if let Some(id) = tokens.iter().find(|id| **id as usize >= vocab) {
            let what = format!("holds {id}, but the vocabulary has {vocab}");
            return Err(RequestError::field("tokens", what));
        }
        json_bytes(&json!({"prompt": model.tokenizer.decode(&tokens)}))
    });
    Ok(json_response(answer.await?))
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
    Ok(Json(info(engine.text(), engine.options().context_max)))
}

fn info(model: &Text, context_max: usize) -> Value {
    let (begin, end) = model.chat.as_ref().map_or(("", ""), |chat| chat.special_tokens());
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let stop = || model.stop_ids.first().map(|id| model.tokenizer.text_of(*id));
    json!({
        "vocab_size": model.vocab,
        "model_max_length": context_max,
        "bos_token": some(begin),
        "eos_token": some(end).or_else(stop),
        "stop_token_ids": model.stop_ids,
        "chat_template": model.chat.as_ref().map(|c| c.source()),
    })
}
