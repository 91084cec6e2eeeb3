//! Bad weight files next to good ones: at start, by hot reload, and under a model that serves.

use super::cli::{Server, write_models};
use crate::common;
use crate::common::gguf::{GgufFile, Meta, tiny};
use serde_json::json;
use std::fs::OpenOptions;
use std::path::Path;

/// Writes a file that claims `tensors` tensors.
fn write_with_count(file: &GgufFile, tensors: u64, path: &Path) {
    let mut bytes = file.bytes();
    bytes[8..16].copy_from_slice(&tensors.to_le_bytes());
    std::fs::write(path, bytes).unwrap();
}

fn entries(names: &[&str]) -> String {
    names.iter().map(|n| format!("[[model]]\nname = \"{n}\"\npath = \"{n}.gguf\"\n")).collect()
}

fn ask(server: &Server, model: &str) -> (u16, String) {
    let body = format!("{{\"model\": \"{model}\", \"prompt\": \"hi\", \"max_tokens\": 3}}");
    server.post("/v1/completions", &body)
}

#[test]
fn a_gguf_file_that_lies_fails_alone_at_start_and_by_hot_reload() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(format!("{name}.gguf"));
    let good = tiny(1, true);
    good.write(&path("good"));
    write_with_count(&good, 1 << 60, &path("tensors"));
    let models = write_models(dir.path(), &entries(&["tensors", "good"]));
    let server = Server::start(&models);
    server.wait_until("/ready?model=good", 200);
    let (status, text) = server.get("/ready?model=tensors");
    assert!(status == 503 && text.contains("not a whole GGUF file"), "{text}");
    // A text of 2^62 bytes and a pointer of Git LFS come while it serves.
    let mut text = good.clone();
    let len = Meta::Raw(8, (1_u64 << 62).to_le_bytes().to_vec());
    text.set("general.name", len);
    text.write(&path("text"));
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 98362432\n";
    std::fs::write(path("pointer"), pointer).unwrap();
    write_models(dir.path(), &entries(&["tensors", "good", "text", "pointer"]));
    server.hang_up();
    for (name, want) in [("text", "not a whole GGUF file"), ("pointer", "is a Git LFS pointer")] {
        server.wait_until(&format!("/ready?model={name}"), 503);
        let mut answer = server.get(&format!("/ready?model={name}")).1;
        for _ in 0..100 {
            if answer.contains(want) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
            answer = server.get(&format!("/ready?model={name}")).1;
        }
        assert!(answer.contains(want), "{answer}");
        assert_eq!(ask(&server, name).0, 503);
    }
    let (status, text) = ask(&server, "good");
    assert!(status == 200 && text.contains("\"completion_tokens\":3"), "{text}");
    assert_eq!(server.terminate().0, 0);
}

#[test]
fn cutting_the_file_of_a_model_that_serves_fails_its_requests_alone() {
    let dir = tempfile::tempdir().unwrap();
    tiny(1, true).write(&dir.path().join("good.gguf"));
    tiny(2, false).write(&dir.path().join("cut.gguf"));
    let mut config = common::tiny_config();
    config["tie_word_embeddings"] = json!(false);
    common::write_checkpoint(&dir.path().join("dir.gguf"), &config, 5);
    let models = write_models(dir.path(), &entries(&["cut", "dir", "good"]));
    let server = Server::start(&models);
    for name in ["cut", "dir", "good"] {
        server.wait_until(&format!("/ready?model={name}"), 200);
        assert_eq!(ask(&server, name).0, 200);
    }
    for file in ["cut.gguf", "dir.gguf/model.safetensors"] {
        let file = OpenOptions::new().write(true).open(dir.path().join(file)).unwrap();
        file.set_len(64).unwrap();
    }
    for name in ["cut", "dir"] {
        let (status, text) = ask(&server, name);
        assert!(status == 500 && text.contains("weights cannot be read"), "{text}");
    }
    assert_eq!(ask(&server, "good").0, 200);
    assert_eq!(server.terminate().0, 0);
}
