//! Writes a level of load under the names of vLLM's result files, so that what reads those files
//! reads ours. Times of the summary are in milliseconds, those of single requests in seconds.
//!
//! Its first token is the first chunk, ours the first with text, which is never earlier.

use super::drive::Driven;
use super::heard::Heard;
use crate::bench::report::schema::LoadLevel;
use serde_json::{Map, Value, json};

/// The whole file: the summary, and a value or a list for each request that ended.
pub fn file(level: &LoadLevel, driven: &Driven) -> Map<String, Value> {
    let mut map = level.vllm.clone();
    let of = |value: fn(&Heard) -> Value| -> Value {
        driven.sent.iter().map(|sent| value(&sent.heard)).collect()
    };
    for (name, values) in [
        ("input_lens", of(|h| json!(h.usage.map_or(0, |u| u.prompt)))),
        ("output_lens", of(|h| json!(h.count()))),
        ("ttfts", of(|h| json!(h.tokens().next().unwrap_or(0.0)))),
        ("itls", of(|h| json!(h.gaps().collect::<Vec<_>>()))),
        ("errors", of(|h| json!(h.failure.as_deref().unwrap_or_default()))),
    ] {
        map.insert(name.into(), values);
    }
    map
}

/// The summary of a level.
pub(super) fn summary(level: &LoadLevel, driven: &Driven, model: &str) -> Map<String, Value> {
    let seconds = level.seconds.max(1e-9);
    let all = level.input_tokens + level.output_tokens;
    let rate = level.rate.map_or(json!("inf"), |rate| json!(rate));
    let mut map = Map::new();
    for (name, value) in [
        ("backend", json!("openai")),
        ("model_id", json!(model)),
        ("num_prompts", json!(level.sent)),
        ("request_rate", rate),
        ("burstiness", json!(1.0)),
        ("max_concurrency", json!(level.concurrency)),
        ("duration", json!(level.seconds)),
        ("completed", json!(level.completed)),
        ("failed", json!(level.sent - level.completed)),
        ("total_input_tokens", json!(level.input_tokens)),
        ("total_output_tokens", json!(level.output_tokens)),
        ("request_throughput", json!(level.completed as f64 / seconds)),
        ("request_goodput", json!(level.goodput)),
        ("output_throughput", json!(level.output_tokens as f64 / seconds)),
        ("total_token_throughput", json!(all as f64 / seconds)),
        ("max_output_tokens_per_s", json!(fullest_second(driven))),
        ("max_concurrent_requests", json!(most_at_once(driven))),
    ] {
        map.insert(name.into(), value);
    }
    for (name, quantiles) in [
        ("ttft", &level.first_token),
        ("tpot", &level.per_token),
        ("itl", &level.gap),
        ("e2el", &level.total),
    ] {
        let Some(q) = quantiles else { continue };
        for (kind, seconds) in [
            ("mean", Some(q.mean)),
            ("median", Some(q.p50)),
            ("std", q.sd),
            ("p50", Some(q.p50)),
            ("p90", Some(q.p90)),
            ("p95", Some(q.p95)),
            ("p99", Some(q.p99)),
        ] {
            map.insert(format!("{kind}_{name}_ms"), json!(seconds.map(|s| 1e3 * s)));
        }
    }
    map
}

/// Tokens of the fullest second, counted from the start of the load.
fn fullest_second(driven: &Driven) -> f64 {
    let mut seconds: Vec<f64> = Vec::new();
    for sent in &driven.sent {
        for at in sent.heard.tokens() {
            let second = (sent.at + at) as usize;
            if seconds.len() <= second {
                seconds.resize(second + 1, 0.0);
            }
            seconds[second] += sent.heard.tokens_per_chunk();
        }
    }
    seconds.into_iter().fold(0.0, f64::max)
}

/// Most requests that ran at one moment; those that were broken off are not known.
fn most_at_once(driven: &Driven) -> i64 {
    let times = driven.sent.iter().flat_map(|s| [(s.at, 1), (s.at + s.heard.ended, -1)]);
    let mut times: Vec<(f64, i64)> = times.collect();
    // One that begins when another ends runs after it.
    times.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let running = times.iter().scan(0, |running, (_, change)| {
        *running += change;
        Some(*running)
    });
    running.max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::schema::Client;
    use crate::bench::traffic::drive::{Load, TimedAnswer};
    use crate::bench::traffic::heard::{Chunk, TokenUsage};
    use crate::bench::traffic::tally::{Promise, level};

    #[test]
    fn a_file_has_the_peaks_and_a_value_for_each_request() {
        // Three tokens each, 0.25 s apart, of 2 tokens a chunk; the second fails at once.
        let answer = |at: f64, failure: Option<&str>| {
            let chunk = |i: usize| Chunk { at: 0.25 * i as f64, has_choice: true, has_text: true };
            let count = if failure.is_some() { 0 } else { 3 };
            let heard = Heard {
                chunks: (1..=count).map(chunk).collect(),
                usage: failure.is_none().then_some(TokenUsage {
                    prompt: 9,
                    cached: 0,
                    completion: 6,
                }),
                ended: 1.0,
                validator_tps: 6.0,
                failure: failure.map(str::to_owned),
            };
            TimedAnswer { at, heard }
        };
        let client = Client { busy: 0.0, timer_late: 0.0, send_late: 0.0 };
        let sent = vec![answer(0.0, None), answer(0.5, Some("timeout")), answer(1.0, None)];
        let driven = Driven { sent, unfinished: 0, seconds: 2.0, client, stop: None };
        let promise = Promise { first_token: 1.0, per_token: 1.0 };
        let level = level(&driven, Load::Concurrency(2), promise, "m");
        let file = file(&level, &driven);
        assert_eq!(
            (&file["max_output_tokens_per_s"], &file["max_concurrent_requests"]),
            (&json!(6.0), &json!(2))
        );
        assert_eq!(file["input_lens"], json!([9, 0, 9]));
        assert_eq!(file["output_lens"], json!([6, 0, 6]));
        assert_eq!(file["ttfts"], json!([0.25, 0.0, 0.25]));
        assert_eq!(file["itls"], json!([[0.25, 0.25], [], [0.25, 0.25]]));
        assert_eq!(file["errors"], json!(["", "timeout", ""]));
        assert_eq!((&file["completed"], &file["failed"]), (&json!(2), &json!(1)));
    }
}
