//! Makes the page at `/`: miners, verdicts over time, weights, and the tokens of one answer by rank
//! and margin.
//!
//! The functions are pure: from records to one self-contained document without scripts. Text of
//! peers is escaped, and the content policy allows nothing to be loaded or run.

use crate::store::record::{
    EpochWeights, MinerResponse, Outcome, ResponseVerdict, RoundHead, WeightsState,
};
use crate::validator::run::progress::RunSnapshot;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// Rounds whose verdicts are shown, and those that have a row of their own.
pub(super) const ROUNDS: u32 = 60;
const ROWS: usize = 15;
/// Tokens of an answer, and characters of a peer's word, that are shown.
const TOKENS_MAX: usize = 4096;
const WORD_CHARS_MAX: usize = 200;
/// Pixels of a verdict, and of a bar of weights.
const CELL: usize = 10;
const BAR: f64 = 200.0;

const STYLE: &str = "
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5em auto; max-width: 80em; padding: 0 1em;
  color: #1c1c1c; background: #fff; }
h1 { font-size: 1.3em; } h2 { font-size: 1.1em; margin: 1.5em 0 .4em; }
nav a { margin-right: 1em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: .1em .8em .1em 0; text-align: left; }
td.n, th.n { text-align: right; }
td.key { font-family: monospace; }
.verified { fill: #2a8f4a; color: #176b2c; } .rejected { fill: #c62828; color: #a11212; }
.failed { fill: #e0a800; color: #7a5b00; } .not_served { fill: #f0dca0; color: #7a5b00; }
.unscored { fill: #b5b5b5; color: #666; } .bar { fill: #3565b0; }
.tokens { font-family: monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens span { border-radius: 2px; }
.first { background: #e3f4e3; } .few { background: #eef3d8; } .some { background: #fbeec5; }
.rare { background: #fbd9b5; } .margin { background: #f7b6b0; } .unseen { color: #777; }
";

/// What the page shows.
pub(super) struct PageContent {
    pub(super) netuid: u16,
    pub(super) now: RunSnapshot,
    /// Newest first.
    pub(super) rounds: Vec<RoundHead>,
    /// Oldest first.
    pub(super) verdicts: Vec<ResponseVerdict>,
    pub(super) weights: Option<EpochWeights>,
    pub(super) answer: Option<(String, MinerResponse)>,
}

/// The answer that the page shows by itself: the newest verified one that is kept, because each of
/// its tokens was looked at; else the newest that is kept.
pub(super) fn newest(verdicts: &[ResponseVerdict]) -> Option<(String, u16)> {
    let mut kept = verdicts.iter().rev().filter(|verdict| verdict.is_kept).peekable();
    let newest = kept.peek().copied();
    let verdict = kept.find(|verdict| verdict.outcome == Outcome::Verified).or(newest)?;
    Some((verdict.round.clone(), verdict.uid))
}

/// The page at `/`, as one document.
pub(super) fn index(shown: &PageContent) -> Response {
    let PageContent { netuid, now, .. } = shown;
    let running = format!("block {} · {} rounds since the start", now.block, now.rounds);
    document(&html! {
        h1 { "Validator of subnet " (netuid) }
        p { (running) }
        nav {
            a href="/ready" { "ready" }
            a href="/health" { "health" }
            a href="/metrics" { "metrics" }
        }
        h2 { "Miners" }
        (miners(shown))
        h2 { "Weights" }
        (weights(shown.weights.as_ref()))
        h2 { "Rounds" }
        (rounds(&shown.rounds))
        h2 { "An answer" }
        @match &shown.answer {
            Some((round, response)) => (answer(round, response)),
            None => p { "No answer is kept: see " code { "--captures" } "." },
        }
    })
}

/// One answer on a page of its own.
pub(super) fn one(round: &str, response: &MinerResponse) -> Response {
    document(&html! {
        nav { a href="/" { "all miners" } }
        h1 { "An answer" }
        (answer(round, response))
    })
}

/// A document whose one style sheet is named by its hash: no other counts, and nothing is loaded.
fn document(body: &Markup) -> Response {
    let hash = STANDARD.encode(Sha256::digest(STYLE));
    let policy = format!(
        "default-src 'none'; style-src 'sha256-{hash}'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'"
    );
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "targon-engine validator" }
                link rel="icon" href="data:,";
                style { (PreEscaped(STYLE)) }
            }
            body { (body) }
        }
    };
    let headers = [
        (CONTENT_TYPE, "text/html; charset=utf-8".to_owned()),
        (CONTENT_SECURITY_POLICY, policy),
        (CACHE_CONTROL, "no-store".to_owned()),
    ];
    (headers, page.into_string()).into_response()
}

/// A peer's word, shortened; maud escapes it.
fn word(text: &str) -> String {
    text.chars().take(WORD_CHARS_MAX).collect()
}

fn miners(shown: &PageContent) -> Markup {
    let mut order: Vec<&str> = shown.verdicts.iter().map(|v| v.round.as_str()).collect();
    order.dedup();
    let place: BTreeMap<&str, usize> = order.iter().enumerate().map(|(i, id)| (*id, i)).collect();
    let mut by_uid: BTreeMap<u16, Vec<&ResponseVerdict>> = BTreeMap::new();
    for verdict in &shown.verdicts {
        by_uid.entry(verdict.uid).or_default().push(verdict);
    }
    let values = shown.weights.as_ref().map_or(&[][..], |weights| &weights.values);
    let weight = |uid| values.iter().find(|(u, _)| *u == uid).map_or(0, |(_, value)| *value);
    html! {
        table id="miners" {
            tr {
                th { "uid" } th { "hotkey" } th { "last " (order.len()) " rounds" }
                th.n { "ok/all" } th.n { "TTFT s" } th.n { "tokens/s" } th { "last verdict" }
                th.n { "weight" }
            }
            @for (uid, verdicts) in &by_uid {
                tr { (miner(*uid, verdicts, &place, weight(*uid))) }
            }
        }
        @if by_uid.is_empty() { p { "No round has ended yet." } }
    }
}

fn miner(uid: u16, all: &[&ResponseVerdict], place: &BTreeMap<&str, usize>, weight: u16) -> Markup {
    let Some(last) = all.last() else { return PreEscaped(String::new()) };
    // A uid's former holders are shown by nobody's row but theirs.
    let own: Vec<&&ResponseVerdict> = all.iter().filter(|v| v.hotkey == last.hotkey).collect();
    let good = own.iter().filter(|v| v.outcome == Outcome::Verified).count();
    let timed = own.iter().rev().find(|v| v.timing.tokens > 0);
    let number = |value: Option<f64>, digits: usize| {
        value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
    };
    let cause = last.cause.as_deref().unwrap_or_default();
    let wide = CELL * place.len();
    html! {
        td.n { (uid) }
        td.key title=(last.hotkey) { (last.hotkey.chars().take(12).collect::<String>()) "…" }
        td {
            svg width=(wide) height=(CELL) role="img" aria-label="verdicts, newest right" {
                @for verdict in &own { (cell(verdict, place)) }
            }
        }
        td.n { (good) "/" (own.len()) }
        td.n { (number(timed.map(|v| v.timing.first_token), 3)) }
        td.n { (number(timed.map(|v| v.timing.tps), 1)) }
        td class=(last.outcome.name()) { (last.outcome.name()) " " (word(cause)) }
        td.n { (weight) }
    }
}

fn cell(verdict: &ResponseVerdict, place: &BTreeMap<&str, usize>) -> Markup {
    let x = CELL * place.get(verdict.round.as_str()).copied().unwrap_or(0);
    let cause = verdict.cause.as_deref().map(word).unwrap_or_default();
    let (name, side) = (verdict.outcome.name(), CELL - 1);
    let square = html! {
        rect class=(name) x=(x) y="0" width=(side) height=(side) {
            title { (name) " " (cause) }
        }
    };
    let path = format!("/answers/{}/{}", verdict.round, verdict.uid);
    match verdict.is_kept {
        true => html! { a href=(path) { (square) } },
        false => square,
    }
}

fn weights(weights: Option<&EpochWeights>) -> Markup {
    let Some(weights) = weights else { return html! { p { "None were decided yet." } } };
    let state = match &weights.state {
        WeightsState::Planned => "decided, not sent".to_owned(),
        WeightsState::Sent { hash, .. } => format!("sent as {hash}"),
        WeightsState::Committed { hash, reveal_round, .. } => {
            format!("committed as {hash}, revealed at drand round {reveal_round}")
        }
        WeightsState::Confirmed => "read back from the chain as sent".to_owned(),
        WeightsState::Failed { why } => format!("not set: {}", word(why)),
    };
    let sum: f64 = weights.values.iter().map(|(_, value)| f64::from(*value)).sum();
    html! {
        p { "Epoch " (weights.epoch) ", decided at block " (weights.block) ": " (state) }
        table id="weights" {
            @for (uid, value) in &weights.values {
                @let share = f64::from(*value) / sum.max(1.0);
                tr {
                    td.n { (uid) }
                    td {
                        svg width=(BAR) height=(CELL) {
                            rect.bar width=(format!("{:.1}", BAR * share)) height=(CELL) {}
                        }
                    }
                    td.n { (value) }
                    td.n { (format!("{share:.4}")) }
                }
            }
        }
    }
}

fn rounds(rounds: &[RoundHead]) -> Markup {
    html! {
        table id="rounds" {
            tr {
                th { "round" } th.n { "block" } th { "model" } th.n { "verified/asked" }
                th.n { "s" }
            }
            @for round in rounds.iter().take(ROWS) {
                @let seconds = round.ended_ms.saturating_sub(round.started_ms) as f64 / 1000.0;
                tr {
                    td.key { (round.id.chars().take(8).collect::<String>()) }
                    td.n { (round.block) }
                    td { (word(&round.model)) }
                    td.n { (round.verified) "/" (round.asked) }
                    td.n { (format!("{seconds:.1}")) }
                }
            }
        }
    }
}

/// The tokens of an answer, as they came, coloured by what the check found.
fn answer(round: &str, response: &MinerResponse) -> Markup {
    let rows = response.report.as_ref().and_then(|report| report["rows"].as_array());
    let rows: BTreeMap<u64, &Value> =
        rows.into_iter().flatten().filter_map(|row| Some((row["index"].as_u64()?, row))).collect();
    let chunks = response.capture.as_ref().and_then(|capture| capture["chunks"].as_array());
    let tokens: Vec<(&str, bool)> = chunks.into_iter().flatten().filter_map(token).collect();
    let (name, error) = (response.outcome.name(), response.error.as_deref().unwrap_or_default());
    let mut index = 0;
    html! {
        p { "uid " (response.uid) " in round " code { (round) } ": "
            strong class=(name) { (name) } " " (word(response.cause.as_deref().unwrap_or_default()))
            " " (word(error)) }
        @if !response.statistics.facts().is_empty() {
            p id="measured" { "Measured: " (response.statistics.facts().join("; ")) "." }
        }
        p { @for (class, words) in LEGEND { span class=(class) { (words) } " " } }
        p.tokens id="answer" {
            @for (text, is_token) in tokens.iter().take(TOKENS_MAX) {
                @let row = rows.get(&index).copied().filter(|_| *is_token);
                span class=(colour(row)) title=(facts(index, row)) { (text) }
                ({ index += u64::from(*is_token); "" })
            }
        }
        @if tokens.len() > TOKENS_MAX { p { (tokens.len() - TOKENS_MAX) " more are not shown." } }
    }
}

const LEGEND: [(&str, &str); 6] = [
    ("first", "the most probable token"),
    ("few", "rank 2 to 5"),
    ("some", "rank 6 to 25"),
    ("rare", "a higher rank"),
    ("margin", "not what the sampler draws"),
    ("unseen", "not scored"),
];

/// A chunk's text, and whether it says that it is a token: the first chunk of a chat does not.
fn token(chunk: &Value) -> Option<(&str, bool)> {
    let choice = chunk["choices"].get(0)?;
    let text = choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
    let is_token = choice["token_ids"].get(0).is_some()
        || choice["logprobs"]["content"].get(0).is_some()
        || choice["logprobs"]["tokens"].get(0).is_some();
    Some((text, is_token))
}

fn colour(row: Option<&Value>) -> &'static str {
    let Some(row) = row else { return "unseen" };
    if row["margin"].as_f64().is_some_and(|margin| margin > 0.0) {
        return "margin";
    }
    match row["rank"].as_u64() {
        Some(0..=1) => "first",
        Some(2..=5) => "few",
        Some(6..=25) => "some",
        Some(_) => "rare",
        None => "unseen",
    }
}

fn facts(index: u64, row: Option<&Value>) -> String {
    let Some(row) = row else { return format!("token {index}, not scored") };
    let (id, rank, margin) = (&row["token"], &row["rank"], &row["margin"]);
    format!(
        "token {index}, id {id}, rank {rank}, margin {margin}, log-probability {}",
        row["logprob"]
    )
}
