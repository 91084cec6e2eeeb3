//! Makes the databases of the tests, and records to put into them.

use crate::entropy::Entropy;
use crate::store::record::{
    EpochWeights, MinerResponse, Outcome, Round, Sampled, Timing, WeightsState,
};
use crate::store::{Cause, Store, StoreError};
use serde_json::json;
use sqlx::Connection;
use std::sync::atomic::{AtomicU64, Ordering};

/// A database for one test.
pub(super) struct Site {
    pub(super) url: String,
    _directory: tempfile::TempDir,
}

pub(super) fn sqlite() -> Site {
    let directory = tempfile::tempdir().unwrap();
    let url = directory.path().join("store.sqlite").to_str().unwrap().to_owned();
    Site { url, _directory: directory }
}

/// A new database on the server of the tests, if there is one.
pub(super) async fn postgres() -> Option<Site> {
    let server = std::env::var("TARGON_TEST_POSTGRES").ok()?;
    sqlx::any::install_default_drivers();
    let name = format!("test_{}", uuid::Uuid::new_v4().simple());
    let mut admin = sqlx::AnyConnection::connect(&server).await.unwrap();
    sqlx::raw_sql(&format!("CREATE DATABASE {name}")).execute(&mut admin).await.unwrap();
    let mut url = url::Url::parse(&server).unwrap();
    url.set_path(&name);
    Some(Site { url: url.into(), _directory: tempfile::tempdir().unwrap() })
}

pub(super) fn block_on<T>(work: impl Future<Output = T>) -> T {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().unwrap().block_on(work)
}

/// Runs a test on each database.
#[track_caller]
pub(super) fn on_each(test: impl AsyncFn(&Site)) {
    block_on(async {
        test(&sqlite()).await;
        if let Some(site) = postgres().await {
            test(&site).await;
        }
    });
}

pub(super) fn id(number: u64) -> String {
    format!("{number:032x}")
}

pub(super) fn response(uid: u16, hotkey: &str, sample: Sampled) -> MinerResponse {
    MinerResponse {
        uid,
        hotkey: hotkey.into(),
        coldkey: format!("cold {hotkey}"),
        timing: Timing { first_token: 0.25, all_tokens: 1.5, total: 1.75, tps: 40.5, tokens: 71 },
        outcome: match sample {
            Sampled::Tps(_) => Outcome::Verified,
            Sampled::Miss => Outcome::Failed,
            Sampled::Nothing => Outcome::Unscored,
        },
        cause: None,
        error: None,
        sample,
        capture: Some(json!({"request": {"seed": 1}, "chunks": ["data: {}\n\n"]})),
        report: Some(json!({"verdict": "pass"})),
        statistics: Default::default(),
    }
}

/// A round of netuid 4 at a block, with the number as its id and its time.
pub(super) fn round(number: u64, block: u64, responses: Vec<MinerResponse>) -> Round {
    Round {
        id: id(number),
        netuid: 4,
        block,
        started_ms: 1_000_000 + number,
        ended_ms: 1_000_500 + number,
        model: "m".into(),
        endpoint: "/v1/completions".into(),
        request: json!({"prompt": "a", "max_tokens": 5, "temperature": 0.1}),
        profile: "default".into(),
        responses,
    }
}

pub(super) fn plan(epoch: u64, value: u16) -> EpochWeights {
    EpochWeights {
        netuid: 4,
        epoch,
        block: 360 * epoch,
        values: vec![(0, value), (7, 65_535)],
        explanation: json!([{"uid": 0, "score": 0.5}, {"uid": 7, "score": 1.0}]),
        state: WeightsState::Planned,
    }
}

/// Weights that were sent, as earlier versions remember it.
pub(super) fn sent_as(hash: String) -> WeightsState {
    WeightsState::Sent { hash, blocks: None, reveal_round: None }
}

/// What names a run of the program: every call is another run.
pub(super) fn another_run() -> Entropy {
    static RUNS: AtomicU64 = AtomicU64::new(0);
    Entropy::seeded(RUNS.fetch_add(1, Ordering::Relaxed))
}

/// The block of the newest round, where there is one.
pub(super) async fn newest(store: &Store, netuid: u16) -> Option<u64> {
    store.rounds(netuid, u64::MAX, 1).await.unwrap().first().map(|round| round.block)
}

#[track_caller]
pub(super) fn record_words(result: Result<(), StoreError>) -> String {
    match result {
        Err(StoreError { cause: Cause::Record(words), .. }) => words,
        other => panic!("no refusal of a record: {other:?}"),
    }
}

pub(super) async fn refusal(url: &str) -> String {
    match Store::open(url, &another_run()).await {
        Ok(_) => panic!("{url} was opened"),
        Err(e) => e.to_string(),
    }
}
