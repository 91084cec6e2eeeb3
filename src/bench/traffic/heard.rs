//! Records one answer of a server: when its chunks were read, and how many tokens the server says
//! it has.

use serde_json::Value;
use std::future::Future;
use std::pin::Pin;

/// A request as it is sent.
#[derive(Clone, PartialEq, Debug)]
pub struct LoadRequest {
    /// Path of the request below the server's URL.
    pub path: &'static str,
    /// The body, which asks for a stream.
    pub body: Value,
}

/// What a request becomes.
pub type Answering = Pin<Box<dyn Future<Output = Heard> + Send>>;

/// Sends a request and times its answer.
pub trait Transport: Send + Sync {
    /// Sends the request at once.
    fn ask(&self, asked: LoadRequest) -> Answering;
}

/// A chunk of an answer.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Chunk {
    /// Seconds since the request was sent, at the read.
    pub at: f64,
    /// It has a choice: it stands for a token, once text has come.
    pub has_choice: bool,
    /// Whether it has something for the reader: text, thoughts or the call of a tool.
    pub has_text: bool,
}

/// Tokens as the server counts them.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct TokenUsage {
    /// Tokens of the prompt.
    pub prompt: u64,
    /// Of those, found in a cache.
    pub cached: u64,
    /// Tokens of the answer.
    pub completion: u64,
}

/// What came of a request.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct Heard {
    /// Its chunks, in the order in which they were read.
    pub chunks: Vec<Chunk>,
    /// What the server says of its tokens.
    pub usage: Option<TokenUsage>,
    /// Seconds from the request to the end.
    pub ended: f64,
    /// Tokens a second as a validator counts them.
    pub validator_tps: f64,
    /// Why it did not end well: a kind in one word or two.
    pub failure: Option<String>,
}

impl Chunk {
    /// Reads a chunk that was received at `at`, in seconds.
    pub fn read(at: f64, chunk: &Value) -> Self {
        let choice = &chunk["choices"][0];
        let delta = &choice["delta"];
        let texts = [
            &delta["content"],
            &delta["reasoning"],
            &delta["reasoning_content"],
            &delta["refusal"],
            &choice["text"],
        ];
        let has_text = texts.iter().any(|t| t.as_str().is_some_and(|t| !t.is_empty()));
        let has_calls = delta["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty());
        Self { at, has_choice: !choice.is_null(), has_text: has_text || has_calls }
    }
}

impl TokenUsage {
    /// Reads it off a chunk that has it.
    pub fn read(chunk: &Value) -> Option<Self> {
        let usage = &chunk["usage"];
        Some(Self {
            prompt: usage["prompt_tokens"].as_u64()?,
            cached: usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0),
            completion: usage["completion_tokens"].as_u64()?,
        })
    }
}

impl Heard {
    /// When each token came: chunks with a choice, from the first text on.
    pub(super) fn tokens(&self) -> impl Iterator<Item = f64> + '_ {
        let chunks = self.chunks.iter().filter(|c| c.has_choice);
        chunks.skip_while(|c| !c.has_text).map(|c| c.at)
    }

    /// Tokens of the answer, as the server counts them; else its chunks.
    pub(super) fn count(&self) -> u64 {
        self.usage.map_or_else(|| self.tokens().count() as u64, |u| u.completion)
    }

    /// Seconds between each token's chunk and the next.
    pub(super) fn gaps(&self) -> impl Iterator<Item = f64> + '_ {
        self.tokens().zip(self.tokens().skip(1)).map(|(from, to)| to - from)
    }

    /// Tokens that a chunk stands for: servers may put several into one.
    pub(super) fn tokens_per_chunk(&self) -> f64 {
        self.count() as f64 / self.tokens().count().max(1) as f64
    }

    /// The longest wait for a chunk, that for the first and for the end included.
    pub(super) fn worst_gap(&self) -> f64 {
        let times = self.chunks.iter().map(|c| c.at).chain([self.ended]);
        let gap = |before: &mut f64, at: f64| Some(at - std::mem::replace(before, at));
        times.scan(0.0, gap).fold(0.0, f64::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn chunks_and_usage_are_read_of_both_endpoints() {
        let role = Chunk::read(0.1, &json!({"choices": [{"delta": {"role": "x", "content": ""}}]}));
        assert!(role.has_choice && !role.has_text);
        assert!(Chunk::read(0.2, &json!({"choices": [{"delta": {"content": "a"}}]})).has_text);
        assert!(Chunk::read(0.2, &json!({"choices": [{"text": "a"}]})).has_text);
        for delta in [
            json!({"reasoning": "a"}),
            json!({"reasoning_content": "a"}),
            json!({"tool_calls": [{"index": 0}]}),
        ] {
            assert!(Chunk::read(0.2, &json!({"choices": [{"delta": delta}]})).has_text, "{delta}");
        }
        let empty = json!({"choices": [{"delta": {"reasoning": null, "tool_calls": []}}]});
        assert!(!Chunk::read(0.2, &empty).has_text);
        let last = json!({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 2}}});
        assert!(!Chunk::read(0.3, &last).has_choice);
        assert_eq!(
            TokenUsage::read(&last),
            Some(TokenUsage { prompt: 5, cached: 2, completion: 7 })
        );
        assert_eq!(TokenUsage::read(&json!({"usage": null})), None);
        assert!(!Chunk::read(0.0, &json!([1])).has_choice);
    }

    #[test]
    fn the_worst_gap_counts_both_ends() {
        let chunk = |at: f64, has_text: bool| Chunk { at, has_choice: true, has_text };
        let chunks = vec![chunk(0.5, false), chunk(1.5, true), chunk(1.75, false)];
        let heard = Heard { chunks, ended: 2.0, ..Heard::default() };
        assert_eq!((heard.worst_gap(), heard.count()), (1.0, 2));
        assert_eq!(heard.tokens().collect::<Vec<_>>(), [1.5, 1.75]);
        assert_eq!(Heard { ended: 3.0, ..Heard::default() }.worst_gap(), 3.0);
    }
}
