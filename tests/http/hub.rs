//! A hub of users' requests beside a validator: what it hands out is verified, scored and reported.

use crate::common;
use crate::common::site::{COMPLETION, Site, completion, site, stream};
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use targon_engine::chain::epistula::{self, Envelope};
use targon_engine::chain::keys::{Hotkey, Keypair};
use targon_engine::chain::metagraph::{Hyperparameters, Metagraph, Neuron, Rao};
use targon_engine::clock::Clock;
use targon_engine::entropy::Entropy;
use targon_engine::store::record::{Round, Sample};
use targon_engine::validator::query::QuerySigner;
use targon_engine::validator::run::hub::{OrganicsHub, Urls};
use targon_engine::validator::run::resident::Resident;
use targon_engine::validator::run::residents::{Residents, Sized};
use targon_engine::validator::run::subnet::Subnet;
use targon_engine::validator::scores::series::Organic;
use targon_engine::verify::evidence::Calibrated;

/// What the hub hands out, and what it was told.
#[derive(Clone, Default)]
struct Told {
    /// What it advances before it hands a bucket out, as if it took so long.
    slow: Option<(Clock, Duration)>,
    refuses: bool,
    bucket: Arc<Mutex<String>>,
    told: Arc<Mutex<Vec<(String, String)>>>,
}

/// Takes bodies that are signed, for nobody in particular.
async fn take(told: &Told, path: &str, headers: &HeaderMap, body: &Bytes) {
    let word = |name: &str| headers[name].to_str().unwrap().to_owned();
    let uuid = word(epistula::HEADER_UUID);
    let timestamp_ms = epistula::timestamp(&word(epistula::HEADER_TIMESTAMP)).unwrap();
    let envelope = Envelope { timestamp_ms, uuid: &uuid, signed_for: None };
    let signature = epistula::signature(&word(epistula::HEADER_SIGNATURE)).unwrap();
    let signer: Hotkey = word(epistula::HEADER_SIGNED_BY).parse().unwrap();
    assert!(envelope.verify(&signer, body, &signature));
    assert!(headers.get(epistula::HEADER_SIGNED_FOR).is_none());
    told.told.lock().push((path.to_owned(), String::from_utf8(body.to_vec()).unwrap()));
}

async fn hub(told: Told) -> String {
    let bucket = async |State(told): State<Told>, headers: HeaderMap, body: Bytes| {
        take(&told, "/organics", &headers, &body).await;
        if let Some((clock, time)) = &told.slow {
            clock.advance(*time);
        }
        told.bucket.lock().clone()
    };
    let scores = async |State(told): State<Told>, headers: HeaderMap, body: Bytes| {
        take(&told, "/organics/scores", &headers, &body).await;
        StatusCode::OK
    };
    let stats = async |State(told): State<Told>, headers: HeaderMap, body: Bytes| {
        take(&told, "/", &headers, &body).await;
        if told.refuses { StatusCode::UNAUTHORIZED } else { StatusCode::OK }
    };
    let app = Router::new()
        .route("/", post(stats))
        .route("/organics", post(bucket))
        .route("/organics/scores", post(scores))
        .with_state(told);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, app).await });
    url
}

fn residents(site: &Site) -> Residents {
    let verifier = common::verifier(&site.served);
    let resident = Resident { verifier, rates: Calibrated::default(), engine: None };
    let all = vec![Sized { name: "tiny".into(), bytes: 1 }];
    Residents::new(all, 1, Arc::new(move |_: &str| Ok(resident.clone())))
}

fn subnet() -> Subnet {
    let neuron = |uid: u16| {
        let hotkey = Hotkey([uid as u8; 32]);
        Neuron { permit: false, ..Neuron::new(uid, hotkey, Rao(0)) }
    };
    let neurons = (0..6).map(neuron).collect();
    let metagraph = Metagraph::new(4, 7, Hyperparameters::default(), neurons);
    Subnet { metagraph, ..Subnet::default() }
}

fn signer() -> QuerySigner {
    let key = Arc::new(Keypair::from_seed(&[7; 32]).unwrap());
    QuerySigner { key, entropy: Entropy::seeded(7) }
}

#[tokio::test(flavor = "multi_thread")]
async fn users_requests_are_verified_scored_and_reported() {
    let site = site(common::options());
    let body = completion(json!({
        "stream": true, "logprobs": true, "temperature": 0.0, "return_tokens_as_token_ids": true,
    }));
    let chunks = stream(&site.app, COMPLETION, body.clone()).await;
    let mut forged = chunks.clone();
    forged[3]["choices"][0]["text"] = "forged".into();
    let key = |uid: u8| Hotkey([uid; 32]).to_string();
    let record = |uid: u8, success: bool, response: &[Value]| {
        json!({
            "request": body, "response": response, "uid": uid, "hotkey": key(uid),
            "coldkey": "c", "endpoint": "COMPLETION", "success": success, "total_time": 500.0,
            "time_to_first_token": 20.0, "response_tokens": 12,
        })
    };
    let lines: Vec<Value> =
        chunks.iter().map(|chunk| Value::String(format!("data: {chunk}\n\n"))).collect();
    // An answer that a stop string ends before its limit.
    let text = |chunk: &Value| chunk["choices"][0]["text"].as_str().unwrap_or("").to_owned();
    let mut stopped = body.clone();
    stopped["stop"] = chunks.iter().map(text).take(6).collect::<String>().into();
    let short = stream(&site.app, COMPLETION, stopped.clone()).await;
    let named = |chunk: &Value| chunk["choices"][0]["logprobs"]["tokens"].as_array().map(Vec::len);
    let verified: usize = short.iter().filter_map(named).sum();
    assert!((3..12).contains(&verified), "{verified}");
    let mut padded = record(1, true, &short);
    (padded["request"], padded["response_tokens"]) = (stopped, 1_000_000.into());
    let mut other = record(5, true, &chunks);
    other["hotkey"] = key(4).into();
    let bucket = json!({"bucket_id": "b_1", "organics": {"tiny": [
        record(1, true, &lines), record(1, false, &[]), padded, record(2, true, &forged),
        record(3, true, &[]), {"uid": "nonsense"}, other,
    ]}});
    let told = Told::default();
    *told.bucket.lock() = bucket.to_string();
    let url = hub(told.clone()).await;
    let signer = signer();
    let urls = Urls { organics: Some(url), stats: None };
    let hub = OrganicsHub::new(urls, signer, Clock::system());
    let (residents, subnet) = (residents(&site), subnet());
    residents.rotate(&["tiny".to_owned()]).await.unwrap();
    assert_eq!(hub.pull(&residents, None, &subnet).await.unwrap(), 5);
    let of = |uid: u8| hub.organics(uid.into(), &key(uid));
    // The hub's count is believed up to the tokens that were verified.
    let most = Organic::Tps(verified as f64 / 0.5);
    assert_eq!(of(1), Some(vec![Organic::Tps(24.0), Organic::Failed, most]));
    assert_eq!(of(2), Some(vec![Organic::Rejected]));
    assert_eq!(of(3), Some(vec![Organic::Empty]));
    assert_eq!((of(5), hub.organics(1, &key(2))), (None, None));
    let seen = told.told.lock().clone();
    assert_eq!(seen[0], ("/organics".to_owned(), "[\"tiny\"]".to_owned()));
    let report: Value = serde_json::from_str(&seen[1].1).unwrap();
    let verified: Vec<_> =
        report["organics"].as_array().unwrap().iter().map(|o| o["verified"].clone()).collect();
    assert_eq!(verified, [true, false, true, false, false]);
    // The same bucket again has nothing new in it.
    assert_eq!(hub.pull(&residents, None, &subnet).await.unwrap(), 0);
    assert_eq!(told.told.lock().len(), 3);
    // Something else than a bucket changes nothing.
    *told.bucket.lock() = "[]".into();
    let error = hub.pull(&residents, None, &subnet).await.unwrap_err().to_string();
    assert!(error.contains("the answer is not a valid bucket"), "{error}");
    assert_eq!(of(2), Some(vec![Organic::Rejected]));
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_there_is_no_time_for_are_unscored() {
    let site = site(common::options());
    let body = completion(json!({
        "stream": true, "logprobs": true, "temperature": 0.0, "return_tokens_as_token_ids": true,
    }));
    let chunks = stream(&site.app, COMPLETION, body.clone()).await;
    let hotkey = Hotkey([1; 32]).to_string();
    let record = json!({
        "request": body, "response": chunks, "uid": 1, "hotkey": hotkey, "endpoint": "COMPLETION",
        "success": true, "total_time": 500.0, "response_tokens": 12,
    });
    for (seconds, expected) in [(599, Organic::Tps(24.0)), (601, Organic::Unscored)] {
        let clock = Clock::manual(1_795_333_310_123);
        let told =
            Told { slow: Some((clock.clone(), Duration::from_secs(seconds))), ..Told::default() };
        let bucket = json!({"bucket_id": "b", "organics": {"tiny": [record, record]}});
        *told.bucket.lock() = bucket.to_string();
        let signer = signer();
        let urls = Urls { organics: Some(hub(told.clone()).await), stats: None };
        let hub = OrganicsHub::new(urls, signer, clock);
        let residents = residents(&site);
        residents.rotate(&["tiny".to_owned()]).await.unwrap();
        assert_eq!(hub.pull(&residents, None, &subnet()).await.unwrap(), 2);
        assert_eq!(hub.organics(1, &hotkey), Some(vec![expected; 2]), "after {seconds} s");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn statistics_are_sent_signed_and_a_hub_that_says_no_or_nothing_is_named() {
    let signer = signer();
    let hub_at = |stats: Option<String>| {
        OrganicsHub::new(Urls { organics: None, stats }, signer.clone(), Clock::system())
    };
    let round = Round {
        id: "ab".repeat(16),
        netuid: 4,
        block: 40,
        started_ms: 0,
        ended_ms: 0,
        model: "tiny".into(),
        endpoint: COMPLETION.into(),
        request: json!({"prompt": "caf\u{e9}"}),
        profile: "default".into(),
        responses: Vec::new(),
    };
    let models = ["tiny".to_owned()];
    let samples = [Sample {
        round: round.id.clone(),
        uid: 3,
        hotkey: "h".into(),
        model: "tiny".into(),
        block: 40,
        tps: Some(12.5),
    }];
    let none = hub_at(None);
    assert!(!none.wants_stats());
    none.tell(&round, &models, &samples).await.unwrap();
    let told = Told::default();
    let taking = hub_at(Some(hub(told.clone()).await));
    assert!(taking.wants_stats());
    taking.tell(&round, &models, &samples).await.unwrap();
    let seen = told.told.lock().clone();
    // Exactly the bytes that Python's `json.dumps` makes were signed.
    assert!(seen[0].1.contains(r#""request": {"prompt": "caf\u00e9"}"#), "{seen:?}");
    let said: Value = serde_json::from_str(&seen[0].1).unwrap();
    assert_eq!(said["request"]["hotkey"], signer.key.hotkey().to_string());
    assert_eq!((&said["models"], seen.len()), (&json!(["tiny"]), 1));
    assert_eq!(said["scores"], json!({"3": {"tiny": [12.5]}}));
    let refusing = Told { refuses: true, ..Told::default() };
    let refused =
        hub_at(Some(hub(refusing).await)).tell(&round, &models, &samples).await.unwrap_err();
    let refused = refused.to_string();
    assert!(refused.contains("401"), "{refused}");
    let nobody = hub_at(Some("http://127.0.0.1:1".into())).tell(&round, &models, &samples).await;
    assert!(nobody.is_err_and(|why| !why.to_string().is_empty()));
}
