//! Turns the answers that were received at one level of load into that level's part of the report.

use super::drive::{Driven, Load, LoadStop, TimedAnswer};
use super::heard::Heard;
use super::vllm;
use crate::bench::conditions::{Mark, MarkKind};
use crate::bench::report::schema::{Client, LoadLevel};
use crate::bench::report::spread::Quantiles;
use serde_json::Map;
use std::collections::BTreeMap;

/// Share of each second that the client's threads may be busy.
const BUSY_MAX: f64 = 0.8;
/// Seconds that its timers and its requests may be late.
const LATE_MAX: f64 = 0.05;
/// Share of the prompts' tokens that may be cached unasked: templates begin alike.
const CACHED_MAX: f64 = 0.1;
/// Share of a level's time that its steady window must have.
const STEADY_MIN: f64 = 0.1;

/// What a request must keep to count as good.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Promise {
    /// Seconds to the first token.
    pub first_token: f64,
    /// Mean seconds a token after it.
    pub per_token: f64,
}

/// The times of one answer that ended well.
struct Times {
    first: f64,
    per_token: Option<f64>,
    total: f64,
}

impl Times {
    fn of(heard: &Heard) -> Option<Self> {
        let first = heard.tokens().next()?;
        let last = heard.tokens().last()?;
        let more = heard.count().saturating_sub(1);
        let per_token = (more > 0).then(|| (last - first) / more as f64);
        Some(Self { first, per_token, total: heard.ended })
    }

    fn keeps(&self, promise: Promise) -> bool {
        self.first <= promise.first_token && self.per_token.is_none_or(|t| t <= promise.per_token)
    }
}

/// Makes a level.
pub fn level(driven: &Driven, load: Load, promise: Promise, model: &str) -> LoadLevel {
    let good = || driven.sent.iter().filter(|s| s.heard.failure.is_none());
    let mut failed = BTreeMap::new();
    for failure in driven.sent.iter().filter_map(|s| s.heard.failure.as_ref()) {
        *failed.entry(failure.clone()).or_insert(0) += 1;
    }
    if driven.unfinished > 0 {
        failed.insert("broken off".into(), driven.unfinished);
    }
    let times: Vec<Times> = good().filter_map(|s| Times::of(&s.heard)).collect();
    let of = |value: fn(&Times) -> Option<f64>| {
        Quantiles::of(&times.iter().filter_map(value).collect::<Vec<_>>())
    };
    let gap = Quantiles::of(&good().flat_map(|s| s.heard.gaps()).collect::<Vec<_>>());
    let tps: Vec<f64> = good().map(|s| s.heard.validator_tps).collect();
    let usage = |of: fn(&Heard) -> u64| good().map(|s| of(&s.heard)).sum::<u64>();
    let all = [0.0, driven.seconds];
    let steady = steady(driven).unwrap_or(all);
    let kept = times.iter().filter(|t| t.keeps(promise)).count();
    let mut level = LoadLevel {
        rate: load.rate(),
        concurrency: load.at_once(),
        seconds: driven.seconds,
        sent: driven.sent.len() + driven.unfinished,
        completed: good().count(),
        failed,
        input_tokens: usage(|h| h.usage.map_or(0, |u| u.prompt)),
        output_tokens: usage(Heard::count),
        cached_tokens: usage(|h| h.usage.map_or(0, |u| u.cached)),
        steady,
        steady_tokens_per_second: within(driven, steady),
        goodput: kept as f64 / driven.seconds.max(1e-9),
        first_token: of(|t| Some(t.first)),
        per_token: of(|t| t.per_token),
        gap,
        total: of(|t| Some(t.total)),
        worst_gap: driven.sent.iter().map(|s| s.heard.worst_gap()).fold(0.0, f64::max),
        validator_tps: Quantiles::of(&tps),
        client: driven.client.clone(),
        vllm: Map::new(),
    };
    level.vllm = vllm::summary(&level, driven, model);
    level
}

/// From when the first answer has ended, or half of the time to the last request, to when the last
/// request is sent: before it the server fills, after it it empties. Where no answer has ended
/// until then, or little time is left, there is no such window.
fn steady(driven: &Driven) -> Option<[f64; 2]> {
    let ends = driven.sent.iter().map(|s| s.at + s.heard.ended);
    let filled = ends.fold(f64::INFINITY, f64::min);
    let last = driven.sent.iter().map(|s| s.at).fold(0.0, f64::max);
    let from = filled.min(last / 2.0);
    (filled < last && last - from > STEADY_MIN * driven.seconds).then_some([from, last])
}

/// Tokens a second that came between two times; of failed answers too, for the server worked.
fn within(driven: &Driven, [from, to]: [f64; 2]) -> f64 {
    let tokens = |sent: &TimedAnswer| {
        let inside = |at: &f64| (from..=to).contains(&(sent.at + at));
        sent.heard.tokens().filter(inside).count() as f64 * sent.heard.tokens_per_chunk()
    };
    driven.sent.iter().map(tokens).sum::<f64>() / (to - from).max(1e-9)
}

/// The marks of a level. `asked` is how many tokens every answer should have.
pub fn marks(
    level: &LoadLevel,
    stop: Option<LoadStop>,
    asked: Option<u64>,
    is_repeated: bool,
) -> Vec<Mark> {
    let mut marks = Vec::new();
    if let Some(what) = bottleneck(level) {
        marks.push(Mark::new(MarkKind::ClientBound, what));
    }
    let cached = level.cached_tokens as f64 / level.input_tokens.max(1) as f64;
    if cached > CACHED_MAX && !is_repeated {
        let what = format!(
            "{:.0} % of the prompts' tokens were cached, though every prompt is new",
            100.0 * cached
        );
        marks.push(Mark::new(MarkKind::WarmCache, what));
    }
    if level.completed > 0 && level.steady == [0.0, level.seconds] {
        let what = format!(
            "no steady window with {} requests at {}: tokens a second are those of the whole time, \
             while the server filled and emptied; send more requests",
            level.sent,
            level.load()
        );
        marks.push(Mark::new(MarkKind::Unsteady, what));
    }
    let failures: usize = level.failed.values().sum();
    if failures > 0 && stop != Some(LoadStop::Unwanted) {
        let kinds: Vec<String> =
            level.failed.iter().map(|(kind, count)| format!("{count} x {kind}")).collect();
        let what = format!("{failures} of {} requests failed: {}", level.sent, kinds.join(", "));
        marks.push(Mark::new(MarkKind::ServerFailed, what));
    }
    let wanted = asked.map(|tokens| tokens * level.completed as u64);
    if let Some(wanted) = wanted.filter(|wanted| *wanted != level.output_tokens) {
        let what = format!("{} tokens came, {wanted} were asked for", level.output_tokens);
        marks.push(Mark::new(MarkKind::Length, what));
    }
    match stop {
        Some(LoadStop::Unwanted) => {
            marks.push(Mark::new(MarkKind::Interrupted, "it was interrupted"))
        }
        Some(LoadStop::ServerFailed) => {
            let what = "the server failed too often in a row and was given up";
            marks.push(Mark::new(MarkKind::ServerFailed, what));
        }
        None => {}
    }
    marks
}

/// Why the client may have been what was measured.
fn bottleneck(level: &LoadLevel) -> Option<String> {
    let Client { busy, timer_late, send_late } = level.client;
    if busy > BUSY_MAX {
        return Some(format!("the client's threads were busy {:.0} % of the time", 100.0 * busy));
    }
    let ms = |seconds: f64| 1e3 * seconds;
    if timer_late > LATE_MAX {
        return Some(format!("the client's timers fired {:.0} ms late", ms(timer_late)));
    }
    (send_late > LATE_MAX)
        .then(|| format!("requests were sent {:.0} ms later than drawn", ms(send_late)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::traffic::heard::{Chunk, TokenUsage};

    const PROMISE: Promise = Promise { first_token: 0.5, per_token: 0.15 };

    /// Ten answers of 11 tokens, 0.1 s apart each, one second after the other; the last one fails.
    fn driven() -> Driven {
        let sent = |i: usize| {
            let first = if i == 0 { 0.9 } else { 0.2 };
            let chunk =
                |t: usize| Chunk { at: first + 0.1 * t as f64, has_choice: true, has_text: true };
            let heard = Heard {
                chunks: (0..11).map(chunk).collect(),
                usage: Some(TokenUsage { prompt: 20, cached: 0, completion: 11 }),
                ended: first + 1.0,
                validator_tps: 9.0,
                failure: (i == 9).then(|| "status 500".into()),
            };
            TimedAnswer { at: i as f64, heard }
        };
        let client = Client { busy: 0.1, timer_late: 0.001, send_late: 0.0 };
        let sent = (0..10).map(sent).collect();
        Driven { sent, unfinished: 1, seconds: 10.2, client, stop: None }
    }

    #[test]
    fn a_level_counts_what_ended_well_and_says_what_did_not() {
        let level = level(&driven(), Load::Rate(1.0), PROMISE, "m");
        assert_eq!((level.sent, level.completed), (11, 9));
        assert_eq!((level.input_tokens, level.output_tokens), (180, 99));
        let failed: Vec<_> = level.failed.iter().map(|(k, n)| (k.as_str(), *n)).collect();
        assert_eq!(failed, [("broken off", 1), ("status 500", 1)]);
        let first = level.first_token.as_ref().unwrap();
        assert_eq!((first.p50, first.max), (0.2, 0.9));
        assert!((level.per_token.as_ref().unwrap().p50 - 0.1).abs() < 1e-9);
        // The first answer is late for its first token.
        assert!((level.goodput - 8.0 / 10.2).abs() < 1e-9);
        assert!((level.worst_gap - 0.9).abs() < 1e-9);
        // From the first end to the last request: 9 - 1.9 s, at 11 tokens a second.
        assert_eq!(level.steady, [1.9, 9.0]);
        assert!((10.0..12.0).contains(&level.steady_tokens_per_second), "{level:?}");
        // Eight of 200 ms and one of 900: 92 % of the way between the last two.
        let p99 = level.vllm["p99_ttft_ms"].as_f64().unwrap();
        assert!((p99 - 844.0).abs() < 1e-6, "{p99}");
        assert_eq!(level.vllm["failed"], 2);
        let kinds: Vec<_> = marks(&level, None, Some(11), false).iter().map(|m| m.kind).collect();
        assert_eq!(kinds, [MarkKind::ServerFailed]);
    }

    #[test]
    fn what_was_not_the_servers_is_marked() {
        let mut level = level(&driven(), Load::Concurrency(2), PROMISE, "m");
        level.failed.clear();
        level.cached_tokens = 90;
        level.client.busy = 0.95;
        let kinds = |level: &LoadLevel, is_repeated| -> Vec<MarkKind> {
            let marks = marks(level, Some(LoadStop::Unwanted), Some(12), is_repeated);
            marks.iter().map(|m| m.kind).collect()
        };
        use MarkKind::{ClientBound, Interrupted, Length, WarmCache};
        assert_eq!(kinds(&level, false), [ClientBound, WarmCache, Length, Interrupted]);
        assert_eq!(kinds(&level, true), [ClientBound, Length, Interrupted]);
        level.client = Client { busy: 0.1, timer_late: 0.0, send_late: 0.2 };
        assert_eq!(kinds(&level, true)[0], ClientBound);
    }

    #[test]
    fn a_server_that_answers_nothing_until_the_last_request_was_never_steady() {
        let mut driven = driven();
        assert!(steady(&driven).is_some());
        for sent in &mut driven.sent {
            sent.heard.chunks.iter_mut().for_each(|chunk| chunk.at += 40.0);
            sent.heard.ended += 40.0;
        }
        driven.seconds += 40.0;
        let level = level(&driven, Load::Rate(1.0), PROMISE, "m");
        assert_eq!(level.steady, [0.0, 50.2]);
        // All 110 tokens in 50.2 s: none is lost with the window.
        assert!((level.steady_tokens_per_second - 110.0 / 50.2).abs() < 1e-9, "{level:?}");
        let marks = marks(&level, None, None, false);
        let what = &marks.iter().find(|m| m.kind == MarkKind::Unsteady).unwrap().what;
        assert!(what.contains("11 requests at 1/s"), "{what}");
    }

    #[test]
    fn nothing_heard_is_a_level_too() {
        let client = Client { busy: 0.0, timer_late: 0.0, send_late: 0.0 };
        let driven = Driven { sent: Vec::new(), unfinished: 0, seconds: 0.0, client, stop: None };
        let level = level(&driven, Load::Rate(1.0), PROMISE, "m");
        assert_eq!((level.sent, level.first_token.as_ref()), (0, None));
        // JSON has no infinity: what is written must be readable.
        let text = serde_json::to_string(&level).unwrap();
        assert_eq!(serde_json::from_str::<LoadLevel>(&text).unwrap(), level);
    }
}
