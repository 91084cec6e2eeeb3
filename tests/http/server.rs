//! The HTTP surface over a tiny model: shapes, Targon's rules, refusals, cancellation, draining.

use crate::common::site::{
    CHAT, COMPLETION, Site, call, chat, completion, get, post, post_raw, site, stream,
};
use crate::common::{self, LASTING_TOKENS};
use axum::body::Body;
use axum::http::{Request, StatusCode};
use serde_json::{Value, json};
use std::time::Duration;
use targon_engine::engine::Options;
use targon_engine::server::listen::serve;
use targon_engine::server::settings::HttpLimits;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tower::ServiceExt;

#[tokio::test]
async fn a_chat_stream_has_one_chunk_for_each_token_and_equals_the_whole_response() {
    let site = site(common::options());
    let extra = json!({"logprobs": true, "top_logprobs": 3, "return_token_ids": true});
    let (status, whole) = post(&site.app, CHAT, chat(extra.clone())).await;
    assert_eq!(status, StatusCode::OK, "{whole}");
    let mut streamed = chat(extra);
    streamed["stream"] = json!(true);
    let frames = stream(&site.app, CHAT, streamed).await;
    let role = &frames[0]["choices"][0];
    assert_eq!(role["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(role["finish_reason"], Value::Null);
    assert_eq!(frames.len(), 1 + 12);
    let mut text = String::new();
    let mut entries = Vec::new();
    let mut ids = Vec::new();
    for frame in &frames[1..] {
        assert_eq!(frame["object"], "chat.completion.chunk");
        assert!(frame.get("usage").is_none());
        let choice = &frame["choices"][0];
        text.push_str(choice["delta"]["content"].as_str().unwrap());
        let content = choice["logprobs"]["content"].as_array().unwrap();
        assert_eq!(content.len(), 1);
        entries.push(content[0].clone());
        ids.extend(choice["token_ids"].as_array().unwrap().clone());
    }
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": text}));
    assert_eq!(choice["logprobs"]["content"], json!(entries));
    assert_eq!(choice["token_ids"], json!(ids));
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(frames[12]["choices"][0]["finish_reason"], "length");
    let prompt = "<user>hello<assistant>".len();
    assert_eq!(
        whole["usage"],
        json!({
            "prompt_tokens": prompt, "total_tokens": prompt + 12, "completion_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 0},
        })
    );
    for entry in &entries {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        assert!(top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64());
        assert!(entry["logprob"].as_f64().unwrap() <= 0.0);
    }
}

#[tokio::test]
async fn completions_report_four_parallel_lists_and_ids_on_request() {
    let site = site(common::options());
    let extra = json!({"logprobs": true, "return_tokens_as_token_ids": true});
    let (_, whole) = post(&site.app, COMPLETION, completion(extra.clone())).await;
    let mut streamed = completion(extra);
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let mut frames = stream(&site.app, COMPLETION, streamed).await;
    let usage = frames.pop().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"], whole["usage"]);
    assert_eq!(frames.len(), 12, "no role chunk here");
    let lists = &whole["choices"][0]["logprobs"];
    for list in ["text_offset", "token_logprobs", "tokens", "top_logprobs"] {
        let joined: Vec<Value> = frames
            .iter()
            .map(|f| {
                let list = f["choices"][0]["logprobs"][list].as_array().unwrap();
                assert_eq!(list.len(), 1);
                list[0].clone()
            })
            .collect();
        assert_eq!(lists[list], json!(joined), "{list}");
    }
    for (token, map) in
        lists["tokens"].as_array().unwrap().iter().zip(lists["top_logprobs"].as_array().unwrap())
    {
        let token = token.as_str().unwrap();
        assert!(token.strip_prefix("token_id:").unwrap().parse::<u32>().is_ok());
        let keys: Vec<&String> = map.as_object().unwrap().keys().collect();
        assert_eq!(keys[0], token, "the token itself comes first");
        assert!(keys.len() <= 2);
    }
}

#[tokio::test]
async fn prompts_come_as_text_texts_ids_and_lists_with_n_choices_each() {
    let site = site(common::options());
    let hello: Vec<u32> = b"hello".iter().map(|b| u32::from(*b)).collect();
    let (_, text) = post(&site.app, COMPLETION, completion(json!({}))).await;
    for prompt in [json!(["hello"]), json!(hello), json!([hello])] {
        let (_, same) = post(&site.app, COMPLETION, completion(json!({"prompt": prompt}))).await;
        assert_eq!(same["choices"], text["choices"], "{prompt}");
    }
    let many = json!({"prompt": ["hello", "hi"], "n": 3});
    let (_, many) = post(&site.app, COMPLETION, completion(many)).await;
    let choices = many["choices"].as_array().unwrap();
    let indices: Vec<u64> = choices.iter().map(|c| c["index"].as_u64().unwrap()).collect();
    assert_eq!(indices, [0, 1, 2, 3, 4, 5]);
    assert_eq!(
        choices[0]["text"], text["choices"][0]["text"],
        "the first choice is the seed's own"
    );
    assert_ne!(choices[0]["text"], choices[1]["text"], "choices have their own noise");
    assert_eq!(many["usage"]["prompt_tokens"], 7);
    assert_eq!(many["usage"]["completion_tokens"], 6 * 12);
}

#[tokio::test]
async fn stop_rules_end_the_text_but_keep_the_chunk() {
    let site = site(common::options());
    let (_, free) =
        post(&site.app, COMPLETION, completion(json!({"return_token_ids": true}))).await;
    let ids = free["choices"][0]["token_ids"].as_array().unwrap().clone();
    let stop_id = json!({"stop_token_ids": [ids[5]], "return_token_ids": true});
    let (_, by_id) = post(&site.app, COMPLETION, completion(stop_id)).await;
    let choice = &by_id["choices"][0];
    let first = ids.iter().position(|id| *id == ids[5]).unwrap();
    assert_eq!(choice["token_ids"].as_array().unwrap(), &ids[..=first], "the stop token counts");
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &ids[5]));
    let text = free["choices"][0]["text"].as_str().unwrap();
    let stop: String = text.chars().skip(3).take(2).collect();
    let (_, by_text) = post(&site.app, COMPLETION, completion(json!({"stop": stop}))).await;
    let choice = &by_text["choices"][0];
    assert_eq!(choice["text"], text.split(&stop).next().unwrap());
    assert_eq!(choice["stop_reason"], json!(stop));
    let frames =
        stream(&site.app, COMPLETION, completion(json!({"stop": stop, "stream": true}))).await;
    let streamed: String =
        frames.iter().map(|f| f["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(streamed, choice["text"].as_str().unwrap());
    assert_eq!(frames.len(), by_text["usage"]["completion_tokens"].as_u64().unwrap() as usize);
}

#[tokio::test]
async fn bad_requests_are_refused_by_name() {
    let site = site(common::options());
    let cases = [
        (json!({"max_tokens": -1}), 400, "max_tokens", "must be at least 1, got -1"),
        (json!({"max_tokens": 0}), 400, "max_tokens", "must be at least 1, got 0"),
        (json!({"model": "nope"}), 404, "model", "does not exist; known: tiny, slow, broken"),
        (json!({"model": "slow"}), 503, "", "still loading"),
        (json!({"model": "broken"}), 503, "", "could not be loaded: no such file"),
        (json!({"temperature": -1}), 400, "temperature", "between 0 and 100, got -1"),
        (json!({"top_p": 2}), 400, "top_p", "between above 0 and 1"),
        (json!({"logprobs": 21}), 400, "logprobs", "at most 20, got 21"),
        (json!({"logprobs": "yes"}), 400, "logprobs", "a boolean or an integer, got a string"),
        (json!({"prompt": [1, -2]}), 400, "prompt", "holds -2, not a token id"),
        (json!({"prompt": [1, 999]}), 400, "prompt", "vocabulary has 261"),
        (json!({"prompt": ""}), 400, "prompt", "at least one token"),
        (json!({"prompt": vec!["a"; 129]}), 400, "prompt", "1 to 128 prompts, got 129"),
        (json!({"n": 200}), 400, "n", "at most 128, got 200"),
        (json!({"stop": ["", "a"]}), 400, "stop", "1 to 1024 bytes"),
        (json!({"logit_bias": {"x": 1}}), 400, "logit_bias", "keys must be token ids, got x"),
        (json!({"stream_options": {}}), 400, "stream_options", "needs `stream`"),
        (json!({"suffix": "x"}), 400, "suffix", "not supported"),
        (json!({"bad_words": ["a"]}), 400, "bad_words", "not supported"),
        (json!({"best_of": 4}), 400, "best_of", "must equal n = 1, got 4"),
        (json!({"guided_json": {}}), 400, "guided_json", "not supported"),
        (json!({"seed": "a"}), 400, "seed", "must be an integer, got a string"),
    ];
    for (extra, status, param, message) in cases {
        let (got, body) = post(&site.app, COMPLETION, completion(extra.clone())).await;
        let error = &body["error"];
        assert_eq!((got.as_u16(), &error["code"]), (status, &json!(status)), "{extra} {body}");
        assert!(error["message"].as_str().unwrap().contains(message), "{extra} {body}");
        let want = if param.is_empty() { Value::Null } else { json!(param) };
        assert_eq!(error["param"], want, "{extra} {body}");
    }
    for (body, message) in [
        (&b"{\"prompt\": \"a\""[..], "not a valid request"),
        (b"{\"prompt\": \"\xff\"}", "not a valid request"),
        (b"{\"prompt\": \"a\"} x", "the body has more behind its JSON value"),
        (b"[]", "not a valid request"),
        (b"", "not a valid request"),
    ] {
        let (status, text) = post_raw(&site.app, COMPLETION, body.to_vec()).await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert!(text.contains(message), "{text}");
    }
    let (status, text) =
        post_raw(&site.app, COMPLETION, vec![b' '; HttpLimits::default().body_bytes + 1]).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    assert!(text.contains("\"error\""), "{text}");
    // After all that, the model still answers.
    let (status, _) = post(&site.app, COMPLETION, completion(json!({}))).await;
    assert_eq!(status, StatusCode::OK);
}

#[tokio::test]
async fn routes_models_and_readiness() {
    let site = site(common::options());
    let (_, list) = get(&site.app, "/v1/models").await;
    let states: Vec<&str> =
        list["data"].as_array().unwrap().iter().map(|m| m["status"].as_str().unwrap()).collect();
    assert_eq!(states, ["ready", "loading", "failed"]);
    assert_eq!(list["data"][0]["max_model_len"], 512);
    assert_eq!(get(&site.app, "/v1/models/tiny").await.1["revision"], "abc");
    assert_eq!(get(&site.app, "/v1/models/nope").await.0, StatusCode::NOT_FOUND);
    assert_eq!(get(&site.app, "/health").await.0, StatusCode::OK);
    let (status, body) = get(&site.app, "/ready").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(body["models"]["broken"]["error"], "no such file");
    assert_eq!(get(&site.app, "/ready?model=tiny").await.0, StatusCode::OK);
    assert_eq!(get(&site.app, "/nothing").await.0, StatusCode::NOT_FOUND);
    let delete = Request::delete("/v1/models").body(Body::empty()).unwrap();
    assert_eq!(call(&site.app, delete).await.0, StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test]
async fn the_model_header_must_not_contradict_the_body() {
    let site = site(common::options());
    let request = |header: &str, body: Value| {
        Request::post(COMPLETION)
            .header("X-Targon-Model", header)
            .body(Body::from(body.to_string()))
            .unwrap()
    };
    let (status, _) = call(&site.app, request("tiny", completion(json!({})))).await;
    assert_eq!(status, StatusCode::OK);
    let (status, text) = call(&site.app, request("slow", completion(json!({})))).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{text}");
    let mut unnamed = completion(json!({}));
    unnamed.as_object_mut().unwrap().remove("model");
    assert_eq!(call(&site.app, request("tiny", unnamed.clone())).await.0, StatusCode::OK);
    let (status, text) = post_raw(&site.app, COMPLETION, unnamed.to_string()).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(text.contains("must name one of: tiny, slow, broken"), "{text}");
}

#[tokio::test]
async fn a_full_queue_is_429_with_retry_after() {
    let tight = Options { waiting_max: 0, ..common::lasting(1) };
    let site = site(tight);
    let long = completion(json!({"max_tokens": LASTING_TOKENS, "stream": true}));
    let response = site
        .app
        .clone()
        .oneshot(Request::post(COMPLETION).body(Body::from(long.to_string())).unwrap())
        .await
        .unwrap();
    let second = Request::post(COMPLETION).body(Body::from(completion(json!({})).to_string()));
    let refused = site.app.clone().oneshot(second.unwrap()).await.unwrap();
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(refused.headers()["retry-after"], "1");
    drop(response);
    assert!(eventually(|| site.engine.stats().snapshot().load.running == 0).await);
}

async fn eventually(mut condition: impl FnMut() -> bool) -> bool {
    for _ in 0..5_000 {
        if condition() {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    false
}

async fn listening(site: &Site, timeout: Duration) -> (std::net::SocketAddr, Stop) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, receiver) = tokio::sync::oneshot::channel::<()>();
    let stop = async move {
        let _ = receiver.await;
    };
    let server = tokio::spawn(serve(listener, site.state.clone(), stop, timeout));
    (address, Stop { sender, server })
}

struct Stop {
    sender: tokio::sync::oneshot::Sender<()>,
    server: tokio::task::JoinHandle<()>,
}

async fn send(address: std::net::SocketAddr, body: &Value) -> TcpStream {
    let mut socket = TcpStream::connect(address).await.unwrap();
    let body = body.to_string();
    let head =
        format!("POST {COMPLETION} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    socket.write_all(head.as_bytes()).await.unwrap();
    socket.write_all(body.as_bytes()).await.unwrap();
    socket
}

#[tokio::test]
async fn a_client_that_goes_away_ends_its_sequence() {
    let site = site(common::lasting(1));
    let (address, _stop) = listening(&site, Duration::from_secs(5)).await;
    for streams in [true, false] {
        let body = completion(json!({"max_tokens": LASTING_TOKENS, "stream": streams}));
        let mut socket = send(address, &body).await;
        if streams {
            let mut first = [0; 64];
            socket.read_exact(&mut first).await.unwrap();
        }
        assert!(eventually(|| site.engine.stats().snapshot().load.running == 1).await);
        drop(socket);
        assert!(eventually(|| site.engine.stats().snapshot().load.running == 0).await);
    }
    let snapshot = site.engine.stats().snapshot();
    assert_eq!((snapshot.aborted, snapshot.load.blocks_used), (2, 0));
}

#[tokio::test]
async fn draining_ends_what_runs_and_refuses_what_comes() {
    let site = site(common::lasting(1));
    let (address, stop) = listening(&site, Duration::from_secs(20)).await;
    let mut running = send(address, &completion(json!({"max_tokens": 1000, "stream": true}))).await;
    assert!(eventually(|| site.engine.stats().snapshot().decode_tokens > 0).await);
    stop.sender.send(()).unwrap();
    assert!(eventually(|| site.state.is_draining()).await);
    let (status, _) = post(&site.app, COMPLETION, completion(json!({}))).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(get(&site.app, "/ready?model=tiny").await.0, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(get(&site.app, "/health").await.0, StatusCode::OK);
    let mut text = String::new();
    running.read_to_string(&mut text).await.unwrap();
    assert!(text.contains("data: [DONE]") && text.contains("\"finish_reason\":\"length\""));
    stop.server.await.unwrap();
}

#[tokio::test]
async fn a_drain_that_takes_too_long_ends_with_an_error_frame() {
    let site = site(common::lasting(1));
    let (address, stop) = listening(&site, Duration::from_millis(1)).await;
    let body = completion(json!({"max_tokens": LASTING_TOKENS, "stream": true}));
    let mut running = send(address, &body).await;
    assert!(eventually(|| site.engine.stats().snapshot().decode_tokens > 0).await);
    stop.sender.send(()).unwrap();
    let mut text = String::new();
    running.read_to_string(&mut text).await.unwrap();
    assert!(text.contains("the server is shutting down"), "{text}");
    assert!(text.contains("data: [DONE]"));
    stop.server.await.unwrap();
}
