//! The routes of the service, asked without a socket.

use super::*;
use crate::entropy::Entropy;
use crate::store::Retention;
use crate::store::record::{
    EpochWeights, LikelyCheat, MeasuredValue, MinerResponse, Outcome, Round, Sampled, Statistics,
    Timing, WeightsState,
};
use axum::body::Body;
use axum::http::Request;
use http_body_util::BodyExt;
use serde_json::Value;
use tower::ServiceExt;

const NOW: u64 = 1_700_000_000_000;

async fn service() -> (Overview, Arc<RunProgress>, Clock, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sqlite");
    let store = Store::open(path.to_str().unwrap(), &Entropy::seeded(1)).await.unwrap();
    let (progress, clock) = (Arc::<RunProgress>::default(), Clock::manual(NOW));
    let service = Overview::new(Arc::clone(&progress), &store, 4, clock.clone());
    (service, progress, clock, dir)
}

async fn get(service: &Overview, path: &str) -> (u16, String) {
    let request = Request::get(path).body(Body::empty()).unwrap();
    let response = service.router().oneshot(request).await.unwrap();
    let status = response.status().as_u16();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(bytes.to_vec()).unwrap())
}

async fn why(service: &Overview) -> (u16, Vec<String>) {
    let (status, body) = get(service, "/ready").await;
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["ready"], status == 200);
    (status, serde_json::from_value(body["why"].clone()).unwrap())
}

#[tokio::test]
async fn it_is_ready_while_it_works_and_says_what_is_wrong_else() {
    let (service, progress, clock, _dir) = service().await;
    assert_eq!(get(&service, "/health").await.0, 200);
    let (status, troubles) = why(&service).await;
    assert_eq!(status, 503);
    assert_eq!(troubles[0], "it has not begun yet");
    progress.beat(clock.unix_ms(), 1);
    progress.see_block(7, clock.unix_ms());
    assert_eq!(why(&service).await, (200, vec![]));
    progress.set_unsaved(2);
    assert_eq!(why(&service).await.1, ["2 rounds that are over are not remembered yet"]);
    progress.set_unsaved(0);
    clock.advance(Duration::from_secs(61));
    assert_eq!(why(&service).await.1, ["its loop has not moved for 61 s"]);
    let (status, body) = get(&service, "/health").await;
    assert_eq!((status, body.contains("\"stalled\"")), (503, true));
    clock.advance(Duration::from_secs(60));
    progress.beat(clock.unix_ms(), 1);
    assert_eq!(why(&service).await.1, ["no block has come for 121 s"]);
    assert_eq!(get(&service, "/health").await.0, 200);
    progress.see_block(8, clock.unix_ms());
    progress.stop();
    assert_eq!(why(&service).await.1, ["it is stopping"]);
}

fn answer(uid: u16, outcome: Outcome, cause: Option<&str>) -> MinerResponse {
    MinerResponse {
        uid,
        hotkey: String::new(),
        coldkey: String::new(),
        timing: Timing::default(),
        outcome,
        cause: cause.map(str::to_owned),
        error: None,
        sample: Sampled::Nothing,
        capture: None,
        report: None,
        statistics: Default::default(),
    }
}

#[tokio::test]
async fn metrics_count_rounds_answers_and_weights() {
    let (service, progress, clock, _dir) = service().await;
    let (status, text) = get(&service, "/metrics").await;
    assert_eq!(status, 200);
    assert!(!text.contains("targon_validator_weights_epoch"), "{text}");
    // It has no engines and reads no bodies: their families would promise what is not counted.
    assert!(!text.contains("vllm:") && !text.contains("targon_unknown_fields"), "{text}");
    assert!(!text.contains("targon_validator_causes"), "{text}");
    progress.beat(NOW, 2);
    progress.see_block(40, NOW);
    let round = Round {
        id: "r".into(),
        netuid: 4,
        block: 40,
        started_ms: 0,
        ended_ms: 0,
        model: "m".into(),
        endpoint: "/v1/completions".into(),
        request: Value::Null,
        profile: "default".into(),
        responses: vec![
            answer(1, Outcome::Verified, None),
            answer(2, Outcome::Failed, Some("LATE")),
            answer(3, Outcome::Failed, Some("LATE")),
        ],
    };
    progress.end_round(&round);
    let mut weights = EpochWeights {
        netuid: 4,
        epoch: 30,
        block: 31,
        values: vec![],
        explanation: Value::Null,
        state: WeightsState::Planned,
    };
    progress.set_weights(&weights);
    assert_eq!(progress.snapshot().weights_age(), None);
    // A commit may never be revealed.
    weights.state = WeightsState::Committed { hash: "0xaa".into(), blocks: None, reveal_round: 9 };
    progress.set_weights(&weights);
    assert_eq!(progress.snapshot().weights_age(), None);
    weights.state = WeightsState::Confirmed;
    progress.set_confirmed(31);
    progress.set_confirmed(20);
    progress.set_weights(&weights);
    clock.advance(Duration::from_secs(5));
    let (_, text) = get(&service, "/metrics").await;
    for line in [
        "targon_validator_heartbeat_seconds 1700000000.0",
        "targon_validator_block 40.0",
        "targon_validator_rounds_total 1",
        "targon_validator_rounds_running 2.0",
        "targon_validator_rounds_unsaved 0.0",
        "targon_validator_answers_total{outcome=\"verified\"} 1",
        "targon_validator_answers_total{outcome=\"failed\"} 2",
        "targon_validator_causes_total{cause=\"LATE\"} 2",
        "targon_validator_weights_epoch 30.0",
        "targon_validator_weights_confirmed 1.0",
        "targon_validator_weights_age_blocks 9.0",
        "targon_validator_uptime_seconds 5.0",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}\n{text}");
    }
}

#[tokio::test]
async fn nothing_can_be_written_through_it_and_unknown_routes_are_said_to_be_none() {
    let (service, _, _, _dir) = service().await;
    let (status, body) = get(&service, "/nothing").await;
    assert_eq!((status, body.contains("no such route")), (404, true));
    let request = Request::post("/health").body(Body::empty()).unwrap();
    assert_eq!(service.router().oneshot(request).await.unwrap().status(), 405);
    let all = Retention { samples_max: Some(0), ..Retention::default() };
    let error = service.store().retain(&all).await.unwrap_err().to_string();
    assert!(error.contains("opened to be read"), "{error}");
    assert_eq!(service.store().last_weights(service.netuid()).await.unwrap(), None);
}

/// What a peer may write where it can.
const HOSTILE: &str = "</span><script>alert(1)</script><img src=x onerror='alert(2)'>\"&";

fn hostile_round() -> Round {
    let chunk = |text: &str| json!({"choices": [{"text": text, "token_ids": [7]}]});
    let rows = json!([{"index": 0, "token": 7, "rank": 1, "logprob": -0.5, "margin": 0.0},
        {"index": 1, "token": 8, "rank": 9, "logprob": -4.0, "margin": 2.5}]);
    let answer = MinerResponse {
        uid: 3,
        hotkey: HOSTILE.into(),
        coldkey: HOSTILE.into(),
        timing: Timing { first_token: 0.25, all_tokens: 1.0, total: 1.25, tps: 40.0, tokens: 50 },
        outcome: Outcome::Rejected,
        cause: Some(HOSTILE.into()),
        error: Some(HOSTILE.into()),
        sample: Sampled::Miss,
        capture: Some(json!({"chunks": [chunk("The sea"), chunk(HOSTILE), chunk(" is"), 7]})),
        report: Some(json!({ "rows": rows })),
        statistics: Statistics {
            rows: Some(33),
            margin: Some(0.0625),
            trimmed: Some(MeasuredValue { value: 91.5, limit: 225.0 }),
            twin: Some(MeasuredValue { value: 1.75, limit: 1.4 }),
            likeliest: Some(LikelyCheat { name: "int8 per channel <b>".into(), beta: 0.97 }),
        },
    };
    let honest = MinerResponse {
        uid: 1,
        hotkey: "5F3sa2TJAWMqDhXG6jhV4N8ko9SxwGy8TpaNS1repo5EYjQX".into(),
        outcome: Outcome::Verified,
        cause: None,
        error: None,
        sample: Sampled::Tps(40.0),
        capture: None,
        statistics: Statistics::default(),
        ..answer.clone()
    };
    Round {
        id: "0123456789abcdef0123456789abcdef".into(),
        netuid: 4,
        block: 40,
        started_ms: 1_000,
        ended_ms: 3_500,
        model: HOSTILE.into(),
        endpoint: "/v1/completions".into(),
        request: Value::Null,
        profile: "default".into(),
        responses: vec![honest, answer],
    }
}

#[tokio::test]
async fn the_page_shows_everything_and_runs_nothing_of_a_peers() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("v.sqlite").to_str().unwrap(), &Entropy::seeded(1))
        .await
        .unwrap();
    let service = Overview::new(Arc::default(), &store, 4, Clock::manual(NOW));
    let (status, empty) = get(&service, "/").await;
    assert_eq!(status, 200);
    assert!(empty.contains("No round has ended yet") && empty.contains("No answer is kept"));
    let round = hostile_round();
    store.save_round(&round).await.unwrap();
    let weights = EpochWeights {
        netuid: 4,
        epoch: 9,
        block: 41,
        values: vec![(1, 65_535)],
        explanation: Value::Null,
        state: WeightsState::Planned,
    };
    assert_eq!(store.plan_weights(&weights).await.unwrap(), crate::store::WeightsClaim::Ours);
    let path = format!("/answers/{}/3", round.id);
    for path in ["/", path.as_str()] {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let response = service.router().oneshot(request).await.unwrap();
        let policy = response.headers()["content-security-policy"].to_str().unwrap().to_owned();
        assert!(policy.starts_with("default-src 'none'; style-src 'sha256-"), "{policy}");
        assert!(!policy.contains("unsafe"), "{policy}");
        let page = response.into_body().collect().await.unwrap().to_bytes();
        let page = String::from_utf8(page.to_vec()).unwrap();
        assert!(!page.contains("<script") && !page.contains("<img"), "{page}");
        assert!(page.contains("&lt;script&gt;alert(1)"), "{page}");
        let measured = "Measured: 33 rows; margin 0.0625; energy 91.50 of 225.00; \
            twin 1.75 of 1.40; int8 per channel &lt;b&gt;, beta 0.97.";
        assert!(page.contains(measured), "{page}");
        // By rank, by margin, and what nobody scored.
        for part in ["class=\"first\"", "class=\"margin\"", "class=\"unseen\""] {
            let answer = &page[page.find("id=\"answer\"").unwrap()..];
            assert!(answer.contains(part), "{part} is not in {answer}");
        }
        // The one sheet is the one that the policy names, and nothing is styled in place.
        assert_eq!((page.matches("<style>").count(), page.matches(" style=").count()), (1, 0));
    }
    let (_, page) = get(&service, "/").await;
    assert!(page.contains(&format!("href=\"{path}\"")), "{page}");
    for part in ["5F3sa2TJAWMq", "0.250", "40.0", "0/1", "1/1", "65535", "Epoch 9"] {
        assert!(page.contains(part), "{part} is not in {page}");
    }
    let (_, other) = get(&service, &format!("/answers/{}/1", round.id)).await;
    assert!(!other.contains("id=\"measured\""), "nothing was measured: {other}");
    assert_eq!(get(&service, &format!("/answers/{}/1000", round.id)).await.0, 404);
    assert_eq!(get(&service, "/answers/x/y").await.0, 400);
    // With all turns taken it says so in place of reading more.
    let turns = service.pages.try_acquire_many(PAGES_MAX as u32).unwrap();
    assert_eq!(get(&service, "/").await.0, 503);
    drop(turns);
    assert_eq!(get(&service, "/").await.0, 200);
}
