//! The validator's records under conditions that only a whole process can be in.

use serde_json::{Value, json};
use sqlx::{Connection, Executor};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use targon_engine::entropy::Entropy;
use targon_engine::store::Store;
use targon_engine::store::record::{MinerResponse, Outcome, Round, Sampled, Timing};

/// The database of the child that writes until it is killed, and its number.
const CHILD: &str = "TARGON_TEST_STORE_CHILD";
const CHILD_NUMBER: &str = "TARGON_TEST_STORE_NUMBER";
/// Miners of a round, each with a capture that fills several pages of the database.
const MINERS: u16 = 8;
const CAPTURE_BYTES: usize = 20_000;

fn round(child: u64, number: u64) -> Round {
    let response = |uid| MinerResponse {
        uid,
        hotkey: format!("hotkey {uid}"),
        coldkey: "coldkey".into(),
        timing: Timing { first_token: 0.1, all_tokens: 0.2, total: 0.3, tps: 4.0, tokens: 5 },
        outcome: Outcome::Verified,
        cause: None,
        error: Some("an error, with a \"comma\"".into()),
        sample: Sampled::Tps(f64::from(uid)),
        capture: Some(json!("x".repeat(CAPTURE_BYTES))),
        report: Some(json!({"uid": uid})),
        statistics: Default::default(),
    };
    Round {
        id: format!("{child:016x}{number:016x}"),
        netuid: 4,
        block: child,
        started_ms: 1_000 * child + number,
        ended_ms: 1_000 * child + number,
        model: "m".into(),
        endpoint: "/v1/completions".into(),
        request: json!({"prompt": "a"}),
        profile: "default".into(),
        responses: (0..MINERS).map(response).collect(),
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
        .block_on(work)
}

/// Writes rounds and says of each that it is finished, until the end comes from outside.
fn write_until_killed(url: &str) -> ! {
    let child: u64 = std::env::var(CHILD_NUMBER).unwrap().parse().unwrap();
    block_on(async {
        let store = Store::open(url, &Entropy::system()).await.unwrap();
        for number in 0.. {
            let round = round(child, number);
            store.save_round(&round).await.unwrap();
            println!("\nfinished {}", round.id);
        }
    });
    unreachable!("there is no last number")
}

/// Starts this test once more as a child that writes, kills it after `delay` from its first
/// finished round, and returns what it has reported as finished.
fn killed(url: &str, number: u64, delay: Duration) -> Vec<String> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["store::a_killed_writer_loses_no_finished_round", "--exact", "--nocapture"])
        .env(CHILD, url)
        .env(CHILD_NUMBER, number.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut finished = lines
        .map_while(Result::ok)
        .filter_map(|line| line.strip_prefix("finished ").map(str::to_owned));
    let first = finished.next().expect("a round is finished");
    std::thread::sleep(delay);
    child.kill().unwrap();
    child.wait().unwrap();
    let mut all = vec![first];
    // A last line that the kill has cut is no report.
    all.extend(finished.filter(|id| id.len() == 32));
    all
}

fn check_kills(url: &str, kills: u64) {
    let mut finished = Vec::new();
    for number in 0..kills {
        let delay = Duration::from_micros((uuid::Uuid::new_v4().as_u128() % 25_000) as u64);
        let reported = killed(url, number, delay);
        block_on(async {
            // The next writer of the file finds it free, and every finished round whole.
            let store = Store::open(url, &Entropy::system()).await.unwrap();
            for id in &reported {
                assert!(store.round(id).await.unwrap().is_some(), "round {id} is lost");
            }
            store.close().await;
        });
        finished.extend(reported);
    }
    block_on(async {
        let store = Store::open(url, &Entropy::system()).await.unwrap();
        let heads = store.rounds(4, u64::MAX, 10_000).await.unwrap();
        // Of each kill one round may be kept that had no time to be reported.
        let (kept, reported) = (heads.len(), finished.len());
        assert!(kept >= reported && kept <= reported + kills as usize, "{kept}, {reported}");
        assert!(heads.iter().all(|head| head.asked == u64::from(MINERS)), "half a round");
        let samples = store.samples(4, u32::MAX, 0).await.unwrap();
        assert_eq!(samples.len(), kept * usize::from(MINERS));
        for id in &finished {
            let number = |part: &str| u64::from_str_radix(part, 16).unwrap();
            let expected = round(number(&id[..16]), number(&id[16..]));
            assert_eq!(store.round(id).await.unwrap(), Some(expected));
        }
        store.close().await;
    });
}

/// A new database on the server of the tests.
fn new_postgres(server: &str) -> String {
    sqlx::any::install_default_drivers();
    let name = format!("test_{}", uuid::Uuid::new_v4().simple());
    block_on(async {
        let mut admin = sqlx::AnyConnection::connect(server).await.unwrap();
        admin.execute(format!("CREATE DATABASE {name}").as_str()).await.unwrap();
    });
    let mut url = url::Url::parse(server).unwrap();
    url.set_path(&name);
    url.into()
}

#[test]
fn a_killed_writer_loses_no_finished_round() {
    if let Ok(url) = std::env::var(CHILD) {
        write_until_killed(&url);
    }
    let directory = tempfile::tempdir().unwrap();
    check_kills(directory.path().join("store.sqlite").to_str().unwrap(), 100);
    if let Ok(server) = std::env::var("TARGON_TEST_POSTGRES") {
        check_kills(&new_postgres(&server), 20);
    }
}

fn export(directory: &Path, arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_targon-engine"))
        .arg("export")
        .args(arguments)
        .env_remove("TARGON_DATABASE_URL")
        .current_dir(directory)
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn records_are_exported_while_the_validator_writes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("validator.sqlite");
    let store = block_on(async {
        let store = Store::open(path.to_str().unwrap(), &Entropy::system()).await.unwrap();
        for number in 0..40 {
            store.save_round(&round(1, number)).await.unwrap();
        }
        store
    });
    let (code, stdout, stderr) = export(directory.path(), &["--uid", "3"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    let rows: Vec<Value> = stdout.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(rows.len(), 40);
    let one = &rows[7];
    assert_eq!((&one["round"], &one["uid"]), (&json!(format!("{:016x}{:016x}", 1, 7)), &json!(3)));
    assert_eq!((&one["total_time"], &one["report"]), (&json!(0.3), &json!({"uid": 3})));
    assert_eq!((&one["cause"], &one["outcome"]), (&Value::Null, &json!("verified")));
    let (code, stdout, _) = export(directory.path(), &["--what", "samples", "--format", "csv"]);
    assert_eq!((code, stdout.lines().count()), (0, 1 + 40 * usize::from(MINERS)));
    let first = format!("{:016x}{:016x},4,1,1000,m,0,hotkey 0,0.0", 1, 0);
    assert_eq!(stdout.lines().nth(1).unwrap(), first);
    let late = ["--what", "rounds", "--since", "1970-01-01T00:00:01.030Z"];
    assert_eq!(export(directory.path(), &late).1.lines().count(), 10);
    drop(store);
}

#[test]
fn an_export_that_cannot_be_says_why() {
    let directory = tempfile::tempdir().unwrap();
    let (code, _, stderr) = export(directory.path(), &[]);
    assert_eq!(code, 1);
    assert!(stderr.contains("validator.sqlite: cannot open the store: No such file"), "{stderr}");
    // Nobody listens on port 1.
    let url = "postgres://me:pa%24%24word@127.0.0.1:1/db?sslmode=disable";
    let (code, _, stderr) = export(directory.path(), &["--database.url", url]);
    assert_eq!(code, 1);
    let place = "postgres://me@127.0.0.1:1/db: cannot open the store: ";
    assert!(stderr.contains(place) && stderr.contains("Connection refused"), "{stderr}");
    assert!(!stderr.contains("pa%24") && !stderr.contains("pa$$"), "{stderr}");
    let (code, _, stderr) = export(directory.path(), &["--what", "weights", "--uid", "1"]);
    assert_eq!(code, 1);
    assert!(stderr.contains("they are of all uids"), "{stderr}");
    let (code, _, stderr) = export(directory.path(), &["--since", "soon"]);
    assert_eq!(code, 1);
    assert!(stderr.contains("--since must be a time, a date or how long ago"), "{stderr}");
}
