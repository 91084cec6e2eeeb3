//! Applies the rules of Targon 4.4 that need no weights of the model: stream, names of tokens,
//! lengths and times (protocol 4.3, 4.4 and 5.4).

use super::reading::StreamReading;
use crate::doctor::{Finding, Level};
use crate::validator::query::{Arrival, QueryError, QueryFault, Streamed};
use crate::validator::round::ask::QuerySampling;
use crate::validator::round::measure::{is_not_streamed, said_error, timing};
use std::time::Duration;

/// How long a validator waits between two reads (protocol 5.4).
pub const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// A silence from which on a busier moment would end the answer.
const GAP_WARNING: Duration = Duration::from_secs(2);
/// Tokens of the shortest answer that counts.
const TOKENS_MIN: usize = 3;

/// An answer, and what was asked for.
#[derive(Clone, Copy)]
pub struct ReceivedAnswer<'a> {
    /// What findings are about: `chat` or `completion`.
    pub topic: &'a str,
    /// The answer as it was received.
    pub streamed: &'a Streamed,
    /// The answer as a validator reads it.
    pub reading: &'a StreamReading,
    /// How tokens had to be drawn.
    pub sampling: QuerySampling,
}

impl ReceivedAnswer<'_> {
    fn finding(&self, rule: &str, level: Level, fact: impl Into<String>) -> Finding {
        Finding::new(format!("{}, {rule}", self.topic), level, fact)
    }

    fn arrivals(&self) -> &[Arrival] {
        &self.streamed.arrivals
    }

    /// Every rule that needs no weights. Where the stream itself is refused, no other rule is
    /// reached.
    pub fn findings(&self) -> Vec<Finding> {
        if let Some(refused) = self.refused() {
            return vec![refused];
        }
        let mut findings = vec![self.stream(), self.names(), self.length()];
        findings.extend(self.crowded());
        findings.push(self.pace());
        findings.push(self.streaming());
        findings.push(self.certainty());
        findings.push(self.weight_values());
        findings
    }

    /// Why the response has no answer at all: `BAD_STREAM`.
    fn refused(&self) -> Option<Finding> {
        let rule = "BAD_STREAM";
        if let Err(e) = &self.streamed.outcome {
            let level = if e.fault() == QueryFault::Own { Level::Warning } else { Level::Fault };
            return Some(self.finding(rule, level, e.to_string()).hint(hint(e)));
        }
        if let Some(said) = said_error(self.arrivals()) {
            let fact = format!("the stream ends in an error: {said}");
            return Some(self.finding(rule, Level::Fault, fact).hint("the miner's log says more"));
        }
        let number = self.reading.without_choice?;
        let fact = format!("chunk {number} has no choice, at which the original breaks off");
        Some(self.finding(rule, Level::Fault, fact).hint(
            "send usage only where `stream_options.include_usage` asks for it: 4.2 to 4.4 do not",
        ))
    }

    fn stream(&self) -> Finding {
        let (chunks, count) = (self.arrivals().len(), self.reading.tokens.len());
        let fact = format!("{chunks} chunks to [DONE], {count} tokens in them");
        self.finding("stream", Level::Ok, fact)
    }

    fn names(&self) -> Finding {
        let StreamReading { tokens, unnamed, .. } = self.reading;
        let silent = tokens.iter().filter(|t| t.id.is_none()).count();
        if unnamed + silent == 0 {
            let fact = "every token is named by its id and has a log-probability";
            return self.finding("token ids", Level::Ok, fact);
        }
        let fact = format!(
            "{unnamed} chunks name no `token_id:` and are left out, {silent} have no \
             log-probability"
        );
        self.finding("token ids", Level::Fault, fact).hint(
            "answer with log-probabilities and names of ids: `serve` with a wallet does, without \
             one by --return-tokens-as-token-ids, vLLM by the same flag",
        )
    }

    fn length(&self) -> Finding {
        let (count, most) = (self.reading.tokens.len(), self.sampling.max_tokens as usize);
        let fact = format!("{count} tokens, asked for at most {most}");
        if count < TOKENS_MIN {
            return self
                .finding("TOO_SHORT", Level::Fault, fact)
                .hint(format!("an answer of fewer than {TOKENS_MIN} tokens is a miss"));
        }
        match count > most {
            true => {
                let hint = "stop at `max_tokens`: the end token counts as a token";
                self.finding("TOO_LONG", Level::Fault, fact).hint(hint)
            }
            false => self.finding("length", Level::Ok, fact),
        }
    }

    fn crowded(&self) -> Option<Finding> {
        let more = self.reading.crowded;
        (more > 0).then(|| {
            let fact = format!("{more} tokens came behind another in one chunk, and do not count");
            self.finding("chunks", Level::Warning, fact).hint("send each token in its own chunk")
        })
    }

    /// Speed is what counts of an answer that passes.
    fn pace(&self) -> Finding {
        let timing = timing(self.arrivals(), self.streamed.ended, self.sampling.max_tokens);
        let gap = StreamReading::longest_gap(self.arrivals(), self.streamed.ended);
        let fact = format!(
            "{:.1} tokens/s, first text after {:.3} s, whole answer {:.3} s, longest silence \
             {:.3} s",
            timing.tps,
            timing.first_token,
            timing.total,
            gap.as_secs_f64()
        );
        match gap > GAP_WARNING {
            true => self.finding("speed", Level::Warning, fact).hint(format!(
                "a validator gives an answer up after {} s without a byte: serve fewer requests at \
                 once, or a smaller model",
                READ_TIMEOUT.as_secs()
            )),
            false => self.finding("speed", Level::Ok, fact),
        }
    }

    fn streaming(&self) -> Finding {
        match is_not_streamed(self.arrivals(), self.streamed.ended) {
            true => self
                .finding("BAD_STREAM", Level::Fault, "most of the answer came at its very end")
                .hint("send each token when it is drawn; a proxy in between must not buffer"),
            false => self.finding("streaming", Level::Ok, "tokens came while they were drawn"),
        }
    }

    /// Reported log-probabilities that are exactly zero: `OVERFIT`, if too many are.
    fn certainty(&self) -> Finding {
        let tokens = &self.reading.tokens;
        let zeros = tokens.iter().filter(|t| t.id.is_some() && t.logprob == 0.0).count();
        let share = zeros as f64 / tokens.len().max(1) as f64;
        let most = 1.0 - (0.5 * self.sampling.temperature).min(0.6);
        let fact = format!(
            "{zeros} of {} log-probabilities are exactly 0; from {:.0} % on they are too good at \
             temperature {:.2}",
            tokens.len(),
            100.0 * most,
            self.sampling.temperature
        );
        match share >= most {
            true => self
                .finding("OVERFIT", Level::Fault, fact)
                .hint("report log-probabilities after temperature, as drawn from"),
            false => self.finding("certainty", Level::Ok, fact),
        }
    }

    fn weight_values(&self) -> Finding {
        let tokens = &self.reading.tokens;
        let with = tokens.iter().filter(|t| t.powv.is_some()).count();
        let fact = format!("{with} of {} tokens have a weight value", tokens.len());
        match with == tokens.len() {
            true => self.finding("powv", Level::Ok, fact),
            false => self
                .finding("powv", Level::Note, format!("{fact}, as only 4.0 and 4.1 want"))
                .hint("4.2 to 4.4 ask for none; this program's `serve` sends them always"),
        }
    }
}

/// What to do where a miner gives no answer.
pub fn hint(e: &QueryError) -> &'static str {
    let status = match e {
        QueryError::Status { status, body, .. } => return refusal(status.as_u16(), body),
        QueryError::Network { fault, .. } => *fault,
        QueryError::Stream { .. } => {
            return "send server-sent events, one JSON chunk each, and `data: [DONE]` at the end";
        }
    };
    match status {
        QueryFault::Own => "this machine lacks something; the miner is not the cause",
        QueryFault::Unreachable => "is it running, and is its port open in firewall and router?",
        QueryFault::Late => "it is overloaded, or the first token takes too long: see its /metrics",
        _ => "is this an HTTP server? a proxy in between may break the connection",
    }
}

fn refusal(status: u16, body: &str) -> &'static str {
    let by_words = [
        ("Epistula version", "this is a signed listener: name a wallet by --wallet.name"),
        ("not intended for self", "name the miner's own hotkey by --hotkey"),
        ("not in metagraph", "sign with a hotkey that is registered on the miner's subnet"),
        (
            "Stake below minimum",
            "sign with more stake, or start it with --no-force-validator-permit",
        ),
        ("too stale", "the clocks differ by seconds: synchronise both"),
        ("Signature Mismatch", "a proxy changed the body, or the miner expects another hotkey"),
    ];
    if let Some((_, hint)) = by_words.iter().find(|(words, _)| body.contains(words)) {
        return hint;
    }
    match status {
        400 | 422 => {
            "the miner refuses a field of the original's requests, or the prompt is too long"
        }
        401 | 403 => "a key of the open API is missing: --api-key",
        404 => "the miner does not serve this model, or has no such route",
        429 | 503 => "it is full: a validator counts this as a miss",
        _ => "the miner failed: its log says why",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const SAMPLING: QuerySampling = QuerySampling { seed: 1, temperature: 0.5, max_tokens: 100 };

    /// An honest stream of `count` tokens, one each 10 ms.
    fn honest(count: u64) -> Vec<Arrival> {
        let chunk = |i: u64| {
            let logprobs =
                json!({"content": [{"token": format!("token_id:{i}"), "logprob": -0.1}]});
            json!({"choices": [{"delta": {"content": "x"}, "logprobs": logprobs, "powv": 3}]})
        };
        (1..=count)
            .map(|i| Arrival { at: Duration::from_millis(10 * i), chunk: chunk(i) })
            .collect()
    }

    fn check(arrivals: Vec<Arrival>, outcome: Result<(), QueryError>) -> Vec<Finding> {
        let ended = arrivals.last().map(|a| a.at).unwrap_or_default();
        let streamed = Streamed { arrivals, ended, outcome };
        let reading = StreamReading::of(&streamed.arrivals);
        let answered = ReceivedAnswer {
            topic: "chat",
            streamed: &streamed,
            reading: &reading,
            sampling: SAMPLING,
        };
        answered.findings()
    }

    /// The rules that are broken; each says what to do.
    fn broken(arrivals: Vec<Arrival>) -> Vec<String> {
        let bad = check(arrivals, Ok(())).into_iter().filter(|f| f.level > Level::Ok);
        bad.map(|f| {
            assert!(f.hint.is_some(), "{f:?}");
            f.topic.strip_prefix("chat, ").unwrap().to_owned()
        })
        .collect()
    }

    fn changed(count: u64, change: impl Fn(usize, &mut Arrival)) -> Vec<Arrival> {
        let mut arrivals = honest(count);
        arrivals.iter_mut().enumerate().for_each(|(i, arrival)| change(i, arrival));
        arrivals
    }

    #[test]
    fn an_honest_answer_breaks_nothing() {
        assert_eq!(broken(honest(80)), Vec::<String>::new());
        let findings = check(honest(80), Ok(()));
        let speed = findings.iter().find(|f| f.topic == "chat, speed").unwrap();
        assert!(speed.fact.starts_with("100.0 tokens/s, first text after 0.010 s"), "{speed:?}");
    }

    #[test]
    fn each_fault_breaks_its_rule() {
        let choice = |a: &mut Arrival, key: &str, to: Value| a.chunk["choices"][0][key] = to;
        let cases: [(&str, Vec<Arrival>); 9] = [
            ("TOO_SHORT", honest(2)),
            ("TOO_LONG", honest(101)),
            ("BAD_STREAM", changed(80, |_, a| a.at = Duration::from_secs(1))),
            ("speed", changed(20, |i, a| a.at = Duration::from_secs(3 * i as u64))),
            (
                "powv",
                changed(20, |i, a| {
                    if i == 7 {
                        choice(a, "powv", Value::Null)
                    }
                }),
            ),
            (
                "token ids",
                changed(20, |i, a| {
                    if i == 7 {
                        choice(a, "logprobs", Value::Null)
                    }
                }),
            ),
            (
                "OVERFIT",
                changed(20, |i, a| {
                    if i > 2 {
                        a.chunk["choices"][0]["logprobs"]["content"][0]["logprob"] = 0.0.into();
                    }
                }),
            ),
            (
                "chunks",
                changed(20, |i, a| {
                    if i == 7 {
                        let content = &mut a.chunk["choices"][0]["logprobs"]["content"];
                        let twice = content[0].clone();
                        content.as_array_mut().unwrap().push(twice);
                    }
                }),
            ),
            (
                "BAD_STREAM",
                changed(20, |i, a| {
                    if i == 19 {
                        a.chunk["choices"] = json!([]);
                    }
                }),
            ),
        ];
        for (rule, arrivals) in cases {
            assert_eq!(broken(arrivals), [rule]);
        }
        let said = json!({"error": {"message": "no room"}});
        let mut arrivals = honest(5);
        arrivals.push(Arrival { at: Duration::from_secs(1), chunk: said });
        let [refused] = check(arrivals, Ok(())).try_into().unwrap();
        assert!(refused.fact.ends_with("no room"), "{refused:?}");
    }

    #[test]
    fn refusals_are_told_with_advice() {
        let status = |status: u16, body: &str| QueryError::Status {
            url: "u".into(),
            status: reqwest::StatusCode::from_u16(status).unwrap(),
            body: body.into(),
        };
        let network = |fault| QueryError::Network { url: "u".into(), what: "w".into(), fault };
        for (e, level, words) in [
            (status(401, "Signer not in metagraph"), Level::Fault, "registered"),
            (status(400, "Unknown Epistula version"), Level::Fault, "--wallet.name"),
            (status(503, ""), Level::Fault, "a miss"),
            (network(QueryFault::Late), Level::Fault, "overloaded"),
            (network(QueryFault::Own), Level::Warning, "not the cause"),
        ] {
            let [refused] = check(honest(5), Err(e)).try_into().unwrap();
            assert_eq!((refused.topic.as_str(), refused.level), ("chat, BAD_STREAM", level));
            assert!(refused.hint.as_ref().unwrap().contains(words), "{refused:?}");
        }
    }
}
