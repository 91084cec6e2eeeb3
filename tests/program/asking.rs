//! Commands that ask a server: what they refuse before they ask, and what they say of its answer.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};

/// What a test's server answers, by the first line of a request.
type Answer = fn(&str) -> String;

/// A server of the test; its address.
fn server(answer: Answer) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            let mut socket = socket.unwrap();
            let body = answer(&request(&mut socket));
            let head = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length:";
            let _ = write!(socket, "{head} {}\r\n\r\n{body}", body.len());
        }
    });
    address
}

/// The first line of a request, which is read whole.
fn request(socket: &mut TcpStream) -> String {
    let (mut text, mut part) = (String::new(), [0; 4096]);
    loop {
        let read = socket.read(&mut part).unwrap();
        if read == 0 {
            return text;
        }
        text += std::str::from_utf8(&part[..read]).unwrap();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        if body.len() >= length.map_or(0, |length| length.parse().unwrap()) {
            return head.lines().next().unwrap_or_default().to_owned();
        }
    }
}

fn program(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_targon-engine"));
    command.current_dir(home).env_clear().env("HOME", home);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn run(home: &Path, arguments: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = program(home).args(arguments).output().unwrap();
    (status.code().unwrap(), text(&stdout), text(&stderr))
}

/// The program where no file can have more than so many KiB.
pub(super) fn run_on_little_disk(home: &Path, kib: u64, arguments: &[&str]) -> (i32, String) {
    let limited = format!("trap '' XFSZ; ulimit -f {kib}; exec \"$0\" \"$@\"");
    let mut shell = Command::new("bash");
    shell.current_dir(home).env("HOME", home).args(["-c", &limited]);
    shell.arg(env!("CARGO_BIN_EXE_targon-engine")).args(arguments);
    let Output { status, stderr, .. } = shell.output().unwrap();
    (status.code().unwrap(), text(&stderr))
}

const CHUNK: &str = r#"{"choices":[{"index":0,"delta":{"content":"hi"},"token_ids":[1],
"logprobs":{"content":[{"token":"hi","logprob":-0.5}]}}]}"#;

/// A miner of the model `first`, which is also the first word of the first event.
fn honest(line: &str) -> String {
    match line.contains("/v1/models") {
        true => r#"{"data": [{"id": "first"}, {"id": "second"}]}"#.to_owned(),
        false => format!("data: {}\n\ndata: [DONE]\n\n", CHUNK.replace('\n', "")),
    }
}

#[test]
fn a_query_refuses_what_it_cannot_ask_before_it_asks() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("body.json"), "{}").unwrap();
    let query = ["query", "--address", "127.0.0.1:1", "--model", "m"];
    for (flags, want) in [
        (&["--temperature", "nan"][..], "must be a finite number from 0 on, got NaN"),
        (&["--temperature", "inf"], "must be a finite number from 0 on, got inf"),
        (&["--temperature", "1e39"], "must be a finite number from 0 on, got inf"),
        (&["--temperature=-1"], "must be a finite number from 0 on, got -1"),
        (&["--proof", "foo"], "--proof foo: must be one of residue-v1, "),
        (&["--max-tokens", "0"], "0 is not in 1.."),
        (&["--read-timeout", "0"], "0 is not in 1..=86400"),
        (&["--timeout", "0"], "0 is not in 1..=86400"),
        (&["--save", "no/such/file"], "--save no/such/file cannot be written: "),
        (&["--save", "."], "--save . cannot be written: "),
    ] {
        let (code, out, err) = run(dir.path(), &[&query[..], flags, &["hello"]].concat());
        assert!(code == 1 && out.is_empty() && err.contains(want), "{flags:?}: {code} {out}{err}");
    }
    for flags in [
        &["--model", "m"][..],
        &["--max-tokens", "3"],
        &["--temperature", "0"],
        &["--proof", "none"],
        &["--completion"],
    ] {
        let body = ["query", "--address", "127.0.0.1:1", "--body", "body.json"];
        let (code, _, err) = run(dir.path(), &[&body[..], flags].concat());
        let names = [flags[0], "--body", "cannot be used with"];
        assert!(code == 1 && names.iter().all(|name| err.contains(name)), "{err}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_query_without_a_model_asks_the_first_that_is_listed() {
    let dir = tempfile::tempdir().unwrap();
    let address = server(honest);
    let query = ["query", "--address", &address, "--save", "c.jsonl", "hello"];
    let (code, _, err) = run(dir.path(), &query);
    assert_eq!(code, 0, "{err}");
    let saved = std::fs::read_to_string(dir.path().join("c.jsonl")).unwrap();
    assert!(saved.contains(r#""model":"first""#), "{saved}");
    for (answer, want) in [
        ((|_| r#"{"data": []}"#.to_owned()) as Answer, " lists no model\n"),
        (|_| "{}".to_owned(), "it lists no models"),
    ] {
        let (code, _, err) = run(dir.path(), &["query", "--address", &server(answer), "hello"]);
        assert!(code == 1 && err.contains(want), "{err}");
        assert!(err.contains("hint: name one by --model"), "{err}");
    }
}

#[test]
fn a_query_says_what_the_server_says_of_its_failure() {
    let dir = tempfile::tempdir().unwrap();
    for (answer, want) in [
        ((|_| "data: {\"error\":{\"message\":\"boom\"}}\n\n".to_owned()) as Answer, ": boom\n"),
        (|_| "data: {\"error\":\"boom\"}\n\ndata: [DONE]\n\n".to_owned(), ": boom\n"),
        (|_| "data: [DONE]\n\n".to_owned(), ": the stream ends before its first event"),
        (|_| "data: {\"choices\":[]}\n\n".to_owned(), "it ends without [DONE]"),
    ] {
        let address = server(answer);
        let query = ["query", "--address", &address, "--model", "m", "hello"];
        let (code, _, err) = run(dir.path(), &query);
        assert!(code == 1 && err.contains(want), "{want}: {code} {err}");
    }
}

#[test]
fn a_capture_is_a_line_of_its_own_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let (address, file) = (server(honest), dir.path().join("c.jsonl"));
    let query = ["query", "--address", &address, "--model", "m", "--save", "c.jsonl", "hello"];
    std::fs::write(&file, r#"{"a": 1}"#).unwrap();
    assert_eq!(run(dir.path(), &query).0, 0);
    let kept = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<&str> = kept.lines().collect();
    assert!(kept.ends_with('\n') && lines.len() == 2 && lines[0] == r#"{"a": 1}"#, "{kept}");
    assert!(serde_json::from_str::<serde_json::Value>(lines[1]).is_ok(), "{kept}");
    // Where only a part of a line can be written, nothing of it stays.
    // With what stands there, the line does not fit into a KiB.
    let before = "x".repeat(800);
    std::fs::write(&file, &before).unwrap();
    let (code, err) = run_on_little_disk(dir.path(), 1, &query);
    assert!(code == 1 && err.contains("--save c.jsonl cannot be written"), "{err}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), before);
}

#[test]
fn a_status_is_that_of_a_miner_or_it_is_said_that_it_is_none() {
    let dir = tempfile::tempdir().unwrap();
    for answer in [
        (|_| "{}".to_owned()) as Answer,
        |_| "[]".to_owned(),
        |_| "null".to_owned(),
        |_| r#"{"detail": "Not Found"}"#.to_owned(),
    ] {
        let (code, out, err) = run(dir.path(), &["status", "--url", &server(answer)]);
        let want = " answered 200 OK, which is not a miner's status: it names no `hotkey`";
        assert!(code == 1 && out.is_empty() && err.contains(want), "{code} {out}{err}");
    }
    // An address needs no scheme; another one than HTTP's is refused.
    let miner = server(|_| r#"{"hotkey": "5F"}"#.to_owned());
    let (code, out, err) = run(dir.path(), &["status", "--url", &miner]);
    assert!(code == 0 && out.contains("5F"), "{out}{err}");
    let (code, _, err) = run(dir.path(), &["status", "--url", "ftp://127.0.0.1:1"]);
    assert!(code == 1 && err.contains("--url must begin with http:// or https://"), "{err}");
}

#[test]
fn a_list_without_models_is_no_stream() {
    let dir = tempfile::tempdir().unwrap();
    let address = server(|_| "{}".to_owned());
    let (code, out, _) = run(dir.path(), &["doctor", "--as-validator", &address]);
    assert!(code == 1 && out.contains("the list of models is malformed"), "{out}");
    assert!(out.contains("answer /v1/models with JSON") && !out.contains("events"), "{out}");
}
