//! Every command of this program that README and guides show is run: on a tiny model, a chain of
//! the test, and servers that the commands themselves start.

use crate::common;
use crate::node::{FakeNode, Neuron, Subnet};
use crate::shell::{commands, documents, shell_lines};
use candle_core::quantized::GgmlDType;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use targon_engine::chain::keys::Hotkey;

const TAO: u64 = 1_000_000_000;
const UID: usize = 7;
/// No command takes as long.
const LONGEST: Duration = Duration::from_secs(120);

/// What documents name, and what stands for it here: names, and sizes that would take long.
const INSTEAD: [(&str, &str); 17] = [
    ("8091", "0"),
    ("5555", "0"),
    ("127.0.0.1:9100", "127.0.0.1:0"),
    ("https://hub.example.org", "http://127.0.0.1:1"),
    ("https://stats.example.org", "http://127.0.0.1:1"),
    ("1,4,16", "1,2"),
    ("128,1024", "16,32"),
    ("1,8,64", "1,8"),
    ("1,2,4,8", "20,40"),
    ("1,8,32", "1,2"),
    ("200", "4"),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "org/tiny"),
    ("./config.json", "m/config.json"),
    ("epyc/report.json", "report/report.json"),
    ("h200/report.json", "report/report.json"),
    ("here/report.json", "report/report.json"),
    ("there/report.json", "report/report.json"),
];

/// What keeps a command short, where it does not say so itself.
const SHORT: [(&str, &[&str]); 7] = [
    ("bench engine", &["--tokens", "32", "--runs", "2", "--batch", "1", "--depth", "16"]),
    ("bench serve", &["--requests", "4", "--output-tokens", "8"]),
    ("bench plan", &["--context", "64", "--prompt", "32", "--answer", "8"]),
    ("audit", &["--tokens", "8", "--answers", "2"]),
    ("query", &["--max-tokens", "8"]),
    ("validate", &["--once", "--private-axons", "--tokens-min", "24", "--tokens-max", "40"]),
    ("doctor", &["--max-tokens", "24"]),
];

/// Commands that are run elsewhere, by a word of theirs, and where.
const ELSEWHERE: [(&str, &str); 1] = [("--update.url", "tests/program/update.rs")];

fn program(home: &Path, arguments: &[String]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_targon-engine"));
    command.current_dir(home).env_clear().env("HOME", home).args(arguments);
    command.env("TARGON_THREADS", "2").env("HF_HUB_OFFLINE", "1");
    command.env("HF_ENDPOINT", "http://127.0.0.1:1").env("TARGON_CHECK_IP", "http://127.0.0.1:1");
    command
}

fn texts<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).to_vec()
}

/// The directory that the documents speak of: models, a model of the Hub, prices.
fn write_home(home: &Path) {
    let mut config = common::tiny_config();
    config["max_position_embeddings"] = 2048.into();
    common::write_checkpoint(&home.join("m"), &config, 3);
    let gguf = common::gguf::of_checkpoint(&home.join("m"), &config, GgmlDType::BF16);
    gguf.write(&home.join("model.gguf"));
    let entry = |name| {
        format!(
            "[[model]]\nname = \"{name}\"\npath = \"m\"\nsequences_max = 4\n\
                                kv_memory = \"8 MiB\"\n"
        )
    };
    std::fs::write(home.join("models.toml"), entry("M") + &entry("mine")).unwrap();
    let price = "[[price]]\ndevice = \"h200\"\nper_hour = 3.5\ndate = \"2026-11-01\"\n\
                 [[price]]\ndevice = \"report\"\nper_hour = 1.5\ndate = \"2026-11-01\"\n";
    std::fs::write(home.join("prices.toml"), price).unwrap();
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let model = home.join(".cache/huggingface/hub/models--org--tiny");
    let snapshot = model.join("snapshots").join(commit);
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(model.join("refs")).unwrap();
    std::fs::write(model.join("refs/main"), commit).unwrap();
    for file in std::fs::read_dir(home.join("m")).unwrap().map(|entry| entry.unwrap().path()) {
        std::fs::copy(&file, snapshot.join(file.file_name().unwrap())).unwrap();
    }
}

fn hotkey(home: &Path, name: &str, hotkey: &str) -> Hotkey {
    let words = ["wallet", "new-hotkey", "--wallet.name", name, "--wallet.hotkey", hotkey];
    let Output { stdout, stderr, .. } = program(home, &texts(words)).output().unwrap();
    let text = String::from_utf8(stdout).unwrap();
    let key = text
        .split_whitespace()
        .nth(1)
        .unwrap_or_else(|| panic!("{}", String::from_utf8_lossy(&stderr)));
    key.parse().unwrap()
}

/// A server, until dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Server {
    /// Started, with the first words of its first `count` lines.
    fn start(mut command: Command, count: usize) -> (Self, Vec<String>) {
        let child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut server = Self(child);
        let mut reader = BufReader::new(server.0.stdout.as_mut().unwrap());
        let line = |_| {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            line.split_whitespace().next().unwrap_or_default().to_owned()
        };
        let lines = (0..count).map(line).collect();
        (server, lines)
    }

    /// Ends it by a signal; whether it ended well.
    fn ends(mut self) -> bool {
        let id = self.0.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
        self.0.wait().unwrap().success()
    }
}

/// The commands that the documents show, each once, without the program's name.
fn shown() -> Vec<Vec<String>> {
    let (mut seen, mut all) = (BTreeSet::new(), Vec::new());
    for path in documents() {
        let text = std::fs::read_to_string(path).unwrap();
        for command in shell_lines(&text).iter().flat_map(|line| commands(line)) {
            if seen.insert(command.clone()) {
                all.push(command[1..].to_vec());
            }
        }
    }
    // Reports are compared and answers verified once there are some.
    let is_late = |c: &Vec<String>| c.iter().any(|word| word == "compare") || c[0] == "verify";
    let is_later = |c: &Vec<String>| c[0] == "explain" || c[0] == "export";
    all.sort_by_key(|command| u8::from(is_late(command)) + 2 * u8::from(is_later(command)));
    all
}

/// A shown command as it is run here.
fn adapted(command: &[String], [open, axon, miner]: &[String; 3]) -> Vec<String> {
    let instead = |word: &String| match word.as_str() {
        "https://llm.example" | "http://127.0.0.1:8000" => open.clone(),
        "127.0.0.1:8000" => open.trim_start_matches("http://").to_owned(),
        "203.0.113.7:8091" => axon.clone(),
        "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY" => miner.clone(),
        word => {
            let found = INSTEAD.iter().find(|(shown, _)| *shown == word);
            found.map_or(word, |(_, here)| here).to_owned()
        }
    };
    let mut words: Vec<String> = command.iter().map(instead).collect();
    let name = words[..words.len().min(2)].join(" ");
    let is_it = |of: &str| name == of || words[0] == of;
    let Some((_, more)) = SHORT.iter().find(|(of, _)| is_it(of)) else { return words };
    let visits = words.iter().any(|word| word == "--as-validator");
    if words[0] == "doctor" && !visits {
        return words;
    }
    let mut at = 0;
    while at < more.len() {
        let values = more[at + 1..].iter().take_while(|word| !word.starts_with("--")).count();
        if !words.iter().any(|word| word == more[at]) {
            words.extend(more[at..=at + values].iter().map(|word| (*word).to_owned()));
        }
        at += 1 + values;
    }
    words
}

/// Runs a command to its end, or a server until it listens; what was wrong with it.
fn fault(home: &Path, words: &[String], chain: &str) -> Option<String> {
    let mut command = program(home, words);
    command.env("BT_SUBTENSOR_CHAIN_ENDPOINT", chain);
    let has = |word: &str| words.iter().any(|w| w == word);
    if matches!(words[0].as_str(), "serve" | "verifier") && !has("--dry-run") {
        command.env("TARGON_PORT", "0").env("BT_AXON_IP", "127.0.0.2");
        let (server, lines) = Server::start(command, 1 + usize::from(has("--wallet.name")));
        let is_listening = lines[0].starts_with("http://");
        return (!is_listening || !server.ends()).then(|| format!("it does not serve: {lines:?}"));
    }
    command.env("BT_AXON_IP", "127.0.0.2");
    let (code, all) = output(home, command);
    let is_well = match code {
        Some(0) => true,
        // What is found wrong with this machine is no fault of the command.
        Some(1) => {
            let doubts = ["is not fit", "is to be doubted"];
            words[0] == "doctor" && all.contains("fault")
                || has("--strict") && doubts.iter().any(|what| all.contains(what))
        }
        // A tiny model's few tokens settle nothing.
        Some(4) => words[0] == "audit",
        _ => false,
    };
    (!is_well).then(|| format!("{code:?}: {all}"))
}

/// The exit code, none where it was ended because it took too long, and what was printed.
fn output(home: &Path, mut command: Command) -> (Option<i32>, String) {
    let files = ["out", "err"].map(|name| home.join(name));
    let [out, err] = files.each_ref().map(|path| std::fs::File::create(path).unwrap());
    let mut running = Server(command.stdout(out).stderr(err).spawn().unwrap());
    let started = Instant::now();
    let code = loop {
        match running.0.try_wait().unwrap() {
            Some(status) => break status.code(),
            None if started.elapsed() > LONGEST => break None,
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    (code, files.map(|path| std::fs::read_to_string(path).unwrap()).concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_that_the_documents_show_runs() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    write_home(home);
    let miner = hotkey(home, "default", "default");
    let others = [hotkey(home, "default", "validator"), hotkey(home, "miner", "h1")];
    let keys = others.iter().map(|key| key.0).chain((2..UID as u8).map(|i| [i; 32]));
    let validator = others[0].0;
    let member =
        |key| Neuron { stake_rao: 20_000 * TAO, permit: key == validator, ..Neuron::new(key) };
    let neurons = keys.chain([miner.0]).map(member).collect();
    let node = FakeNode::start(Subnet::new(4, neurons)).await;
    node.auto_blocks(Duration::from_millis(200));
    let url = node.url();
    let mut serve = program(home, &texts(["serve", "--port", "0", "--wallet.name", "default"]));
    serve.args(["--axon.ip", "127.0.0.2", "--axon.port", "0", "--netuid", "4"]);
    serve.args(["--logprobs-mode", "scaled", "--subtensor.chain_endpoint", &url]);
    let (_miner, lines) = Server::start(serve, 2);
    let (open, axon) = (lines[0].clone(), lines[1].trim_start_matches("http://").to_owned());
    for _ in 0..600 {
        if node.subnet(|s| s.neurons[UID].axon.is_some()) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let announced = node.subnet(|s| s.neurons[UID].axon);
    let places = [open.clone(), axon, miner.to_string()];
    let (mut faults, mut count) = (Vec::new(), 0);
    for command in shown() {
        if ELSEWHERE.iter().any(|(word, _)| command.iter().any(|w| w == word)) {
            continue;
        }
        let mut words = adapted(&command, &places);
        if words[0] == "status" {
            words.extend(["--url".to_owned(), open.clone()]);
        }
        count += 1;
        let started = Instant::now();
        // Another `serve` of the same hotkey may have announced itself, and is gone.
        node.subnet(|s| s.neurons[UID].axon = announced);
        let found = tokio::task::block_in_place(|| fault(home, &words, &url));
        println!("{:6.1} s  {}", started.elapsed().as_secs_f64(), words.join(" "));
        faults.extend(found.map(|what| format!("{}\n{what}", words.join(" "))));
    }
    assert!(faults.is_empty(), "{}", faults.join("\n\n"));
    assert!(count >= 40, "only {count} commands were found");
}
