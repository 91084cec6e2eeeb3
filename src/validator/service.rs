//! The routes of Targon's verifier container (4.2 to 4.4): a validator uses this process by
//! changing a URL. Several models are served, told apart by `model`.

use crate::engine::Engine;
use crate::engine::output::Event;
use crate::engine::request::Request;
use crate::intake::translate::Defaults;
use crate::intake::understand::Reader;
use crate::verify::answer::Answer;
use crate::verify::{Claim, Depth, Profile, Reason, Rejection, Rules, Verdict, Verifier};
use crate::wire::openai::{ChatRequest, CompletionRequest};
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Bytes of a request body.
const BODY_BYTES_MAX: usize = 16 << 20;
/// Answers that wait or are verified at once; more are told to come back.
const REQUESTS_MAX: usize = 64;
/// Answers that are verified at once: each has a KV cache of its own, and they share all cores.
const RUNNING_MAX: usize = 2;
/// Tokens of an answer.
const OUTPUT_MAX: usize = 1 << 16;
/// Seed and tokens where a request names none.
const SEED_DEFAULT: i64 = 42;

/// A model of the service.
#[derive(Clone)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Generates for `/generate`.
    pub engine: Engine,
    /// Judges for `/verify`.
    pub verifier: Verifier,
}

#[derive(Clone)]
struct Service {
    models: Arc<Vec<Entry>>,
    slots: Arc<Semaphore>,
    running: Arc<Semaphore>,
}

/// The routes over `models`.
pub fn router(models: Vec<Entry>) -> Router {
    let service = Service {
        models: Arc::new(models),
        slots: Arc::new(Semaphore::new(REQUESTS_MAX)),
        running: Arc::new(Semaphore::new(RUNNING_MAX)),
    };
    Router::new()
        .route("/", get(|| async { Json(json!(["", 200])) }))
        .route("/endpoints", get(endpoints))
        .route("/metadata", get(metadata))
        .route("/generate", post(generate))
        .route("/verify", post(verify))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(service)
}

impl Service {
    /// The model of that name; without a name the only one.
    fn model(&self, name: Option<&str>) -> Result<&Entry, String> {
        let names = || self.models.iter().map(|m| m.name.as_str()).collect::<Vec<_>>().join(", ");
        match (name, self.models.as_slice()) {
            (Some(name), models) => models.iter().find(|m| m.name == name).ok_or_else(|| {
                let name: String = name.chars().take(200).collect();
                format!("the model `{name}` is not served here; known: {}", names())
            }),
            (None, [only]) => Ok(only),
            (None, _) => Err(format!("`model` must name one of: {}", names())),
        }
    }
}

#[derive(Deserialize)]
struct ModelQuery {
    model: Option<String>,
}

fn endpoint_names(service: &Service, query: &ModelQuery) -> Result<Vec<&'static str>, String> {
    let model = service.model(query.model.as_deref())?;
    Ok(match model.verifier.model.chat {
        Some(_) => vec!["completion", "chat"],
        None => vec!["completion"],
    })
}

fn refused(message: String) -> Response {
    (StatusCode::BAD_REQUEST, Json(json!({"error": message}))).into_response()
}

async fn endpoints(State(service): State<Service>, Query(query): Query<ModelQuery>) -> Response {
    endpoint_names(&service, &query).map_or_else(refused, |names| Json(names).into_response())
}

async fn metadata(State(service): State<Service>, Query(query): Query<ModelQuery>) -> Response {
    let names = endpoint_names(&service, &query);
    names.map_or_else(refused, |n| Json(json!({"endpoints": n})).into_response())
}

#[derive(Deserialize)]
struct Generate {
    model: Option<String>,
    messages: Vec<Value>,
    #[serde(default)]
    sampling_params: Map<String, Value>,
}

/// Text for a validator's own prompts; null where it cannot be had, as in the original.
async fn generate(State(service): State<Service>, body: Bytes) -> Json<Value> {
    match generated(&service, &body).await {
        Ok(text) => Json(json!({"text": text})),
        Err(why) => {
            tracing::warn!("/generate: {why}");
            Json(json!({"text": null}))
        }
    }
}

async fn generated(service: &Service, body: &[u8]) -> Result<String, String> {
    let request: Generate = serde_json::from_slice(body).map_err(|e| e.to_string())?;
    let entry = service.model(request.model.as_deref())?;
    let mut params = request.sampling_params;
    if entry.verifier.model.chat.is_some() {
        params.insert("messages".into(), request.messages.into());
    } else {
        let line = |m: &Value| {
            let word = |key: &str| m[key].as_str().unwrap_or_default().to_owned();
            format!("{}: {}\n", word("role"), word("content"))
        };
        let lines: String = request.messages.iter().map(line).collect();
        params.insert("prompt".into(), format!("{lines}\nResponse: ").into());
    }
    let request = understand(entry, params).await?;
    let mut generation = entry.engine.submit(request).map_err(|e| e.to_string())?;
    let mut text = String::new();
    while let Some(event) = generation.next().await {
        match event {
            Event::Step(step) => text.push_str(&step.text),
            Event::Fault(fault) => return Err(fault.to_string()),
            Event::Prompt(_) | Event::Finish(_) => {}
        }
    }
    Ok(text)
}

/// Reads parameters by the rules of the server, with the container's defaults.
async fn understand(entry: &Entry, mut params: Map<String, Value>) -> Result<Request, String> {
    for (key, default) in
        [("temperature", json!(0.0)), ("seed", json!(SEED_DEFAULT)), ("n", json!(1))]
    {
        params.entry(key).or_insert(default);
    }
    params.insert("logprobs".into(), true.into());
    params.insert("logprobs_mode".into(), "scaled".into());
    params.remove("stream");
    params.remove("stream_options");
    let reader = Reader {
        model: &entry.verifier.model,
        context_max: entry.verifier.context_max,
        defaults: Defaults::default(),
    };
    let is_chat = params.get("messages").is_some_and(|m| !m.is_null());
    let body = Value::Object(params);
    let understood = if is_chat {
        let request: ChatRequest = serde_json::from_value(body).map_err(|e| e.to_string())?;
        reader.chat(&request).await
    } else {
        let request: CompletionRequest = serde_json::from_value(body).map_err(|e| e.to_string())?;
        reader.completion(&request).await
    };
    let mut requests = understood.map_err(|e| e.message)?.requests;
    match requests.len() {
        1 => Ok(requests.remove(0)),
        count => Err(format!("one prompt and one choice are verified at a time, got {count}")),
    }
}

#[derive(Deserialize)]
struct Verify {
    model: Option<String>,
    #[serde(default)]
    request_type: String,
    request_params: Map<String, Value>,
    output_sequence: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    text: String,
    logprob: Option<f64>,
    token_id: i64,
}

async fn verify(State(service): State<Service>, body: Bytes) -> Response {
    let Ok(_slot) = service.slots.try_acquire() else {
        let message = format!("{REQUESTS_MAX} answers are being verified already, the limit");
        let error = json!({"error": message, "cause": "INTERNAL_ERROR"});
        return (StatusCode::TOO_MANY_REQUESTS, Json(error)).into_response();
    };
    let request: Verify = match serde_json::from_slice(&body) {
        Ok(request) => request,
        Err(e) => return refused(format!("the body is not a request: {e}")),
    };
    if request.output_sequence.len() > OUTPUT_MAX {
        return refused(format!("`output_sequence` must have at most {OUTPUT_MAX} tokens"));
    }
    let verdict = verdict(&service, request).await;
    Json(match verdict {
        Ok(Verdict::Pass) => json!({"verified": true}),
        Ok(Verdict::Reject(rejection)) => json!({
            "verified": false, "error": rejection.to_string(), "cause": cause(&rejection),
        }),
        // Without `verified`, the caller counts the answer neither way.
        Ok(Verdict::Unscored(why)) | Err(why) => {
            tracing::warn!("/verify: {why}");
            json!({"error": why, "cause": "INTERNAL_ERROR"})
        }
    })
    .into_response()
}

/// The original's word for a rejection.
fn cause(rejection: &Rejection) -> &'static str {
    match rejection.reason {
        Reason::TooShort => "TOO_SHORT",
        Reason::TooLong => "TOO_LONG",
        Reason::SkippedEosEot => "SKIPPED_EOS_EOT",
        Reason::EarlyEnd => "EARLY_END",
        Reason::Overfit => "OVERFIT",
        Reason::LogprobRandom => "LOGPROB_RANDOM",
        Reason::UnlikelyToken => "UNLIKELY_TOKEN",
        Reason::UnlikelyTokens | Reason::LogprobMismatch | Reason::SamplerMargin => {
            "UNLIKELY_TOKENS"
        }
        _ => "BAD_STREAM",
    }
}

async fn verdict(service: &Service, request: Verify) -> Result<Verdict, String> {
    let entry = service.model(request.model.as_deref())?.clone();
    let mut params = request.request_params;
    let other = if request.request_type == "COMPLETION" { "messages" } else { "prompt" };
    params.remove(other);
    let asked = understand(&entry, params).await?;
    let mut answer = Answer { text: Some(String::new()), ..Answer::default() };
    for item in request.output_sequence {
        let Ok(id) = u32::try_from(item.token_id) else {
            let what = format!("{} is not a token id", item.token_id);
            return Ok(Verdict::Reject(Rejection::new(Reason::BadIds, what)));
        };
        answer.ids.push(id);
        answer.logprobs.push(item.logprob);
        answer.text.get_or_insert_default().push_str(&item.text);
    }
    let running = Arc::clone(&service.running).acquire_owned().await.map_err(|e| e.to_string())?;
    // A caller that goes away drops this future, and with it the guard: the work is given up.
    let token = CancellationToken::new();
    let guard = token.clone().drop_guard();
    let judged = tokio::task::spawn_blocking(move || {
        // As long as the memory is in use, and not as long as somebody waits.
        let _running = running;
        let claim = Claim {
            request: &asked,
            seed: None,
            choice: 0,
            proof: None,
            answer: &answer,
            end_is_implied: true,
        };
        let chance = uuid::Uuid::new_v4().as_u128() as u64;
        let is_wanted = || !token.is_cancelled();
        let rules =
            Rules { is_wanted: &is_wanted, ..Rules::new(Profile::Ranks, Depth::Slow, chance) };
        entry.verifier.verify_by(&[claim], rules).remove(0).verdict
    });
    let verdict = judged.await.map_err(|e| format!("the verifier broke: {e}"));
    guard.disarm();
    verdict
}
