//! The HTTP routes over both models of one process.

use crate::pair::pair;
use axum::Router;
use axum::body::Body;
use axum::http::{Request as HttpRequest, Response, StatusCode};
use serde_json::{Value, json};
use targon_engine::clock::Clock;
use targon_engine::intake::translate::Defaults;
use targon_engine::server::router;
use targon_engine::server::state::ServerState;
use tower::ServiceExt;

/// A greedy chat of `model`.
fn chat(model: &str, question: &str, extra: Value) -> HttpRequest<Body> {
    let mut body = json!({
        "model": model, "messages": [{"role": "user", "content": question}], "temperature": 0,
    });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    HttpRequest::post("/v1/chat/completions").body(Body::from(body.to_string())).unwrap()
}

async fn server() -> (Router, ServerState) {
    let registry = tokio::task::spawn_blocking(|| pair().registry.clone()).await.unwrap();
    let state = ServerState::new(registry, Defaults::default(), Clock::system());
    (router(state.clone()), state)
}

async fn text(response: Response<Body>) -> String {
    let bytes = axum::body::to_bytes(response.into_body(), 8 << 20).await.unwrap();
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_runs_when_the_server_drains_goes_on_to_its_end() {
    for model in ["native", "other"] {
        let (app, state) = server().await;
        let question = "Explain how rain forms, in a few sentences.";
        let whole = app.clone().oneshot(chat(model, question, json!({"max_tokens": 40}))).await;
        let whole: Value = serde_json::from_str(&text(whole.unwrap()).await).unwrap();
        let streamed = json!({"max_tokens": 40, "stream": true});
        let stream = app.clone().oneshot(chat(model, question, streamed)).await.unwrap();
        assert_eq!(stream.status(), StatusCode::OK);
        state.drain();
        assert_eq!(state.in_flight(), 1, "{model}: its stream still runs");
        let late = app.oneshot(chat(model, question, json!({"max_tokens": 1}))).await.unwrap();
        assert_eq!(late.status(), StatusCode::SERVICE_UNAVAILABLE, "{model}");
        let mut content = String::new();
        let mut is_done = false;
        for data in text(stream).await.lines().filter_map(|line| line.strip_prefix("data: ")) {
            is_done = data == "[DONE]";
            if !is_done {
                let frame: Value = serde_json::from_str(data).unwrap();
                content += frame["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
            }
        }
        assert!(is_done, "{model}");
        assert_eq!(content, whole["choices"][0]["message"]["content"].as_str().unwrap(), "{model}");
        assert_eq!(state.in_flight(), 0, "{model}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_server_answers_for_both_by_the_same_routes() {
    let (app, _) = server().await;
    let mut whole = Vec::new();
    for model in ["native", "other"] {
        let extra = json!({"max_tokens": 12, "logprobs": true, "top_logprobs": 2});
        let asked = chat(model, "What is two plus two?", extra);
        let response = app.clone().oneshot(asked).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let answer: Value = serde_json::from_str(&text(response).await).unwrap();
        let choice = &answer["choices"][0];
        assert!(choice["logprobs"]["content"][0]["logprob"].as_f64().unwrap() <= 0.0, "{choice}");
        whole.push((choice["message"].clone(), choice["finish_reason"].clone()));
    }
    assert_eq!(whole[0], whole[1]);
    let get = HttpRequest::get("/metrics").body(Body::empty()).unwrap();
    let metrics = text(app.oneshot(get).await.unwrap()).await;
    for model in ["native", "other"] {
        assert!(metrics.contains(&format!("model_name=\"{model}\"")), "{metrics}");
    }
}
