//! `verifier` as a service manager runs it: it comes up whatever its caches hold, says why where it
//! does not, and ends by SIGTERM.

use crate::common;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What a start or a stop may take.
const BUDGET: Duration = Duration::from_secs(30);

struct Place(tempfile::TempDir);

impl Place {
    fn new(models: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut entries = String::new();
        for (seed, name) in (1..).zip(models) {
            common::write_checkpoint(&dir.path().join(name), &common::tiny_config(), seed);
            entries.push_str(&format!("[[model]]\nname = \"{name}\"\npath = \"{name}\"\n"));
        }
        std::fs::write(dir.path().join("models.toml"), entries).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn start(&self, command: &str) -> Program {
        let mut child = Command::new(env!("CARGO_BIN_EXE_targon-engine"))
            .arg(command)
            .args(["--port", "0", "--models"])
            .arg(self.path("models.toml"))
            .env("TARGON_THREADS", "2")
            .env("TARGON_CACHE", self.path("cache"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("http://").unwrap().to_owned();
        Program { child, address }
    }
}

/// A running program; killed when dropped.
struct Program {
    child: Child,
    address: String,
}

impl Program {
    fn get(&self, path: &str) -> u16 {
        let Ok(mut socket) = TcpStream::connect(&self.address) else { return 0 };
        socket.set_read_timeout(Some(BUDGET)).unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        socket.read_to_string(&mut text).unwrap();
        text.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    fn wait_until_ready(&self) {
        let started = Instant::now();
        while self.get("/ready") != 200 {
            assert!(started.elapsed() < BUDGET, "it is never ready");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn wait(&mut self) -> (i32, String) {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                let mut log = String::new();
                self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
                return (status.code().unwrap(), log);
            }
            assert!(started.elapsed() < BUDGET, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn terminate(mut self) -> (i32, String) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        self.wait()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push(path),
        }
    }
    found.sort();
    found
}

#[test]
fn damaged_caches_do_not_keep_it_from_serving_and_sigterm_ends_it() {
    let place = Place::new(&["one", "two"]);
    let stop = |program: Program| {
        program.wait_until_ready();
        assert_eq!(program.get("/"), 200);
        let (code, log) = program.terminate();
        assert!(code == 0 && log.contains("stopped"), "{code}: {log}");
        log
    };
    stop(place.start("verifier"));
    let cache = files(&place.path("cache"));
    let whole: Vec<Vec<u8>> = cache.iter().map(|path| std::fs::read(path).unwrap()).collect();
    assert_eq!(cache.len(), 3, "{cache:?}");
    for command in ["verifier", "serve"] {
        for (path, bytes) in cache.iter().zip(&whole) {
            std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
        }
        let log = stop(place.start(command));
        for want in ["computed values is not used", "cached calibration is not used"] {
            assert!(log.contains(want), "{command}: {want}: {log}");
        }
        assert_eq!(files(&place.path("cache")), cache);
        for (path, bytes) in cache.iter().zip(&whole) {
            assert!(std::fs::read(path).unwrap() == *bytes, "{}", path.display());
        }
    }
}

#[test]
fn a_model_that_cannot_be_had_ends_it_with_its_name() {
    let place = Place::new(&["one"]);
    let program = place.start("verifier");
    program.wait_until_ready();
    drop(program);
    let cached = files(&place.path("cache/calibration")).remove(0);
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(cached).unwrap()).unwrap();
    json["shift"] = 20.into();
    let forged = place.path("one/targon-calibration.json");
    std::fs::write(&forged, json.to_string()).unwrap();
    let (code, log) = place.start("verifier").wait();
    assert_eq!(code, 1, "{log}");
    for want in ["one cannot be served", &forged.display().to_string(), "remove the file"] {
        assert!(log.contains(want), "{want}: {log}");
    }
    std::fs::remove_file(forged).unwrap();
    std::fs::write(place.path("one/model.safetensors"), b"short").unwrap();
    let (code, log) = place.start("verifier").wait();
    assert!(code == 1 && log.contains("one cannot be served"), "{code}: {log}");
}

#[test]
fn it_follows_the_log_of_the_file_and_says_what_else_of_it_has_no_effect() {
    let place = Place::new(&["one"]);
    let models = std::fs::read_to_string(place.path("models.toml")).unwrap();
    let server = "[server]\nlog = \"warn\"\napi_keys = [\"0123456789abcdef\"]\n";
    std::fs::write(place.path("models.toml"), models + server).unwrap();
    let program = place.start("verifier");
    program.wait_until_ready();
    let (code, log) = program.terminate();
    assert_eq!(code, 0, "{log}");
    assert!(log.contains("[server] api_keys and cors_origins have no effect here"), "{log}");
    assert!(!log.contains("stopped") && !log.contains("0123456789abcdef"), "{log}");
}
