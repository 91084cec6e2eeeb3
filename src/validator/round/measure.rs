//! Measures an answer (protocol 5.4): the first token, tokens a second, and whether it was
//! streamed.

use crate::store::record::Timing;
use crate::validator::query::Arrival;
use serde_json::Value;
use std::time::Duration;

/// Answers of at most so many tokens may come in one piece.
const STREAMED_MIN: usize = 60;
/// The token that must have come before most of the time has passed, as a share of all tokens.
const EARLY_SHARE: f64 = 0.05;
/// The share of the whole time that it may take.
const LATE_SHARE: f64 = 0.85;

/// Times and speed of an answer that ended at `ended` and may have `max_tokens`.
pub fn timing(arrivals: &[Arrival], ended: Duration, max_tokens: u32) -> Timing {
    let times = token_times(arrivals);
    let total = ended.as_secs_f64();
    let first_token = times.first().copied().unwrap_or(ended).as_secs_f64();
    let tokens = u32::try_from(times.len()).unwrap_or(u32::MAX);
    let all_tokens = (total - first_token).max(0.0);
    counted(Timing { first_token, all_tokens, total, tps: 0.0, tokens }, max_tokens)
}

/// The same times with a speed that counts at most so many tokens: a chunk is whatever its sender
/// calls one, so those that hold no verified token must not raise the speed.
pub fn counted(timing: Timing, most: u32) -> Timing {
    let Timing { total, tokens, .. } = timing;
    let tps = if total > 0.0 { f64::from(tokens.min(most)) / total } else { 0.0 };
    Timing { tps, ..timing }
}

/// Whether a long answer came all at once: it was computed before it was sent.
pub fn is_not_streamed(arrivals: &[Arrival], ended: Duration) -> bool {
    let times = token_times(arrivals);
    if times.len() <= STREAMED_MIN || ended.is_zero() {
        return false;
    }
    let early = (EARLY_SHARE * times.len() as f64).ceil() as usize;
    times[early].as_secs_f64() / ended.as_secs_f64() >= LATE_SHARE
}

/// When each token came. Chunks before the first text are no tokens, later ones without text are:
/// an end, or a part of a character.
fn token_times(arrivals: &[Arrival]) -> Vec<Duration> {
    let has_choice = |arrival: &&Arrival| !arrival.chunk["choices"][0].is_null();
    let is_silent = |arrival: &&Arrival| text(&arrival.chunk).is_empty();
    arrivals.iter().filter(has_choice).skip_while(is_silent).map(|arrival| arrival.at).collect()
}

fn text(chunk: &Value) -> &str {
    let choice = &chunk["choices"][0];
    let text = choice["delta"]["content"].as_str().or_else(|| choice["text"].as_str());
    text.unwrap_or_default()
}

/// What a miner says went wrong in the middle of its stream.
pub fn said_error(arrivals: &[Arrival]) -> Option<String> {
    let error = arrivals.iter().map(|arrival| &arrival.chunk["error"]).find(|e| !e.is_null())?;
    let message = error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned);
    Some(message.chars().take(200).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn chunk(ms: u64, text: &str) -> Arrival {
        let chunk = json!({"choices": [{"delta": {"content": text}}]});
        Arrival { at: Duration::from_millis(ms), chunk }
    }

    #[test]
    fn a_token_counts_from_the_first_text_on() {
        let mut arrivals = vec![chunk(10, ""), chunk(500, "a"), chunk(600, ""), chunk(900, "b")];
        let usage = json!({"choices": [], "usage": {}});
        arrivals.push(Arrival { at: Duration::from_millis(950), chunk: usage });
        let timing = timing(&arrivals, Duration::from_secs(1), 2);
        let expected =
            Timing { first_token: 0.5, all_tokens: 0.5, total: 1.0, tps: 2.0, tokens: 3 };
        assert_eq!(timing, expected);
        let none = super::timing(&[], Duration::ZERO, 2);
        assert_eq!((none.tps, none.tokens), (0.0, 0));
    }

    #[test]
    fn what_comes_at_the_end_was_not_streamed() {
        // Of 100 tokens the one of number 5 counts, at just under and at 85 percent of the time.
        let answer = |fifth: u64, count: u64| -> Vec<Arrival> {
            let at = |i: u64| if i < count.div_ceil(20) { 1 } else { fifth };
            (0..count).map(|i| chunk(at(i), "x")).collect()
        };
        let second = Duration::from_secs(1);
        assert!(!is_not_streamed(&answer(849, 100), second));
        assert!(is_not_streamed(&answer(850, 100), second));
        // Short answers may.
        assert!(!is_not_streamed(&answer(999, 60), second));
        assert!(is_not_streamed(&answer(999, 61), second));
        assert!(!is_not_streamed(&answer(0, 100), Duration::ZERO));
    }

    #[test]
    fn an_error_in_a_stream_is_repeated_in_short() {
        let with = |chunk| Arrival { at: Duration::ZERO, chunk };
        let said = said_error(&[with(json!({"error": {"message": "no room"}}))]);
        assert_eq!(said.as_deref(), Some("no room"));
        let long = said_error(&[with(json!({"error": "x".repeat(5000)}))]);
        assert_eq!(long.map(|text| text.len()), Some(200));
        assert_eq!(said_error(&[with(json!({"choices": []}))]), None);
        assert_eq!(said_error(&[with(json!([1, 2]))]), None);
    }
}
