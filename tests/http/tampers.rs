//! Every field that a client can read, changed on the way: each change is rejected for its reason,
//! and honest answers of every kind pass.

use crate::common;
use crate::common::site::{CHAT, COMPLETION, Site, chat, completion, post, site, stream};
use axum::http::StatusCode;
use serde_json::{Value, json};
use targon_engine::clock::Clock;
use targon_engine::intake::translate::Defaults;
use targon_engine::models::Model;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::server::registry::{ModelState, Registry};
use targon_engine::server::router;
use targon_engine::server::state::ServerState;
use targon_engine::verify::answer::Answer;
use targon_engine::verify::capture::{Capture, CheckedChoice};
use targon_engine::verify::question::Question;
use targon_engine::verify::{Claim, Depth, Profile, Reason, Verdict, Verifier};

const NONCE: &str = "4444444444444444444444444444444444444444444444444444444444444444";
/// Tokens of the answers that are changed: more than one chunk of a proof.
const TOKENS: usize = 40;

/// How an answer is sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    ChatStream,
    ChatWhole,
    TextStream,
    TextWhole,
}

use Form::{ChatStream, ChatWhole, TextStream, TextWhole};

const ALL: &[Form] = &[ChatStream, ChatWhole, TextStream, TextWhole];
const STREAMS: &[Form] = &[ChatStream, TextStream];
const WHOLES: &[Form] = &[ChatWhole, TextWhole];
const CHATS: &[Form] = &[ChatStream, ChatWhole];
const TEXTS: &[Form] = &[TextStream, TextWhole];

impl Form {
    fn is_stream(self) -> bool {
        STREAMS.contains(&self)
    }

    fn is_chat(self) -> bool {
        CHATS.contains(&self)
    }

    fn body(self, extra: Value) -> Value {
        let mut body = match self.is_chat() {
            true => chat(json!({"logprobs": true, "top_logprobs": 2})),
            false => completion(json!({"logprobs": 2})),
        };
        let common = json!({
            "max_tokens": TOKENS, "temperature": 0.8, "logprobs_mode": "raw",
            "return_token_ids": true, "proof": {"scheme": "residue-v1", "nonce": NONCE},
            "stream": self.is_stream(),
        });
        for fields in [common, extra] {
            body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        }
        body
    }

    /// The choice that carries token `token`.
    fn part(self, sent: &mut Value, token: usize) -> &mut Value {
        match self {
            ChatStream => &mut sent[token + 1]["choices"][0],
            TextStream => &mut sent[token]["choices"][0],
            ChatWhole | TextWhole => &mut sent["choices"][0],
        }
    }

    /// The choice that carries the end.
    fn tail(self, sent: &mut Value) -> &mut Value {
        self.part(sent, TOKENS - 1)
    }

    /// What stands around a choice.
    fn body_of(self, sent: &mut Value) -> &mut Value {
        if self.is_stream() { &mut sent[4] } else { sent }
    }

    /// What carries a choice's text, and its name.
    fn text_of(self, part: &mut Value) -> (&mut Value, &'static str) {
        match self {
            ChatStream => (&mut part["delta"], "content"),
            ChatWhole => (&mut part["message"], "content"),
            TextStream | TextWhole => (part, "text"),
        }
    }

    /// The alternatives of token 5.
    fn alternatives(self, sent: &mut Value) -> &mut Value {
        let at = if self.is_stream() { 0 } else { 5 };
        let logprobs = &mut self.part(sent, 5)["logprobs"];
        match self.is_chat() {
            true => &mut logprobs["content"][at]["top_logprobs"],
            false => &mut logprobs["top_logprobs"][at],
        }
    }
}

async fn ask(site: &Site, body: &Value) -> Value {
    let path = if body.get("messages").is_some() { CHAT } else { COMPLETION };
    if body["stream"] == true {
        return stream(&site.app, path, body.clone()).await.into();
    }
    let (status, response) = post(&site.app, path, body.clone()).await;
    assert_eq!(status, StatusCode::OK, "{response}");
    response
}

async fn checked(verifier: &Verifier, body: &Value, sent: &Value) -> Vec<CheckedChoice> {
    let capture = match sent.as_array() {
        Some(chunks) => Capture::of_stream(body.clone(), chunks.clone()),
        None => Capture::of_response(body.clone(), sent.clone()),
    };
    let question = capture.question(verifier, "tiny", 0).await.unwrap();
    verifier.verify(None, 7).depth(Depth::Slow).capture(question, &capture)
}

async fn verdict(verifier: &Verifier, body: &Value, sent: &Value) -> Verdict {
    checked(verifier, body, sent).await.remove(0).report.verdict
}

fn expect(verdict: &Verdict, reason: Reason, name: &str) {
    let Verdict::Reject(rejection) = verdict else { panic!("{name}: {verdict}") };
    assert_eq!(rejection.reason, reason, "{name}: {rejection}");
}

/// A change of an answer. A control shows in the ids and their proof as well; everything else shows
/// only where the whole answer is compared.
struct Row {
    forms: &'static [Form],
    name: &'static str,
    reason: Reason,
    is_control: bool,
    change: fn(&mut Value, Form),
}

const fn row(
    forms: &'static [Form],
    name: &'static str,
    reason: Reason,
    change: fn(&mut Value, Form),
) -> Row {
    Row { forms, name, reason, is_control: false, change }
}

const fn control(row: Row) -> Row {
    Row { is_control: true, ..row }
}

fn decoy(index: Value) -> Value {
    json!({"index": index, "delta": {"content": "lies"}, "message": {"content": "lies"},
        "text": "lies", "finish_reason": null})
}

/// A chunk like another one, with this choice.
fn more(sent: &mut Value, choice: Value) {
    let mut chunk = sent[3].clone();
    chunk["choices"] = json!([choice]);
    sent.as_array_mut().unwrap().insert(3, chunk);
}

fn insert(list: &mut Value, at: usize, value: Value) {
    list.as_array_mut().unwrap().insert(at, value);
}

fn remove(object: &mut Value, key: &str) -> Value {
    object.as_object_mut().unwrap().remove(key).unwrap()
}

/// What the whole response says beside its choices.
const AROUND: &[Row] = &[
    row(ALL, "another model", Reason::BadStream, |s, f| f.body_of(s)["model"] = json!("gpt")),
    row(ALL, "another object", Reason::BadStream, |s, f| f.body_of(s)["object"] = json!("x")),
    row(ALL, "a field of text", Reason::BadStream, |s, f| f.body_of(s)["note"] = json!("lies")),
    row(ALL, "a flag", Reason::BadStream, |s, f| f.body_of(s)["note"] = json!(false)),
    row(ALL, "a tier of words", Reason::BadStream, |s, f| {
        f.body_of(s)["service_tier"] = json!("lies");
    }),
    row(ALL, "an id that is a list", Reason::BadStream, |s, f| f.body_of(s)["id"] = json!(["a"])),
    row(ALL, "another mode", Reason::BadStream, |s, f| {
        f.body_of(s)["logprobs_mode"] = json!("scaled");
    }),
    row(ALL, "false usage", Reason::BadStream, |s, f| {
        f.body_of(s)["usage"] =
            json!({"prompt_tokens": 9, "completion_tokens": 999, "total_tokens": 1008});
    }),
    row(WHOLES, "more cached than asked", Reason::BadStream, |s, _| {
        s["usage"]["prompt_tokens_details"]["cached_tokens"] = json!(100_000);
    }),
    row(WHOLES, "usage with words", Reason::BadStream, |s, _| s["usage"]["note"] = json!("lies")),
    row(CHATS, "another prompt", Reason::BadIds, |s, f| {
        let body = if f.is_stream() { &mut s[0] } else { s };
        body["prompt_token_ids"] = json!([1, 2, 3]);
    }),
    row(TEXTS, "another prompt", Reason::BadIds, |s, f| {
        f.part(s, 0)["prompt_token_ids"] = json!([1, 2, 3]);
    }),
    row(STREAMS, "scores of the prompt", Reason::BadStream, |s, f| {
        f.body_of(s)["prompt_logprobs"] = json!([null, {}]);
    }),
    row(&[TextWhole], "scores of the prompt", Reason::LogprobMismatch, |s, f| {
        f.part(s, 0)["prompt_logprobs"] =
            json!([null, {"4": {"logprob": -1.0, "rank": 1, "decoded_token": ""}}]);
    }),
    row(&[ChatWhole], "scores of the prompt", Reason::LogprobMismatch, |s, _| {
        s["prompt_logprobs"] =
            json!([null, {"4": {"logprob": -1.0, "rank": 1, "decoded_token": ""}}]);
    }),
];

/// Choices that were not asked for.
const CHOICES: &[Row] = &[
    row(STREAMS, "a chunk of choice 1", Reason::BadStream, |s, _| more(s, decoy(json!(1)))),
    row(STREAMS, "a chunk of no choice", Reason::BadStream, |s, _| more(s, decoy(json!(null)))),
    row(STREAMS, "chunks without tokens", Reason::BadStream, |s, f| {
        for _ in 0..5 {
            let text = if f.is_chat() { json!({"delta": {}}) } else { json!({"text": ""}) };
            let mut choice = text;
            choice["index"] = json!(0);
            more(s, choice);
        }
    }),
    row(STREAMS, "a chunk without index", Reason::BadStream, |s, _| {
        more(s, json!({"delta": {"content": "lies"}, "text": "lies"}));
    }),
    row(ALL, "a decoy before", Reason::BadStream, |s, f| {
        insert(&mut f.body_of(s)["choices"], 0, decoy(json!(1)));
    }),
    row(ALL, "a decoy behind", Reason::BadStream, |s, f| {
        insert(&mut f.body_of(s)["choices"], 1, decoy(json!(7)));
    }),
    row(ALL, "a decoy without index", Reason::BadStream, |s, f| {
        insert(&mut f.body_of(s)["choices"], 0, json!({"text": "lies"}));
    }),
    row(WHOLES, "a second of one index", Reason::BadStream, |s, f| {
        let twin = f.part(s, 0).clone();
        insert(&mut s["choices"], 1, twin);
    }),
    control(row(WHOLES, "a choice that is text", Reason::BadStream, |s, _| {
        s["choices"][0] = json!("lies");
    })),
];

/// What is read as the model's words.
const WORDS: &[Row] = &[
    control(row(ALL, "another text", Reason::TextMismatch, |s, f| {
        let (part, key) = f.text_of(f.part(s, 5));
        part[key] = json!("lies");
    })),
    row(&[ChatStream], "moved to text", Reason::TextMismatch, |s, f| {
        for token in 0..TOKENS {
            let part = f.part(s, token);
            part["text"] = remove(&mut part["delta"], "content");
        }
    }),
    row(&[ChatWhole], "moved to text", Reason::TextMismatch, |s, f| {
        let part = f.part(s, 0);
        part["text"] = remove(&mut part["message"], "content");
    }),
    row(TEXTS, "moved to content", Reason::TextMismatch, |s, f| {
        let name = if f.is_stream() { "delta" } else { "message" };
        let parts = if f.is_stream() { TOKENS } else { 1 };
        for token in 0..parts {
            let part = f.part(s, token);
            let text = remove(part, "text");
            part[name] = json!({ "content": text });
        }
    }),
    row(STREAMS, "text in the next chunk", Reason::TextMismatch, |s, f| {
        let text = |s: &mut Value, token| {
            let (part, key) = f.text_of(f.part(s, token));
            part[key].as_str().unwrap().to_owned()
        };
        let token = (0..TOKENS - 1).find(|t| !text(s, *t).is_empty()).unwrap();
        let joined = text(s, token) + &text(s, token + 1);
        for (token, text) in [(token, String::new()), (token + 1, joined)] {
            let (part, key) = f.text_of(f.part(s, token));
            part[key] = text.into();
        }
    }),
    row(ALL, "reasoning", Reason::TextMismatch, |s, f| {
        f.text_of(f.part(s, 5)).0["reasoning_content"] = json!("lies");
    }),
    row(CHATS, "a refusal", Reason::TextMismatch, |s, f| {
        f.text_of(f.part(s, 5)).0["refusal"] = json!("lies");
    }),
    row(CHATS, "a function call", Reason::BadStream, |s, f| {
        f.text_of(f.part(s, 5)).0["function_call"] = json!({"name": "f", "arguments": "{}"});
    }),
    row(ALL, "a field of its own", Reason::BadStream, |s, f| {
        f.part(s, 5)["note"] = json!("lies");
    }),
    row(&[ChatStream], "another role", Reason::BadStream, |s, _| {
        s[0]["choices"][0]["delta"]["role"] = json!("system");
    }),
    row(&[ChatWhole], "another role", Reason::BadStream, |s, f| {
        f.part(s, 0)["message"]["role"] = json!("system");
    }),
    control(row(CHATS, "a call that nobody offered", Reason::TextMismatch, |s, f| {
        f.text_of(f.part(s, 5)).0["tool_calls"] = json!([{}]);
    })),
    row(ALL, "no finish reason", Reason::EarlyEnd, |s, f| {
        f.tail(s)["finish_reason"] = json!(null);
    }),
    row(STREAMS, "an early finish reason", Reason::EarlyEnd, |s, f| {
        f.part(s, 5)["finish_reason"] = json!("length");
    }),
    control(row(ALL, "another finish reason", Reason::EarlyEnd, |s, f| {
        f.tail(s)["finish_reason"] = json!("stop");
    })),
    row(ALL, "a stop string that was none", Reason::EarlyEnd, |s, f| {
        f.tail(s)["stop_reason"] = json!("lies");
    }),
];

/// What is read as evidence.
const NUMBERS: &[Row] = &[
    row(CHATS, "a token of another name", Reason::LogprobMismatch, |s, f| {
        f.part(s, 5)["logprobs"]["content"][0]["token"] = json!("lies");
    }),
    row(TEXTS, "a token of another name", Reason::LogprobMismatch, |s, f| {
        f.part(s, 5)["logprobs"]["tokens"][0] = json!("lies");
    }),
    row(CHATS, "other bytes", Reason::LogprobMismatch, |s, f| {
        f.part(s, 5)["logprobs"]["content"][0]["bytes"] = json!([108, 256]);
    }),
    row(TEXTS, "another offset", Reason::LogprobMismatch, |s, f| {
        f.part(s, 5)["logprobs"]["text_offset"][0] = json!(-1);
    }),
    row(CHATS, "a field of an entry", Reason::LogprobMismatch, |s, f| {
        f.part(s, 5)["logprobs"]["content"][0]["note"] = json!("lies");
    }),
    row(ALL, "a list of its own", Reason::LogprobMismatch, |s, f| {
        f.part(s, 5)["logprobs"]["refusal"] = json!(["lies"]);
    }),
    row(CHATS, "a log-probability that is off", Reason::LogprobMismatch, |s, f| {
        let entry = &mut f.part(s, 5)["logprobs"]["content"][0];
        entry["logprob"] = (entry["logprob"].as_f64().unwrap() - 1e-6).into();
    }),
    row(TEXTS, "a log-probability that is off", Reason::LogprobMismatch, |s, f| {
        let logprobs = &mut f.part(s, 5)["logprobs"];
        let off = Value::from(logprobs["token_logprobs"][0].as_f64().unwrap() - 1e-6);
        let name = logprobs["tokens"][0].as_str().unwrap().to_owned();
        logprobs["top_logprobs"][0][name] = off.clone();
        logprobs["token_logprobs"][0] = off;
    }),
    row(CHATS, "a log-probability that is missing", Reason::LogprobMismatch, |s, f| {
        f.part(s, 5)["logprobs"]["content"][0]["logprob"] = json!(null);
    }),
    row(ALL, "none at all", Reason::LogprobMismatch, |s, f| {
        f.part(s, 5)["logprobs"] = json!(null);
    }),
    row(CHATS, "an alternative of another value", Reason::LogprobMismatch, |s, f| {
        f.alternatives(s)[1]["logprob"] = json!(-0.5);
    }),
    row(CHATS, "an alternative of another token", Reason::LogprobMismatch, |s, f| {
        let entry = &mut f.alternatives(s)[1];
        (entry["token"], entry["bytes"]) = (json!("@"), json!([64]));
    }),
    row(CHATS, "an alternative of other bytes", Reason::LogprobMismatch, |s, f| {
        f.alternatives(s)[1]["bytes"] = json!([1, 2, 3]);
    }),
    row(CHATS, "an alternative less", Reason::LogprobMismatch, |s, f| {
        f.alternatives(s).as_array_mut().unwrap().pop();
    }),
    row(CHATS, "an alternative twice", Reason::LogprobMismatch, |s, f| {
        let top = f.alternatives(s);
        top[1] = top[0].clone();
    }),
    row(TEXTS, "an alternative of another value", Reason::LogprobMismatch, |s, f| {
        let top = f.alternatives(s).as_object_mut().unwrap();
        *top.values_mut().last().unwrap() = json!(-0.123);
    }),
    row(TEXTS, "alternatives of other names", Reason::LogprobMismatch, |s, f| {
        *f.alternatives(s) = json!({"x": -0.5, "y": -0.5});
    }),
    row(STREAMS, "a powv of words", Reason::BadPowv, |s, f| f.part(s, 5)["powv"] = json!("lies")),
    control(row(STREAMS, "another powv", Reason::BadPowv, |s, f| {
        f.part(s, 5)["powv"] = json!(1);
    })),
    row(STREAMS, "a proof with words", Reason::BadProof, |s, f| {
        f.part(s, 31)["proof"]["note"] = json!("lies");
    }),
    row(WHOLES, "a proof with words", Reason::BadProof, |s, f| {
        f.part(s, 0)["proof"][0]["note"] = json!("lies");
    }),
    row(ALL, "an end with words", Reason::BadProof, |s, f| {
        f.tail(s)["proof_end"]["note"] = json!("lies");
    }),
    row(STREAMS, "a proof in the next chunk", Reason::BadProof, |s, f| {
        let proof = remove(f.part(s, 31), "proof");
        f.part(s, 32)["proof"] = proof;
    }),
];

/// Whether the ids, their text, their proof and their end alone show a change: what was checked of
/// an answer before all of it was.
async fn shows_in_the_proof(verifier: &Verifier, body: &Value, sent: &Value) -> bool {
    let answer = match sent.as_array() {
        Some(chunks) => Answer::of_stream(chunks, 0),
        None => {
            let choices = sent["choices"].as_array().unwrap();
            let first = choices.iter().find(|c| c["index"] == 0);
            Answer::of_response(&json!({ "choices": Vec::from_iter(first) }), 0)
        }
    };
    let Ok(Answer { text: Some(text), ids, powv, finish_reason, chunks, end, .. }) = answer else {
        return true;
    };
    let text = Some(text);
    let answer = Answer { text, ids, powv, finish_reason, chunks, end, ..Answer::default() };
    let question = Question::read(verifier, "tiny", body, None, 0).await.unwrap();
    let claim = Claim {
        seed: question.seed,
        proof: question.proof,
        ..Claim::new(&question.requests()[0], &answer)
    };
    verifier.verify(Profile::Proof, 7).answer(&claim).verdict != Verdict::Pass
}

#[tokio::test]
async fn every_field_that_is_changed_is_rejected_for_its_reason() {
    let site = site(common::options());
    let verifier = common::verifier(&site.served);
    let mut count = 0;
    for form in ALL {
        let body = form.body(json!({}));
        let honest = ask(&site, &body).await;
        assert_eq!(verdict(&verifier, &body, &honest).await, Verdict::Pass, "{form:?}");
        for row in [AROUND, CHOICES, WORDS, NUMBERS].into_iter().flatten() {
            if !row.forms.contains(form) {
                continue;
            }
            let mut sent = honest.clone();
            (row.change)(&mut sent, *form);
            assert_ne!(sent, honest, "{form:?}: {} changes nothing", row.name);
            let kind = if row.is_control { "control" } else { "tamper" };
            let name = format!("{form:?}, {kind}: {}", row.name);
            expect(&verdict(&verifier, &body, &sent).await, row.reason, &name);
            assert_eq!(shows_in_the_proof(&verifier, &body, &sent).await, row.is_control, "{name}");
            count += 1;
        }
    }
    assert!(count > 130, "{count}");
}

/// A site whose model's template knows tools.
fn site_with_tools() -> Site {
    let dir = tempfile::tempdir().unwrap();
    common::write_checkpoint(dir.path(), &common::tiny_config(), 3);
    let template = "{% if tools %}<tool_call>{{ tools | length }}{% endif %}\
        {% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>";
    let chat = json!({ "chat_template": template }).to_string();
    std::fs::write(dir.path().join("tokenizer_config.json"), chat).unwrap();
    let pool = Pool::new(2, Isa::best()).unwrap();
    let model = Model::load(dir.path(), None, &pool, |_, _| {}).unwrap();
    let served = common::served(model, common::options());
    let registry = Registry::default();
    registry.announce(["tiny".to_owned()]);
    registry.set("tiny", None, ModelState::Ready(Box::new(served.clone())));
    let state = ServerState::new(registry, Defaults::default(), Clock::manual(1_000_000));
    Site { engine: served.engine.clone(), served, app: router(state.clone()), state }
}

fn offers(extra: Value) -> Value {
    let tool = json!({"type": "function", "function": {"name": "f", "parameters":
        {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
        "additionalProperties": false}}});
    let mut body = json!({"tools": [tool], "max_tokens": 400, "ignore_eos": false});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn named() -> Value {
    offers(json!({"tool_choice": {"type": "function", "function": {"name": "f"}}}))
}

fn called() -> Value {
    let regex = r#"Sure. <tool_call>\{"name": "f", "arguments": \{"a": 1\}\}</tool_call>"#;
    offers(json!({"structured_outputs": {"regex": regex}}))
}

fn required() -> Value {
    offers(json!({"tool_choice": "required", "parallel_tool_calls": false}))
}

/// The first part of a call in an answer.
fn call(sent: &mut Value) -> &mut Value {
    let parts: Box<dyn Iterator<Item = &mut Value>> = match sent {
        Value::Array(chunks) => Box::new(chunks.iter_mut().map(|c| &mut c["choices"][0]["delta"])),
        body => Box::new(std::iter::once(&mut body["choices"][0]["message"])),
    };
    let mut calls = parts.filter(|part| part["tool_calls"].is_array());
    &mut calls.next().expect("there is a call")["tool_calls"][0]
}

#[tokio::test]
async fn calls_are_those_that_the_ids_spell() {
    let site = site_with_tools();
    let verifier = common::verifier(&site.served);
    type Change = fn(&mut Value);
    let changes: [(&str, Change); 4] = [
        ("another function", |s| call(s)["function"]["name"] = json!("rm")),
        ("other arguments", |s| call(s)["function"]["arguments"] = json!("{\"a\":2000}")),
        ("a field of its own", |s| call(s)["note"] = json!("lies")),
        ("an id of no text", |s| call(s)["id"] = json!({"lies": "x"})),
    ];
    for form in CHATS {
        for extra in [named(), called(), required()] {
            let body = form.body(extra);
            let honest = ask(&site, &body).await;
            assert_eq!(verdict(&verifier, &body, &honest).await, Verdict::Pass, "{body} {honest}");
            for (name, change) in changes {
                let mut sent = honest.clone();
                change(&mut sent);
                let verdict = verdict(&verifier, &body, &sent).await;
                let is_right = matches!(&verdict, Verdict::Reject(r)
                    if matches!(r.reason, Reason::TextMismatch | Reason::BadStream));
                assert!(is_right, "{form:?} {name}: {verdict}");
            }
        }
        // Where tools are offered, an honest answer may be plain text; a forged call is none.
        let body = form.body(offers(json!({"ignore_eos": true, "max_tokens": TOKENS})));
        let honest = ask(&site, &body).await;
        assert_eq!(verdict(&verifier, &body, &honest).await, Verdict::Pass);
        let forged = json!([{"index": 0, "id": "c", "type": "function",
            "function": {"name": "f", "arguments": "{\"a\":1}"}}]);
        for calls in [forged, json!([{}])] {
            let mut sent = honest.clone();
            let (part, key) = form.text_of(form.part(&mut sent, 5));
            (part["tool_calls"], part[key]) = (calls, json!("lies"));
            expect(&verdict(&verifier, &body, &sent).await, Reason::TextMismatch, "a forged call");
        }
    }
}

/// Requests of every kind, without `stream`.
fn kinds() -> Vec<Value> {
    let proof = json!({"scheme": "residue-v1", "nonce": NONCE});
    let with = |extra: Value| {
        let mut fields = json!({"proof": proof, "return_token_ids": true, "max_tokens": 37});
        fields.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        fields
    };
    vec![
        chat(with(json!({}))),
        chat(with(json!({"n": 2, "logprobs": true, "top_logprobs": 3}))),
        chat(with(json!({"logprobs": true, "top_logprobs": 20, "logprobs_mode": "scaled",
            "temperature": 0.6, "presence_penalty": 0.4, "logit_bias": {"65": -100, "66": 4}}))),
        chat(with(json!({"logprobs": true, "return_tokens_as_token_ids": true,
            "top_logprobs": 4, "proof": {"scheme": "toploc", "nonce": NONCE}}))),
        chat(with(json!({"logprobs": true, "logprob_token_ids": [5, 9, 200]}))),
        chat(with(json!({"max_completion_tokens": 9, "ignore_eos": false, "user": "me"}))),
        chat(with(json!({"structured_outputs": {"regex": "[a-f]{20}x"}, "ignore_eos": false,
            "max_tokens": 60, "proof": {"scheme": "residue-v1-u4", "nonce": NONCE}}))),
        chat(with(json!({"temperature": 0, "skip_special_tokens": false}))),
        completion(with(json!({"logprobs": 0}))),
        completion(with(json!({"logprobs": 5, "n": 2, "prompt": ["hello", "good bye"]}))),
        completion(with(json!({"prompt": [[104, 101], [108, 108, 111]], "logprobs": true,
            "return_tokens_as_token_ids": true}))),
        completion(with(json!({"echo": true}))),
        completion(with(json!({"echo": true, "logprobs": 2, "prompt": "日本 hello"}))),
        completion(with(json!({"echo": true, "logprobs": 2, "n": 2, "prompt": ["ab", "cde"],
            "return_tokens_as_token_ids": true, "logprobs_mode": "scaled"}))),
        completion(with(json!({"stop": ["e", "a", "t", "\u{3}"], "max_tokens": 200}))),
        completion(with(json!({"stop": ["e", "a", "t"], "max_tokens": 200, "logprobs": 1,
            "include_stop_str_in_output": true, "min_tokens": 3}))),
        completion(with(json!({"stop_token_ids": (0..120).collect::<Vec<u32>>()}))),
    ]
}

#[tokio::test]
async fn honest_answers_of_every_kind_pass() {
    let site = site(common::options());
    let verifier = common::verifier(&site.served);
    let mut bodies = kinds();
    for body in kinds() {
        for options in [
            json!({"include_usage": true}),
            json!({"include_usage": true, "continuous_usage_stats": true}),
        ] {
            let mut streamed = body.clone();
            (streamed["stream"], streamed["stream_options"]) = (json!(true), options);
            bodies.push(streamed);
        }
        bodies.push(body);
        bodies.last_mut().unwrap()["stream"] = json!(true);
    }
    let scores = json!({"prompt_logprobs": 2, "max_tokens": 9, "return_token_ids": true,
        "proof": {"scheme": "residue-v1", "nonce": NONCE}, "n": 2});
    bodies.extend([chat(scores.clone()), completion(scores)]);
    for body in bodies {
        let sent = ask(&site, &body).await;
        let checked = checked(&verifier, &body, &sent).await;
        for checked in checked {
            let verdict = &checked.report.verdict;
            assert_eq!(*verdict, Verdict::Pass, "{body}\n{sent}");
            assert!(checked.report.chunks.iter().all(|c| c.is_exact));
        }
    }
}

/// One answer of this engine in the form of another honest server's.
fn as_elsewhere(chunks: &[Value]) -> Vec<Value> {
    let mut chunks: Vec<Value> = chunks.to_vec();
    let mut held = String::new();
    for chunk in &mut chunks {
        let Some(choice) = chunk["choices"].get_mut(0).and_then(Value::as_object_mut) else {
            continue;
        };
        choice.remove("powv");
        let is_last = !choice["finish_reason"].is_null();
        if let Some(text) = choice["delta"]["content"].as_str() {
            // Text comes two tokens late, as where stop strings are watched for.
            held.push_str(text);
            let keep = if is_last { 0 } else { held.len().min(2) };
            let keep = (0..=keep).rev().find(|k| held.is_char_boundary(held.len() - k)).unwrap();
            let rest = held.split_off(held.len() - keep);
            choice["delta"] = json!({"content": std::mem::replace(&mut held, rest),
                "reasoning_content": null, "tool_calls": []});
        }
        choice.insert("stop_reason".into(), json!(null));
    }
    chunks.remove(0);
    let last = chunks.last().unwrap().clone();
    for chunk in &mut chunks {
        chunk.as_object_mut().unwrap().retain(|key, _| key != "system_fingerprint");
        (chunk["id"], chunk["created"]) = (json!("chatcmpl-other"), json!(17));
    }
    assert!(!last["choices"].as_array().unwrap().is_empty());
    chunks
}

#[tokio::test]
async fn other_honest_servers_cut_their_text_otherwise() {
    let site = site(common::options());
    let verifier = common::verifier(&site.served);
    let body = ChatStream.body(json!({}));
    let honest = ask(&site, &body).await;
    let elsewhere = as_elsewhere(honest.as_array().unwrap());
    assert_ne!(elsewhere[1..], honest.as_array().unwrap()[2..]);
    let sent = Value::from(elsewhere.clone());
    assert_eq!(verdict(&verifier, &body, &sent).await, Verdict::Pass);
    // What they say is compared all the same.
    type Change = fn(&mut Value);
    let changes: [(Change, Reason); 5] = [
        (|s| s[7]["choices"][0]["delta"]["content"] = json!("lies"), Reason::TextMismatch),
        (|s| s[7]["choices"][0]["delta"]["reasoning"] = json!("lies"), Reason::TextMismatch),
        (|s| more(s, decoy(json!(1))), Reason::BadStream),
        (|s| s[7]["choices"][0]["finish_reason"] = json!("stop"), Reason::EarlyEnd),
        (|s| s[7]["choices"][0]["logprobs"] = json!(null), Reason::LogprobMismatch),
    ];
    for (place, (change, reason)) in changes.into_iter().enumerate() {
        let mut sent = Value::from(elsewhere.clone());
        change(&mut sent);
        expect(&verdict(&verifier, &body, &sent).await, reason, &format!("change {place}"));
    }
}

/// Log-probabilities at a low temperature say of most tokens that they are certain.
#[tokio::test]
async fn log_probabilities_of_no_named_kind_may_be_those_at_the_temperature() {
    let site = site(common::options());
    let verifier = common::verifier(&site.served);
    let more = json!({"temperature": 0.05, "max_tokens": 48, "logprobs_mode": "scaled",
        "ignore_eos": true});
    let mut body = ChatStream.body(more);
    body.as_object_mut().unwrap().remove("proof");
    let honest = ask(&site, &body).await;
    let by_ranks = async |body: &Value, sent: &Value| {
        let capture = Capture::of_stream(body.clone(), sent.as_array().unwrap().clone());
        let question = capture.question(&verifier, "tiny", 0).await.unwrap();
        let check = verifier.verify(Some(Profile::Ranks), 7);
        check.capture(question, &capture).remove(0).report.verdict
    };
    assert_eq!(by_ranks(&body, &honest).await, Verdict::Pass, "the control: it is named");
    body.as_object_mut().unwrap().remove("logprobs_mode");
    let mut elsewhere = as_elsewhere(honest.as_array().unwrap());
    for chunk in &mut elsewhere {
        chunk.as_object_mut().unwrap().remove("logprobs_mode");
    }
    assert_eq!(by_ranks(&body, &Value::from(elsewhere.clone())).await, Verdict::Pass);
    for chunk in &mut elsewhere {
        chunk["logprobs_mode"] = json!("raw");
    }
    let named = by_ranks(&body, &Value::from(elsewhere)).await;
    assert!(matches!(named, Verdict::Reject(_)), "the control: {named}");
}

#[tokio::test]
async fn a_prompt_that_is_repeated_must_be_the_one_that_was_sent() {
    let site = site(common::options());
    let verifier = common::verifier(&site.served);
    for form in TEXTS {
        let body = form.body(json!({"echo": true, "prompt": "hello"}));
        let honest = ask(&site, &body).await;
        assert_eq!(verdict(&verifier, &body, &honest).await, Verdict::Pass, "{form:?}");
        let mut sent = honest.clone();
        let first = form.part(&mut sent, 0);
        let text = first["text"].as_str().unwrap().replacen("hello", "hullo", 1);
        first["text"] = text.into();
        expect(&verdict(&verifier, &body, &sent).await, Reason::TextMismatch, "another prompt");
        let mut sent = honest.clone();
        form.part(&mut sent, 0)["logprobs"]["tokens"][1] = json!("u");
        expect(&verdict(&verifier, &body, &sent).await, Reason::LogprobMismatch, "another token");
    }
    let body = TextStream.body(json!({"echo": true}));
    let mut sent = ask(&site, &body).await;
    sent.as_array_mut().unwrap().remove(0);
    let verdict = verdict(&verifier, &body, &sent).await;
    assert!(matches!(verdict, Verdict::Reject(_)), "{verdict}");
}

#[tokio::test]
async fn what_is_reported_of_a_prompt_is_true() {
    let site = site(common::options());
    let verifier = common::verifier(&site.served);
    let asked = json!({"prompt_logprobs": 2, "max_tokens": 9, "return_token_ids": true,
        "proof": {"scheme": "residue-v1", "nonce": NONCE}});
    for body in [chat(asked.clone()), completion(asked)] {
        let honest = ask(&site, &body).await;
        assert_eq!(verdict(&verifier, &body, &honest).await, Verdict::Pass);
        type Change = fn(&mut Value);
        let changes: [(&str, Change); 5] = [
            ("value", |entry| entry["logprob"] = json!(-0.25)),
            ("rank", |entry| entry["rank"] = (entry["rank"].as_u64().unwrap() % 200 + 1).into()),
            ("text", |entry| entry["decoded_token"] = json!("lies")),
            ("field", |entry| entry["note"] = json!("lies")),
            ("no value", |entry| drop(remove(entry, "logprob"))),
        ];
        for (name, change) in changes {
            let mut sent = honest.clone();
            let is_chat = body.get("messages").is_some();
            let around = if is_chat { &mut sent } else { &mut sent["choices"][0] };
            let place = around["prompt_logprobs"][3].as_object_mut().unwrap();
            change(place.values_mut().last().unwrap());
            expect(&verdict(&verifier, &body, &sent).await, Reason::LogprobMismatch, name);
        }
    }
    for form in TEXTS {
        let body = form.body(json!({"echo": true, "prompt": "hello"}));
        let honest = ask(&site, &body).await;
        for list in ["token_logprobs", "top_logprobs"] {
            let mut sent = honest.clone();
            let value = &mut form.part(&mut sent, 0)["logprobs"][list][2];
            match value {
                Value::Object(map) => *map.values_mut().last().unwrap() = json!(-0.25),
                value => *value = json!(-0.25),
            }
            expect(&verdict(&verifier, &body, &sent).await, Reason::LogprobMismatch, list);
        }
    }
}

#[tokio::test]
async fn usage_that_was_asked_for_is_there_and_right() {
    let site = site(common::options());
    let verifier = common::verifier(&site.served);
    for form in STREAMS {
        let body = form.body(json!({"stream_options": {"include_usage": true}}));
        let honest = ask(&site, &body).await;
        assert_eq!(verdict(&verifier, &body, &honest).await, Verdict::Pass);
        let mut sent = honest.clone();
        let last = sent.as_array().unwrap().len() - 1;
        sent[last]["usage"]["completion_tokens"] = json!(TOKENS - 1);
        expect(&verdict(&verifier, &body, &sent).await, Reason::BadStream, "false usage");
        let mut sent = honest.clone();
        sent.as_array_mut().unwrap().pop();
        expect(&verdict(&verifier, &body, &sent).await, Reason::BadStream, "no usage");
    }
}

#[tokio::test]
async fn what_the_request_left_open_is_unscored_and_not_passed() {
    let site = site(common::options());
    let verifier = common::verifier(&site.served);
    for form in ALL {
        let without = [
            (json!({"proof": {"scheme": "residue-v1"}}), "proof.nonce"),
            (json!({"max_tokens": 0, "echo": true}), "no rows to check"),
        ];
        for (extra, words) in without {
            if form.is_chat() && extra["echo"] == true {
                continue;
            }
            let body = form.body(extra);
            let sent = ask(&site, &body).await;
            let verdict = verdict(&verifier, &body, &sent).await;
            let Verdict::Unscored(why) = &verdict else { panic!("{form:?}: {verdict}") };
            assert!(why.contains(words), "{why}");
            // It is rejected all the same where it lies.
            let mut sent = sent.clone();
            let body_of = if form.is_stream() { &mut sent[0] } else { &mut sent };
            body_of["model"] = json!("gpt");
            let verdict = self::verdict(&verifier, &body, &sent).await;
            expect(&verdict, Reason::BadStream, "another model");
        }
    }
    let body = ChatWhole.body(json!({"return_token_ids": false}));
    let sent = ask(&site, &body).await;
    let verdict = verdict(&verifier, &body, &sent).await;
    assert!(matches!(&verdict, Verdict::Unscored(why) if why.contains("return_token_ids")));
}

#[tokio::test]
async fn where_an_answer_ends_that_has_no_limit_is_known_to_its_server_alone() {
    let site = site(common::options());
    let mut verifier = common::verifier(&site.served);
    let greedy = json!({
        "temperature": 0, "return_token_ids": true, "logprobs": true, "logprobs_mode": "scaled",
    });
    let limited = chat(greedy);
    let mut sent = ask(&site, &limited).await;
    assert_eq!(verdict(&verifier, &limited, &sent).await, Verdict::Pass);
    let mut body = limited.clone();
    remove(&mut body, "max_tokens");
    let is_unknown =
        |verdict: Verdict| matches!(verdict, Verdict::Unscored(why) if why.contains("max_tokens"));
    // A server of a smaller context cuts here.
    assert!(is_unknown(verdict(&verifier, &body, &sent).await));
    // That an answer ended by itself can be told from its ids.
    let mut ended = sent.clone();
    ended["choices"][0]["finish_reason"] = json!("stop");
    expect(&verdict(&verifier, &body, &ended).await, Reason::EarlyEnd, "no end token");
    // A server of a larger context goes on where ours would end.
    let prompt = sent["usage"]["prompt_tokens"].as_u64().unwrap();
    verifier.context_max = usize::try_from(prompt).unwrap() + 6;
    sent["choices"][0]["finish_reason"] = json!("stop");
    assert!(is_unknown(verdict(&verifier, &body, &sent).await));
}

#[test]
fn a_line_that_cannot_be_read_is_a_rejection_of_that_line() {
    let nested = |depth: usize| {
        let (open, close) = ("[".repeat(depth), "]".repeat(depth));
        format!(r#"{{"request": {{}}, "chunks": [{{"choices": {open}{close}}}]}}"#)
    };
    assert!(Capture::parse(nested(100).as_bytes()).is_ok());
    for line in [
        nested(126),
        nested(100_000),
        "{".into(),
        "\u{1b}[2J".into(),
        "[]".into(),
        r#"{"request": {}}"#.into(),
    ] {
        let rejection = Capture::parse(line.as_bytes()).unwrap_err();
        assert_eq!(rejection.reason, Reason::BadStream, "{rejection}");
        assert!(rejection.what.len() < 300);
    }
    assert!(Capture::parse(b"{\"request\": \"\xff\"}").is_err());
}
