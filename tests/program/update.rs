//! Programs that replace themselves: a server of releases on this machine, a copy of the built
//! binary, and a small program that takes its place.

use crate::common;
use crate::node::{FakeNode, Neuron, Subnet};
use axum::Router;
use axum::body::Bytes;
use axum::routing::get;
use minisign::KeyPair;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;
use targon_engine::chain::keys::Hotkey;
use targon_engine::update::target;
use tokio::net::TcpListener;

/// Says a newer version; run as anything else, it writes down who and how, and ends with 7.
const NEXT: &str = "#!/bin/sh\n\
    if [ \"$1\" = --version ]; then echo targon-engine 9.9.9; exit 0; fi\n\
    echo \"$$ $*\" >\"$HOME/restarted\"\nexit 7\n";

/// A machine with a copy of the program, and a server of releases.
struct Machine {
    home: tempfile::TempDir,
    url: String,
    key: String,
}

impl Machine {
    /// The release is signed with a key; the program is told of it, or of another one.
    async fn new(is_told_another_key: bool) -> Self {
        Self::with(NEXT.into(), is_told_another_key).await
    }

    /// A release of any program.
    async fn with(next: Vec<u8>, is_told_another_key: bool) -> Self {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("bin")).unwrap();
        std::fs::copy(env!("CARGO_BIN_EXE_targon-engine"), home.path().join("bin/engine")).unwrap();
        let mut config = common::tiny_config();
        config["max_position_embeddings"] = 2048.into();
        let model = home.path().join("model");
        common::write_checkpoint(&model, &config, 3);
        let entry = format!("[[model]]\nname = \"tiny\"\npath = \"{}\"\n", model.display());
        std::fs::write(home.path().join("models.toml"), entry).unwrap();
        let pair = KeyPair::generate_unencrypted_keypair().unwrap();
        let comment = format!("targon-engine 9.9.9 {}", target());
        let signature =
            minisign::sign(None, &pair.sk, Cursor::new(&next), Some(&comment), None).unwrap();
        let list = json!({"format": 1, "version": "9.9.9", "builds": [{
            "target": target(), "file": "engine-9.9.9", "bytes": next.len(),
            "sha256": hex::encode(Sha256::digest(&next)), "signature": signature.into_string(),
        }]});
        let (list, next) = (list.to_string(), Bytes::from(next));
        let router = Router::new()
            .route("/list.json", get(move || std::future::ready(list.clone())))
            .route("/engine-9.9.9", get(move || std::future::ready(next.clone())));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/list.json", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        let told = match is_told_another_key {
            true => KeyPair::generate_unencrypted_keypair().unwrap(),
            false => pair,
        };
        Self { home, url, key: told.pk.to_base64() }
    }

    fn program(&self) -> PathBuf {
        self.home.path().join("bin/engine")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.program());
        command.current_dir(self.home.path()).env("HOME", self.home.path());
        command.env("TARGON_THREADS", "2").env("XDG_CACHE_HOME", self.home.path().join("cache"));
        command.args(arguments).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    fn serve(&self, arguments: &[&str]) -> Child {
        let serve = ["serve", "--models", "models.toml", "--port", "0", "--autoupdate"];
        self.command(&[&serve, arguments].concat()).spawn().unwrap()
    }

    fn source(&self) -> [&str; 4] {
        ["--update.url", &self.url, "--update.key", &self.key]
    }

    /// How often the new program was started, as it has written down.
    fn starts(&self) -> Option<String> {
        let entries = std::fs::read_dir(self.home.path().join("bin")).unwrap();
        let mut paths = entries.map(|entry| entry.unwrap().path());
        let is_note = |path: &PathBuf| path.to_string_lossy().contains(".engine.trial-");
        paths.find(is_note).and_then(|note| std::fs::read_to_string(note).ok())
    }

    /// The old program is back, runs as `child`, and will not take the new one again.
    async fn check_rolled_back(&self, mut child: Child, why: &'static str) {
        let log = child.stderr.take().unwrap();
        let said = logged_all(log, "no update: release 9.9.9 failed here").await;
        assert_eq!(said.matches("rolling back").count(), 1, "{said}");
        assert!(said.contains("release 9.9.9 failed in its first 10 minutes"), "{said}");
        assert!(said.contains(why), "{said}");
        let built = std::fs::read(env!("CARGO_BIN_EXE_targon-engine")).unwrap();
        assert!(std::fs::read(self.program()).unwrap() == built, "the old program is not back");
        let failed = std::fs::read_to_string(self.home.path().join("bin/engine.failed")).unwrap();
        assert_eq!((failed.trim(), self.starts()), ("9.9.9", None));
        end(child);
    }

    /// The process has become the small program, with its number and its arguments.
    async fn check_replaced(&self, child: Child, arguments: &str) {
        let number = child.id();
        let ended = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
        let ended = tokio::time::timeout(Duration::from_secs(120), ended).await.unwrap().unwrap();
        let log = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(7), "{log}");
        let said = std::fs::read_to_string(self.home.path().join("restarted")).unwrap();
        assert!(said.starts_with(&format!("{number} {arguments}")), "{said}\n{log}");
        assert_eq!(std::fs::read_to_string(self.program()).unwrap(), NEXT);
        let built = std::fs::read(env!("CARGO_BIN_EXE_targon-engine")).unwrap();
        let kept = std::fs::read(self.home.path().join("bin/engine.previous")).unwrap();
        assert!(kept == built, "the old program is not what is kept");
    }
}

/// Reads a child's log until a line has these words.
async fn logged(child: &mut Child, words: &'static str) -> String {
    let all = logged_all(child.stderr.take().unwrap(), words).await;
    all.lines().last().unwrap().to_owned()
}

/// The log up to a line with these words.
async fn logged_all(log: ChildStderr, words: &'static str) -> String {
    let read = tokio::task::spawn_blocking(move || {
        use std::io::BufRead;
        let mut all = String::new();
        for line in std::io::BufReader::new(log).lines() {
            let line = line.unwrap();
            all = all + &line + "\n";
            if line.contains(words) {
                return all;
            }
        }
        panic!("{words} is not in {all}");
    });
    tokio::time::timeout(Duration::from_secs(120), read).await.unwrap().unwrap()
}

/// The built program as release 9.9.9, with another name for one of its flags where that is asked.
fn newer(flag: Option<(&str, &str)>) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("engine");
    std::fs::copy(env!("CARGO_BIN_EXE_targon-engine"), &path).unwrap();
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(version.len(), "9.9.9".len(), "the version is written over");
    let mut rules = format!("s/{}/9.9.9/g", version.replace('.', "\\."));
    if let Some((old, new)) = flag {
        assert_eq!(old.len(), new.len());
        rules += &format!(";s/{old}/{new}/g");
    }
    let mut sed = Command::new("sed");
    sed.env("LC_ALL", "C").arg("-i").arg(rules).arg(&path);
    assert!(sed.status().unwrap().success());
    std::fs::read(path).unwrap()
}

fn end(mut child: Child) {
    assert_eq!(child.try_wait().unwrap(), None, "it must still run");
    child.kill().unwrap();
    child.wait().unwrap();
}

fn beside(program: &Path) -> usize {
    std::fs::read_dir(program.parent().unwrap()).unwrap().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_becomes_the_newer_release_where_that_is_asked_for() {
    let machine = Machine::new(false).await;
    let child = machine.serve(&machine.source());
    let arguments = "serve --models models.toml --port 0 --autoupdate --update.url";
    machine.check_replaced(child, arguments).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_starts_and_fails_is_rolled_back_once() {
    // It does not know a flag any more that the running program was started with.
    let flag = ("return-tokens-as-token-ids", "return-tokens-as-token-idz");
    let machine = Machine::with(newer(Some(flag)), false).await;
    let arguments = [&machine.source()[..], &["--return-tokens-as-token-ids"]].concat();
    let child = machine.serve(&arguments);
    machine.check_rolled_back(child, "it ended with 1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_is_killed_again_and_again_is_rolled_back_once() {
    let machine = Machine::with(newer(None), false).await;
    let source = machine.source();
    let mut child = machine.serve(&source);
    for start in 1..=3 {
        let count = start.to_string();
        for _ in 0..2_400 {
            if machine.starts().is_some_and(|starts| starts == count) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(machine.starts(), Some(count));
        child.kill().unwrap();
        child.wait().unwrap();
        // As a supervisor does.
        child = machine.serve(&source);
    }
    machine.check_rolled_back(child, "it was started 3 times and never lasted").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_another_key_signed_is_refused_and_the_program_stays() {
    let machine = Machine::new(true).await;
    let mut child = machine.serve(&machine.source());
    let line = logged(&mut child, "no update").await;
    assert!(line.contains("the signature of engine-9.9.9 is not valid"), "{line}");
    assert_eq!(beside(&machine.program()), 1);
    end(child);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_address_and_key_it_says_so_and_runs_on() {
    let machine = Machine::new(false).await;
    let mut child = machine.serve(&[]);
    let line = logged(&mut child, "does not update").await;
    assert!(line.contains("--update.url and --update.key are not both set"), "{line}");
    tokio::time::sleep(Duration::from_millis(300)).await;
    end(child);
    let run = machine.command(&["serve", "--autoupdate", "--update.url", "http://example.org/"]);
    let out = { run }.args(["--update.key", &machine.key]).output().unwrap();
    let log = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{log}");
    assert!(log.contains("must be https, or http at a loopback address"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_validator_becomes_the_newer_release_between_rounds_unless_told_not_to() {
    let machine = Machine::new(false).await;
    let wallet = ["wallet", "new-hotkey", "--wallet.name", "w", "--wallet.hotkey", "v"];
    let made = machine.command(&wallet).stdout(Stdio::piped()).output().unwrap();
    let made = String::from_utf8(made.stdout).unwrap();
    let hotkey: Hotkey = made.split_whitespace().nth(1).unwrap().parse().unwrap();
    let own = Neuron { stake_rao: 20_000_000_000_000, permit: true, ..Neuron::new(hotkey.0) };
    let node = FakeNode::start(Subnet::new(4, vec![own, Neuron::new([7; 32])])).await;
    node.auto_blocks(Duration::from_secs(1));
    let endpoint = node.url();
    let mut arguments = vec!["validate", "--models", "models.toml", "--private-axons"];
    arguments.extend(["--wallet.name", "w", "--wallet.hotkey", "v"]);
    arguments.extend(["--subtensor.chain_endpoint", &endpoint]);
    arguments.extend(machine.source());
    let mut off = machine.command(&arguments).env("NO_AUTO_UPDATE", "true").spawn().unwrap();
    logged(&mut off, "no round").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(beside(&machine.program()), 1);
    end(off);
    let child = machine.command(&arguments).spawn().unwrap();
    machine.check_replaced(child, "validate --models models.toml --private-axons").await;
}
