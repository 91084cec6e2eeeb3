//! Text as the references have it: outputs against the `tokenizers` crate, templates against
//! Jinja2.

use crate::common;
use crate::common::site::{COMPLETION, post, stream};
use axum::http::StatusCode;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::Path;
use targon_engine::clock::Clock;
use targon_engine::intake::translate::Defaults;
use targon_engine::models::Model;
use targon_engine::models::chat::ChatTemplate;
use targon_engine::models::tokenizer::{Detokenizer, TextTokenizer};
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::proof::codec::from_hex;
use targon_engine::server::registry::{ModelState, Registry, Served};
use targon_engine::server::router;
use targon_engine::server::state::ServerState;
use targon_engine::verify::Challenge;
use targon_engine::verify::answer::Answer;
use targon_engine::verify::{Claim, Profile, Verdict};
use tokenizers::Tokenizer;

/// Tokens after the 256 bytes; the last two are special and added.
const PIECES: [&str; 12] =
    ["▁", "▁▁", "▁the", "é", "日本", "a", "▁a▁b", "▁▁x", "\u{1f600}", "b▁", "<x▁y>", "</s>"];
/// An id that no token has.
const HOLE: u32 = 300;

/// A tokenizer of pieces with the given decoder.
fn pieces_json(decoder: Value) -> Value {
    let mut vocab = serde_json::Map::new();
    for byte in 0..256 {
        vocab.insert(format!("<0x{byte:02X}>"), byte.into());
    }
    for (i, token) in PIECES.iter().enumerate() {
        vocab.insert((*token).into(), (256 + i).into());
    }
    let added = |id: usize, special: bool| {
        json!({"id": 256 + id, "content": PIECES[id], "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": special})
    };
    json!({
        "version": "1.0", "added_tokens": [added(10, false), added(11, true)],
        "decoder": decoder,
        "model": {"type": "BPE", "byte_fallback": true, "vocab": vocab, "merges": []},
    })
}

/// The decoders that models of our families come with.
fn decoders() -> Vec<Value> {
    let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let (bytes, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
    let strip = |start: usize| json!({"type": "Strip", "content": " ", "start": start, "stop": 0});
    let sequence = |list: Vec<&Value>| json!({"type": "Sequence", "decoders": list});
    let metaspace = |scheme: &str| {
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme,
            "split": true})
    };
    vec![
        sequence(vec![&replace, &bytes, &fuse]),
        sequence(vec![&replace, &bytes, &fuse, &strip(1)]),
        sequence(vec![&replace, &bytes, &fuse, &strip(2)]),
        sequence(vec![&sequence(vec![&replace, &bytes]), &fuse, &strip(1)]),
        metaspace("always"),
        metaspace("first"),
        metaspace("never"),
        sequence(vec![&metaspace("always"), &bytes, &fuse, &strip(1)]),
    ]
}

/// Our tokenizer and the crate's own.
fn both(json: &Value) -> (TextTokenizer, Tokenizer) {
    let read = || Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
    (TextTokenizer::new(Path::new("tokenizer.json"), read()).unwrap(), read())
}

/// The text of `prompt` up to its last whole character, and that of the output after it.
fn split(tokenizer: &TextTokenizer, skip: bool, prompt: &[u32], output: &[u32]) -> [String; 2] {
    let mut before = Detokenizer::new(tokenizer, skip);
    let whole = prompt.iter().map(|id| before.push(tokenizer, *id)).collect();
    let mut after = Detokenizer::after(tokenizer, skip, prompt);
    let mut text: String = output.iter().map(|id| after.push(tokenizer, *id)).collect();
    text.push_str(&after.finish());
    [whole, text]
}

/// Ids of pieces, of characters spelled in bytes, and one without a token.
fn ids() -> impl Strategy<Value = Vec<u32>> {
    let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
    let spelled = prop::sample::select(vec![" ", "  ", "é", "日", "\u{1f600}", "a", "▁"]);
    let part = prop_oneof![
        6 => (256..256 + PIECES.len() as u32).prop_map(|id| vec![id]),
        3 => spelled.prop_map(bytes),
        1 => Just(vec![HOLE]),
    ];
    prop::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn prompt_and_output_are_the_crates_text_of_both(
        ids in ids(), cut in 0..40_usize, skip: bool,
    ) {
        let (prompt, output) = ids.split_at(cut.min(ids.len()));
        for decoder in decoders() {
            let (ours, crates) = both(&pieces_json(decoder.clone()));
            let whole = crates.decode(&ids, skip).unwrap();
            let [before, after] = split(&ours, skip, prompt, output);
            prop_assert_eq!(before + &after, whole, "{:?} at {} by {}", ids, cut, decoder);
        }
    }

    /// Any ids at all: where bytes make no text, only the number of marks may differ.
    #[test]
    fn any_ids_are_decoded_as_the_crate_does(
        ids in prop::collection::vec(0..HOLE + 1, 0..30), cut in 0..30_usize, skip: bool,
    ) {
        let (prompt, output) = ids.split_at(cut.min(ids.len()));
        for decoder in decoders() {
            let (ours, crates) = both(&pieces_json(decoder));
            let whole = crates.decode(&ids, skip).unwrap();
            let [before, after] = split(&ours, skip, prompt, output);
            if !whole.contains('\u{fffd}') {
                prop_assert_eq!(before + &after, whole, "{:?} at {}", ids, cut);
            }
        }
        let (ours, crates) = both(&common::tokenizer_json());
        let ids: Vec<u32> = ids.iter().map(|id| id % 261).collect();
        let (prompt, output) = ids.split_at(cut.min(ids.len()));
        let [before, after] = split(&ours, skip, prompt, output);
        let whole = crates.decode(&ids, skip).unwrap();
        prop_assert_eq!(before + &after, whole, "{:?} at {}", ids, cut);
    }
}

#[test]
fn decoders_that_would_be_a_guess_are_refused() {
    let strip = json!({"type": "Strip", "content": " ", "start": 0, "stop": 1});
    let replace = json!({"type": "Replace", "pattern": {"Regex": "a+"}, "content": " "});
    let (bytes, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
    let late = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    for decoder in [
        json!({"type": "Sequence", "decoders": [bytes, fuse, strip]}),
        json!({"type": "Sequence", "decoders": [replace, bytes, fuse]}),
        json!({"type": "Sequence", "decoders": [bytes, late, fuse]}),
        json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        Value::Null,
    ] {
        let json = pieces_json(decoder.clone());
        let inner = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
        let error = TextTokenizer::new(Path::new("t.json"), inner).err().unwrap().to_string();
        assert!(
            error.starts_with("t.json: decoder ") && error.contains("is not supported"),
            "{error}"
        );
    }
}

/// The tiny model with the tokenizer of a SentencePiece model.
fn sentence_piece_model() -> Served {
    let dir = tempfile::tempdir().unwrap();
    let mut config = common::tiny_config();
    config["vocab_size"] = json!(268);
    config["eos_token_id"] = json!(267);
    common::write_checkpoint(dir.path(), &config, 3);
    let tokenizer = pieces_json(decoders().remove(1));
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let pool = Pool::new(2, Isa::best()).unwrap();
    let model = Model::load(dir.path(), None, &pool, |_, _| {}).unwrap();
    common::served(model, common::options())
}

#[tokio::test]
async fn server_stream_echo_stop_strings_and_verifier_agree_on_the_first_blank() {
    const NONCE: &str = "2222222222222222222222222222222222222222222222222222222222222222";
    let served = sentence_piece_model();
    let registry = Registry::default();
    registry.announce(["tiny".to_owned()]);
    registry.set("tiny", None, ModelState::Ready(Box::new(served.clone())));
    let app = router(ServerState::new(registry, Defaults::default(), Clock::manual(1_000_000)));
    let verifier = common::verifier(&served);
    let (the, grin) = (258, [0xf0, 0x9f, 0x98]);
    for (prompt, bias, extra, want) in [
        (vec![0x61, 0x62], the, json!({}), " the the the"),
        (vec![0x61, 0x62], the, json!({"echo": true}), "ab the the the"),
        (vec![the], the, json!({"echo": true}), "the the the the"),
        (vec![267], the, json!({"echo": true}), "the the the"),
        (vec![the], the, json!({"stop": ["e the"]}), " th"),
        (vec![0x61, 0x62], the, json!({"stop": [" the"]}), ""),
        // The output completes a character that begins in the prompt.
        (grin.to_vec(), 0x80, json!({"echo": true}), "\u{1f600}\u{fffd}\u{fffd}"),
        (grin.to_vec(), 0x80, json!({"echo": true, "logprobs": 1}), "\u{1f600}\u{fffd}\u{fffd}"),
        (grin.to_vec(), the, json!({"echo": true}), "\u{fffd} the the the"),
    ] {
        let mut body = json!({
            "model": "tiny", "prompt": prompt, "max_tokens": 3, "ignore_eos": true, "seed": 1,
            "logit_bias": {bias.to_string(): 100}, "return_token_ids": true,
            "proof": {"scheme": "residue-v1", "nonce": NONCE},
        });
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let (status, whole) = post(&app, COMPLETION, body.clone()).await;
        assert_eq!(
            (status, &whole["choices"][0]["text"]),
            (StatusCode::OK, &json!(want)),
            "{body}"
        );
        let mut streamed = body.clone();
        streamed["stream"] = json!(true);
        let frames = stream(&app, COMPLETION, streamed).await;
        let text: String =
            frames.iter().map(|f| f["choices"][0]["text"].as_str().unwrap()).collect();
        assert_eq!(text, want, "{body}");
        if extra.get("echo").is_some() {
            continue; // its text is that of prompt and output
        }
        let answer = Answer::of_response(&whole, 0).unwrap();
        let reader = common::reader(&verifier.model.text);
        let read = reader.completion(&serde_json::from_value(body).unwrap()).await.unwrap();
        let asked = Challenge {
            scheme: "residue-v1".parse().unwrap(),
            nonce: Some(from_hex(NONCE).unwrap()),
            hotkey: None,
        };
        let claim =
            Claim { seed: Some(1), proof: Some(asked), ..Claim::new(&read.requests[0], &answer) };
        let report = verifier.verify(Profile::Proof, 7).answer(&claim);
        assert!(matches!(report.verdict, Verdict::Pass), "{:?}", report.verdict);
    }
    let body = json!({"model": "tiny", "prompt": grin, "max_tokens": 0, "echo": true});
    let (_, whole) = post(&app, COMPLETION, body).await;
    assert_eq!(whole["choices"][0]["text"], "\u{fffd}", "{whole}");
}

fn render(source: &str, variables: &Value) -> Result<String, String> {
    let tokens = (String::new(), String::new());
    let template = ChatTemplate::compile(Path::new("t"), source, tokens);
    let template = template.map_err(|e| e.to_string())?;
    template.render(variables.as_object().unwrap().clone(), 0).map_err(|e| e.to_string())
}

#[test]
fn a_developer_is_a_system_to_templates_that_know_none() {
    let variables = json!({"messages": [
        {"role": "developer", "content": "a"}, {"role": "user", "content": "b"},
    ]});
    let old = "{% for m in messages %}{% if m.role in ['system', 'user'] %}{{ m.role }}:\
        {{ m.content }};{% endif %}{% endfor %}";
    assert_eq!(render(old, &variables).unwrap(), "system:a;user:b;");
    let new = "{% for m in messages %}{% if m.role == \"developer\" %}<{{ m.content }}>\
        {% endif %}{% endfor %}";
    assert_eq!(render(new, &variables).unwrap(), "<a>");
    let word = "{# our developer #}{{ messages[0].role }}";
    assert_eq!(render(word, &variables).unwrap(), "system");
}

/// Templates, and what Jinja2 3.1.6 makes of them with the filters and options of transformers.
const RENDERED: &str = include_str!("../data/chat_templates.json");

#[test]
fn templates_are_rendered_as_jinja2_does() {
    let variables = json!({
        "s": "it's a \"test\"", "l": ["a", 1, 1.5, true, null, {"k": ["v"]}],
        "d": {"a": "b", "n": null, "f": 1e20}, "t": "a-b-c", "w": " one two  three ",
        "u": "é\n\t\\\u{200b}\u{a0}\u{1f600}日", "f": 0.00001, "g": 1e16, "i": 7,
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
    });
    let cases: Vec<(String, String)> = serde_json::from_str(RENDERED).unwrap();
    assert!(cases.len() > 25);
    let wrong: Vec<String> = cases
        .iter()
        .map(|(source, want)| (source, want, render(source, &variables)))
        .filter(|(_, want, got)| got.as_ref() != Ok(*want))
        .map(|(source, want, got)| format!("{source}\n  want {want:?}\n  got  {got:?}"))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_python_refuses_is_refused() {
    for (source, want) in [
        ("{{ 'abc'.index('x') }}", "substring not found"),
        ("{{ ['a'].index('x') }}", "'x' is not in list"),
        ("{{ 'abc'.partition('') }}", "empty separator"),
        ("{{ '%s' % ('a', 'b') }}", "not all arguments converted"),
        ("{{ 'a' | tojson(ascii=true) }}", "ascii"),
        ("{{ 'a'.ljust(100000000) }}", "a width may be at most"),
    ] {
        let error = render(source, &json!({})).unwrap_err();
        assert!(error.contains(want), "{source}: {error}");
    }
}
