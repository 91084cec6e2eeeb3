//! Reads an answer as Targon's validators 4.2 to 4.4 do (protocol 1.4 and 5.4): one token a chunk,
//! named by its id. It is pure: events with their times go in, and tokens and what was left out
//! come out.

use crate::validator::query::Arrival;
use serde_json::Value;
use std::time::Duration;

/// How a token is named whose id counts.
const ID_PREFIX: &str = "token_id:";
/// What the original takes for a chunk of a chat that says nothing of its token.
const UNKNOWN_LOGPROB: f64 = -100.0;

/// A token of an answer.
#[derive(Clone, PartialEq, Debug)]
pub struct StreamedToken {
    /// What the reader sees of it.
    pub text: String,
    /// Its id, where it was named.
    pub id: Option<u32>,
    /// Its reported log-probability.
    pub logprob: f64,
    /// Its weight value (Targon 4.0 and 4.1).
    pub powv: Option<i64>,
    /// When it came, since the request was sent.
    pub at: Duration,
}

/// What a validator has after it has read a stream.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct StreamReading {
    /// The tokens that count.
    pub tokens: Vec<StreamedToken>,
    /// When the first text came, whether its token counts or not.
    pub first_text: Option<Duration>,
    /// Chunks from the first text on that are left out, because nothing names their token.
    pub unnamed: usize,
    /// Tokens beyond the first of a chunk, which are never looked at.
    pub crowded: usize,
    /// The number of the chunk without a choice, at which the original gives the answer up.
    pub without_choice: Option<usize>,
}

impl StreamReading {
    /// Reads the events of a stream.
    pub fn of(arrivals: &[Arrival]) -> Self {
        let mut reading = Self::default();
        for (number, arrival) in arrivals.iter().enumerate() {
            let choice = &arrival.chunk["choices"][0];
            if choice.is_null() {
                reading.without_choice = Some(number);
                break;
            }
            reading.take(choice, arrival.at);
        }
        reading
    }

    fn take(&mut self, choice: &Value, at: Duration) {
        let is_chat = choice.get("delta").is_some();
        let text = if is_chat { &choice["delta"]["content"] } else { &choice["text"] };
        let text = text.as_str().unwrap_or_default();
        if self.first_text.is_none() {
            if text.is_empty() {
                return;
            }
            self.first_text = Some(at);
        }
        let logprobs = &choice["logprobs"];
        let (name, logprob, more) = match is_chat {
            true => {
                let content = &logprobs["content"];
                (&content[0]["token"], &content[0]["logprob"], content)
            }
            false => (&logprobs["tokens"][0], &logprobs["token_logprobs"][0], &logprobs["tokens"]),
        };
        self.crowded += more.as_array().map_or(0, |all| all.len().saturating_sub(1));
        let id = name.as_str().and_then(id);
        if id.is_none() && !(is_chat && logprobs.is_null()) {
            self.unnamed += 1;
            return;
        }
        self.tokens.push(StreamedToken {
            text: text.to_owned(),
            id,
            logprob: logprob.as_f64().unwrap_or(UNKNOWN_LOGPROB),
            powv: choice["powv"].as_i64(),
            at,
        });
    }

    /// The longest time without a token, up to `ended`: what a validator waits for at most.
    pub fn longest_gap(arrivals: &[Arrival], ended: Duration) -> Duration {
        let times = arrivals.iter().map(|a| a.at).chain([ended]);
        let (longest, _) = times.fold((Duration::ZERO, Duration::ZERO), |(longest, last), at| {
            (longest.max(at.saturating_sub(last)), at)
        });
        longest
    }
}

fn id(name: &str) -> Option<u32> {
    name.strip_prefix(ID_PREFIX)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn reading(chunks: &[Value]) -> StreamReading {
        let at = |(ms, chunk): (u64, &Value)| Arrival {
            at: Duration::from_millis(ms),
            chunk: json!({"choices": [chunk]}),
        };
        StreamReading::of(&(1..).zip(chunks).map(at).collect::<Vec<_>>())
    }

    fn chat(text: &str, name: &str) -> Value {
        let logprobs = json!({"content": [{"token": name, "logprob": -0.5}]});
        json!({"delta": {"content": text}, "logprobs": logprobs})
    }

    #[test]
    fn tokens_count_from_the_first_text_on_if_they_are_named() {
        let role = json!({"delta": {"role": "assistant", "content": ""}, "logprobs": null});
        let silent = json!({"delta": {"content": "x"}, "logprobs": null});
        let read = reading(&[
            role,
            chat("", "token_id:1"),
            chat("a", "a"),
            chat("b", "token_id:7"),
            silent,
            chat("", "token_id:9"),
        ]);
        let ids: Vec<Option<u32>> = read.tokens.iter().map(|t| t.id).collect();
        assert_eq!(ids, [Some(7), None, Some(9)]);
        assert_eq!(read.tokens[1].logprob, UNKNOWN_LOGPROB);
        assert_eq!((read.unnamed, read.first_text), (1, Some(Duration::from_millis(3))));
    }

    #[test]
    fn completions_are_read_where_their_lists_are() {
        let logprobs = json!({"tokens": ["token_id:5", "token_id:6"], "token_logprobs": [-1, -2]});
        let chunk = json!({"text": "ab", "logprobs": logprobs, "powv": -3});
        let read = reading(&[chunk, json!({"text": "c", "logprobs": null})]);
        let [token] = read.tokens.as_slice() else { panic!("{read:?}") };
        assert_eq!((token.id, token.logprob, token.powv), (Some(5), -1.0, Some(-3)));
        assert_eq!((read.crowded, read.unnamed), (1, 1));
        for name in ["token_id:", "token_id:-1", "token_id:4294967296", "token_id: 3"] {
            assert_eq!(id(name), None, "{name}");
        }
    }

    #[test]
    fn a_chunk_without_choice_ends_it() {
        let usage = Arrival { at: Duration::ZERO, chunk: json!({"choices": [], "usage": {}}) };
        let read = StreamReading::of(&[usage]);
        assert_eq!((read.without_choice, read.tokens.len()), (Some(0), 0));
        assert_eq!(StreamReading::of(&[]), StreamReading::default());
    }

    #[test]
    fn the_longest_silence_counts_to_the_end() {
        let at = |ms| Arrival { at: Duration::from_millis(ms), chunk: Value::Null };
        let gap = |end| StreamReading::longest_gap(&[at(10), at(300)], Duration::from_millis(end));
        assert_eq!((gap(310).as_millis(), gap(900).as_millis()), (290, 600));
    }
}
