//! The signed door of a miner: every rule of the protocol in its order and words, each malformed
//! header, replays, and the limits that keep one validator from crowding out another.

use crate::common::site::{CHAT, COMPLETION, chat, completion};
use crate::common::{self, LASTING_TOKENS};
use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode};
use http_body_util::BodyExt;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;
use targon_engine::chain::Head;
use targon_engine::chain::btauth;
use targon_engine::chain::epistula::{Envelope, HEADER_SIGNATURE, HEADER_TIMESTAMP, HEADER_UUID};
use targon_engine::chain::keys::Keypair;
use targon_engine::chain::metagraph::{Hyperparameters, Metagraph, Neuron, Rao};
use targon_engine::clock::Clock;
use targon_engine::engine::{Engine, Options};
use targon_engine::intake::translate::Defaults;
use targon_engine::server::door::bodies::{GRACE, SHARE_MAX};
use targon_engine::server::door::{Gate, Policy, STAKE_MIN, SignedOutcome};
use targon_engine::server::listen::accept;
use targon_engine::server::registry::{ModelState, Registry, Served};
use targon_engine::server::settings::HttpLimits;
use targon_engine::server::state::ServerState;
use targon_engine::server::subnet::router;
use targon_engine::verify::answer::Answer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tower::ServiceExt;

const NOW: u64 = 1_795_333_310_123;
const VALIDATOR: u8 = 1;
const POOR: u8 = 2;
const STRANGER: u8 = 3;
const SECOND: u8 = 4;
const MINER: u8 = 9;

fn key(seed: u8) -> Keypair {
    Keypair::from_seed(&[seed; 32]).unwrap()
}

fn neuron(uid: u16, seed: u8, stake: Rao) -> Neuron {
    Neuron { incentive: 0.25, ..Neuron::new(uid, key(seed).hotkey(), stake) }
}

struct Miner {
    app: Router,
    open: Router,
    gate: Gate,
    clock: Clock,
    engine: Engine,
}

fn members() -> Metagraph {
    let members = vec![
        neuron(0, VALIDATOR, STAKE_MIN),
        neuron(1, POOR, Rao(STAKE_MIN.0 - 1)),
        neuron(2, MINER, Rao(0)),
        neuron(3, SECOND, STAKE_MIN),
    ];
    Metagraph::new(4, 70, Hyperparameters::default(), members)
}

fn miner_with(policy: Policy, options: Options) -> Miner {
    miner_over(common::tiny_served(3, options), policy)
}

fn miner_over(served: Served, policy: Policy) -> Miner {
    let (engine, registry) = (served.engine.clone(), Registry::default());
    registry.announce(["tiny", "broken"].map(String::from));
    registry.set("tiny", None, ModelState::Ready(Box::new(served)));
    registry.set("broken", None, ModelState::Failed("no such file".into()));
    let clock = Clock::manual(NOW);
    let gate = Gate::new(key(MINER).hotkey(), policy, clock.clone());
    gate.set_metagraph(Arc::new(members()));
    let state = ServerState::new(registry, Defaults::default(), clock.clone());
    let state = state.signed_by(Arc::new(key(MINER))).behind(gate.clone());
    let open = targon_engine::server::router(state.clone());
    Miner { app: router(state, gate.clone()), open, gate, clock, engine }
}

fn miner() -> Miner {
    miner_with(Policy::default(), common::options())
}

/// A signed request that can be spoilt before it is sent.
struct Signed {
    method: &'static str,
    path: String,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Signed {
    fn new(seed: u8, path: &str, body: &Value, at_ms: u64) -> Self {
        let uuid = uuid::Uuid::new_v4().to_string();
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let signed_for = Some(key(MINER).hotkey());
        let envelope = Envelope { timestamp_ms: at_ms, uuid: &uuid, signed_for };
        let mut headers = HeaderMap::new();
        for (name, value) in envelope.sign(&key(seed), &body) {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_str(&value).unwrap());
        }
        let method = if body.is_empty() { "GET" } else { "POST" };
        Self { method, path: path.into(), headers, body }
    }

    fn with(mut self, name: &'static str, value: &str) -> Self {
        let value = HeaderValue::from_bytes(value.as_bytes()).unwrap();
        self.headers.insert(HeaderName::from_static(name), value);
        self
    }

    fn without(mut self, name: &'static str) -> Self {
        self.headers.remove(name);
        self
    }

    fn request(&self) -> Request<Body> {
        let mut request = Request::builder().method(self.method).uri(&self.path);
        *request.headers_mut().unwrap() = self.headers.clone();
        request.body(Body::from(self.body.clone())).unwrap()
    }

    async fn send(&self, app: &Router) -> (StatusCode, Value) {
        let response = app.clone().oneshot(self.request()).await.unwrap();
        let status = response.status();
        let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }
}

fn asks(seed: u8) -> Signed {
    Signed::new(seed, COMPLETION, &completion(json!({"max_tokens": 3})), NOW)
}

#[tokio::test]
async fn signed_requests_of_validators_are_answered() {
    let miner = miner();
    for (path, body) in [
        (CHAT, chat(json!({"max_tokens": 3, "logprobs": true}))),
        (COMPLETION, completion(json!({"max_tokens": 3, "logprobs": true}))),
    ] {
        let (status, answer) = Signed::new(VALIDATOR, path, &body, NOW).send(&miner.app).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        // As a validator of 4.x wants it, without asking.
        assert_eq!(answer["logprobs_mode"], "scaled");
        let logprobs = &answer["choices"][0]["logprobs"];
        let name = logprobs["content"][0]["token"].as_str().or(logprobs["tokens"][0].as_str());
        assert!(name.unwrap().starts_with("token_id:"), "{answer}");
    }
    assert_eq!(miner.gate.counted(SignedOutcome::Accepted), 2);
    let plain = Request::get("/").body(Body::empty()).unwrap();
    assert_eq!(miner.app.clone().oneshot(plain).await.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn every_rule_refuses_with_its_status_and_message() {
    let miner = miner();
    let ok = || asks(VALIDATOR);
    let at = |ms| Signed::new(VALIDATOR, COMPLETION, &completion(json!({"max_tokens": 3})), ms);
    let other_body = || Signed { body: b"{}".to_vec(), ..ok() };
    let for_other = key(STRANGER).hotkey().to_string();
    let bad = StatusCode::BAD_REQUEST;
    let no = StatusCode::UNAUTHORIZED;
    let mismatch = "Signature Mismatch";
    let receiver = "Bad Request, message is not intended for self";
    let long = format!("0x{}", "ab".repeat(63));
    let cases = [
        (ok().without("epistula-version"), bad, "Unknown Epistula version"),
        (ok().with("epistula-version", "1"), bad, "Unknown Epistula version"),
        (ok().with("epistula-version", " 2 x"), bad, "Unknown Epistula version"),
        (ok().without("epistula-signed-for"), bad, receiver),
        (ok().with("epistula-signed-for", &for_other), bad, receiver),
        (ok().without("epistula-signed-by"), no, "Signer not in metagraph"),
        (ok().with("epistula-signed-by", "5Grw"), no, "Signer not in metagraph"),
        (asks(STRANGER), no, "Signer not in metagraph"),
        (asks(POOR), no, "Stake below minimum: 9999.999999999 TAO, at least 10000"),
        (ok().without(HEADER_SIGNATURE), bad, "Invalid Signature"),
        (ok().with(HEADER_SIGNATURE, "0xzz"), bad, "Invalid Signature"),
        (ok().with(HEADER_SIGNATURE, &long), bad, "Invalid Signature"),
        (ok().without(HEADER_TIMESTAMP), bad, "Invalid timestamp"),
        (ok().with(HEADER_TIMESTAMP, "soon"), bad, "Invalid timestamp"),
        (ok().with(HEADER_TIMESTAMP, "-1"), bad, "Invalid timestamp"),
        (ok().without(HEADER_UUID), bad, "Invalid uuid"),
        (ok().with(HEADER_UUID, "a.b"), bad, "Invalid uuid"),
        (at(NOW - 8_001), bad, "Request is too stale"),
        (at(NOW + 8_001), bad, "Request is dated too far in the future"),
        (ok().with(HEADER_TIMESTAMP, &(NOW + 1).to_string()), bad, mismatch),
        (ok().with(HEADER_UUID, "another"), bad, mismatch),
        (other_body(), bad, mismatch),
        (
            asks(STRANGER).with("epistula-signed-by", &key(VALIDATOR).hotkey().to_string()),
            bad,
            mismatch,
        ),
        (ok().with(HEADER_UUID, "\u{e9}"), bad, "Header epistula-uuid is not text"),
    ];
    for (number, (request, status, detail)) in cases.into_iter().enumerate() {
        let (got, answer) = request.send(&miner.app).await;
        assert_eq!((got, &answer), (status, &json!({"detail": detail})), "case {number}");
    }
    let mut twice = ok();
    twice.headers.append("epistula-uuid", HeaderValue::from_static("second"));
    let (_, answer) = twice.send(&miner.app).await;
    assert_eq!(answer["detail"], "Header epistula-uuid is given more than once");
    assert_eq!(miner.gate.counted(SignedOutcome::Accepted), 0);
    for edge in [NOW - 8_000, NOW + 8_000] {
        assert_eq!(at(edge).send(&miner.app).await.0, StatusCode::OK);
    }
}

#[tokio::test]
async fn the_timestamp_may_be_padded_and_the_message_wrapped() {
    let miner = miner();
    // The message holds the number, not the header's text.
    let padded = asks(VALIDATOR).with(HEADER_TIMESTAMP, &format!("0{NOW} "));
    assert_eq!(padded.send(&miner.app).await.0, StatusCode::OK);
    let mut wrapped = asks(VALIDATOR);
    let uuid = wrapped.headers[HEADER_UUID].to_str().unwrap().to_owned();
    let signed_for = Some(key(MINER).hotkey());
    let envelope = Envelope { timestamp_ms: NOW, uuid: &uuid, signed_for };
    let message = envelope.message(&wrapped.body);
    let message = [b"<Bytes>".as_slice(), &message, b"</Bytes>"].concat();
    let signature = key(VALIDATOR).sign(&message);
    let hex: String = signature.iter().map(|b| format!("{b:02x}")).collect();
    wrapped = wrapped.with(HEADER_SIGNATURE, &format!("0x{hex}"));
    assert_eq!(wrapped.send(&miner.app).await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_request_counts_once_and_a_refused_one_leaves_no_trace() {
    let miner = miner();
    let request = asks(VALIDATOR);
    // Somebody spoils it on the way first: that must not use up its name.
    let spoilt =
        Signed { body: b"{}".to_vec(), headers: request.headers.clone(), ..asks(VALIDATOR) };
    assert_eq!(spoilt.send(&miner.app).await.1["detail"], "Signature Mismatch");
    assert_eq!(request.send(&miner.app).await.0, StatusCode::OK);
    for _ in 0..3 {
        let (status, answer) = request.send(&miner.app).await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert_eq!(answer["detail"], "Request was received already");
    }
    // On another route, too: the path is not signed.
    let elsewhere = Signed { path: CHAT.into(), ..asks(VALIDATOR) };
    let elsewhere = Signed { headers: request.headers.clone(), ..elsewhere };
    let elsewhere = Signed { body: request.body.clone(), ..elsewhere };
    assert_eq!(elsewhere.send(&miner.app).await.0, StatusCode::BAD_REQUEST);
    miner.clock.advance(Duration::from_millis(8_001));
    assert_eq!(request.send(&miner.app).await.1["detail"], "Request is too stale");
    // Another signer may use the same name.
    let uuid = request.headers[HEADER_UUID].clone();
    let signed_for = Some(key(MINER).hotkey());
    let timestamp_ms = NOW + 8_001;
    let envelope = Envelope { timestamp_ms, uuid: uuid.to_str().unwrap(), signed_for };
    let mut other = asks(SECOND);
    for (name, value) in envelope.sign(&key(SECOND), &other.body) {
        other = other.with(name, &value);
    }
    assert_eq!(other.send(&miner.app).await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_body_that_comes_late_does_not_outlast_the_memory_of_its_request() {
    let miner = miner();
    let request = asks(VALIDATOR);
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Vec<u8>, std::io::Error>>(1);
    let mut late = request.request();
    *late.body_mut() = Body::from_stream(tokio_stream::wrappers::ReceiverStream::new(receiver));
    let app = miner.app.clone();
    let waiting = tokio::spawn(async move { app.oneshot(late).await.unwrap().status() });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(request.send(&miner.app).await.0, StatusCode::OK);
    miner.clock.advance(Duration::from_secs(20));
    // By now the first one is forgotten.
    let other =
        Signed::new(SECOND, COMPLETION, &completion(json!({"max_tokens": 3})), NOW + 20_000);
    assert_eq!(other.send(&miner.app).await.0, StatusCode::OK);
    sender.send(Ok(request.body.clone())).await.unwrap();
    drop(sender);
    assert_eq!(waiting.await.unwrap(), StatusCode::BAD_REQUEST);
    assert_eq!(miner.gate.counted(SignedOutcome::Accepted), 2);
}

#[tokio::test]
async fn a_full_house_still_lists_its_models_and_a_refused_request_may_come_again() {
    let policy = Policy { slots: 1, waiting_max: 0, ..Policy::default() };
    let miner = miner_with(policy, common::lasting(1));
    let body = completion(json!({"max_tokens": LASTING_TOKENS, "stream": true}));
    let running = Signed::new(VALIDATOR, COMPLETION, &body, NOW).request();
    let running = miner.app.clone().oneshot(running).await.unwrap();
    let refused = asks(SECOND);
    assert_eq!(refused.send(&miner.app).await.0, StatusCode::TOO_MANY_REQUESTS);
    let list = Signed::new(SECOND, "/models", &Value::Null, NOW).send(&miner.app).await;
    assert_eq!(list, (StatusCode::OK, json!(["tiny"])));
    drop(running);
    assert_eq!(refused.send(&miner.app).await.0, StatusCode::OK);
}

#[tokio::test]
async fn policies_are_followed() {
    let rate = NonZeroU32::new(1000).unwrap();
    let open = Policy { stake_min: None, rate, ..Policy::default() };
    assert_eq!(asks(POOR).send(&miner_with(open, common::options()).app).await.0, StatusCode::OK);
    let stranger = key(STRANGER).hotkey();
    let allow = Policy { allow: [stranger].into(), ..Policy::default() };
    let miner = miner_with(allow, common::options());
    assert_eq!(asks(STRANGER).send(&miner.app).await.0, StatusCode::OK);
    let deny = Policy { deny: [key(VALIDATOR).hotkey()].into(), ..Policy::default() };
    let (status, answer) = asks(VALIDATOR).send(&miner_with(deny, common::options()).app).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    assert_eq!(answer["detail"], "Signer is denied by this miner");
}

#[tokio::test]
async fn one_hotkeys_rate_is_its_own() {
    let rate = NonZeroU32::new(2).unwrap();
    let miner = miner_with(Policy { rate, ..Policy::default() }, common::options());
    let mut statuses = Vec::new();
    for _ in 0..8 {
        statuses.push(asks(VALIDATOR).send(&miner.app).await.0);
    }
    assert!(statuses[..4].iter().all(|s| *s == StatusCode::OK), "{statuses:?}");
    assert!(statuses[4..].contains(&StatusCode::TOO_MANY_REQUESTS), "{statuses:?}");
    assert_eq!(asks(SECOND).send(&miner.app).await.0, StatusCode::OK);
    // A limited request may come again as it is.
    let again = asks(VALIDATOR);
    while again.send(&miner.app).await.0 == StatusCode::TOO_MANY_REQUESTS {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(again.send(&miner.app).await.1["detail"], "Request was received already");
}

#[tokio::test]
async fn where_stake_is_known_in_part_only_a_permit_takes_its_place() {
    let miner = miner();
    let rule = "members with 10000 TAO of stake";
    let shown =
        || async { common::site::get(&miner.open, "/targon/status").await.1["may_ask"].clone() };
    assert_eq!(shown().await, rule);
    let mut metagraph = members();
    metagraph.is_stake_partial = true;
    miner.gate.set_metagraph(Arc::new(metagraph));
    // Members have a permit in these tests.
    assert_eq!(asks(POOR).send(&miner.app).await.0, StatusCode::OK);
    let words = shown().await;
    assert!(words.as_str().unwrap().contains("or a validator permit"), "{words}");
    let without = |seed, stake| Neuron { permit: false, ..neuron(0, seed, stake) };
    let members = vec![without(VALIDATOR, STAKE_MIN), without(POOR, Rao(7_000_000_000))];
    let mut metagraph = Metagraph::new(4, 71, Hyperparameters::default(), members);
    metagraph.is_stake_partial = true;
    miner.gate.set_metagraph(Arc::new(metagraph));
    assert_eq!(asks(VALIDATOR).send(&miner.app).await.0, StatusCode::OK);
    let (status, answer) = asks(POOR).send(&miner.app).await;
    let detail = "Stake below minimum: 7 TAO are known, at least 10000 or a validator permit";
    assert_eq!((status, &answer["detail"]), (StatusCode::UNAUTHORIZED, &json!(detail)));
    assert_eq!(miner.gate.counted(SignedOutcome::LowStake), 1);
}

#[tokio::test]
async fn long_answers_of_one_validator_do_not_make_another_wait_for_their_end() {
    let policy = Policy { slots: 2, ..Policy::default() };
    let miner = miner_with(policy, common::lasting(2));
    let long = completion(json!({"max_tokens": LASTING_TOKENS, "stream": true}));
    let mut running = Vec::new();
    for _ in 0..2 {
        let request = Signed::new(VALIDATOR, COMPLETION, &long, NOW).request();
        let mut body = miner.app.clone().oneshot(request).await.unwrap().into_body();
        // The first token: it runs.
        body.frame().await.unwrap().unwrap();
        running.push(body);
    }
    let started = std::time::Instant::now();
    let (status, answer) = asks(SECOND).send(&miner.app).await;
    let took = started.elapsed();
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert!(took < Duration::from_secs(1), "three tokens took {took:?}");
    println!("three tokens of another validator after {took:?}");
    // Both long ones go on, one of them from where it was set aside; neither has ended.
    let stats = || miner.engine.stats().snapshot();
    while stats().finished < 1 || stats().load.running < 2 {
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", stats());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let now = stats();
    assert!(now.finished == 1 && now.faults == 0 && now.load.preemptions > 0, "{now:?}");
}

#[tokio::test]
async fn the_choices_of_one_validator_leave_places_to_others() {
    let options = Options { waiting_max: 6, ..common::lasting(2) };
    let miner = miner_with(Policy { slots: 2, ..Policy::default() }, options);
    let choices = |n: usize| {
        let body = completion(json!({"max_tokens": LASTING_TOKENS, "n": n, "stream": true}));
        Signed::new(VALIDATOR, COMPLETION, &body, NOW).request()
    };
    // Of eight places a quarter is never one validator's.
    let most = miner.app.clone().oneshot(choices(6)).await.unwrap();
    assert_eq!(most.status(), StatusCode::OK);
    let more = miner.app.clone().oneshot(choices(1)).await.unwrap();
    assert_eq!(more.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(asks(SECOND).send(&miner.app).await.0, StatusCode::OK);
    drop((most, more));
}

#[tokio::test]
async fn a_loud_validator_does_not_starve_a_quiet_one() {
    let policy = Policy { slots: 1, waiting_max: 30, ..Policy::default() };
    let miner = miner_with(policy, common::options());
    let body = completion(json!({"max_tokens": 40}));
    let send = |seed| {
        let (request, app) = (Signed::new(seed, COMPLETION, &body, NOW), miner.app.clone());
        tokio::spawn(async move { request.send(&app).await.0 })
    };
    let loud: Vec<_> = (0..31).map(|_| send(VALIDATOR)).collect();
    while miner.gate.counted(SignedOutcome::Accepted) == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(send(SECOND).await.unwrap(), StatusCode::OK);
    let done = loud.iter().filter(|task| task.is_finished()).count();
    assert!(done <= 5, "the quiet one came after {done} of the loud one's 31");
    let mut refused = 0;
    for task in loud {
        match task.await.unwrap() {
            StatusCode::OK => {}
            StatusCode::TOO_MANY_REQUESTS => refused += 1,
            other => panic!("{other}"),
        }
    }
    assert!(refused <= 1, "31 fit: one runs, thirty wait");
}

#[tokio::test]
async fn models_are_listed_in_the_shape_that_the_validator_reads() {
    let miner = miner();
    let aiohttp = "Python/3.12 aiohttp/3.10.11";
    let wanted = json!(["tiny", "NousResearch/Meta-Llama-3.1-8B-Instruct"]);
    let (list, map) = (json!(["tiny"]), json!({"tiny": 16}));
    let posts = |seed, body: &Value, at_ms, agent: &'static str, is_kind_last: bool| {
        let signed = Signed::new(seed, "/models", body, at_ms);
        let mut headers = HeaderMap::new();
        let kind = ("content-type", HeaderValue::from_static("application/json"));
        if !is_kind_last {
            headers.insert(kind.0, kind.1.clone());
        }
        headers.extend(signed.headers.clone());
        if is_kind_last {
            headers.insert(kind.0, kind.1);
        }
        headers.insert("user-agent", HeaderValue::from_static(agent));
        Signed { headers, ..signed }
    };
    let gets = |seed, at_ms| Signed::new(seed, "/models", &Value::Null, at_ms);
    for (request, want) in [
        (gets(VALIDATOR, NOW), &list),
        // 4.x ignores the answer and then asks for a list.
        (posts(VALIDATOR, &wanted, NOW, "python-httpx/0.27.2", false), &list),
        (gets(VALIDATOR, NOW + 1), &list),
        // 5.0 and all later ones read the answer.
        (posts(SECOND, &wanted, NOW, aiohttp, true), &list),
        (gets(SECOND, NOW + 1), &list),
        (posts(SECOND, &wanted, NOW + 2, aiohttp, false), &map),
        (gets(SECOND, NOW + 3), &map),
        (posts(SECOND, &json!({"tiny": 5}), NOW + 4, "Go-http-client/1.1", false), &map),
    ] {
        assert_eq!(request.send(&miner.app).await, (StatusCode::OK, want.clone()));
    }
    let wrong = Signed::new(VALIDATOR, "/models", &json!("tiny"), NOW).send(&miner.app).await;
    assert_eq!(wrong.0, StatusCode::BAD_REQUEST);

    miner.gate.set_head(Head { block: 77 });
    let (status, shown) = common::site::get(&miner.open, "/targon/status").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!((&shown["uid"], &shown["block"]), (&json!(2), &json!(77)));
    let validators = shown["validators"].as_array().unwrap();
    let first = validators.iter().find(|v| v["uid"] == 0).unwrap();
    assert_eq!(first["models"], wanted);
    let request = Request::get("/metrics").body(Body::empty()).unwrap();
    let (_, metrics) = common::site::call(&miner.open, request).await;
    for line in [
        "targon_signed_requests_total{outcome=\"accepted\"} 9",
        "targon_chain_block 77.0",
        "targon_uid 2.0",
        "targon_incentive 0.25",
        "targon_auth_seconds_count 9",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
}

#[tokio::test]
async fn the_models_header_must_not_contradict_the_body() {
    let miner = miner();
    let body = completion(json!({"max_tokens": 3}));
    let right = Signed::new(VALIDATOR, COMPLETION, &body, NOW).with("x-targon-model", "tiny");
    assert_eq!(right.send(&miner.app).await.0, StatusCode::OK);
    let wrong = Signed::new(VALIDATOR, COMPLETION, &body, NOW).with("x-targon-model", "broken");
    assert_eq!(wrong.send(&miner.app).await.0, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn sdk_11_signatures_are_taken_beside_epistula() {
    let miner = miner();
    let body = completion(json!({"max_tokens": 3})).to_string().into_bytes();
    let signed = |path: &'static str, nonce: u64| {
        let (sender, receiver) = (key(VALIDATOR).hotkey(), Some(key(MINER).hotkey()));
        let envelope = btauth::RequestEnvelope { method: "POST", path, nonce, sender, receiver };
        let mut request = Signed {
            method: "POST",
            path: COMPLETION.into(),
            headers: HeaderMap::new(),
            body: body.clone(),
        };
        for (name, value) in envelope.sign(&key(VALIDATOR), &request.body) {
            request = request.with(name, &value);
        }
        request
    };
    let nonce = NOW * 1_000_000;
    let good = signed(COMPLETION, nonce);
    assert_eq!(good.send(&miner.app).await.0, StatusCode::OK);
    for (request, detail) in [
        (good, "Request was received already"),
        (signed(CHAT, nonce + 1), "Signature Mismatch"),
        (signed(COMPLETION, nonce - 11_000_000_000), "Request is too stale"),
        (signed(COMPLETION, nonce + 3_000_000_000), "Request is dated too far in the future"),
        (signed(COMPLETION, nonce + 2).with(btauth::HEADER_VERSION, "2"), "Unknown btauth version"),
        (
            signed(COMPLETION, nonce + 3).without(btauth::HEADER_RECEIVER),
            "Bad Request, message is not intended for self",
        ),
        (
            signed(COMPLETION, nonce + 4).with(btauth::HEADER_CRYPTO, "ed25519"),
            "Only sr25519 signatures are accepted",
        ),
        (signed(COMPLETION, nonce + 5).with(btauth::HEADER_NONCE, "x"), "Invalid nonce"),
    ] {
        let (status, answer) = request.send(&miner.app).await;
        assert_eq!((status, &answer["detail"]), (StatusCode::BAD_REQUEST, &json!(detail)));
    }
}

#[tokio::test]
async fn a_proof_without_a_nonce_is_bound_to_the_signed_name() {
    let miner = miner();
    let body = completion(json!({"max_tokens": 3, "return_token_ids": true,
        "proof": {"scheme": "residue-v1"}}));
    let request = Signed::new(VALIDATOR, COMPLETION, &body, NOW);
    let uuid = request.headers[HEADER_UUID].to_str().unwrap().to_owned();
    let (status, answer) = request.send(&miner.app).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let end = Answer::of_response(&answer, 0).unwrap().end.unwrap();
    let nonce = targon_engine::proof::commit::nonce_of(&uuid);
    assert_eq!(end.nonce, targon_engine::proof::codec::to_hex(&nonce));
    assert_eq!(end.hotkey, Some(key(MINER).hotkey().to_string()));
}

#[tokio::test]
async fn compressed_bodies_are_refused_by_the_name_of_their_encoding() {
    let miner = miner();
    let mut packed = asks(VALIDATOR);
    packed.headers.insert("content-encoding", HeaderValue::from_static("gzip"));
    let (status, answer) = packed.send(&miner.app).await;
    assert_eq!(status, StatusCode::UNSUPPORTED_MEDIA_TYPE, "{answer}");
    assert!(answer["detail"].as_str().unwrap().contains("got gzip"), "{answer}");
}

#[tokio::test]
async fn large_bodies_are_refused_before_they_are_hashed() {
    let miner = miner();
    let mut large = asks(VALIDATOR);
    large.body = vec![b' '; (2 << 20) + 1];
    let (status, answer) = large.send(&miner.app).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{answer}");
    let mut padded = completion(json!({"max_tokens": 3})).to_string();
    padded.push_str(&" ".repeat(1 << 20));
    let uuid = "large";
    let signed_for = Some(key(MINER).hotkey());
    let envelope = Envelope { timestamp_ms: NOW, uuid, signed_for };
    let mut request = Signed { body: padded.into_bytes(), ..asks(VALIDATOR) };
    for (name, value) in envelope.sign(&key(VALIDATOR), &request.body) {
        request = request.with(name, &value);
    }
    assert_eq!(request.send(&miner.app).await.0, StatusCode::OK);
}

#[tokio::test]
async fn bodies_count_for_as_long_as_their_requests_wait() {
    let policy = Policy { slots: 1, ..Policy::default() };
    let miner = miner_with(policy, common::lasting(1));
    let body = completion(json!({"max_tokens": LASTING_TOKENS, "stream": true}));
    let running = Signed::new(VALIDATOR, COMPLETION, &body, NOW).request();
    let running = miner.app.clone().oneshot(running).await.unwrap();
    assert_eq!(miner.gate.bodies(), (0, 0));
    let next = asks(VALIDATOR);
    let (app, request) = (miner.app.clone(), next.request());
    let waiting = tokio::spawn(async move { app.oneshot(request).await.unwrap().status() });
    for _ in 0..500 {
        if miner.gate.status()["validators"][0]["waiting"] == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(miner.gate.bodies(), (1, next.body.len()));
    drop(running);
    assert_eq!(waiting.await.unwrap(), StatusCode::OK);
    assert_eq!(miner.gate.bodies(), (0, 0));
}

/// Strangers at once, and the bytes that each of them announces.
const STRANGERS: usize = 200;
const ANNOUNCED: usize = 2 << 20;
/// Within this time everybody else must be served meanwhile.
const SERVED_WITHIN: Duration = Duration::from_secs(1);

/// A signed request as bytes, of which `body` comes and `announced` bytes are said to.
fn bytes_of(signed: &Signed, body: &[u8], announced: usize) -> Vec<u8> {
    let mut head = format!("{} {} HTTP/1.1\r\nhost: x\r\n", signed.method, signed.path);
    for (name, value) in &signed.headers {
        head.push_str(&format!("{name}: {}\r\n", value.to_str().unwrap()));
    }
    let head = format!("{head}content-length: {announced}\r\n\r\n");
    [head.as_bytes(), body].concat()
}

/// The head and the first byte of a large request in the name of a member, signed by a stranger.
fn stalled() -> Vec<u8> {
    let forged = Signed::new(STRANGER, COMPLETION, &json!({}), NOW);
    let forged = forged.with("epistula-signed-by", &key(VALIDATOR).hotkey().to_string());
    bytes_of(&forged, b"{", ANNOUNCED)
}

/// The status line's beginning.
async fn status(socket: &mut TcpStream) -> String {
    let mut begin = [0; 12];
    socket.read_exact(&mut begin).await.unwrap();
    String::from_utf8_lossy(&begin).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_who_stall_in_a_members_name_shut_nobody_out() {
    let miner = miner();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (app, never) = (miner.app.clone(), std::future::pending());
    let server =
        tokio::spawn(async move { accept(listener, app, HttpLimits::default, never).await });
    let mut sockets = Vec::new();
    for _ in 0..STRANGERS {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(&stalled()).await.unwrap();
        sockets.push(socket);
    }
    let started = std::time::Instant::now();
    while miner.gate.bodies().0 < SHARE_MAX {
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", miner.gate.bodies());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // What is announced costs nothing, and a share has its limit.
    let (open, bytes) = miner.gate.bodies();
    assert!(open <= SHARE_MAX && bytes <= STRANGERS, "{open} bodies, {bytes} bytes");
    // The member itself, from the same address even, and another one.
    for seed in [VALIDATOR, SECOND] {
        let request = asks(seed);
        let started = std::time::Instant::now();
        let mut socket = TcpStream::connect(address).await.unwrap();
        let bytes = bytes_of(&request, &request.body, request.body.len());
        socket.write_all(&bytes).await.unwrap();
        let status = status(&mut socket).await;
        let took = started.elapsed();
        println!("served after {took:?} with {open} bodies open");
        assert!(status == "HTTP/1.1 200" && took < SERVED_WITHIN, "{status} after {took:?}");
    }
    // Nor do they stay.
    while miner.gate.bodies().0 > 0 {
        assert!(started.elapsed() < GRACE + Duration::from_secs(5), "{:?}", miner.gate.bodies());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(status(&mut sockets[0]).await, "HTTP/1.1 503");
    assert_eq!(status(&mut sockets[STRANGERS - 1]).await, "HTTP/1.1 408");
    server.abort();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever stands in the headers, the answer is a refusal, and nothing breaks.
    #[test]
    fn any_headers_are_refused_in_words(
        values in proptest::collection::vec(
            (0..9_usize, proptest::collection::vec(0x20..=0xff_u8, 0..90)), 1..5),
    ) {
        const NAMES: [&str; 9] = [
            "epistula-version", "epistula-timestamp", "epistula-uuid", "epistula-signed-by",
            "epistula-signed-for", "epistula-request-signature", "x-bittensor-version",
            "x-bittensor-nonce", "x-bittensor-hotkey",
        ];
        static MINER: std::sync::OnceLock<Miner> = std::sync::OnceLock::new();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _guard = runtime.enter();
        let miner = MINER.get_or_init(miner);
        let mut request = asks(VALIDATOR);
        let mut is_changed = false;
        for (name, value) in values {
            let Ok(value) = HeaderValue::from_bytes(&value) else { continue };
            is_changed |= request.headers.get(NAMES[name]) != Some(&value) && name < 6;
            request.headers.insert(NAMES[name], value);
        }
        let (status, answer) = runtime.block_on(request.send(&miner.app));
        if is_changed {
            prop_assert!(status.is_client_error() && answer["detail"].is_string(), "{answer}");
        }
    }
}
