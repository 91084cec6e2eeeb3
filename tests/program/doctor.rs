//! `doctor`, `config check`, `completions` and `man` as a user runs them.

use crate::common;
use crate::node::{FakeNode, Neuron, Subnet};
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
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
    let mut all = vec!["doctor", "--json", "--axon.port", "0", "--port", "0"];
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
fn a_models_file_is_checked() {
    let home = home();
    let (code, out, _) = run(home.path(), &["config", "check"]);
    assert!(code == 0 && out.contains("models.toml: 1 models, no fault"), "{out}");
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
