//! A server over the tiny model, and how tests talk to it.

use super::tiny_served;
use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use serde_json::{Value, json};
use targon_engine::clock::Clock;
use targon_engine::engine::{Engine, Options};
use targon_engine::intake::translate::Defaults;
use targon_engine::server::registry::{ModelState, Registry, Served};
use targon_engine::server::router;
use targon_engine::server::state::ServerState;
use tower::ServiceExt;

pub struct Site {
    pub engine: Engine,
    pub served: Served,
    pub state: ServerState,
    pub app: Router,
}

/// A server with the ready model `tiny`, and `slow` and `broken`, which are not.
pub fn site(options: Options) -> Site {
    let served = tiny_served(3, options);
    let registry = Registry::default();
    registry.announce(["tiny", "slow", "broken"].map(String::from));
    let ready = ModelState::Ready(Box::new(served.clone()));
    registry.set("tiny", Some("abc".into()), ready);
    registry.set("broken", None, ModelState::Failed("no such file".into()));
    let state = ServerState::new(registry, Defaults::default(), Clock::manual(1_000_000));
    Site { engine: served.engine.clone(), served, app: router(state.clone()), state }
}

pub async fn call(app: &Router, request: Request<Body>) -> (StatusCode, String) {
    let response = app.clone().oneshot(request).await.unwrap();
    let status = response.status();
    let bytes = axum::body::to_bytes(response.into_body(), 64 << 20).await.unwrap();
    (status, String::from_utf8(bytes.to_vec()).unwrap())
}

pub async fn get(app: &Router, path: &str) -> (StatusCode, Value) {
    let (status, text) = call(app, Request::get(path).body(Body::empty()).unwrap()).await;
    (status, serde_json::from_str(&text).unwrap())
}

pub async fn post_raw(app: &Router, path: &str, body: impl Into<Body>) -> (StatusCode, String) {
    call(app, Request::post(path).body(body.into()).unwrap()).await
}

pub async fn post(app: &Router, path: &str, body: Value) -> (StatusCode, Value) {
    let (status, text) = post_raw(app, path, body.to_string()).await;
    (status, serde_json::from_str(&text).unwrap())
}

/// The frames of a stream, `[DONE]` checked and left out.
pub async fn stream(app: &Router, path: &str, body: Value) -> Vec<Value> {
    let (status, text) = post_raw(app, path, body.to_string()).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let mut frames: Vec<&str> =
        text.split("\n\n").filter(|f| !f.is_empty()).map(|f| &f["data: ".len()..]).collect();
    assert_eq!(frames.pop(), Some("[DONE]"));
    frames.into_iter().map(|f| serde_json::from_str(f).unwrap()).collect()
}

pub const CHAT: &str = "/v1/chat/completions";
pub const COMPLETION: &str = "/v1/completions";

pub fn chat(extra: Value) -> Value {
    let mut body = json!({
        "model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12,
        "seed": 4, "ignore_eos": true,
    });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

pub fn completion(extra: Value) -> Value {
    let mut body = json!({
        "model": "tiny", "prompt": "hello", "max_tokens": 12, "seed": 4, "ignore_eos": true,
    });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}
