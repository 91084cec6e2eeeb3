//! Makes answers that no prover would send. Every byte comes from the peer, so each of them must be
//! refused.

use super::trial::relink;
use crate::intake::proof::chunk;
use crate::proof::codec::from_hex;
use crate::verify::Rejection;
use crate::verify::answer::Answer;
use crate::wire::openai::response::{ProofChunk, ProofEnd};
use serde_json::{Value, json};

/// One way to be malformed.
pub(super) enum Variant {
    /// After decoding.
    Decoded(fn(&mut Answer)),
    /// In the response itself, of which this is the choice.
    Sent(fn(&mut Value)),
    /// In the chunks of a stream, which a client reads as they are.
    Received(fn(&mut Vec<Value>)),
}

/// An answer that was changed.
pub(super) enum Changed {
    /// One that can be read, or why it cannot.
    Answer(Result<Box<Answer>, Rejection>),
    /// A stream.
    Chunks(Vec<Value>),
}

impl Variant {
    /// The malformed answer, of which `chunks` are the stream.
    pub(super) fn apply(&self, answer: &Answer, chunks: &[Value]) -> Changed {
        match self {
            Variant::Decoded(change) => {
                let mut answer = answer.clone();
                change(&mut answer);
                Changed::Answer(Ok(Box::new(answer)))
            }
            Variant::Sent(change) => {
                let mut choice = choice_of(answer);
                change(&mut choice);
                let answer = Answer::of_response(&json!({ "choices": [choice] }), 0);
                Changed::Answer(answer.map(Box::new))
            }
            Variant::Received(change) => {
                let mut chunks = chunks.to_vec();
                change(&mut chunks);
                Changed::Chunks(chunks)
            }
        }
    }
}

/// All of them, by name.
pub(super) fn variants() -> Vec<(&'static str, Variant)> {
    let decoded = DECODED.iter().map(|(name, change)| (*name, Variant::Decoded(*change)));
    let sent = SENT.iter().map(|(name, change)| (*name, Variant::Sent(*change)));
    let received = RECEIVED.iter().map(|(name, change)| (*name, Variant::Received(*change)));
    decoded.chain(sent).chain(received).collect()
}

type Decoded = fn(&mut Answer);
type Sent = fn(&mut Value);
type Received = fn(&mut Vec<Value>);

const DECODED: [(&str, Decoded); 23] = [
    ("data without its last byte", |a| {
        a.chunks[0].data.pop();
        rechain(a);
    }),
    ("data with a byte too many", |a| {
        a.chunks[0].data.push(0);
        rechain(a);
    }),
    ("data of no bytes", |a| {
        a.chunks[0].data.clear();
        rechain(a);
    }),
    ("data of a megabyte", |a| {
        a.chunks[0].data.resize(1 << 20, 7);
        rechain(a);
    }),
    ("data of the largest bytes", |a| {
        a.chunks[0].data.fill(0xff);
        rechain(a);
    }),
    ("huge chunk number", |a| a.chunks[0].index = u32::MAX),
    ("no chunks", |a| a.chunks.clear()),
    ("a chunk twice", |a| {
        let first = a.chunks[0].clone();
        a.chunks.push(first);
    }),
    ("a digest of zeros", |a| a.chunks[0].digest = [0; 32]),
    ("log-probability not a number", |a| a.logprobs[0] = Some(f64::NAN)),
    ("log-probability infinite", |a| a.logprobs[0] = Some(f64::INFINITY)),
    ("log-probability minus infinite", |a| a.logprobs[0] = Some(f64::NEG_INFINITY)),
    ("log-probability positive", |a| a.logprobs[0] = Some(1e300)),
    ("log-probabilities replaced by one number", |a| a.logprobs.fill(Some(-0.01))),
    ("log-probabilities of the tokens beside", |a| a.logprobs.rotate_left(1)),
    ("log-probabilities a little off", |a| {
        a.logprobs.iter_mut().flatten().for_each(|logprob| *logprob -= 1e-3);
    }),
    ("huge token", |a| a.ids[0] = u32::MAX),
    ("no tokens", |a| a.ids.clear()),
    ("no end", |a| a.end = None),
    ("end after a huge number of tokens", |a| change_end(a, |e| e.tokens = usize::MAX)),
    ("root of no digits", |a| change_end(a, |e| e.root.clear())),
    ("unknown scheme", |a| change_end(a, |e| e.scheme = "residue-v0".into())),
    ("hotkey that is none", |a| change_end(a, |e| e.hotkey = Some("5Hot\u{1f600}".into()))),
];

const SENT: [(&str, Sent); 16] = [
    ("base64 cut short", |c| {
        let data = c["proof"][0]["data"].as_str().unwrap_or_default();
        c["proof"][0]["data"] = data[..data.len().saturating_sub(1)].into();
    }),
    ("not base64", |c| c["proof"][0]["data"] = "%%%%".into()),
    ("data is null", |c| c["proof"][0]["data"] = Value::Null),
    ("data is a list", |c| c["proof"][0]["data"] = json!([1, 2, 3])),
    ("digest of three digits", |c| c["proof"][0]["digest"] = "abc".into()),
    ("digest of other characters", |c| c["proof"][0]["digest"] = "é".repeat(32).into()),
    ("negative chunk number", |c| c["proof"][0]["index"] = json!(-1)),
    ("chunk number beyond 32 bits", |c| c["proof"][0]["index"] = json!(1_u64 << 40)),
    ("chunk number 1e300", |c| c["proof"][0]["index"] = json!(1e300)),
    ("proof is a number", |c| c["proof"] = json!(7)),
    ("proof of empty objects", |c| c["proof"] = json!([{}, {}])),
    ("end is a list", |c| c["proof_end"] = json!([])),
    ("end after -1 tokens", |c| c["proof_end"]["tokens"] = json!(-1)),
    ("token beyond 32 bits", |c| c["token_ids"][0] = json!(1_u64 << 40)),
    ("negative token", |c| c["token_ids"][0] = json!(-1)),
    ("tokens are text", |c| c["token_ids"] = json!("1, 2, 3")),
];

const RECEIVED: [(&str, Received); 18] = [
    ("a chunk of another choice", |c| c.insert(1, lie(json!(1)))),
    ("a chunk of no choice", |c| c.insert(1, lie(Value::Null))),
    ("a chunk of choice text", |c| c.insert(1, lie(json!("0")))),
    ("a chunk beside the others", |c| c.insert(1, json!({"choices": [], "note": "lies"}))),
    ("a decoy before the choice", |c| {
        let real = c[1]["choices"].take();
        c[1]["choices"] = json!([lie(json!(1))["choices"][0], real[0]]);
    }),
    ("two choices of one number", |c| {
        let real = c[1]["choices"].take();
        c[1]["choices"] = json!([real[0], lie(json!(0))["choices"][0]]);
    }),
    ("text in a field of chats", |c| {
        let text = c[1]["choices"][0]["text"].take();
        c[1]["choices"][0]["delta"] = json!({ "content": text });
    }),
    ("text in a field of reasoning", |c| c[1]["choices"][0]["reasoning_content"] = json!("lies")),
    ("text in a field of its own", |c| c[1]["choices"][0]["note"] = json!("lies")),
    ("text moved to the next chunk", |c| move_text(c)),
    ("a decoy after the end", |c| c.push(lie(json!(0)))),
    ("a call", |c| c[1]["choices"][0]["tool_calls"] = json!([{}])),
    ("a call of a function", |c| c[1]["choices"][0]["tool_calls"] = call()),
    ("a call in place of the text", |c| {
        c[1]["choices"][0]["text"] = "".into();
        c[1]["choices"][0]["delta"] = json!({ "tool_calls": call() });
    }),
    ("another model", |c| c[1]["model"] = json!("gpt")),
    ("false usage", |c| c[1]["usage"] = json!({"prompt_tokens": 1, "completion_tokens": 1 << 20})),
    ("a log-probability unasked", |c| c[1]["choices"][0]["logprobs"] = json!({"refusal": ["x"]})),
    ("no finish reason", |c| {
        if let Some(last) = c.last_mut() {
            last["choices"][0]["finish_reason"] = Value::Null;
        }
    }),
];

/// A chunk that says what the model did not.
fn lie(index: Value) -> Value {
    json!({"choices": [{"index": index, "text": "lies", "delta": {"content": "lies"}}]})
}

/// A call that the model did not make.
fn call() -> Value {
    let function = json!({"name": "pay", "arguments": "{\"to\": \"me\"}"});
    json!([{"index": 0, "id": "call_1", "type": "function", "function": function}])
}

/// The text of the first chunk that has one, and of the next, in the next alone.
fn move_text(chunks: &mut [Value]) {
    let text = |chunk: &Value| chunk["choices"][0]["text"].as_str().unwrap_or_default().to_owned();
    for place in 1..chunks.len() {
        let (before, own) = (text(&chunks[place - 1]), text(&chunks[place]));
        if !before.is_empty() {
            chunks[place - 1]["choices"][0]["text"] = "".into();
            chunks[place]["choices"][0]["text"] = (before + &own).into();
            return;
        }
    }
}

fn rechain(answer: &mut Answer) {
    let root = answer.end.as_ref().and_then(|end| from_hex(&end.root).ok());
    if let Some(root) = root {
        relink(&root, answer);
    }
}

fn change_end(answer: &mut Answer, change: fn(&mut ProofEnd)) {
    if let Some(end) = &mut answer.end {
        change(end);
    }
}

/// The choice that a response carries `answer` in.
fn choice_of(answer: &Answer) -> Value {
    json!({
        "index": 0,
        "message": {"role": "assistant", "content": answer.text},
        "token_ids": answer.ids,
        "proof": answer.chunks.iter().map(chunk).collect::<Vec<ProofChunk>>(),
        "proof_end": answer.end,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::CANON;
    use crate::proof::commit::ChunkProof;

    fn answer() -> Answer {
        let end = ProofEnd {
            scheme: "residue-v1".into(),
            canon: CANON.into(),
            nonce: "01".repeat(32),
            model: "02".repeat(32),
            root: "03".repeat(32),
            tokens: 2,
            hotkey: None,
            signature: None,
        };
        let mut answer = Answer {
            ids: vec![4, 5],
            text: Some("ab".into()),
            logprobs: vec![Some(-0.5), Some(-0.7)],
            chunks: vec![ChunkProof { index: 0, data: vec![9; 16], digest: [0; 32] }],
            end: Some(end),
            ..Answer::default()
        };
        rechain(&mut answer);
        answer
    }

    #[test]
    fn an_answer_survives_the_way_and_every_variant_differs() {
        let answer = answer();
        let sent = Answer::of_response(&json!({ "choices": [choice_of(&answer)] }), 0).unwrap();
        assert_eq!((&sent.ids, &sent.text), (&answer.ids, &answer.text));
        assert_eq!((&sent.chunks, &sent.end), (&answer.chunks, &answer.end));
        let chunk = |text: &str| {
            json!({"choices": [{"index": 0, "text": text,
            "finish_reason": "length"}], "model": "m"})
        };
        let chunks = [chunk("a"), chunk("b")];
        for (name, variant) in variants() {
            match variant.apply(&answer, &chunks) {
                Changed::Answer(Ok(changed)) => {
                    assert_ne!(format!("{changed:?}"), format!("{answer:?}"), "{name}");
                }
                Changed::Answer(Err(_)) => {}
                Changed::Chunks(changed) => assert_ne!(changed, chunks, "{name}"),
            }
        }
    }
}
