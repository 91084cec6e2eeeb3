//! Every command that prints ends quietly once nobody reads what it prints.

use crate::common;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// What a shell reports of a program that SIGPIPE ended.
const CLOSED_PIPE: i32 = 141;

/// Files of `src/cli` that print data, and the tests of commands that need more than a directory;
/// the others are tested here.
const PRINTING: &[(&str, Option<&str>)] = &[
    ("audit", Some("tests/program/bench.rs")),
    ("bench/attack", None),
    ("bench/compare", Some("tests/program/bench.rs")),
    ("bench/output", Some("tests/program/bench.rs")),
    ("bench/plan", None),
    ("cache", None),
    ("calibrate", None),
    ("config", None),
    ("doctor", None),
    ("explain", Some("tests/program/validator.rs")),
    ("export", None),
    ("fetch", None),
    ("manual", None),
    ("out", None), // `--help` and `--version`
    ("plan", None),
    ("query", None),
    ("status", None),
    ("subnet", Some("tests/program/miner.rs")),
    ("validate", Some("tests/program/validator.rs")),
    ("verify", None),
    ("wallet", None),
];

/// Runs a command with a stdout of which `read` bytes are read, as by `head -c`.
fn run(mut command: Command, read: usize) -> Output {
    let (mut reader, writer) = std::io::pipe().unwrap();
    command.stderr(Stdio::piped());
    let running = command.stdout(Stdio::from(writer)).spawn().unwrap();
    // The command holds the other end, too.
    drop(command);
    std::io::Read::read_exact(&mut reader, &mut vec![0; read]).unwrap();
    drop(reader);
    running.wait_with_output().unwrap()
}

fn command(home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_targon-engine"));
    command
        .args(arguments)
        .env_clear()
        .env("HF_HOME", home.join("hub"))
        .env("HF_HUB_OFFLINE", "1")
        .env("HOME", home)
        .env("XDG_CACHE_HOME", home.join("cache"))
        .current_dir(home)
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    command
}

#[track_caller]
fn check(home: &Path, arguments: &[&str]) {
    check_after(home, 0, arguments);
}

/// Fails unless the program ends as one does that SIGPIPE ends, once `read` bytes were read.
#[track_caller]
fn check_after(home: &Path, read: usize, arguments: &[&str]) {
    ends_quietly(command(home, arguments), read);
}

/// The same of a command that was made elsewhere.
#[track_caller]
pub(crate) fn ends_quietly(command: Command, read: usize) {
    let shown = format!("{command:?}");
    let output = run(command, read);
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(!words.contains("panicked"), "{shown}: {words}");
    assert_eq!(output.status.code(), Some(CLOSED_PIPE), "{shown}: {words}");
}

#[test]
fn every_file_that_prints_has_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
    let mut printing = Vec::new();
    for directory in ["", "bench/", "tui/"] {
        for entry in std::fs::read_dir(root.join("src/cli").join(directory)).unwrap() {
            let file = entry.unwrap().file_name().into_string().unwrap();
            let Some(name) = file.strip_suffix(".rs") else { continue };
            let text = read(&format!("src/cli/{directory}{file}"));
            if text.contains("outln!(") || text.contains("write_all(b") || name == "manual" {
                printing.push(format!("{directory}{name}"));
            }
        }
    }
    printing.sort();
    let listed: Vec<&str> = PRINTING.iter().map(|(name, _)| *name).collect();
    assert_eq!(printing, listed, "a file prints, and no test reads only a part of it");
    for test in PRINTING.iter().filter_map(|(_, test)| *test) {
        assert!(read(test).contains("ends_quietly("), "{test} has no such test");
    }
}

/// A validator's records with one round.
fn write_store(path: &Path) {
    use targon_engine::entropy::Entropy;
    use targon_engine::store::{Store, record::Round};
    let round = Round {
        id: "0".repeat(32),
        netuid: 4,
        block: 1,
        started_ms: 1,
        ended_ms: 2,
        model: "m".into(),
        endpoint: "/v1/completions".into(),
        request: serde_json::Value::Null,
        profile: "default".into(),
        responses: Vec::new(),
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let store = Store::open(path.to_str().unwrap(), &Entropy::system()).await.unwrap();
        store.save_round(&round).await.unwrap();
        store.close().await;
    });
}

#[test]
fn commands_that_print_end_quietly() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path();
    common::write_checkpoint(&home.join("m"), &common::tiny_config(), 1);
    std::fs::write(home.join("models.toml"), "[[model]]\nname = \"m\"\npath = \"m\"\n").unwrap();
    let body = "{\"request\": {\"prompt\": \"a\", \"max_tokens\": 1}, \"chunks\": []}\n";
    std::fs::write(home.join("capture.jsonl"), body).unwrap();
    check(home, &["plan", "--models", "models.toml"]);
    check(home, &["cache", "list"]);
    check(home, &["cache", "list", "--json"]);
    check(home, &["cache", "clean", "--older-than", "1d"]);
    check(home, &["bench", "plan", "m", "--context", "64", "--prompt", "64", "--answer", "8"]);
    check(home, &["config", "check"]);
    check(home, &["--help"]);
    check(home, &["help", "serve"]);
    check(home, &["--version"]);
    check(home, &["calibrate", "--models", "models.toml", "--answers", "2"]);
    check(home, &["completions", "zsh"]);
    check(home, &["doctor", "--offline"]);
    check(home, &["doctor", "--offline", "--json"]);
    check(home, &["calibrate", "--models", "models.toml"]);
    check(home, &["verify", "capture.jsonl", "--models", "models.toml"]);
    check(home, &["verify", "capture.jsonl", "--models", "models.toml", "--json"]);
    write_store(&home.join("validator.sqlite"));
    check(home, &["export", "--what", "rounds"]);
    check(home, &["export", "--format", "csv"]);
    check(home, &["wallet", "new-hotkey", "--wallet.name", "w", "--wallet.hotkey", "h"]);
    check(home, &["wallet", "show", "--wallet.name", "w", "--wallet.hotkey", "h"]);
}

#[test]
fn the_attack_bench_ends_quietly() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path();
    common::write_checkpoint(&home.join("m"), &common::tiny_config(), 1);
    let bench = ["bench", "attack", "m", "--prompts", "2", "--honest", "0", "--tokens", "32"];
    let only = ["--only", "another seed"];
    check(home, &[&bench[..], &only].concat());
    check(home, &[&bench[..], &only, &["--json"]].concat());
}

#[test]
fn a_model_that_was_fetched_is_named_quietly() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path();
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let model = home.join("hub/hub/models--a--b");
    let snapshot = model.join("snapshots").join(commit);
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(model.join("refs")).unwrap();
    std::fs::write(model.join("refs/main"), commit).unwrap();
    std::fs::write(snapshot.join("m.gguf"), "GGUF").unwrap();
    check(home, &["fetch", "a/b", "--file", "m.gguf"]);
}

#[test]
fn a_query_ends_quietly_before_its_answer_and_within_it() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            let mut socket = socket.unwrap();
            let _ = std::io::Read::read(&mut socket, &mut [0; 4096]);
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\
                        connection: close\r\n\r\n";
            let _ = socket.write_all(head.as_bytes());
            let chunk = "{\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"},\
                         \"token_ids\":[1],\"logprobs\":{\"content\":[{\"token\":\"a\",\
                         \"logprob\":-0.5}]}}]}";
            for _ in 0..50 {
                if write!(socket, "data: {chunk}\n\n").is_err() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
    });
    let query = ["query", "--address", &address, "--model", "m", "--proof", "none", "hello"];
    check(home, &query);
    check_after(home, 1, &query);
}

#[test]
fn commands_that_ask_others_end_quietly() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path();
    let status = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\
                  content-length: 15\r\n\r\n{\"hotkey\":\"5F\"}";
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            let mut socket = socket.unwrap();
            let mut head = [0; 4096];
            let _ = std::io::Read::read(&mut socket, &mut head);
            let _ = std::io::Write::write_all(&mut socket, status.as_bytes());
        }
    });
    check(home, &["status", "--url", &url]);
    check(home, &["status", "--url", &url, "--json"]);
}
