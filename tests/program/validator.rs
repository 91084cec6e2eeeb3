//! A validator as its operator runs it: a chain, miners as programs of their own, records on disk.

use super::closed_stdout::ends_quietly;
use crate::common;
use crate::dishonest::{self, Setup, Way};
use crate::node::{FakeNode, Neuron, Subnet};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use targon_engine::chain::keyfile::KeyFileError;
use targon_engine::chain::keys::Hotkey;
use targon_engine::chain::wallet::Wallet;
use targon_engine::store::Store;
use targon_engine::store::record::{Outcome, Sampled, WeightsState};

const MODEL: &str = "tiny";
const TAO: u64 = 1_000_000_000;

/// A place with wallets, and a model file for each seed of weights.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// A models file whose model has weights of this seed, and the same name as all others.
    fn models(&self, seed: u32) -> String {
        let model = self.path().join(format!("model{seed}"));
        let mut config = common::tiny_config();
        // Prompts are long for a tokenizer of bytes.
        config["max_position_embeddings"] = 2048.into();
        common::write_checkpoint(&model, &config, seed);
        let entry = format!(
            "[[model]]\nname = \"{MODEL}\"\npath = \"{}\"\nsequences_max = 4\n",
            model.display()
        );
        let name = format!("models{seed}.toml");
        std::fs::write(self.path().join(&name), entry).unwrap();
        name
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_targon-engine"));
        command.current_dir(self.path()).env("HOME", self.path()).env("TARGON_THREADS", "2");
        command.env("XDG_CACHE_HOME", self.path().join("cache")).args(arguments);
        command
    }

    async fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        run(self.command(arguments)).await
    }

    async fn hotkey(&self, name: &str) -> Hotkey {
        let wallet = ["wallet", "new-hotkey", "--wallet.name", "w", "--wallet.hotkey", name];
        let (code, out, err) = self.run(&wallet).await;
        assert_eq!(code, 0, "{err}");
        out.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    fn miner(&self, node: &FakeNode, hotkey: &str, models: &str) -> Running {
        let url = node.url();
        let mut command = self.command(&["serve", "--port", "0", "--models", models]);
        command.args(["--wallet.name", "w", "--wallet.hotkey", hotkey]);
        // The chain refuses exactly 127.0.0.1; this is the same machine.
        command.args(["--axon.ip", "127.0.0.2", "--axon.port", "0"]);
        command.args(["--subtensor.chain_endpoint", &url]);
        Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    /// A miner that cheats with the model of seed 3, in this process.
    fn cheat(&self, node: &FakeNode, hotkey: &str, way: Way) {
        let wallet = Wallet::new(&self.path().join(".bittensor/wallets"), "w", hotkey).unwrap();
        let scratch = self.path().join(format!("{hotkey}.weights"));
        std::fs::create_dir(&scratch).unwrap();
        let setup = Setup {
            way,
            model: MODEL.into(),
            path: self.path().join("model3"),
            scratch,
            threads: 2,
            signer: wallet.keypair(|_| Err(KeyFileError::NotAsked("none".into()))).unwrap(),
            chain: node.url(),
            ip: [127, 0, 0, 2].into(),
        };
        tokio::spawn(async move { panic!("{:?}", dishonest::run(setup, |_| ()).await) });
    }

    async fn validate(&self, node: &FakeNode, extra: &[&str]) -> (i32, String, String) {
        run(self.validating(node, extra)).await
    }

    fn validating(&self, node: &FakeNode, extra: &[&str]) -> Command {
        let url = node.url();
        let mut all = vec!["validate", "--wallet.name", "w", "--wallet.hotkey", "validator"];
        all.extend(["--subtensor.chain_endpoint", &url, "--private-axons"]);
        if !extra.contains(&"--tokens-min") {
            all.extend(["--tokens-min", "24"]);
        }
        all.extend(["--tokens-max", "40"]);
        all.extend(extra);
        self.command(&all)
    }
}

async fn run(mut command: Command) -> (i32, String, String) {
    let run = tokio::task::spawn_blocking(move || command.output().unwrap());
    let Output { status, stdout, stderr } = run.await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

/// A running program; killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A chain with a validator at uid 0 and miners behind it.
async fn chain(validator: Hotkey, miners: &[Hotkey]) -> FakeNode {
    let own = Neuron { stake_rao: 20_000 * TAO, permit: true, ..Neuron::new(validator.0) };
    let neurons = std::iter::once(own).chain(miners.iter().map(|key| Neuron::new(key.0)));
    let node = FakeNode::start(Subnet::new(4, neurons.collect())).await;
    // An epoch of 360 blocks outlasts the test.
    node.auto_blocks(Duration::from_secs(1));
    node
}

async fn announced(node: &FakeNode, uids: &[usize]) {
    for _ in 0..1_200 {
        if node.subnet(|s| uids.iter().all(|uid| s.neurons[*uid].axon.is_some())) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the miners have not announced their addresses within a minute");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_round_ends_in_verdicts_records_and_weights_on_the_chain() {
    let home = Home::new();
    let validator = home.hotkey("validator").await;
    let miners = [home.hotkey("honest").await, home.hotkey("other").await];
    let gone = Hotkey([7; 32]);
    let node = chain(validator, &[miners[0], miners[1], gone]).await;
    let (own, other) = (home.models(3), home.models(4));
    let _honest = home.miner(&node, "honest", &own);
    let _other = home.miner(&node, "other", &other);
    announced(&node, &[1, 2]).await;
    // At an address where nobody listens.
    let nowhere = crate::node::Axon::new([127, 0, 0, 2].into(), 1);
    node.subnet(|s| s.neurons[3].axon = Some(nowhere));
    let database = ["--models", &own, "--database.url", "v.sqlite", "--once"];
    let (code, out, err) = home.validate(&node, &database).await;
    assert_eq!(code, 0, "{out}\n{err}");
    let line = |key: &Hotkey| {
        let key = key.to_string();
        out.lines().find(|line| line.contains(&key)).unwrap_or_default().to_owned()
    };
    assert!(line(&miners[0]).contains("verified"), "{out}\n{err}");
    assert!(line(&miners[1]).contains("rejected"), "{out}\n{err}");
    assert!(line(&gone).contains("NOT_SERVED"), "{out}\n{err}");
    assert!(out.contains("read back from the chain as sent"), "{out}\n{err}");
    assert!(out.contains("65535"), "{out}");
    // Exactly what was printed stands on the chain.
    let stands = node.subnet(|s| s.weights.clone());
    assert_eq!(stands.into_values().collect::<Vec<_>>(), [vec![(1, 65_535)]]);
    let set = node.calls().iter().filter(|call| call.name.contains("weights")).count();
    assert_eq!(set, 1);
    check_records(&home, &miners, gone).await;
    // A second run in the same epoch looks up what is there, and sends nothing again.
    let (code, out, err) = home.validate(&node, &database).await;
    assert_eq!(code, 0, "{out}\n{err}");
    assert!(out.contains("read back from the chain as sent"), "{out}\n{err}");
    let set = node.calls().iter().filter(|call| call.name.contains("weights")).count();
    assert_eq!(set, 1, "{out}\n{err}");
    let once = ["--models", &own, "--once", "--dry-run"];
    ends_quietly(home.validating(&node, &once), 0);
    let explain = ["explain", "--uid", "1", "--database.url", "v.sqlite"];
    ends_quietly(home.command(&explain), 0);
    ends_quietly(home.command(&[&explain[..], &["--json"]].concat()), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn cheats_that_claim_the_true_model_get_nothing_and_the_slow_get_less() {
    let home = Home::new();
    let validator = home.hotkey("validator").await;
    let ways = [
        ("slow", Way::Slow(150)),
        ("weights", Way::Weights(4)),
        // Of four bits, an answer of this small model may draw no token that tells it.
        ("spoof", Way::Spoof(2)),
        ("replay", Way::Replay),
    ];
    let mut keys = vec![home.hotkey("honest").await];
    for (name, _) in ways {
        keys.push(home.hotkey(name).await);
    }
    let node = chain(validator, &keys).await;
    let models = home.models(3);
    let _honest = home.miner(&node, "honest", &models);
    ways.iter().for_each(|(name, way)| home.cheat(&node, name, *way));
    announced(&node, &[1, 2, 3, 4, 5]).await;
    let database = ["--models", &models, "--database.url", "v.sqlite", "--rounds", "2"];
    let (code, out, err) = home.validate(&node, &database).await;
    assert_eq!(code, 0, "{out}\n{err}");
    let store = Store::open_to_read(home.path().join("v.sqlite").to_str().unwrap()).await.unwrap();
    let heads = store.rounds(4, u64::MAX, 10).await.unwrap();
    assert_eq!(heads.len(), 2);
    for head in heads {
        let round = store.round(&head.id).await.unwrap().unwrap();
        let found: Vec<(Outcome, Option<&str>)> =
            round.responses.iter().map(|r| (r.outcome, r.cause.as_deref())).collect();
        // The spoofer's rows and log-probabilities are true: what tells it is how tokens are drawn.
        let rejected = |cause| (Outcome::Rejected, Some(cause));
        let expected = [
            (Outcome::Verified, None),
            (Outcome::Verified, None),
            rejected("SKETCH_ENERGY"),
            rejected("SAMPLER_MARGIN"),
            rejected("BAD_POWV"),
        ];
        assert_eq!(found, expected, "{out}");
    }
    store.close().await;
    let weights = node.subnet(|s| s.weights.clone()).into_values().next().unwrap();
    let [(1, best), (2, slow)] = weights[..] else { panic!("{weights:?}") };
    // Its share is that of its speed, which is less than 7 tokens a second.
    assert!(best == u16::MAX && (1..u16::MAX).contains(&slow), "{weights:?}");
    let explain = ["explain", "--uid", "4", "--database.url", "v.sqlite"];
    let (code, out, err) = home.run(&explain).await;
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("SAMPLER_MARGIN") && out.contains("logits from being drawn"), "{out}");
}

/// What the first run has written down.
async fn check_records(home: &Home, miners: &[Hotkey; 2], gone: Hotkey) {
    let path = home.path().join("v.sqlite");
    let store = Store::open_to_read(path.to_str().unwrap()).await.unwrap();
    let heads = store.rounds(4, u64::MAX, 10).await.unwrap();
    assert_eq!(heads.len(), 1);
    let round = store.round(&heads[0].id).await.unwrap().unwrap();
    let found: Vec<_> = round.responses.iter().map(|r| (r.hotkey.clone(), r.outcome)).collect();
    let expected = [
        (miners[0].to_string(), Outcome::Verified),
        (miners[1].to_string(), Outcome::Rejected),
        (gone.to_string(), Outcome::NotServed),
    ];
    assert_eq!(found, expected);
    let Sampled::Tps(tps) = round.responses[0].sample else { panic!("{round:?}") };
    assert!(tps > 0.0 && round.responses[0].timing.tokens > 0);
    assert_eq!(round.responses[1].sample, Sampled::Miss);
    // The rejected answer is kept as `verify` reads it, and it is rejected there as well.
    let capture = round.responses[1].capture.clone().unwrap();
    assert!(capture["chunks"].as_array().is_some_and(|chunks| !chunks.is_empty()));
    std::fs::write(home.path().join("kept.jsonl"), capture.to_string()).unwrap();
    let verify = ["verify", "kept.jsonl", "--models", "models3.toml", "--json"];
    let (code, out, err) = home.run(&verify).await;
    assert_eq!(code, 3, "{out}\n{err}");
    let verdict: Value = serde_json::from_str(out.lines().next().unwrap()).unwrap();
    assert_eq!(verdict["reason"].as_str(), round.responses[1].cause.as_deref());
    let weights = store.last_weights(4).await.unwrap().unwrap();
    assert_eq!((weights.values, weights.state), (vec![(1, 65_535)], WeightsState::Confirmed));
    let uids: BTreeSet<&String> =
        weights.explanation["miners"].as_object().unwrap().keys().collect();
    assert_eq!(uids.len(), 4);
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn starts_that_cannot_work_end_at_once_with_what_is_missing() {
    let home = Home::new();
    let validator = home.hotkey("validator").await;
    let models = home.models(3);
    let node = chain(validator, &[]).await;
    let expect = async |code: i32, words: &[&str], extra: &[&str]| {
        let mut all = vec!["--models", models.as_str(), "--once"];
        all.extend(extra);
        let (got, out, err) = home.validate(&node, &all).await;
        assert_eq!(got, code, "{out}\n{err}");
        assert!(words.iter().all(|word| err.contains(word)), "{words:?}: {err}");
    };
    node.subnet(|s| s.neurons[0].permit = false);
    let permit = ["uid 0", "has no validator permit", "20000.000 TAO", "--allow-no-permit"];
    expect(1, &permit, &[]).await;
    expect(1, &["the chain has no subnet 77"], &["--netuid", "77"]).await;
    expect(1, &["--tokens-min must be at most"], &["--tokens-min", "50"]).await;
    expect(1, &["--slow-share must lie between 0 and 1"], &["--slow-share", "2"]).await;
    expect(
        1,
        &["--vpermit-tao-limit must be at least 0, got NaN"],
        &["--vpermit-tao-limit", "nan"],
    )
    .await;
    expect(1, &["--vpermit-tao-limit must be at least 0, got -1"], &["--vpermit-tao-limit=-1"])
        .await;
    expect(1, &["--unsaved .: cannot be read: it is not a file"], &["--unsaved", "."]).await;
    std::fs::write(home.path().join("garbage.jsonl"), "\n{}\n").unwrap();
    let garbage = ["--unsaved garbage.jsonl: line 2: not a round: "];
    expect(1, &garbage, &["--unsaved", "garbage.jsonl"]).await;
    let listed = ["--models.mode", "config", "--models.config", "no-such.txt"];
    expect(1, &["--models.config no-such.txt", "No such file"], &listed).await;
    expect(1, &["--models.config goes only with --models.mode config"], &listed[2..]).await;
    let no_proof = ["--profile", "targon-4.4", "--rules", "proof"];
    expect(1, &["--rules proof needs a proof to be asked for"], &no_proof).await;
    expect(1, &["--proof nothing: must be one of"], &["--proof", "nothing"]).await;
    expect(1, &["no-such.jsonl"], &["--dataset", "no-such.jsonl"]).await;
    expect(1, &["no-such.json", "cannot be read"], &["--limits", "no-such.json"]).await;
    let short = [
        "tiny cannot be verified: needs ",
        " with 3 contexts of 2048 tokens, but only 1.0 KiB may be",
        "lower `context_max`, --tokens-max or --checks",
    ];
    expect(1, &short, &["--allow-no-permit", "--verify-memory", "1KiB"]).await;
    // What no round can ask for takes no memory: the model's own context would be 131,072.
    let long = home.path().join("long.toml");
    let mut config = common::tiny_config();
    config["max_position_embeddings"] = 131_072.into();
    common::write_checkpoint(&home.path().join("long"), &config, 3);
    let path = home.path().join("long");
    let entry = format!("[[model]]\nname = \"tiny\"\npath = \"{}\"\n", path.display());
    std::fs::write(&long, entry).unwrap();
    let long = ["--models", "long.toml", "--allow-no-permit", "--verify-memory", "1KiB", "--once"];
    for (hub, context) in [(None, "3 contexts of 4136"), (Some("http://[::1]:1"), "of 131072")] {
        let hub: Vec<&str> = hub.map(|url| ["--organics.url", url]).into_iter().flatten().collect();
        let (code, out, err) = home.validate(&node, &[&long[..], &hub].concat()).await;
        assert!(code == 1 && err.contains(context), "{context}: {out}\n{err}");
    }
    expect(1, &["--verify-memory must be a size"], &["--verify-memory", "much"]).await;
    expect(1, &["--listen", "cannot listen"], &["--listen", "192.0.2.1:1"]).await;
    let place = ["--allow-no-permit", "--database.url", "/proc/no/such.sqlite"];
    expect(1, &["/proc/no/such.sqlite", "see --database.url"], &place).await;
    node.subnet(|s| s.neurons[0] = Neuron::new([9; 32]));
    expect(1, &["is not registered on subnet 4", "btcli"], &[]).await;
    node.refuse(true);
    node.drop_connections();
    expect(2, &["no endpoint of the chain answers"], &[]).await;
}
