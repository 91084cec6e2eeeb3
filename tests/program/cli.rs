//! The program as a user runs it: exit codes, messages, serving next to a broken model, SIGTERM.

use crate::common;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_targon-engine"));
    command.env_remove("TARGON_MODELS").env("TARGON_THREADS", "2");
    command
}

fn run(arguments: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = program().args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

/// Whatever goes wrong with an address, no command shows more of it than scheme, host and port.
#[test]
fn keys_in_addresses_are_never_shown() {
    let home = tempfile::tempdir().unwrap();
    common::write_checkpoint(home.path(), &common::tiny_config(), 3);
    let entry = format!("[[model]]\nname = \"m\"\nsource = \"path\"\npath = {:?}\n", home.path());
    let models = write_models(home.path(), &entry);
    let secret = |scheme: &str| format!("{scheme}://me:s3cret@127.0.0.1:1/s3cret?key=s3cret");
    let [http, ftp, ws] = ["http", "ftp", "ws"].map(secret);
    let endpoint = "--subtensor.chain_endpoint";
    let validate = ["validate", "--models", &models, "--wallet.path", "/nowhere"];
    let mut faults = Vec::new();
    for arguments in [
        &["status", "--url", &http][..],
        &["query", "--address", &http, "--model", "m", "--proof", "none", "hello"],
        &["audit", "--url", &ftp, "--model", "m", "--models", &models],
        &["bench", "serve", "--url", &http, "--model", "m", "--requests", "1"],
        &["bench", "serve", "--url", &ftp, "--model", "m", "--requests", "1"],
        &["doctor", endpoint, &ws],
        &["doctor", endpoint, &http],
        &["fetch", "a/b"],
        &["serve", "--models", &models, "--model-endpoint", &http],
        &[&validate[..], &["--organics.url", &ftp]].concat(),
        &[&validate[..], &["--stats.url", &ftp]].concat(),
    ] {
        let mut command = program();
        command.args(arguments).env("HF_ENDPOINT", &http).env("HOME", home.path());
        let Output { stdout, stderr, .. } = command.output().unwrap();
        let said = String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned();
        if said.contains("s3cret") || !said.contains("127.0.0.1:1") {
            faults.push(format!("{arguments:?}: {said}"));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// A models.toml in `dir` with the given entries.
pub(super) fn write_models(dir: &Path, entries: &str) -> String {
    let path = dir.join("models.toml");
    std::fs::write(&path, entries).unwrap();
    path.display().to_string()
}

/// A running server; killed when dropped.
pub(super) struct Server {
    child: Child,
    address: String,
}

impl Server {
    pub(super) fn start(models: &str) -> Self {
        let mut child = program()
            .args(["serve", "--models", models, "--port", "0"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("http://").unwrap().to_owned();
        Self { child, address }
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(super) fn get(&self, path: &str) -> (u16, String) {
        self.send(&format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"))
    }

    pub(super) fn post(&self, path: &str, body: &str) -> (u16, String) {
        self.send(&format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        ))
    }

    fn send(&self, request: &str) -> (u16, String) {
        let mut socket = TcpStream::connect(&self.address).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        socket.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        socket.read_to_string(&mut text).unwrap();
        let status = text.split(' ').nth(1).unwrap().parse().unwrap();
        (status, text)
    }

    pub(super) fn wait_until(&self, path: &str, status: u16) {
        for _ in 0..600 {
            if self.get(path).0 == status {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("{path} never answered {status}");
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }

    pub(super) fn hang_up(&self) {
        self.signal("-HUP");
    }

    pub(super) fn terminate(mut self) -> (i32, String) {
        self.signal("-TERM");
        let mut log = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        (self.child.wait().unwrap().code().unwrap(), log)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_broken_model_does_not_stop_the_others_and_sigterm_ends_cleanly() {
    let dir = tempfile::tempdir().unwrap();
    common::write_checkpoint(&dir.path().join("good"), &common::tiny_config(), 1);
    common::write_checkpoint(&dir.path().join("second"), &common::tiny_config(), 2);
    common::write_checkpoint(&dir.path().join("bad"), &common::tiny_config(), 3);
    std::fs::write(dir.path().join("bad/model.safetensors"), b"short").unwrap();
    let models = write_models(
        dir.path(),
        "[[model]]\nname = \"good\"\npath = \"good\"\n\
         [[model]]\nname = \"second\"\npath = \"second\"\n\
         [[model]]\nname = \"bad\"\npath = \"bad\"\n\
         [[model]]\nname = \"absent\"\npath = \"nowhere\"\n",
    );
    let server = Server::start(&models);
    server.wait_until("/ready?model=good", 200);
    server.wait_until("/ready?model=second", 200);
    let (status, text) = server.get("/ready?model=bad");
    assert!(status == 503 && text.contains("not a whole safetensors file"), "{text}");
    let (status, text) = server.get("/ready?model=absent");
    assert!(status == 503 && text.contains("cannot read"), "{text}");
    for model in ["good", "second"] {
        let body = serde_json::json!({
            "model": model, "prompt": "hi", "max_tokens": 3, "ignore_eos": true,
        });
        let (status, text) = server.post("/v1/completions", &body.to_string());
        assert!(status == 200 && text.contains("\"completion_tokens\":3"), "{text}");
    }
    let (status, _) = server.post("/v1/completions", "{\"model\": \"bad\", \"prompt\": \"hi\"}");
    assert_eq!(status, 503);
    let (code, log) = server.terminate();
    assert_eq!(code, 0, "{log}");
    assert!(log.contains("stopped"), "{log}");
}

#[test]
fn a_server_whose_models_the_hub_cannot_give_for_now_may_be_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let models = write_models(dir.path(), "[[model]]\nname = \"a\"\nrepo = \"o/m\"\n");
    let mut command = program();
    command.args(["serve", "--models", &models, "--port", "0"]).env("HOME", dir.path());
    let output = command.env("HF_ENDPOINT", "http://127.0.0.1:1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("a cannot be served: cannot reach http://127.0.0.1:1/"), "{said}");
    assert_eq!(output.status.code(), Some(2), "{said}");
}

#[test]
fn mistakes_exit_with_one_and_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let typo = write_models(dir.path(), "[[model]]\nname = \"a\"\ncontxt_max = 1\n");
    let (code, out, err) = run(&["serve", "--models", &typo]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.contains("line 3: unknown field `contxt_max`"), "{err}");
    assert!(err.contains("hint: did you mean `context_max`?"), "{err}");
    let (code, _, err) = run(&["serve", "--models", "/nowhere/models.toml"]);
    assert!(code == 1 && err.contains("/nowhere/models.toml: cannot be read"), "{err}");
    let absent = write_models(dir.path(), "[[model]]\nname = \"a\"\npath = \"absent\"\n");
    let (code, _, err) = run(&["serve", "--models", &absent, "--port", "0"]);
    assert!(code == 1 && err.contains("error: a cannot be served: cannot read"), "{err}");
    assert!(!err.contains("no effect"), "{err}");
    let (code, _, err) = run(&["serve", "--models", &absent, "--api-key", "short"]);
    let short = "error: --api-key: keys must have at least 16 characters each, one has 5";
    assert!(code == 1 && err.contains(short), "{err}");
    // What means nothing here is said once.
    let serve = ["serve", "--models", &absent, "--port", "0"];
    let unused = ["--dry-run", "--axon.port", "8092", "--update.url", "https://example.org"];
    let (_, _, err) = run(&[serve, unused].concat());
    let members = "these flags have no effect: --axon.port, --dry-run\n";
    assert!(err.contains(members) && err.matches("this is no miner").count() == 1, "{err}");
    assert!(err.contains("--update.key have no effect without --autoupdate"), "{err}");
    let (code, _, err) = run(&["serve", "--isa", "mmx"]);
    assert!(
        code == 1
            && err.contains("unknown instruction set `mmx`; known: amx, avx512-bf16, avx512, "),
        "{err}"
    );
    let foreign = if cfg!(target_arch = "x86_64") { "neon" } else { "avx2" };
    let (code, _, err) = run(&["serve", "--isa", foreign]);
    let said = format!("this CPU has no {foreign}; it has ");
    assert!(code == 1 && err.contains(&said) && err.contains("scalar"), "{err}");
    if !targon_engine::ops::lanes::Isa::best().has_tiles() {
        let (code, _, err) = run(&["serve", "--isa", "amx"]);
        assert!(
            code == 1 && err.contains("amx cannot be used: ") && err.contains("scalar"),
            "{err}"
        );
    }
    let (code, _, err) = run(&["srve"]);
    assert!(code == 1 && err.contains("serve"), "{err}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    common::write_checkpoint(&dir.path().join("m"), &common::tiny_config(), 1);
    let good = write_models(dir.path(), "[[model]]\nname = \"m\"\npath = \"m\"\n");
    let (code, _, err) = run(&["serve", "--models", &good, "--port", &port]);
    assert!(code == 1 && err.contains("cannot listen on 127.0.0.1:"), "{err}");
}

#[test]
fn a_level_of_the_log_that_is_none_is_refused_wherever_it_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let entry = "[[model]]\nname = \"m\"\npath = \"m\"\n";
    let models = write_models(dir.path(), entry);
    let check = ["config", "check", "--models", &models];
    for level in ["inof", "9", "engine", "engine=foo"] {
        let by_flag = run(&[&check[..], &["--log", level]].concat());
        let by_variable = program().args(check).env("TARGON_LOG", level).output().unwrap();
        let said = String::from_utf8(by_variable.stderr).unwrap();
        for (code, err) in [(by_flag.0, by_flag.2), (by_variable.status.code().unwrap(), said)] {
            assert!(code == 1 && err.contains("'--log <LOG>': must be error, warn,"), "{err}");
            assert!(err.contains(&format!("got `{level}`")), "{err}");
        }
    }
    assert_eq!(run(&[&check[..], &["--log", "warn,engine=debug"]].concat()).0, 0);
    let models = write_models(dir.path(), &format!("{entry}[server]\nlog = \"engine=foo\"\n"));
    for command in [&["config", "check"][..], &["serve", "--port", "0"]] {
        let (code, _, err) = run(&[command, &["--models", &models]].concat());
        let want = format!("error: {models}: [server] `log` must be error, warn,");
        assert!(code == 1 && err.contains(&want), "{err}");
    }
}

#[test]
fn a_plan_is_a_table_and_what_cannot_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    common::write_checkpoint(&dir.path().join("m"), &common::tiny_config(), 1);
    let models = write_models(dir.path(), "[[model]]\nname = \"m\"\npath = \"m\"\n");
    let (code, out, _) = run(&["plan", "--models", &models]);
    assert!(code == 0 && out.contains("64 x 512") && out.contains("available memory"), "{out}");
    let entry = "[[model]]\nname = \"m\"\npath = \"m\"\nkv_memory = \"1 KiB\"\n";
    let models = write_models(dir.path(), entry);
    let (code, out, err) = run(&["plan", "--models", &models]);
    assert!(code == 1 && out.contains("cannot be served"), "{out}");
    assert!(err.contains("lower `context_max` or raise `kv_memory`"), "{err}");
}

#[test]
fn models_and_keys_follow_the_file_while_serving() {
    let dir = tempfile::tempdir().unwrap();
    for (seed, name) in ["one", "two"].into_iter().enumerate() {
        common::write_checkpoint(&dir.path().join(name), &common::tiny_config(), seed as u32);
    }
    let entry = |name: &str| format!("[[model]]\nname = \"{name}\"\npath = \"{name}\"\n");
    let models = write_models(dir.path(), &entry("one"));
    let server = Server::start(&models);
    server.wait_until("/ready", 200);
    let ask = |model: &str| {
        let body = format!("{{\"model\": \"{model}\", \"prompt\": \"hi\", \"max_tokens\": 2}}");
        server.post("/v1/completions", &body).0
    };
    assert_eq!((ask("one"), ask("two")), (200, 404));
    // A mistake changes nothing, wherever it is.
    let no_filter = format!("{}[server]\nlog = \"inof\"\n", entry("two"));
    for mistake in ["[[model]]\nnam = 1\n", &no_filter] {
        write_models(dir.path(), mistake);
        server.hang_up();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!((ask("one"), ask("two")), (200, 404));
    }
    write_models(dir.path(), &entry("two"));
    server.hang_up();
    server.wait_until("/ready?model=two", 200);
    server.wait_until("/ready?model=one", 404);
    assert_eq!((ask("one"), ask("two")), (404, 200));
    let keys = format!("{}[server]\napi_keys = [\"0123456789abcdef\"]\n", entry("two"));
    write_models(dir.path(), &keys);
    server.hang_up();
    server.wait_until("/v1/models", 401);
    assert_eq!(ask("two"), 401);
    let (code, log) = server.terminate();
    assert_eq!(code, 0, "{log}");
    assert!(log.contains("nothing is reloaded") && log.contains("unknown field `nam`"), "{log}");
    let refused = format!("nothing is reloaded: {models}: [server] `log` must be error,");
    assert!(log.contains(&refused), "{log}");
    assert!(!log.contains("0123456789abcdef"), "{log}");
}

#[test]
fn a_rejection_outweighs_what_could_not_be_scored_in_any_order() {
    let dir = tempfile::tempdir().unwrap();
    common::write_checkpoint(&dir.path().join("m"), &common::tiny_config(), 1);
    let models = write_models(dir.path(), "[[model]]\nname = \"m\"\npath = \"m\"\n");
    let request = r#"{"model": "m", "prompt": "x", "max_tokens": 2}"#;
    // Without a proof that was asked for, the profile `proof` has nothing to score.
    let choice =
        r#"{"index": 0, "token_ids": [104, 104], "text": "hh", "finish_reason": "length"}"#;
    let unscored = format!("{{\"request\": {request}, \"response\": {{\"choices\": [{choice}]}}}}");
    let rejected = format!("{{\"request\": {request}, \"response\": {{\"choices\": []}}}}");
    let file = dir.path().join("answers.jsonl");
    let check = |lines: &[&String]| {
        let lines: Vec<&str> = lines.iter().map(|l| l.as_str()).collect();
        std::fs::write(&file, lines.join("\n")).unwrap();
        let file = file.display().to_string();
        run(&["verify", &file, "--models", &models, "--profile", "proof"])
    };
    // A file without a line is no proof that all answers pass.
    for empty in ["", "\n  \n"] {
        let (code, out, err) = check(&[&empty.to_owned()]);
        assert!(code == 1 && out.is_empty(), "{code} {out}{err}");
        assert!(err.contains("answers.jsonl holds no captured answer"), "{err}");
    }
    let (code, out, err) = check(&[&unscored]);
    assert!(code == 4 && out.contains("unscored: the request asked for no proof"), "{out}{err}");
    let (code, out, _) = check(&[&rejected]);
    assert!(code == 3 && out.contains("reject: BAD_STREAM"), "{out}");
    assert_eq!(check(&[&unscored, &rejected]).0, 3);
    assert_eq!(check(&[&rejected, &unscored]).0, 3);
    // A line that is none is refused, and so is one of a request that is none; the next is checked.
    let nested =
        format!("{{\"request\": {request}, \"chunks\": [{}{}]}}", "[".repeat(126), "]".repeat(126));
    for bad in ["{", "\u{1b}[2J", &nested] {
        let (code, out, err) = check(&[&bad.to_owned(), &unscored]);
        assert_eq!(code, 3, "{out}{err}");
        assert!(
            out.contains("answers.jsonl:1: reject: BAD_STREAM: this is not a captured"),
            "{out}"
        );
        assert!(out.contains("answers.jsonl:2 choice 0: unscored"), "{out}");
    }
    let no_request = r#"{"request": {"max_tokens": "x", "prompt": "x"}, "chunks": []}"#.to_owned();
    let (code, out, _) = check(&[&no_request, &rejected]);
    assert!(code == 3 && out.contains("answers.jsonl:1: unscored: "), "{out}");
    assert!(out.contains("answers.jsonl:2 choice 0: reject"), "{out}");
    // What a peer says neither steers the terminal nor looks like a verdict of ours.
    let words = r#""\u001b[2J\u009b31m\u202e\nanswers.jsonl:9 choice 0: pass""#;
    let steers = format!(
        "{{\"request\": {request}, \"chunks\": [{{\"error\": {{\"message\": {words}}}}}]}}"
    );
    let (code, out, _) = check(&[&steers]);
    assert!(code == 3 && out.contains(r"\u001b[2J\u009b31m\u202e\nanswers"), "{out}");
    assert!(out.chars().all(|c| c == '\n' || (!c.is_control() && c != '\u{202e}')), "{out:?}");
    assert!(out.lines().all(|line| !line.starts_with("answers.jsonl:9")), "{out}");
}

#[test]
fn a_check_that_cannot_be_made_as_asked_is_refused_and_an_unknown_model_is_unscored() {
    let dir = tempfile::tempdir().unwrap();
    common::write_checkpoint(&dir.path().join("m"), &common::tiny_config(), 1);
    let models = write_models(dir.path(), "[[model]]\nname = \"m\"\npath = \"m\"\n");
    let line = |model: &str| {
        let request = format!(r#"{{"model": "{model}", "prompt": "x", "max_tokens": 2}}"#);
        let choice =
            r#"{"index": 0, "token_ids": [104, 104], "text": "hh", "finish_reason": "length"}"#;
        format!("{{\"request\": {request}, \"response\": {{\"choices\": [{choice}]}}}}\n")
    };
    let file = dir.path().join("answers.jsonl");
    let name = file.display().to_string();
    let verify = |flags: &[&str]| run(&[&["verify", &name, "--models", &models], flags].concat());
    std::fs::write(&file, line("m").repeat(2)).unwrap();
    for (flags, want) in [
        (&["--html", "/no/such/p"][..], "--html /no/such/p cannot be written: "),
        (&["--profile", "targon-4.4", "--exact"], "--exact goes only with proofs"),
        (&["--profile", "targon-4.1", "--twin", "never"], "--twin goes only with proofs"),
        (&["--profile", "targon-4.4", "--name-cheats"], "--name-cheats goes only with proofs"),
    ] {
        let (code, out, err) = verify(flags);
        assert!(code == 1 && out.is_empty() && err.contains(want), "{flags:?}: {out}{err}");
    }
    // Whether a flag has an effect may depend on the answer.
    let (_, _, err) = verify(&["--exact"]);
    let want = "answers.jsonl:1: --exact says nothing of an answer without a proof";
    assert!(err.contains(want) && err.matches("says nothing").count() == 1, "{err}");
    // A model that is not here is no fault of the answer, and the next line is checked.
    std::fs::write(&file, line("zz") + &line("m")).unwrap();
    let (code, out, err) = verify(&["--profile", "proof"]);
    assert_eq!(code, 4, "{out}{err}");
    let unscored = format!("answers.jsonl:1: unscored: {models} has no model `zz`\n");
    assert!(out.contains(&unscored), "{out}");
    assert!(out.contains("answers.jsonl:2 choice 0: unscored: the request asked for no"), "{out}");
}
