//! The verifier's service under attack: by peers, whose bytes stand in `output_sequence`, and by
//! callers that are slow, loud or wrong. Each attack has a budget of time.

use crate::common;
use crate::common::site::{CHAT, Site, chat, get, post, post_raw, site, stream};
use axum::Router;
use axum::http::StatusCode;
use serde_json::{Value, json};
use std::future::Future;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use targon_engine::clock::Clock;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::server::listen::serve_all;
use targon_engine::server::registry::{ModelState, Registry};
use targon_engine::server::settings::{HttpLimits, Settings};
use targon_engine::verifier::Service;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// Tokens that are asked for.
const TOKENS: usize = 8;

/// The service beside a server of the same model, which gives honest answers.
struct Desk {
    site: Site,
    registry: Registry,
    service: Service,
    app: Router,
    pool: Pool,
}

fn desk(limits: HttpLimits) -> Desk {
    let site = site(common::options());
    let registry = Registry::default();
    registry.announce(["tiny".to_owned()]);
    let served = site.served.clone();
    registry.set("tiny", None, ModelState::Ready(Box::new(served)));
    let pool = Pool::new(2, Isa::best()).unwrap();
    let settings = Settings { limits, ..Settings::default() };
    let service = Service::new(registry.clone(), &settings, Clock::system(), &pool);
    Desk { site, registry, app: service.router(), service, pool }
}

/// What is asked of miner and verifier; greedy, so that an honest answer is certain to pass.
fn params(extra: Value) -> Value {
    let mut params = json!({
        "messages": [{"role": "user", "content": "hello"}], "max_tokens": TOKENS,
        "temperature": 0.0, "seed": 42, "ignore_eos": true, "stream": true,
    });
    params.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    params
}

impl Desk {
    /// An honest answer, taken apart as the original client does it: chunks without text are
    /// dropped until the first one with text.
    async fn honest(&self, params: &Value) -> Vec<Value> {
        let mut body = chat(params.clone());
        body["logprobs"] = json!(true);
        body["logprobs_mode"] = json!("scaled");
        let frames = stream(&self.site.app, CHAT, body).await;
        let tokens = frames.iter().map(|f| &f["choices"][0]).filter_map(|choice| {
            let id = choice["token_ids"][0].as_u64()?;
            let logprob = &choice["logprobs"]["content"][0]["logprob"];
            let text = choice["delta"]["content"].as_str().unwrap_or_default();
            Some(json!({"text": text, "logprob": logprob, "token_id": id}))
        });
        tokens.skip_while(|t| t["text"] == "").collect()
    }

    async fn verify(&self, params: &Value, output: &str) -> (StatusCode, Value) {
        let text = format!(
            r#"{{"model": "tiny", "request_type": "CHAT", "request_params": {params},
                "output_sequence": {output}}}"#
        );
        let (status, text) = post_raw(&self.app, "/verify", text).await;
        (status, serde_json::from_str(&text).unwrap())
    }
}

/// Fails when `work` takes longer than it may.
async fn within<T>(budget: Duration, what: &str, work: impl Future<Output = T>) -> T {
    let started = Instant::now();
    let done = tokio::time::timeout(budget, work).await;
    done.unwrap_or_else(|_| panic!("{what}: not done after {:?}", started.elapsed()))
}

fn of(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn written(items: &[Value]) -> String {
    json!(items).to_string()
}

#[tokio::test]
async fn honest_answers_are_verified_with_and_without_a_limit() {
    let desk = desk(HttpLimits::default());
    let asked = params(json!({}));
    let honest = desk.honest(&asked).await;
    assert_eq!(honest.len(), TOKENS);
    let verified = (StatusCode::OK, json!({"verified": true}));
    assert_eq!(desk.verify(&asked, &written(&honest)).await, verified);
    // No limit, in the container's words: nothing is too long, and it may end anywhere.
    let endless = params(json!({"max_tokens": 0}));
    assert_eq!(desk.verify(&endless, &written(&honest)).await, verified);
    let (_, short) = desk.verify(&endless, &written(&honest[..2])).await;
    assert_eq!(short["cause"], "TOO_SHORT");
    let mut other = honest.clone();
    other[5]["token_id"] = json!(7);
    let (_, rejected) = desk.verify(&endless, &written(&other)).await;
    assert_eq!(rejected["verified"], false);
    // A peer cannot step out of the model's context in order not to be checked.
    let long: Vec<Value> = honest.iter().cycle().take(600).cloned().collect();
    let (_, rejected) = desk.verify(&endless, &written(&long)).await;
    assert_eq!(rejected["cause"], "TOO_LONG", "{rejected}");
    // A caller that asks for more than the context holds is told so.
    for max_tokens in [600_i64, 1 << 40] {
        let asked = params(json!({"max_tokens": max_tokens}));
        let (_, refused) = desk.verify(&asked, &written(&long)).await;
        assert_eq!(
            (&refused["cause"], &refused["verified"]),
            (&json!("INTERNAL_ERROR"), &json!(null))
        );
        assert!(refused["error"].as_str().unwrap().contains("maximum context length"), "{refused}");
    }
}

/// Sequences that a peer can have caused, and the word for each.
fn cheats(honest: &[Value]) -> Vec<(&'static str, String, &'static str)> {
    let with = |key: &str, value: &str| {
        let mut changed = honest.to_vec();
        changed[2][key] = json!("@");
        written(&changed).replace("\"@\"", value)
    };
    let all = |key: &str, value: Value| {
        let mut changed = honest.to_vec();
        changed.iter_mut().for_each(|token| token[key] = value.clone());
        written(&changed)
    };
    let without = |key: &str| {
        let mut changed = honest.to_vec();
        changed[2].as_object_mut().unwrap().remove(key);
        written(&changed)
    };
    let again =
        |count: usize| written(&honest.iter().cycle().take(count).cloned().collect::<Vec<_>>());
    let long = format!("\"{}\"", "x".repeat(1 << 20));
    let deep = "[".repeat(100_000) + &"]".repeat(100_000);
    let hidden = format!(r#"[{}{}]"#, "0,".repeat(3_000_000), 0);
    vec![
        ("70,000 tokens", again(70_000), "TOO_LONG"),
        ("one token too many", again(TOKENS + 1), "TOO_LONG"),
        ("no tokens", "[]".into(), "TOO_SHORT"),
        ("two tokens", written(&honest[..2]), "EARLY_END"),
        ("an id of 2^70", with("token_id", "1180591620717411303424"), "BAD_STREAM"),
        ("an id of 5.5", with("token_id", "5.5"), "BAD_STREAM"),
        ("an id of 1e400", with("token_id", "1e400"), "BAD_STREAM"),
        ("an id below 0", with("token_id", "-1"), "BAD_STREAM"),
        ("an id outside the vocabulary", with("token_id", "4000000000"), "BAD_STREAM"),
        ("an id that is a text", with("token_id", "\"5\""), "BAD_STREAM"),
        ("an id that is null", with("token_id", "null"), "BAD_STREAM"),
        ("no id", without("token_id"), "BAD_STREAM"),
        ("a text that is null", with("text", "null"), "BAD_STREAM"),
        ("a text that is a number", with("text", "5"), "BAD_STREAM"),
        ("no text", without("text"), "BAD_STREAM"),
        ("half of a surrogate pair", with("text", r#""\ud83d""#), "BAD_STREAM"),
        ("a megabyte of text", with("text", &long), "BAD_STREAM"),
        ("a log-probability of NaN", with("logprob", "NaN"), "BAD_STREAM"),
        ("one of minus infinity", with("logprob", "-Infinity"), "BAD_STREAM"),
        ("one of 1e999", with("logprob", "1e999"), "UNLIKELY_TOKENS"),
        ("one that is a text", with("logprob", "\"-0.5\""), "BAD_STREAM"),
        ("all of them 0", all("logprob", json!(0)), "OVERFIT"),
        ("all of them 0.0", all("logprob", json!(-0.0)), "OVERFIT"),
        ("all of them -0.01", all("logprob", json!(-0.01)), "UNLIKELY_TOKENS"),
        ("none of them", all("logprob", Value::Null), "UNLIKELY_TOKENS"),
        ("depth", format!("[{deep}]"), "BAD_STREAM"),
        ("depth in a key that nobody reads", with("powv", &deep), "BAD_STREAM"),
        ("values that are no tokens", hidden, "TOO_LONG"),
        ("lists in place of objects", r#"[["a", -1, 5], 0, 0]"#.into(), "BAD_STREAM"),
        ("a key twice", r#"[{"text": "a", "text": "b", "token_id": 1}]"#.into(), "BAD_STREAM"),
        ("not a list", "{}".into(), "BAD_STREAM"),
        ("null", "null".into(), "BAD_STREAM"),
        ("a text", "\"abc\"".into(), "BAD_STREAM"),
    ]
}

#[tokio::test]
async fn a_peers_bytes_are_rejected_whatever_they_are() {
    let desk = desk(HttpLimits::default());
    let asked = params(json!({}));
    let honest = desk.honest(&asked).await;
    for (what, output, cause) in cheats(&honest) {
        let verified = desk.verify(&asked, &output);
        let (status, answer) = within(of(5), what, verified).await;
        assert_eq!(status, StatusCode::OK, "{what}: {answer}");
        assert_eq!(answer["verified"], false, "{what}: {answer}");
        assert_eq!(answer["cause"], cause, "{what}: {answer}");
        let error = answer["error"].as_str().unwrap();
        assert!((10..400).contains(&error.len()), "{what}: {error:.500}");
    }
    // Bytes that are no UTF-8 inside a text.
    let mut changed = honest.clone();
    changed[2]["text"] = json!("@@@");
    let body = json!({
        "request_type": "CHAT", "request_params": asked, "output_sequence": changed,
    });
    let mut body = body.to_string().into_bytes();
    let at = body.windows(3).position(|bytes| bytes == b"@@@").unwrap();
    body[at..at + 3].copy_from_slice(&[0xff, 0xfe, 0xc3]);
    let (status, answer) = post_raw(&desk.app, "/verify", body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert!(answer.contains("\"cause\":\"BAD_STREAM\""), "{answer}");
}

#[tokio::test]
async fn what_is_wrong_with_the_callers_part_is_said_as_fastapi_says_it() {
    let desk = desk(HttpLimits::default());
    let whole = json!({"request_type": "CHAT", "request_params": {}, "output_sequence": []});
    let with = |key: &str, value: Value| {
        let mut body = whole.clone();
        body[key] = value;
        body.to_string()
    };
    let without = |key: &str| {
        let mut body = whole.clone();
        body.as_object_mut().unwrap().remove(key);
        body
    };
    let mut later = without("output_sequence");
    later["raw_chunks"] = json!([]);
    for (body, kind, place) in [
        (String::new(), "model_attributes_type", json!(["body"])),
        ("3".into(), "model_attributes_type", json!(["body"])),
        ("{\"request_type\":".into(), "json_invalid", json!(["body"])),
        (without("request_type").to_string(), "missing", json!(["body", "request_type"])),
        (without("request_params").to_string(), "missing", json!(["body", "request_params"])),
        (without("output_sequence").to_string(), "missing", json!(["body", "output_sequence"])),
        (later.to_string(), "missing", json!(["body", "output_sequence"])),
        (with("request_type", json!(1)), "string_type", json!(["body", "request_type"])),
        (with("request_params", json!([])), "dictionary_type", json!(["body", "request_params"])),
        (with("model", json!(7)), "string_type", json!(["body", "model"])),
        (
            with("request_params", json!({"messages": "hello", "max_tokens": 8})),
            "value_error",
            json!(["body", "request_params"]),
        ),
    ] {
        let (status, text) = post_raw(&desk.app, "/verify", body.clone()).await;
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{body}: {text}");
        let fault = &answer["detail"][0];
        assert_eq!(fault["type"], kind, "{body}: {text}");
        let loc = fault["loc"].as_array().unwrap();
        assert_eq!(&loc[..place.as_array().unwrap().len()], place.as_array().unwrap(), "{text}");
        assert!(fault["msg"].is_string() && answer.get("verified").is_none(), "{text}");
    }
    let (_, text) = post_raw(&desk.app, "/verify", later.to_string()).await;
    assert!(text.contains("4.2 to 4.4") && text.contains("raw_chunks"), "{text}");
    // What has the right form and cannot be checked here counts neither way.
    for extra in [
        json!({"messages": [{"role": "user", "content": "x".repeat(4_000)}]}),
        json!({"n": 2}),
        json!({"top_p": -3}),
    ] {
        let (status, answer) = desk.verify(&params(extra), "[]").await;
        assert_eq!((status, &answer["cause"]), (StatusCode::OK, &json!("INTERNAL_ERROR")));
        assert!(answer.get("verified").is_none(), "{answer}");
    }
    let (status, answer) = post(&desk.app, "/generate", json!({"messages": 3})).await;
    assert!(status == StatusCode::UNPROCESSABLE_ENTITY && answer["detail"].is_array(), "{answer}");
    let (status, answer) = get(&desk.app, "/nowhere").await;
    assert_eq!((status, answer), (StatusCode::NOT_FOUND, json!({"detail": "Not Found"})));
}

#[tokio::test]
async fn an_answer_that_begins_inside_a_character_is_understood() {
    let desk = desk(HttpLimits::default());
    // The two bytes of é one after the other, then whatever comes.
    let asked = params(json!({
        "logit_bias": {"195": 60.0, "169": 40.0}, "repetition_penalty": 100.0, "max_tokens": 12,
    }));
    let honest = desk.honest(&asked).await;
    assert_eq!((honest.len(), &honest[0]["text"]), (11, &json!("é")), "{honest:?}");
    assert_eq!(honest[0]["token_id"], 169, "the first token was dropped: {honest:?}");
    let (_, answer) = desk.verify(&asked, &written(&honest)).await;
    assert_eq!(answer, json!({"verified": true}));
    // It is no way around the rules.
    let mut other = honest.clone();
    other[6]["token_id"] = json!(5);
    other[6]["text"] = json!("\u{5}");
    for (what, items) in [("another token", &other[..]), ("an early end", &honest[..6])] {
        let (_, answer) = desk.verify(&asked, &written(items)).await;
        assert_eq!(answer["verified"], false, "{what}: {answer}");
    }
}

/// The service behind a socket; the sender stops it.
struct Open {
    address: SocketAddr,
    stop: tokio::sync::oneshot::Sender<()>,
    serving: JoinHandle<()>,
}

async fn open(desk: &Desk, drain: Duration) -> Open {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let stopped = async move { drop(stopped.await) };
    let listeners = vec![(listener, desk.app.clone())];
    let state = desk.service.state().clone();
    let serving = tokio::spawn(serve_all(listeners, state, stopped, drain));
    Open { address, stop, serving }
}

/// Sends bytes, then reads to the end.
async fn exchange(address: SocketAddr, request: Vec<u8>) -> String {
    let mut socket = TcpStream::connect(address).await.unwrap();
    // A server that has answered may close before everything is sent.
    let _ = socket.write_all(&request).await;
    let mut text = Vec::new();
    let _ = socket.read_to_end(&mut text).await;
    String::from_utf8_lossy(&text).into_owned()
}

fn request(method: &str, path: &str, length: usize, body: &str) -> Vec<u8> {
    format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

fn body_of(response: &str) -> Value {
    let (_, body) = response.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{response}"));
    serde_json::from_str(body).unwrap_or_else(|_| panic!("{response}"))
}

#[tokio::test]
async fn requests_that_never_end_are_ended() {
    let short = Duration::from_millis(300);
    let limits = HttpLimits { header_time: short, body_time: short, ..HttpLimits::default() };
    let desk = desk(limits);
    let open = open(&desk, of(1)).await;
    let mut waiting = JoinSet::new();
    for i in 0..70 {
        let (method, path) = [
            ("POST", "/verify"),
            ("POST", "/generate"),
            ("GET", "/endpoints"),
            ("POST", "/"),
            ("POST", "/nowhere"),
        ][i % 5];
        let head = match i % 2 {
            0 => request(method, path, 1000, ""),
            _ => request(method, path, 1000, "{\"request_type\": \"CH"),
        };
        waiting.spawn(async move { (path, exchange(open.address, head).await) });
    }
    waiting.spawn(async move { ("a head", exchange(open.address, b"POST /ver".to_vec()).await) });
    let ended = async {
        while let Some(done) = waiting.join_next().await {
            let (path, response) = done.unwrap();
            if ["/verify", "/generate"].contains(&path) {
                assert!(response.starts_with("HTTP/1.1 408"), "{path}: {response}");
                assert!(response.contains("\"detail\""), "{path}: {response}");
            }
        }
    };
    within(of(5), "70 connections without a body", ended).await;
    // And whoever comes afterwards is served.
    let response = exchange(open.address, request("GET", "/ready", 0, "")).await;
    assert!(response.starts_with("HTTP/1.1 200"), "{response}");
}

#[tokio::test]
async fn an_answer_that_is_too_long_for_a_body_is_rejected_and_its_caller_hears_it() {
    let desk = desk(HttpLimits { body_bytes: 1 << 20, ..HttpLimits::default() });
    let open = open(&desk, of(1)).await;
    let asked = params(json!({}));
    let item = json!({"text": "x".repeat(1000), "logprob": -1, "token_id": 5});
    let body = json!({
        "request_type": "CHAT", "request_params": asked, "output_sequence": vec![item; 18_000],
    });
    let body = body.to_string();
    assert!(body.len() > 17 << 20);
    for length in [format!("content-length: {}", body.len()), "transfer-encoding: chunked".into()] {
        let mut bytes =
            format!("POST /verify HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{length}\r\n\r\n");
        match length.starts_with('c') {
            true => bytes.push_str(&body),
            false => bytes.push_str(&format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len())),
        }
        let response = exchange(open.address, bytes.into_bytes());
        let answer = body_of(&within(of(5), "17 MiB", response).await);
        assert_eq!(answer["verified"], false, "{answer}");
        assert_eq!(answer["cause"], "BAD_STREAM", "{answer}");
    }
    // The longest honest answer is no such thing: the limit counts it beside the caller's part.
    let honest = desk.honest(&asked).await;
    let mut long = asked.clone();
    long["padding"] = json!("x".repeat((1 << 20) - 1000));
    assert_eq!(desk.verify(&long, &written(&honest)).await.1, json!({"verified": true}));
    long["padding"] = json!("x".repeat((1 << 20) + 1));
    let (status, answer) = desk.verify(&long, &written(&honest)).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{answer:.300}");
}

#[tokio::test]
async fn the_service_says_how_it_is() {
    let desk = desk(HttpLimits::default());
    let asked = params(json!({}));
    let honest = desk.honest(&asked).await;
    desk.verify(&asked, &written(&honest)).await;
    desk.verify(&asked, "[]").await;
    desk.verify(&params(json!({"n": 2})), "[]").await;
    assert_eq!(get(&desk.app, "/health").await.0, StatusCode::OK);
    assert_eq!(get(&desk.app, "/").await, (StatusCode::OK, json!(["", 200])));
    let (status, ready) = get(&desk.app, "/ready").await;
    assert!(status == StatusCode::OK && ready["models"]["tiny"]["status"] == "ready", "{ready}");
    let request = axum::http::Request::get("/metrics").body(axum::body::Body::empty()).unwrap();
    let (status, text) = crate::common::site::call(&desk.app, request).await;
    assert_eq!(status, StatusCode::OK);
    for want in [
        r#"targon_verifications_total{verdict="verified",cause=""} 1"#,
        r#"targon_verifications_total{verdict="rejected",cause="TOO_SHORT"} 1"#,
        r#"targon_verifications_total{verdict="unscored",cause="INTERNAL_ERROR"} 1"#,
        r#"http_requests_total{method="POST",path="/verify",status="200"} 3"#,
        r#"vllm:num_requests_running{model_name="tiny"} 0"#,
    ] {
        assert!(text.contains(want), "{want}: {text}");
    }
    // Until its models are there, the container does not answer.
    desk.registry.announce(["late".to_owned()]);
    assert_eq!(get(&desk.app, "/").await.0, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(get(&desk.app, "/ready").await.0, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(get(&desk.app, "/endpoints?model=late").await.0, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(get(&desk.app, "/health").await.0, StatusCode::OK);
}

/// Holds all compute threads until dropped.
struct Busy(Option<std::sync::mpsc::Sender<()>>, Option<std::thread::JoinHandle<()>>);

impl Busy {
    fn new(pool: &Pool) -> Self {
        let (free, freed) = std::sync::mpsc::channel::<()>();
        let (taken, is_taken) = std::sync::mpsc::channel();
        let pool = pool.clone();
        let thread = std::thread::spawn(move || {
            let _turn = pool.turn();
            taken.send(()).unwrap();
            let _ = freed.recv();
        });
        is_taken.recv().unwrap();
        Self(Some(free), Some(thread))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        drop(self.0.take());
        let _ = self.1.take().unwrap().join();
    }
}

#[tokio::test]
async fn a_stop_waits_for_what_runs_and_takes_nothing_new() {
    let desk = desk(HttpLimits::default());
    let asked = params(json!({}));
    let honest = desk.honest(&asked).await;
    let body = json!({
        "request_type": "CHAT", "request_params": asked, "output_sequence": honest,
    });
    let post = request("POST", "/verify", body.to_string().len(), &body.to_string());
    let Open { address, stop, serving } = open(&desk, of(20)).await;
    let busy = Busy::new(&desk.pool);
    let running = tokio::spawn(exchange(address, post.clone()));
    let state = desk.service.state().clone();
    let counted = async {
        while state.in_flight() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within(of(5), "the verification begins", counted).await;
    stop.send(()).unwrap();
    let draining = async {
        while !state.is_draining() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within(of(5), "the stop is heard", draining).await;
    let refused = within(of(5), "a late request", exchange(address, post)).await;
    assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
    assert_eq!(body_of(&refused)["cause"], "INTERNAL_ERROR");
    for (path, status) in [("/ready", 503), ("/", 503), ("/health", 200)] {
        let response = exchange(address, request("GET", path, 0, "")).await;
        assert!(response.starts_with(&format!("HTTP/1.1 {status}")), "{path}: {response}");
    }
    assert!(!serving.is_finished() && !running.is_finished());
    drop(busy);
    let response = within(of(5), "what ran", running).await.unwrap();
    assert_eq!(body_of(&response), json!({"verified": true}));
    within(of(5), "the end", serving).await.unwrap();
}

#[tokio::test]
async fn callers_that_are_too_many_or_go_away_hold_nothing_up() {
    let desk = desk(HttpLimits::default());
    let asked = params(json!({}));
    let honest = desk.honest(&asked).await;
    let body = json!({
        "request_type": "CHAT", "request_params": asked, "output_sequence": honest,
    });
    let post = request("POST", "/verify", body.to_string().len(), &body.to_string());
    let open = open(&desk, of(1)).await;
    let state = desk.service.state();
    let count = async |count: usize| {
        let reached = async {
            while state.in_flight() != count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        within(of(20), &format!("{count} requests run"), reached).await;
    };
    let busy = Busy::new(&desk.pool);
    let mut waiting = JoinSet::new();
    for _ in 0..64 {
        waiting.spawn(exchange(open.address, post.clone()));
    }
    count(64).await;
    let refused = within(of(5), "one too many", exchange(open.address, post.clone())).await;
    assert!(refused.starts_with("HTTP/1.1 429"), "{refused}");
    assert!(refused.contains("retry-after") && body_of(&refused)["cause"] == "INTERNAL_ERROR");
    // Their sockets close, and their places are free at once.
    waiting.abort_all();
    count(0).await;
    let later = tokio::spawn(exchange(open.address, post));
    count(1).await;
    drop(busy);
    let response = within(of(10), "whoever came later", later).await.unwrap();
    assert_eq!(body_of(&response), json!({"verified": true}));
}

#[tokio::test]
async fn a_verification_that_outlasts_the_stop_is_given_up() {
    let desk = desk(HttpLimits::default());
    let asked = params(json!({}));
    let honest = desk.honest(&asked).await;
    let body = json!({
        "request_type": "CHAT", "request_params": asked, "output_sequence": honest,
    });
    let post = request("POST", "/verify", body.to_string().len(), &body.to_string());
    let Open { address, stop, serving } = open(&desk, Duration::from_millis(200)).await;
    let _busy = Busy::new(&desk.pool);
    let running = tokio::spawn(exchange(address, post));
    let state = desk.service.state().clone();
    let counted = async {
        while state.in_flight() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within(of(5), "the verification begins", counted).await;
    stop.send(()).unwrap();
    let response = within(of(5), "what ran", running).await.unwrap();
    assert!(body_of(&response).get("verified").is_none(), "{response}");
    within(of(5), "the end", serving).await.unwrap();
}
