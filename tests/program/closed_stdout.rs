//! Every command that prints ends quietly once nobody reads what it prints.

use crate::common;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// What a shell reports of a program that SIGPIPE ended.
const CLOSED_PIPE: i32 = 141;

/// Runs the program with a stdout that nobody reads any more.
fn run(home: &Path, arguments: &[&str]) -> Output {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    Command::new(env!("CARGO_BIN_EXE_targon-engine"))
        .args(arguments)
        .env_clear()
        .env("HOME", home)
        .env("XDG_CACHE_HOME", home.join("cache"))
        .current_dir(home)
        .stdin(Stdio::null())
        .stdout(Stdio::from(writer))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap()
}

#[track_caller]
fn check(home: &Path, arguments: &[&str]) {
    let output = run(home, arguments);
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(!words.contains("panicked"), "{arguments:?}: {words}");
    assert_eq!(output.status.code(), Some(CLOSED_PIPE), "{arguments:?}: {words}");
}

/// A validator's records with one round.
fn write_store(path: &Path) {
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
        let store = Store::open(path.to_str().unwrap()).await.unwrap();
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
    check(home, &["bench", "plan", "m", "--context", "64", "--prompt", "64", "--answer", "8"]);
    check(home, &["config", "check"]);
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
