//! Handles requests of real users, as a hub sends them: they are read, scored, and reported
//! (protocol 5.13).
//!
//! A hub is neither a miner nor the chain. What it reports of a miner does not change the evidence
//! about that miner. It counts only as samples, as the scoring profile says, and only for the
//! hotkey that holds the uid now. A record that cannot be read is skipped with a warning; the
//! others count.

use super::scores::series::Organic;
use crate::store::record::Sample;
use crate::wire::python::dumps;
use anyhow::anyhow;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Records of a bucket that are looked at; the original's hub hands out 100.
pub const RECORDS_MAX: usize = 512;
/// Chunks of one answer.
const CHUNKS_MAX: usize = 16_384;
/// Name of a version 4.4.1 in numbers (protocol 0).
const VERSION: u64 = 404_010;

/// What a hub hands out at once.
#[derive(Clone, PartialEq, Debug, Deserialize)]
pub struct Bucket {
    /// Its name: the same one again has nothing new in it.
    pub bucket_id: String,
    /// Records by model, each still as it came.
    organics: BTreeMap<String, Vec<Value>>,
}

/// One request of a user, and what a miner answered.
#[derive(Clone, PartialEq, Debug, Deserialize)]
pub struct Record {
    /// The body of the request.
    pub request: Map<String, Value>,
    /// The events of the stream, as objects or as the lines that carried them.
    response: Vec<Value>,
    /// The uid of the miner that answered.
    pub uid: u16,
    /// Its hotkey, as SS58.
    pub hotkey: String,
    /// Its coldkey, as SS58.
    #[serde(default)]
    pub coldkey: String,
    /// `CHAT` or `COMPLETION`.
    pub endpoint: String,
    /// Whether the hub got a whole answer.
    pub success: bool,
    /// From the request to the end of the answer, in milliseconds.
    #[serde(default)]
    pub total_time: f64,
    /// From the request to the first token, in milliseconds.
    #[serde(default)]
    pub time_to_first_token: f64,
    /// Tokens, by the hub's count.
    #[serde(default)]
    pub response_tokens: u64,
    /// Name of the model that was asked for.
    #[serde(default)]
    pub model_name: String,
}

/// The request for a bucket.
pub fn request(models: &[String]) -> Vec<u8> {
    dumps(&models.iter().cloned().map(Value::String).collect()).into_bytes()
}

impl Bucket {
    /// Reads a hub's answer.
    ///
    /// # Errors
    /// When it is not a bucket: what is wrong with it.
    pub fn read(bytes: &[u8]) -> anyhow::Result<Self> {
        serde_json::from_slice(bytes).map_err(|e| anyhow!("the answer is not a valid bucket: {e}"))
    }

    /// Its records, and what is wrong with those that cannot be read.
    pub fn records(self) -> (Vec<Record>, Vec<String>) {
        let (mut records, mut wrong) = (Vec::new(), Vec::new());
        let all = self.organics.into_iter().flat_map(|(model, list)| {
            list.into_iter().enumerate().map(move |(place, value)| (model.clone(), place, value))
        });
        for (model, place, value) in all.take(RECORDS_MAX) {
            match serde_json::from_value::<Record>(value) {
                Ok(mut record) => {
                    record.model_name.clone_from(&model);
                    records.push(record);
                }
                Err(e) => wrong.push(format!("{model}, record {place}: {e}")),
            }
        }
        (records, wrong)
    }
}

impl Record {
    /// The events that are chunks of an answer.
    pub fn chunks(&self) -> Vec<Value> {
        let read = |event: &Value| match event {
            Value::String(line) => {
                let data = line.trim().strip_prefix("data:").unwrap_or(line).trim();
                serde_json::from_str::<Value>(data).ok().filter(Value::is_object)
            }
            Value::Object(_) => Some(event.clone()),
            _ => None,
        };
        self.response.iter().take(CHUNKS_MAX).filter_map(read).collect()
    }

    /// Request and answer as `verify` reads them.
    pub fn capture(&self) -> Value {
        json!({"hotkey": self.hotkey, "request": self.request, "chunks": self.chunks()})
    }

    /// Tokens that count, of which `most` are known: no more than the hub counted, than its record
    /// holds, and than were asked for.
    pub fn tokens_at_most(&self, most: u64) -> u64 {
        let held = self.chunks().iter().map(held_tokens).sum();
        let asked = self.request.get("max_tokens").and_then(Value::as_u64).unwrap_or(u64::MAX);
        self.response_tokens.min(held).min(asked).min(most)
    }

    /// So many tokens by the whole time, a second; none without tokens or without a time.
    pub fn tps(&self, tokens: u64) -> Option<f64> {
        let tps = tokens as f64 / (self.total_time / 1e3);
        (tokens > 0 && self.total_time > 0.0 && tps.is_finite()).then_some(tps)
    }
}

/// Tokens that a chunk holds: as many as it names; one where it names none and has a choice.
fn held_tokens(chunk: &Value) -> u64 {
    let choice = &chunk["choices"][0];
    if choice.is_null() {
        return 0;
    }
    let logprobs = &choice["logprobs"];
    let lists = [&logprobs["content"], &logprobs["tokens"], &choice["token_ids"]];
    let named = lists.iter().filter_map(|list| list.as_array()).map(Vec::len).max();
    named.unwrap_or(0).max(1) as u64
}

/// What was found of a record.
#[derive(Clone, PartialEq, Debug)]
pub struct ScoredRecord {
    /// The record of the hub that it was made from.
    pub record: Record,
    /// Its tokens as far as they are known: those that were verified where it was, else those that
    /// it holds; never more than the hub counted.
    pub tokens: u64,
    /// What the record counts for the miner's score.
    pub organic: Organic,
    /// The rule that is broken, and by what.
    pub fault: Option<(String, String)>,
}

/// The report of all records, as the hub's table has it: times in milliseconds, no tokens.
pub fn report(scored: &[ScoredRecord]) -> Vec<u8> {
    let one = |ScoredRecord { record, organic, tokens, fault }: &ScoredRecord| {
        let of = |key: &str| record.request.get(key).cloned().unwrap_or(Value::Null);
        let tps = if let Organic::Tps(tps) = organic { *tps } else { 0.0 };
        json!({
            "time_to_first_token": record.time_to_first_token,
            "time_for_all_tokens": record.total_time - record.time_to_first_token,
            "total_time": record.total_time,
            "tps": tps,
            "tokens": [],
            "verified": matches!(organic, Organic::Tps(_)),
            "error": fault.as_ref().map(|(_, what)| what),
            "cause": fault.as_ref().map(|(cause, _)| cause),
            "model": record.model_name,
            "max_tokens": of("max_tokens"),
            "seed": of("seed"),
            "temperature": of("temperature"),
            "uid": record.uid,
            "hotkey": record.hotkey,
            "coldkey": record.coldkey,
            "endpoint": record.endpoint,
            "total_tokens": tokens,
        })
    };
    let organics: Vec<Value> = scored.iter().map(one).collect();
    dumps(&json!({"organics": organics})).into_bytes()
}

/// The statistics of a round (protocol 5.14), for a hub that counts for all validators.
/// `samples` are those that scores are made of, by miner and model, oldest first.
pub fn stats(
    round: &crate::store::record::Round,
    validator: &str,
    models: &[String],
    samples: &[Sample],
) -> Vec<u8> {
    use crate::store::record::{MinerResponse, Outcome};
    // 48 characters, as the table wants; as unique as the round.
    let name: String = round.id.chars().chain(round.id.chars()).take(48).collect();
    let one = |answer: &MinerResponse| {
        let MinerResponse { uid, hotkey, coldkey, timing, outcome, cause, error, capture, .. } =
            answer;
        json!({
            "r_nanoid": name, "hotkey": hotkey, "coldkey": coldkey, "uid": uid,
            "stats": {
                "time_to_first_token": timing.first_token,
                "time_for_all_tokens": timing.all_tokens,
                "total_time": timing.total,
                "tps": timing.tps,
                "tokens": capture.as_ref().map(tokens).unwrap_or_default(),
                "verified": *outcome == Outcome::Verified,
                "error": error,
                "cause": cause,
            },
        })
    };
    // Who was not asked, or about whom nothing is known, is not in the original's statistics.
    let is_asked =
        |r: &&MinerResponse| !matches!(r.outcome, Outcome::NotServed | Outcome::Unscored);
    let responses: Vec<Value> = round.responses.iter().filter(is_asked).map(one).collect();
    let endpoint = if round.endpoint.contains("chat") { "CHAT" } else { "COMPLETION" };
    dumps(&json!({
        "request": {
            "r_nanoid": name,
            "block": round.block,
            "request": round.request,
            "request_endpoint": format!("Endpoints.{endpoint}"),
            "version": VERSION,
            "hotkey": validator,
        },
        "responses": responses,
        "models": models,
        "scores": scores(samples),
    }))
    .into_bytes()
}

/// Tokens a second by uid and model, null for a miss.
fn scores(samples: &[Sample]) -> BTreeMap<u16, BTreeMap<&str, Vec<Option<f64>>>> {
    let mut scores: BTreeMap<u16, BTreeMap<&str, Vec<Option<f64>>>> = BTreeMap::new();
    for Sample { uid, model, tps, .. } in samples {
        scores.entry(*uid).or_default().entry(model).or_default().push(*tps);
    }
    scores
}

/// The tokens of a capture, where it names their ids.
fn tokens(capture: &Value) -> Vec<Value> {
    let chunks = capture["chunks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let token = |chunk: &Value| {
        let choice = &chunk["choices"][0];
        let (chat, plain) = (&choice["logprobs"]["content"][0], &choice["logprobs"]);
        let name = chat["token"].as_str().or_else(|| plain["tokens"][0].as_str())?;
        let id: i64 = name.strip_prefix("token_id:")?.parse().ok()?;
        let logprob = chat["logprob"].as_f64().or_else(|| plain["token_logprobs"][0].as_f64())?;
        let text = choice["delta"]["content"].as_str().or_else(|| choice["text"].as_str());
        Some(json!({"text": text.unwrap_or_default(), "token_id": id, "logprob": logprob}))
    };
    chunks.iter().filter_map(token).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(extra: Value) -> Value {
        let mut record = json!({
            "id": "req_1", "request": {"max_tokens": 50, "seed": 7, "temperature": 0.5},
            "response": ["data: {\"choices\": []}\n\n", {"choices": [{"text": "x"}]},
                         "data: [DONE]", 5],
            "uid": 3, "hotkey": "h", "coldkey": "c", "endpoint": "CHAT", "success": true,
            "total_time": 2000.0, "time_to_first_token": 100.0, "response_tokens": 60,
            "model_name": "other",
        });
        for (key, value) in extra.as_object().unwrap() {
            record[key] = value.clone();
        }
        record
    }

    #[test]
    fn a_bad_record_costs_itself_only() {
        let bucket = json!({"bucket_id": "b_1", "organics": {
            "m": [record(json!({})), record(json!({"uid": -1})), 7, record(json!({"uid": 4}))],
        }});
        let bucket = Bucket::read(bucket.to_string().as_bytes()).unwrap();
        let (records, wrong) = bucket.records();
        assert_eq!(records.iter().map(|r| r.uid).collect::<Vec<_>>(), [3, 4]);
        assert_eq!(wrong.len(), 2);
        assert!(wrong[0].starts_with("m, record 1: "), "{wrong:?}");
        let first = &records[0];
        assert_eq!((first.model_name.as_str(), first.chunks().len()), ("m", 2));
        for none in ["", "[]", "{\"bucket_id\": 4, \"organics\": {}}", "{\"organics\": {}}"] {
            assert!(Bucket::read(none.as_bytes()).is_err(), "{none}");
        }
    }

    #[test]
    fn a_hub_cannot_count_more_tokens_than_there_are() {
        let of = |extra: Value| serde_json::from_value::<Record>(record(extra)).unwrap();
        let chunk = json!({"choices": [{"text": "x"}]});
        let two = json!({"choices": [{"logprobs": {"content": [{}, {}]}}]});
        let usage = json!({"choices": [], "usage": {}});
        let chunks = vec![chunk; 40].into_iter().chain([two, usage]).collect::<Vec<_>>();
        let held = |extra: Value| {
            let mut record = of(extra);
            record.response.clone_from(&chunks);
            record
        };
        let record = held(json!({"response_tokens": 1_000_000_000}));
        assert_eq!(record.tokens_at_most(u64::MAX), 42);
        assert_eq!((record.tokens_at_most(12), record.tps(12)), (12, Some(6.0)));
        assert_eq!(held(json!({"response_tokens": 7})).tokens_at_most(12), 7);
        let asked = held(json!({"request": {"max_tokens": 3}}));
        assert_eq!(asked.tokens_at_most(u64::MAX), 3);
        // Without a time or a token nothing was measured.
        for (tokens, time) in [(0, 2000.0), (5, 0.0), (5, -1.0), (5, 1e-308)] {
            assert_eq!(of(json!({"total_time": time})).tps(tokens), None, "{tokens} {time}");
        }
    }

    #[test]
    fn payloads_are_those_of_the_hub_byte_for_byte() {
        assert_eq!(request(&["a/b".into(), "é".into()]), b"[\"a/b\", \"\\u00e9\"]");
        let read: Record = serde_json::from_value(record(json!({"model_name": "m"}))).unwrap();
        let organic = Organic::Tps(25.0);
        let scored = [ScoredRecord { record: read, organic, tokens: 50, fault: None }];
        let text = String::from_utf8(report(&scored)).unwrap();
        let expected = "{\"organics\": [{\"time_to_first_token\": 100.0, \
            \"time_for_all_tokens\": 1900.0, \"total_time\": 2000.0, \"tps\": 25.0, \
            \"tokens\": [], \"verified\": true, \"error\": null, \"cause\": null, \
            \"model\": \"m\", \
            \"max_tokens\": 50, \"seed\": 7, \"temperature\": 0.5, \"uid\": 3, \"hotkey\": \"h\", \
            \"coldkey\": \"c\", \"endpoint\": \"CHAT\", \"total_tokens\": 50}]}";
        assert_eq!(text, expected);
    }

    #[test]
    fn statistics_of_a_round_are_those_of_the_hub_byte_for_byte() {
        use crate::store::record::{MinerResponse, Outcome, Round, Sample, Sampled, Timing};
        let answer = |uid, outcome, cause: Option<&str>, capture| MinerResponse {
            uid,
            hotkey: format!("h{uid}"),
            coldkey: format!("c{uid}"),
            timing: Timing {
                first_token: 0.25,
                all_tokens: 1.5,
                total: 1.75,
                tps: 8.0,
                tokens: 14,
            },
            outcome,
            cause: cause.map(str::to_owned),
            error: cause.map(|_| "token 3 \u{e9}".to_owned()),
            sample: Sampled::Nothing,
            capture,
            report: None,
            statistics: Default::default(),
        };
        let capture = json!({"chunks": [{"choices": [{"text": "b",
            "logprobs": {"tokens": ["token_id:6"], "token_logprobs": [-1.0]}}]}]});
        let mut round = Round {
            id: "0123456789abcdef0123456789abcdef".into(),
            netuid: 4,
            block: 40,
            started_ms: 0,
            ended_ms: 0,
            model: "m".into(),
            endpoint: "/v1/chat/completions".into(),
            request: json!({"seed": 5, "max_tokens": 14}),
            profile: "default".into(),
            responses: vec![
                answer(1, Outcome::Verified, None, Some(capture)),
                answer(2, Outcome::Rejected, Some("BAD_IDS"), Some(json!({"chunks": 7}))),
                answer(3, Outcome::NotServed, Some("NOT_SERVED"), None),
                answer(4, Outcome::Unscored, Some("INTERNAL_ERROR"), None),
            ],
        };
        let sample = |uid, model: &str, tps| Sample {
            round: "r".into(),
            uid,
            hotkey: format!("h{uid}"),
            model: model.into(),
            block: 40,
            tps,
        };
        let samples = [
            sample(10, "m", Some(8.0)),
            sample(2, "m", Some(7.5)),
            sample(2, "m", None),
            sample(2, "\u{e9}", None),
        ];
        let text = |round: &Round| {
            String::from_utf8(stats(round, "v", &["m".into(), "\u{e9}".into()], &samples)).unwrap()
        };
        let name = "0123456789abcdef0123456789abcdef0123456789abcdef";
        let of = |uid: u16, rest: &str| {
            format!(
                "{{\"r_nanoid\": \"{name}\", \"hotkey\": \"h{uid}\", \"coldkey\": \"c{uid}\", \
                 \"uid\": {uid}, \"stats\": {{\"time_to_first_token\": 0.25, \
                 \"time_for_all_tokens\": 1.5, \"total_time\": 1.75, \"tps\": 8.0, {rest}}}}}"
            )
        };
        let verified = of(
            1,
            "\"tokens\": [{\"text\": \"b\", \"token_id\": 6, \"logprob\": -1.0}], \
             \"verified\": true, \"error\": null, \"cause\": null",
        );
        let rejected = of(
            2,
            "\"tokens\": [], \"verified\": false, \"error\": \"token 3 \\u00e9\", \
             \"cause\": \"BAD_IDS\"",
        );
        // Who was not asked, and what trouble of ours leaves open, is in no statistics.
        let expected = format!(
            "{{\"request\": {{\"r_nanoid\": \"{name}\", \"block\": 40, \"request\": \
             {{\"seed\": 5, \"max_tokens\": 14}}, \"request_endpoint\": \"Endpoints.CHAT\", \
             \"version\": 404010, \"hotkey\": \"v\"}}, \"responses\": [{verified}, {rejected}], \
             \"models\": [\"m\", \"\\u00e9\"], \"scores\": {{\"2\": \
             {{\"m\": [7.5, null], \"\\u00e9\": [null]}}, \"10\": {{\"m\": [8.0]}}}}}}"
        );
        assert_eq!(text(&round), expected);
        round.endpoint = "/v1/completions".into();
        round.responses.clear();
        let said: Value = serde_json::from_str(&text(&round)).unwrap();
        assert_eq!(said["request"]["request_endpoint"], "Endpoints.COMPLETION");
        assert_eq!(said["responses"], json!([]));
    }

    #[test]
    fn tokens_of_both_endpoints_are_read_and_others_left_out() {
        let capture = json!({"chunks": [
            {"choices": [{"delta": {"content": "a"},
                "logprobs": {"content": [{"token": "token_id:5", "logprob": -0.5}]}}]},
            {"choices": [{"text": "b",
                "logprobs": {"tokens": ["token_id:6"], "token_logprobs": [-1.0]}}]},
            {"choices": [{"text": "c", "logprobs": null}]},
            {"choices": []},
        ]});
        let expected = [
            json!({"text": "a", "token_id": 5, "logprob": -0.5}),
            json!({"text": "b", "token_id": 6, "logprob": -1.0}),
        ];
        assert_eq!(tokens(&capture), expected);
    }
}
