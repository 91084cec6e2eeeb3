//! A miner as its operator runs it: wallet, chain, signed queries by uid, captures that verify.

use super::closed_stdout::ends_quietly;
use crate::common;
use crate::node::{FakeNode, Neuron, Subnet};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use targon_engine::chain::keys::Hotkey;

const MODEL: &str = "tiny";

/// A place with a tiny model, two wallets and nothing of the real home.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self::of(&common::tiny_config())
    }

    fn of(config: &Value) -> Self {
        let home = tempfile::tempdir().unwrap();
        let model = home.path().join("model");
        common::write_checkpoint(&model, config, 3);
        let entry = format!(
            "[[model]]\nname = \"{MODEL}\"\npath = \"{}\"\nsequences_max = 4\n",
            model.display()
        );
        std::fs::write(home.path().join("models.toml"), entry).unwrap();
        Self(home)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_targon-engine"));
        command.current_dir(self.path()).env("HOME", self.path()).env("TARGON_THREADS", "2");
        command.env("XDG_CACHE_HOME", self.path().join("cache")).args(arguments);
        command
    }

    fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        let Output { status, stdout, stderr } = self.command(arguments).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (status.code().unwrap(), text(stdout), text(stderr))
    }

    /// Makes a hotkey by the program itself.
    fn hotkey(&self, name: &str) -> Hotkey {
        let wallet = ["wallet", "new-hotkey", "--wallet.name", "w", "--wallet.hotkey", name];
        let (code, out, err) = self.run(&wallet);
        assert_eq!(code, 0, "{err}");
        out.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

/// A running program; killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    fn lines(&mut self, count: usize) -> Vec<String> {
        let mut reader = BufReader::new(self.0.stdout.as_mut().unwrap());
        let mut lines = Vec::new();
        for _ in 0..count {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            lines.push(line.trim().to_owned());
        }
        lines
    }

    fn ends(mut self) -> (i32, String) {
        let status = self.0.wait().unwrap();
        let mut text = String::new();
        self.0.stderr.as_mut().unwrap().read_to_string(&mut text).unwrap();
        (status.code().unwrap(), text)
    }
}

async fn chain(members: &[Hotkey]) -> FakeNode {
    let neuron = |key: &Hotkey| Neuron { stake_rao: 20_000_000_000_000, ..Neuron::new(key.0) };
    let node = FakeNode::start(Subnet::new(4, members.iter().map(neuron).collect())).await;
    node.auto_blocks(Duration::from_millis(50));
    node
}

fn serve_command(home: &Home, node: &FakeNode, extra: &[&str]) -> Command {
    let mut command = home.command(&["serve", "--port", "0", "--wallet.name", "w"]);
    command.args(["--wallet.hotkey", "miner", "--subtensor.chain_endpoint", &node.url()]);
    // The chain refuses exactly 127.0.0.1; this is the same machine.
    command.args(["--axon.ip", "127.0.0.2", "--axon.port", "0"]).args(extra);
    command
}

fn serve(home: &Home, node: &FakeNode, extra: &[&str]) -> Running {
    let mut command = serve_command(home, node, extra);
    Running(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn from_registration_to_a_verified_answer() {
    let home = Home::new();
    let (miner, validator) = (home.hotkey("miner"), home.hotkey("validator"));
    let node = chain(&[miner, validator]).await;
    let mut serving = serve(&home, &node, &["--epoch_length", "5"]);
    let lines = serving.lines(2);
    let open = lines[0].clone();
    for _ in 0..600 {
        if !node.calls().is_empty() && node.subnet(|s| s.neurons[0].axon.is_some()) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let url = node.url();
    let asks = |extra: &[&str]| {
        let common = ["query", "--uid", "0", "--wallet.name", "w", "--wallet.hotkey", "validator"];
        let mut all = common.to_vec();
        all.extend(["--subtensor.chain_endpoint", &url, "--save", "capture.jsonl", "hello"]);
        all.extend(extra);
        home.run(&all)
    };
    let (code, out, err) = asks(&["--max-tokens", "40"]);
    assert_eq!(code, 0, "{out}\n{err}");
    assert!(out.contains(&format!("proof chunks of residue-v1, signed by {miner}")), "{out}");
    let (code, out, err) = asks(&["--completion", "--max-tokens", "5", "--temperature", "0"]);
    assert_eq!(code, 0, "{out}\n{err}");
    let (code, out, err) = home.run(&["verify", "capture.jsonl", "--exact"]);
    assert_eq!(code, 0, "{out}\n{err}");
    assert_eq!(out.matches(": pass").count(), 2, "{out}");

    let (code, status, err) = home.run(&["status", "--url", &open]);
    assert_eq!(code, 0, "{err}");
    assert!(status.contains(&validator.to_string()) && status.contains("accepted"), "{status}");
    home.hotkey("stranger");
    let axon = lines[1].strip_suffix(" signed").unwrap();
    let stranger =
        ["query", "--address", axon, "--wallet.name", "w", "--wallet.hotkey", "stranger"];
    let mut all = stranger.to_vec();
    let hotkey = miner.to_string();
    all.extend(["--hotkey", &hotkey, "hello"]);
    let (code, _, err) = home.run(&all);
    assert_eq!(code, 1);
    assert!(err.contains("Signer not in metagraph"), "{err}");
    // Unsigned requests go to the open listener only.
    let (code, _, err) = home.run(&["query", "--address", axon, "--model", MODEL, "hello"]);
    assert!(code == 1 && err.contains("this is a signed listener"), "{err}");
    let (code, out, err) = home.run(&["query", "--address", &open, "--model", MODEL, "hello"]);
    assert_eq!(code, 0, "{out}\n{err}");
    // Deregistered, the program ends by itself and says why.
    node.subnet(|s| s.neurons[0] = Neuron::new([7; 32]));
    let (code, err) = serving.ends();
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("is not registered on subnet 4") && err.contains("btcli"), "{err}");
    assert!(!err.contains("secretSeed") && !err.contains("privateKey"));
}

/// Exit code and findings of `doctor --as-validator`: topic, level, fact with its hint.
fn examined(home: &Home, arguments: &[&str]) -> (i32, Vec<[String; 3]>) {
    let base = ["doctor", "--json", "--max-tokens", "24", "--temperature", "0", "--as-validator"];
    let (code, out, err) = home.run(&[&base[..], arguments].concat());
    let report: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}\n{err}"));
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    let told = |f: &Value| format!("{}; {}", text(f, "fact"), text(f, "hint"));
    let findings = report["findings"].as_array().unwrap().iter();
    (code, findings.map(|f| [text(f, "topic"), text(f, "level"), told(f)]).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signed_examination_says_what_each_rule_concludes() {
    let mut config = common::tiny_config();
    config["max_position_embeddings"] = 2048.into();
    let home = Home::of(&config);
    let (miner, validator) = (home.hotkey("miner"), home.hotkey("validator"));
    home.hotkey("stranger");
    let node = chain(&[miner, validator]).await;
    let mut serving = serve(&home, &node, &["--logprobs-mode", "scaled"]);
    let lines = serving.lines(2);
    let axon = lines[1].strip_suffix(" signed").unwrap();
    let miner = miner.to_string();
    let signed = |by: &'static str| ["--wallet.name", "w", "--wallet.hotkey", by];
    let asked = [&[axon, "--hotkey", &miner][..], &signed("validator")].concat();
    let (mut code, mut found) = examined(&home, &asked);
    for _ in 0..100 {
        if code == 0 {
            break;
        }
        // Loading takes a moment.
        tokio::time::sleep(Duration::from_millis(100)).await;
        (code, found) = examined(&home, &asked);
    }
    assert_eq!(code, 0, "{found:#?}");
    let fact = |of: &str| {
        let finding = found.iter().find(|[topic, level, _]| topic == of && level == "ok");
        finding.unwrap_or_else(|| panic!("{of} in {found:#?}"))[2].as_str()
    };
    assert!(fact("models list").contains("1 models: tiny"));
    for (rule, words) in [
        ("token ids", "every token"),
        ("speed", "tokens/s"),
        ("powv", "have a weight value"),
        ("LOGPROB_MISMATCH", "agree by 1.000"),
        ("UNLIKELY_TOKENS", "0 of "),
        ("verdict", "its speed counts"),
    ] {
        for endpoint in ["chat", "completion"] {
            let fact = fact(&format!("{endpoint}, {rule}"));
            assert!(fact.contains(words), "{endpoint}, {rule}: {fact}");
        }
    }

    // The signed listener is known as one of this program.
    let port = axon.rsplit(':').next().unwrap().trim_end_matches('/');
    let place = ["--axon.ip", "127.0.0.2", "--axon.port", port, "--port", "0"];
    let (_, out, _) = home.run(&[&["doctor", "--offline"], &place[..]].concat());
    assert!(out.contains(&format!("port {port} is taken by a targon-engine")), "{out}");

    // Who may not ask, and who asks another, is told so by the rule that refuses them.
    let validator = validator.to_string();
    for (arguments, words) in [
        (
            [&[axon, "--hotkey", &miner][..], &signed("stranger")].concat(),
            "a hotkey that is registered",
        ),
        (
            [&[axon, "--hotkey", &validator][..], &signed("validator")].concat(),
            "the miner's own hotkey by --hotkey",
        ),
        (vec![axon], "name a wallet by --wallet.name"),
    ] {
        let (code, found) = examined(&home, &arguments);
        let [[topic, level, fact]] = found.as_slice() else { panic!("{found:#?}") };
        assert_eq!((code, topic.as_str(), level.as_str()), (1, "models list", "fault"));
        assert!(fact.contains(words), "{fact}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn starts_that_cannot_work_end_at_once_with_what_to_do() {
    let home = Home::new();
    let node = chain(&[Hotkey([5; 32])]).await;
    let (code, err) = serve(&home, &node, &[]).ends();
    assert!(code == 1 && err.contains("w/hotkeys/miner cannot be read"), "{err}");
    home.hotkey("miner");
    let (code, err) = serve(&home, &node, &[]).ends();
    assert!(code == 1 && err.contains("is not registered on subnet 4"), "{err}");
    for (flag, value, want) in [
        ("--axon.external_ip", "0.0.0.0", "an address that others can reach, got 0.0.0.0"),
        ("--axon.external_ip", "::", "an address that others can reach, got ::"),
        ("--axon.external_port", "0", "0 is not in 1.."),
        ("--check-ip", "foo", "must begin with http:// or https://, got foo"),
    ] {
        let (code, err) = serve(&home, &node, &[flag, value]).ends();
        assert!(code == 1 && err.contains(flag) && err.contains(want), "{err}");
    }
    let (code, err) = serve(&home, &node, &["--netuid", "77"]).ends();
    assert!(code == 1 && err.contains("the chain has no subnet 77"), "{err}");
    let (code, err) = serve(&home, &node, &["--model-endpoint", "http://x"]).ends();
    assert!(code == 1 && err.contains("is not a proxy"), "{err}");
    let (code, err) = serve(&home, &node, &["--walet.name", "x"]).ends();
    assert!(code == 1 && err.contains("--wallet.name"), "{err}");
    let key = home.path().join(".bittensor/wallets/w/hotkeys/miner");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(key, mode).unwrap();
    let (code, err) = serve(&home, &node, &[]).ends();
    assert!(code == 1 && err.contains("chmod 600"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_miners_open_routes_stay_on_loopback_and_a_dry_run_signs_nothing() {
    let home = Home::new();
    let miner = home.hotkey("miner");
    let node = chain(&[miner]).await;
    let (code, err) = serve(&home, &node, &["--host", "0.0.0.0"]).ends();
    assert!(code == 1 && err.contains("must be on loopback"), "{err}");
    let mut serving = serve(&home, &node, &["--dry-run"]);
    let words = serving.lines(1).remove(0);
    assert!(words.contains("serve_axon") && words.contains("netuid: 4"), "{words}");
    let (code, err) = serving.ends();
    assert_eq!((code, node.calls().len()), (0, 0), "{err}");
    assert!(err.contains("the address lies in a private network"), "{err}");
    ends_quietly(serve_command(&home, &node, &["--dry-run"]), 0);
    // Trouble that passes is not the user's: whoever supervises the program starts it again.
    node.refuse(true);
    node.drop_connections();
    let (code, err) = serve(&home, &node, &[]).ends();
    assert!(code == 2 && err.contains("no endpoint of the chain answers"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_the_chain_refuses_for_good_is_shown_as_such() {
    let home = Home::new();
    let miner = home.hotkey("miner");
    let node = chain(&[miner]).await;
    let mut serving = serve(&home, &node, &["--axon.external_ip", "127.0.0.1"]);
    let open = serving.lines(2).remove(0);
    let mut status = String::new();
    for _ in 0..600 {
        status = home.run(&["status", "--url", &open]).1;
        if !status.contains("axon refused        -") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let line = status.lines().find(|line| line.starts_with("axon refused")).unwrap();
    assert!(line.contains("127.0.0.1:") && line.contains("--axon.external_ip"), "{status}");
    assert!(status.contains("who may ask         members with 10000 TAO of stake\n"), "{status}");
}
