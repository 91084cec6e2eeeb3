//! Fuzz targets for whatever parses the bytes of strangers, in bolero's harness: as tests, each
//! runs on random inputs for a second.

use crate::common;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::LazyLock;
use targon_engine::chain::error::Refusal;
use targon_engine::chain::keys::Hotkey;
use targon_engine::chain::{epistula, keyfile};
use targon_engine::config::models_toml;
use targon_engine::models::Model;
use targon_engine::models::chat::ChatTemplate;
use targon_engine::models::gguf::{HEADER_BYTES_MAX, Header};
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::proof::commit::ResidueChunk;
use targon_engine::proof::toploc;
use targon_engine::server::gate::models::Asked;
use targon_engine::verify::answer::Answer;
use targon_engine::wire::openai::{ChatRequest, CompletionRequest};

#[test]
fn request_bodies() {
    bolero::check!().for_each(|bytes: &[u8]| {
        // Parsing either fails or gives something that can be printed.
        if let Ok(request) = serde_json::from_slice::<ChatRequest>(bytes) {
            assert!(!format!("{request:?}").is_empty());
        }
        if let Ok(request) = serde_json::from_slice::<CompletionRequest>(bytes) {
            assert!(!format!("{request:?}").is_empty());
        }
    });
}

#[test]
fn chat_templates() {
    bolero::check!().with_type::<(String, String)>().for_each(|(source, content)| {
        let tokens = (String::new(), String::new());
        if let Ok(template) = ChatTemplate::compile(Path::new("t"), source, tokens) {
            let variables = json!({"messages": [{"role": "user", "content": content}]});
            let text = template.render(variables.as_object().unwrap().clone());
            assert!(text.is_err() || text.unwrap().len() <= 32 << 20);
        }
    });
}

#[test]
fn proofs() {
    bolero::check!().with_type::<(Vec<u8>, u8)>().for_each(|(bytes, rows)| {
        if let Ok(chunk) = ResidueChunk::from_bytes(bytes, usize::from(*rows)) {
            assert_eq!(chunk.sketches.len(), usize::from(*rows));
        }
        if let Ok(proof) = toploc::Proof::from_bytes(bytes, toploc::TOP_K) {
            assert_eq!(proof.to_bytes(), *bytes);
        }
    });
}

#[test]
fn answers() {
    bolero::check!().for_each(|bytes: &[u8]| {
        let Ok(value) = serde_json::from_slice::<Value>(bytes) else { return };
        // Whatever it is, it is an answer with tokens or it is refused.
        for answer in [
            Answer::of_response(&value, 0),
            Answer::of_stream(std::slice::from_ref(&value), 0),
            Answer::of_response(&json!({"choices": [{"index": 0, "token_ids": value}]}), 0),
        ] {
            assert!(answer.is_err() || !answer.unwrap().ids.is_empty());
        }
    });
}

#[test]
fn model_files() {
    bolero::check!().with_type::<String>().for_each(|text| {
        if let Err(e) = models_toml::parse(Path::new("models.toml"), text, &[]) {
            assert!(e.to_string().starts_with("models.toml: "));
        }
    });
}

#[test]
fn signed_headers() {
    bolero::check!().with_type::<(String, String, String, Vec<u8>)>().for_each(
        |(time, name, signature, body)| {
            let (time, name) = (epistula::timestamp(time), epistula::uuid(name));
            let signature = epistula::signature(signature);
            if let (Some(timestamp_ms), Some(uuid)) = (time, name) {
                let envelope = epistula::Envelope { timestamp_ms, uuid, signed_for: None };
                let message = envelope.message(body);
                assert_eq!(message.iter().filter(|b| **b == b'.').count(), 3);
                // Nobody's key has signed this.
                let zeros = signature.unwrap_or([0; 64]);
                assert!(!envelope.verify(&Hotkey([3; 32]), body, &zeros));
            }
        },
    );
}

#[test]
fn lists_of_models() {
    bolero::check!().for_each(|bytes: &[u8]| {
        if let Ok(asked) = Asked::read(&Default::default(), bytes, 0) {
            assert!(asked.models.len() <= 256);
        }
    });
}

#[test]
fn key_files() {
    bolero::check!().for_each(|bytes: &[u8]| {
        let _ = keyfile::is_encrypted(bytes);
        if let Ok(key) = keyfile::public_key(bytes) {
            assert_eq!(key.to_string().parse(), Ok(key));
        }
        assert!(keyfile::keypair(bytes).is_err(), "no random bytes hold a matching key");
    });
}

#[test]
fn refusals_of_nodes() {
    bolero::check!().with_type::<String>().for_each(|text| {
        let refusal = Refusal::of_pool(text);
        assert!(!refusal.to_string().is_empty());
        let _ = (refusal.custom_code(), refusal.is_passing());
    });
}

#[test]
fn gguf_headers() {
    bolero::check!().for_each(|bytes: &[u8]| {
        let file = [b"GGUF\x03\0\0\0", bytes].concat();
        if let Ok(header) = Header::read(&file[..], file.len() as u64) {
            assert!(header.data <= HEADER_BYTES_MAX + header.alignment);
            assert!(header.tensors.iter().all(|t| !t.shape.contains(&0)));
        }
    });
}

/// A tiny GGUF file, where its tensors begin, a place for changed ones, and threads to load them.
static GGUF: LazyLock<(Vec<u8>, usize, tempfile::TempDir, Pool)> = LazyLock::new(|| {
    let bytes = common::gguf::tiny(1, true).bytes();
    let data = Header::read(&bytes[..], bytes.len() as u64).unwrap().data as usize;
    (bytes, data, tempfile::tempdir().unwrap(), Pool::new(2, Isa::best()).unwrap())
});

/// Changes `bytes` at `at` in one of four ways.
fn damage(bytes: &mut Vec<u8>, at: usize, way: u8, value: u8) {
    const NUMBERS: [u64; 10] =
        [0, 1, 2, 33, 1 << 16, 1 << 31, 1 << 32, 1 << 62, u64::MAX - 31, u64::MAX];
    let number = NUMBERS[usize::from(value) % NUMBERS.len()].to_le_bytes();
    let mut put = |new: &[u8]| {
        let end = (at + new.len()).min(bytes.len());
        bytes[at.min(end)..end].copy_from_slice(&new[..end - at.min(end)]);
    };
    match way % 16 {
        0..9 => put(&[value]),
        9..12 => put(&number[..4]),
        12..15 => put(&number),
        _ => bytes.truncate(at),
    }
}

#[test]
fn gguf_files() {
    bolero::check!().with_type::<Vec<(u16, u8, u8)>>().for_each(|changes| {
        let (good, data, dir, pool) = &*GGUF;
        let mut bytes = good.clone();
        for (at, way, value) in changes.iter().take(4) {
            damage(&mut bytes, usize::from(*at) % data, *way, *value);
        }
        let path = dir.path().join("m.gguf");
        std::fs::write(&path, bytes).unwrap();
        // Whatever it is, it is a model or it is refused with the file's name.
        match Model::load(&path, None, pool, |_, _| {}) {
            Ok(model) => assert_eq!(model.decoder.spec.hidden, 64),
            Err(e) => assert!(e.to_string().contains("m.gguf"), "{e}"),
        }
    });
}
