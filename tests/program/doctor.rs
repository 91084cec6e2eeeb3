//! `doctor`, `config check`, `completions` and `man` as a user runs them.

use crate::node::{FakeNode, Neuron, Subnet};
use crate::{asking, common};
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use targon_engine::chain::keys::Hotkey;

fn run(home: &Path, arguments: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_targon-engine"));
    command.current_dir(home).env_clear().env("HOME", home).args(arguments);
    // A Hub that nobody runs, so that nothing leaves this machine.
    command.env("HF_ENDPOINT", "http://127.0.0.1:1").env("TARGON_CHECK_IP", "http://127.0.0.1:1");
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

fn home() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    common::write_checkpoint(&home.path().join("m"), &common::tiny_config(), 1);
    std::fs::write(home.path().join("models.toml"), "[[model]]\nname = \"m\"\npath = \"m\"\n")
        .unwrap();
    home
}

fn findings(home: &Path, arguments: &[&str]) -> (i32, Vec<Value>) {
    let mut all = vec!["doctor", "--json"];
    for port in ["--axon.port", "--port"] {
        if !arguments.contains(&port) {
            all.extend([port, "0"]);
        }
    }
    all.extend(arguments);
    let (code, out, err) = run(home, &all);
    let report: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}\n{err}"));
    (code, report["findings"].as_array().unwrap().clone())
}

/// The level of the finding whose topic and words are given.
fn level(findings: &[Value], topic: &str, words: &str) -> String {
    let is_it = |f: &&Value| f["topic"] == topic && f["fact"].as_str().unwrap().contains(words);
    let found = findings.iter().find(is_it);
    found.unwrap_or_else(|| panic!("{topic}: {words} in {findings:#?}"))["level"]
        .as_str()
        .unwrap()
        .to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_of_the_subnet_is_found_well() {
    let home = home();
    let wallet = ["--wallet.name", "w", "--wallet.hotkey", "h"];
    let made = [&["wallet", "new-hotkey"], wallet.as_slice()].concat();
    let (_, out, _) = run(home.path(), &made);
    let key: Hotkey = out.split_whitespace().nth(1).unwrap().parse().unwrap();
    let member = Neuron { stake_rao: 20_000_000_000_000, ..Neuron::new(key.0) };
    let node = FakeNode::start(Subnet::new(4, vec![member])).await;
    node.auto_blocks(Duration::from_millis(50));
    let url = node.url();
    let chain = ["--subtensor.chain_endpoint", &url, "--axon.external_ip", "127.0.0.2"];
    let (code, found) = findings(home.path(), &[wallet.as_slice(), &chain].concat());
    assert_eq!(code, 0, "{found:#?}");
    assert_eq!(level(&found, "wallet", &key.to_string()), "ok");
    assert_eq!(level(&found, "chain", "subnet 4 has 1 members"), "ok");
    assert_eq!(level(&found, "registration", "uid 0 on subnet 4"), "ok");
    assert_eq!(level(&found, "stake", "20000 TAO"), "ok");
    assert_eq!(level(&found, "axon", "no address is announced"), "note");
    assert_eq!(level(&found, "public address", "private network"), "warning");
    assert_eq!(level(&found, "hub", "cannot be reached"), "warning");
    assert_eq!(level(&found, "model m", "chat template renders"), "ok");

    let other_subnet = [wallet.as_slice(), &chain, &["--netuid", "5"]].concat();
    let (code, found) = findings(home.path(), &other_subnet);
    assert_eq!(code, 1, "{found:#?}");
    assert_eq!(level(&found, "chain", "no endpoint of the chain can be used"), "fault");

    let secret = home.path().join(".bittensor/wallets/w/hotkeys/h");
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o644)).unwrap();
    let (code, found) = findings(home.path(), &[wallet.as_slice(), &["--offline"]].concat());
    assert_eq!((code, level(&found, "wallet", "mode 644").as_str()), (1, "fault"));
}

#[test]
fn a_wallet_is_shown_where_its_hotkey_is_right() {
    let home = tempfile::tempdir().unwrap();
    let wallet = |action: &'static str, hotkey: &'static str| {
        ["wallet", action, "--wallet.name", "w", "--wallet.hotkey", hotkey]
    };
    let show = || run(home.path(), &wallet("show", "h"));
    let file = |name: &str| home.path().join(".bittensor/wallets/w/hotkeys").join(name);
    for hotkey in ["h", "other"] {
        assert_eq!(run(home.path(), &wallet("new-hotkey", hotkey)).0, 0);
    }
    let (code, out, err) = show();
    assert!(code == 0 && out.starts_with("hotkey   5") && !out.contains("encrypted"), "{out}{err}");
    let good = std::fs::read(file("h")).unwrap();
    for (bytes, want) in [("no key", "is not a key file"), ("{}", "names neither")] {
        std::fs::write(file("h"), bytes).unwrap();
        let (code, out, err) = show();
        assert!(code == 1 && out.is_empty() && err.contains(want), "{out}{err}");
    }
    std::fs::write(file("h"), "$NACL").unwrap();
    let (code, out, _) = show();
    assert!(code == 0 && out.contains("(encrypted: not looked into)"), "{out}");
    std::fs::write(file("h"), good).unwrap();
    std::fs::copy(file("otherpub.txt"), file("hpub.txt")).unwrap();
    let (code, _, err) = show();
    assert!(code == 1 && err.contains("hpub.txt must name 5"), "{err}");
    std::fs::remove_file(file("h")).unwrap();
    let (code, _, err) = show();
    assert!(code == 1 && err.contains("w/hotkeys/h cannot be read: "), "{err}");
}

#[test]
fn a_hotkey_that_cannot_be_written_whole_leaves_nothing_behind() {
    let home = tempfile::tempdir().unwrap();
    let words = ["wallet", "new-hotkey", "--wallet.name", "w", "--wallet.hotkey", "h"];
    let (code, err) = asking::run_on_little_disk(home.path(), 0, &words);
    assert!(code == 1 && err.contains("w/hotkeys/h cannot be written: "), "{err}");
    let hotkeys = home.path().join(".bittensor/wallets/w/hotkeys");
    assert_eq!(std::fs::read_dir(hotkeys).unwrap().count(), 0);
    assert_eq!(run(home.path(), &words).0, 0);
}

#[test]
fn models_are_looked_at_one_by_one() {
    let home = home();
    std::fs::create_dir(home.path().join("cut")).unwrap();
    std::fs::write(home.path().join("cut/config.json"), "{\"model_type\": \"llama\"").unwrap();
    let local = |name: &str| format!("[[model]]\nname = \"{name}\"\npath = \"{name}\"\n");
    let entries = local("m") + &local("cut") + "[[model]]\nname = \"far/away\"\n";
    std::fs::write(home.path().join("models.toml"), entries).unwrap();
    let (code, found) = findings(home.path(), &["--offline"]);
    assert_eq!(code, 1);
    assert_eq!(level(&found, "model m", "tokenizer of 261 tokens"), "ok");
    assert_eq!(level(&found, "model cut", "config.json"), "fault");
    assert_eq!(level(&found, "model far/away", "far/away"), "fault");
    // For people, too.
    let (code, out, _) = run(home.path(), &["doctor", "--offline", "--port", "0"]);
    assert!(code == 1 && out.contains("FAULT    model cut: "), "{out}");
    assert!(out.contains("hint: ") && out.contains("\nfaults: 2, warnings: "), "{out}");
}

#[test]
fn a_part_that_fails_is_a_finding_beside_the_others() {
    let home = home();
    let wrong = |flags: &[&str], topic: &str, words: &str| {
        let (code, found) = findings(home.path(), &[flags, &["--offline"]].concat());
        assert_eq!((code, level(&found, topic, words).as_str()), (1, "fault"), "{flags:?}");
        assert!(found.iter().any(|f| f["topic"] == "disk"), "{found:#?}");
    };
    wrong(&["--wallet.name", "../x"], "wallet", "../x");
    wrong(&["--axon.ip", "here"], "axon port", "--axon.ip must be an IP address, got here");
    wrong(&["--models", "nothere.toml"], "models", "nothere.toml: cannot be read");
    std::fs::write(home.path().join("models.toml"), "[[model]]\nname = \"m\"\npth = \"m\"\n")
        .unwrap();
    wrong(&[], "models", "line 3: unknown field `pth`");
    // Nobody named the file.
    std::fs::remove_file(home.path().join("models.toml")).unwrap();
    let (code, found) = findings(home.path(), &["--offline"]);
    assert_eq!((code, level(&found, "models", "does not exist").as_str()), (0, "note"));
    wrong(&["--models", "models.toml"], "models", "models.toml: cannot be read");
    let chain = ["--subtensor.chain_endpoint", "http://x", "--axon.external_ip", "127.0.0.2"];
    let (code, found) = findings(home.path(), &chain);
    assert_eq!((code, level(&found, "chain", "--subtensor.chain_endpoint").as_str()), (1, "fault"));
    assert_eq!(level(&found, "clock", "compared with no other"), "warning");
}

#[test]
fn a_visit_that_cannot_be_is_refused_or_is_a_finding() {
    let home = home();
    for (flags, words) in [
        (&["--as-validator", ""][..], "got an empty address"),
        (&["--as-validator", " "], "got an empty address"),
        (&["--as-validator", "127.0.0.1:1", "--offline"], "--offline does not go with"),
    ] {
        let (code, _, err) = run(home.path(), &[&["doctor", "--json"], flags].concat());
        assert!(code == 1 && err.contains(words), "{flags:?}: {err}");
    }
    let key = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY";
    let (code, found) =
        visit(home.path(), "127.0.0.1:1", &["--hotkey", key, "--wallet.name", "../x"]);
    assert_eq!((code, level(&found, "wallet", "../x").as_str()), (1, "fault"));
}

#[test]
fn a_port_that_another_program_holds_is_told() {
    let home = home();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (_, found) = findings(home.path(), &["--offline", "--axon.port", &port]);
    assert_eq!(level(&found, "axon port", &format!("port {port} is taken by another")), "warning");
}

#[test]
fn a_models_file_is_checked() {
    let home = home();
    let (code, out, _) = run(home.path(), &["config", "check"]);
    assert!(code == 0 && out.contains("models.toml: 1 models, no fault"), "{out}");
    let all = "[[model]]\nname = \"m\"\npath = \"m\"\ndevice = \"cpu\"\nkv_memory = \"64 MiB\"\n\
               sequences_max = 3\nspeculative_tokens = 4\nprefix_cache_file = \"p.bin\"\n\
               [server]\napi_keys = [\"0123456789abcdef\"]\nbody_seconds = 7\n";
    std::fs::write(home.path().join("models.toml"), all).unwrap();
    let (_, out, _) = run(home.path(), &["config", "check"]);
    for line in [
        "  engine       native",
        "  device       cpu",
        "  sequences    3",
        "  kv memory    64.0 MiB",
        "  speculation  up to 4 tokens",
        "  API keys     1",
        "  seconds      header 30, body 7, write 30, stall 60",
    ] {
        assert!(out.lines().any(|l| l == line), "{line}: {out}");
    }
    assert!(out.contains("p.bin") && !out.contains("0123456789abcdef"), "{out}");
    std::fs::write(home.path().join("models.toml"), "[[model]]\nname = \"m\"\npth = \"m\"\n")
        .unwrap();
    let (code, _, err) = run(home.path(), &["config", "check"]);
    assert!(code == 1 && err.contains("line 3: unknown field `pth`"), "{err}");
    assert!(err.contains("did you mean `path`?"), "{err}");
}

#[test]
fn shells_and_man_know_every_command() {
    let home = home();
    let (code, script, _) = run(home.path(), &["completions", "bash"]);
    assert!(code == 0 && script.contains("doctor") && script.contains("--wallet.name"), "{script}");
    let (code, _, err) = run(home.path(), &["completions", "nonsense"]);
    assert!(code == 1 && err.contains("[possible values: bash"), "{err}");
    let (code, _, err) = run(home.path(), &["man", "pages"]);
    assert_eq!(code, 0, "{err}");
    let page = std::fs::read_to_string(home.path().join("pages/targon-engine-doctor.1")).unwrap();
    assert!(page.contains("Look at machine") && page.contains("wallet"), "{page}");
}

/// A server that is ended with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The tiny model with room for a validator's prompts, and who serves it; its address.
fn tiny_server(home: &Path, seed: u32) -> (Server, String) {
    let mut config = common::tiny_config();
    config["max_position_embeddings"] = 2048.into();
    common::write_checkpoint(&home.join("m"), &config, seed);
    let mut command = Command::new(env!("CARGO_BIN_EXE_targon-engine"));
    command.current_dir(home).env_clear().env("HOME", home);
    command.args(["serve", "--port", "0", "--return-tokens-as-token-ids"]);
    command.args(["--logprobs-mode", "scaled", "--threads", "2"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut server = Server(child);
    let mut line = String::new();
    BufReader::new(server.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let address = line.split_whitespace().find(|word| word.starts_with("http://"));
    let address = address.unwrap_or_else(|| panic!("{line}")).trim_end_matches('/').to_owned();
    (server, address)
}

fn visit(home: &Path, address: &str, extra: &[&str]) -> (i32, Vec<Value>) {
    let mut all = vec!["doctor", "--json", "--as-validator", address];
    all.extend(extra);
    let (code, out, err) = run(home, &all);
    let report: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}\n{err}"));
    let found = report["findings"].as_array().unwrap().clone();
    let is_mute = |f: &&Value| f["level"] != "ok" && f["level"] != "note" && !f["hint"].is_string();
    assert_eq!(found.iter().find(is_mute), None, "no hint");
    (code, found)
}

#[test]
fn a_miner_is_checked_as_validators_do() {
    let home = home();
    let (server, address) = tiny_server(home.path(), 1);
    let asked = ["--max-tokens", "24", "--temperature", "0"];
    // Loading takes a moment.
    let (mut code, mut found) = visit(home.path(), &address, &asked);
    for _ in 0..100 {
        if code == 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
        (code, found) = visit(home.path(), &address, &asked);
    }
    assert_eq!(code, 0, "{found:#?}");
    assert_eq!(level(&found, "models list", "1 models: m"), "ok");
    for topic in ["chat", "completion"] {
        let of = |rule: &str| format!("{topic}, {rule}");
        assert_eq!(level(&found, &of("speed"), "tokens/s"), "ok");
        assert_eq!(level(&found, &of("token ids"), "every token"), "ok");
        assert_eq!(level(&found, &of("powv"), "have a weight value"), "ok");
        assert_eq!(level(&found, &of("LOGPROB_MISMATCH"), "agree by 1.000"), "ok");
        assert_eq!(level(&found, &of("UNLIKELY_TOKENS"), "0 of 24 tokens"), "ok");
        assert_eq!(level(&found, &of("verdict"), "its speed counts"), "ok");
    }
    // Its port is known as that of this program.
    let port = address.rsplit(':').next().unwrap();
    let (_, seen) = findings(home.path(), &["--offline", "--port", port]);
    assert_eq!(level(&seen, "open port", "taken by a targon-engine that runs"), "note");
    // A model that it does not list is a miss.
    let (code, found) = visit(home.path(), &address, &["--model", "other"]);
    assert_eq!((code, level(&found, "models list", "other is not among").as_str()), (1, "fault"));
    // Beside other weights the same answers are no answers of this model.
    let elsewhere = tempfile::tempdir().unwrap();
    let mut config = common::tiny_config();
    config["max_position_embeddings"] = 2048.into();
    common::write_checkpoint(&elsewhere.path().join("m"), &config, 2);
    std::fs::copy(home.path().join("models.toml"), elsewhere.path().join("models.toml")).unwrap();
    let (code, found) = visit(elsewhere.path(), &address, &asked);
    assert_eq!(code, 1, "{found:#?}");
    assert_eq!(level(&found, "chat, verdict", "makes this answer a miss"), "fault");
    drop(server);
    let (code, found) = visit(home.path(), &address, &asked);
    assert_eq!((code, found.len()), (1, 1), "{found:#?}");
    assert_eq!(level(&found, "models list", "onnect"), "fault");
}

/// A miner of the test: how it misbehaves is its state.
async fn answer(State(kind): State<&'static str>, body: Bytes) -> Response {
    let asked: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((&asked["stream"], &asked["logprobs"]), (&json!(true), &json!(true)));
    let is_chat = asked.get("messages").is_some();
    let chunk = move |i: usize| {
        let (name, powv) = (format!("token_id:{i}"), (kind != "no powv").then_some(7));
        let mut choice = match is_chat {
            true => json!({"delta": {"content": "x"},
                "logprobs": {"content": [{"token": name, "logprob": -0.5}]}}),
            false => json!({"text": "x",
                "logprobs": {"tokens": [name], "token_logprobs": [-0.5]}}),
        };
        if kind == "no logprobs" {
            choice["logprobs"] = Value::Null;
        }
        choice["powv"] = json!(powv);
        format!("data: {}\n\n", json!({"choices": [choice]}))
    };
    let count: usize = if kind == "at once" { 80 } else { 8 };
    let wait = move |i: usize| match (kind, i) {
        // Long beside what reading all chunks takes on a busy machine.
        ("at once", 0) => Duration::from_millis(4_000),
        ("slow", 4) => Duration::from_millis(2_500),
        ("at once", _) => Duration::ZERO,
        _ => Duration::from_millis(2),
    };
    match kind {
        "full" => (StatusCode::SERVICE_UNAVAILABLE, "no room").into_response(),
        "whole" => json!({"choices": []}).to_string().into_response(),
        _ => {
            let frames = stream::iter(0..=count).then(move |i| async move {
                tokio::time::sleep(wait(i)).await;
                let frame = if i == count { "data: [DONE]\n\n".into() } else { chunk(i) };
                Ok::<_, std::io::Error>(frame)
            });
            Body::from_stream(frames).into_response()
        }
    }
}

async fn wrong_miner(kind: &'static str) -> String {
    let app = axum::Router::new()
        .route("/v1/models", axum::routing::get(|| async { r#"{"data": [{"id": "w"}]}"# }))
        .route("/v1/chat/completions", axum::routing::post(answer))
        .route("/v1/completions", axum::routing::post(answer))
        .with_state(kind);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_miner_does_wrong_is_told_by_its_rule() {
    let home = tempfile::tempdir().unwrap();
    for (kind, code, rule, level_of_it, words) in [
        ("right", 0, "token ids", "ok", "every token"),
        ("no powv", 0, "powv", "note", "0 of 8 tokens"),
        ("no logprobs", 1, "token ids", "fault", "name no `token_id:`"),
        ("at once", 1, "BAD_STREAM", "fault", "at its very end"),
        ("slow", 0, "speed", "warning", "longest silence 2.5"),
        ("full", 1, "BAD_STREAM", "fault", "503"),
        ("whole", 1, "BAD_STREAM", "fault", "[DONE]"),
    ] {
        let address = wrong_miner(kind).await;
        let path = home.path().to_owned();
        let asked = ["--max-tokens", "100", "--temperature", "0.5"];
        let visited = tokio::task::spawn_blocking(move || visit(&path, &address, &asked));
        let (exit, found) = visited.await.unwrap();
        assert_eq!(exit, code, "{kind}: {found:#?}");
        for topic in ["chat", "completion"] {
            let topic = format!("{topic}, {rule}");
            assert_eq!(level(&found, &topic, words), level_of_it, "{kind}");
        }
        if kind != "full" && kind != "whole" {
            assert_eq!(level(&found, "weights", "are not here"), "note");
        }
    }
}
