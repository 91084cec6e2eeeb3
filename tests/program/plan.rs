//! `plan` beside a Hub: only a model's configuration is fetched.

use crate::common;
use axum::Router;
use axum::extract::{Path as Segments, State};
use axum::http::StatusCode;
use axum::routing::get;
use serde_json::{Value, json};
use sha1::{Digest, Sha1};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A Hub with one repository `o/m`, whose weights cannot be had; the files that were asked for.
async fn hub(config: Value) -> (String, Arc<Mutex<Vec<String>>>) {
    let config = config.to_string();
    let blob = Sha1::digest(format!("blob {}\0{config}", config.len()));
    let blob: String = blob.iter().map(|byte| format!("{byte:02x}")).collect();
    let weights = json!({"sha256": "0".repeat(64), "size": 1_u64 << 39});
    let listing = json!({"sha": COMMIT, "siblings": [
        {"rfilename": "config.json", "size": config.len(), "blobId": blob},
        {"rfilename": "tokenizer.json", "size": 9, "blobId": "1".repeat(40)},
        {"rfilename": "model.safetensors", "size": 1_u64 << 39, "lfs": weights},
        {"rfilename": "m.gguf", "size": 1_u64 << 39, "lfs": weights},
    ]});
    let asked = Arc::new(Mutex::new(Vec::new()));
    let file = move |State(asked): State<Arc<Mutex<Vec<String>>>>,
                     Segments(name): Segments<String>| async move {
        asked.lock().unwrap().push(name.clone());
        if name == "config.json" { Ok(config) } else { Err(StatusCode::NOT_FOUND) }
    };
    let app = Router::new()
        .route("/api/models/o/m/revision/main", get(|| async move { listing.to_string() }))
        .route(&format!("/o/m/resolve/{COMMIT}/{{name}}"), get(file))
        .with_state(Arc::clone(&asked));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, app).await });
    (endpoint, asked)
}

fn plan(home: &Path, endpoint: &str, entry: &str) -> (i32, String, String) {
    std::fs::write(home.join("models.toml"), format!("[[model]]\nname = \"m\"\n{entry}")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_targon-engine"));
    command.current_dir(home).env_clear().env("HOME", home).env("HF_ENDPOINT", endpoint);
    let Output { status, stdout, stderr } = command.arg("plan").output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_downloads_no_weights() {
    let home = tempfile::tempdir().unwrap();
    let (endpoint, asked) = hub(common::tiny_config()).await;
    let (code, out, err) = plan(home.path(), &endpoint, "repo = \"o/m\"\n");
    assert!(code == 0 && out.contains("64 x 512"), "{out}\n{err}");
    assert_eq!(*asked.lock().unwrap(), ["config.json"]);
    // The same numbers as those of the files.
    common::write_checkpoint(&home.path().join("m"), &common::tiny_config(), 1);
    let (_, local, _) = plan(home.path(), &endpoint, "path = \"m\"\n");
    let row = |table: &str| table.lines().find(|line| line.contains("64 x 512")).map(str::to_owned);
    assert_eq!(row(&out), row(&local));
    // The header of a GGUF file is in it.
    let gguf = "repo = \"o/m\"\nfile = \"m.gguf\"\n";
    let (code, _, err) = plan(home.path(), &endpoint, gguf);
    let hint = "targon-engine fetch o/m --revision main --file m.gguf";
    assert!(code == 1 && err.contains("not here yet") && err.contains(hint), "{err}");
    assert_eq!(asked.lock().unwrap().len(), 1);
}
