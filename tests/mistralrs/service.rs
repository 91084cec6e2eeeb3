//! The HTTP routes over both models of one process.

use crate::pair::pair;
use axum::body::Body;
use axum::http::{Request as HttpRequest, StatusCode};
use serde_json::{Value, json};
use targon_engine::clock::Clock;
use targon_engine::intake::translate::Defaults;
use targon_engine::server::router;
use targon_engine::server::state::ServerState;
use tower::ServiceExt;

#[tokio::test(flavor = "multi_thread")]
async fn one_server_answers_for_both_by_the_same_routes() {
    let registry = tokio::task::spawn_blocking(|| pair().registry.clone()).await.unwrap();
    let app = router(ServerState::new(registry, Defaults::default(), Clock::system()));
    let mut whole = Vec::new();
    for model in ["native", "other"] {
        let body = json!({
            "model": model, "messages": [{"role": "user", "content": "What is two plus two?"}],
            "max_tokens": 12, "temperature": 0, "logprobs": true, "top_logprobs": 2,
        });
        let post = HttpRequest::post("/v1/chat/completions").body(Body::from(body.to_string()));
        let response = app.clone().oneshot(post.unwrap()).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let bytes = axum::body::to_bytes(response.into_body(), 8 << 20).await.unwrap();
        let answer: Value = serde_json::from_slice(&bytes).unwrap();
        let choice = &answer["choices"][0];
        assert!(choice["logprobs"]["content"][0]["logprob"].as_f64().unwrap() <= 0.0, "{choice}");
        whole.push((choice["message"].clone(), choice["finish_reason"].clone()));
    }
    assert_eq!(whole[0], whole[1]);
    let get = HttpRequest::get("/metrics").body(Body::empty()).unwrap();
    let response = app.oneshot(get).await.unwrap();
    let bytes = axum::body::to_bytes(response.into_body(), 8 << 20).await.unwrap();
    let metrics = String::from_utf8(bytes.to_vec()).unwrap();
    for model in ["native", "other"] {
        assert!(metrics.contains(&format!("model_name=\"{model}\"")), "{metrics}");
    }
}
