//! Makes prompts that no miner can have seen: a passage, a task about it, a persona and the date.
//!
//! A [`Draft`] is drawn from a [`Passages`]. The engine may rewrite its passage into a query in
//! words of its own: [`Draft::rewriting`] is the request for that, [`read_query`] reads the
//! answer, and the round's owner calls the engine in between. [`Draft::finish`] makes the
//! [`DrawnPrompt`], as messages or as text. Chance and date are given; nothing here waits or knows
//! a network. Seed, temperature and length of the answer belong to the round, not to the prompt.
//!
//! Of our own drafts alone there are more than 10^12 for each day, so that two of a day's prompts
//! are hardly ever equal.

pub mod dataset;
pub mod ours;

use crate::chance::Chance;
use anyhow::{Context, anyhow};
use dataset::Passages;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Value, json};

const NAMES: &str = include_str!("data/names.txt");
const COUNTRIES: &str = include_str!("data/countries.txt");

/// How warm the engine rewrites (protocol 5.3).
const REWRITING_TEMPERATURE: f64 = 0.5;
/// Tokens of the query that it may write, drawn between these (protocol 5.3).
const REWRITING_TOKENS: (u32, u32) = (16, 64);
/// What a query must begin with, so that nothing before it is taken for it.
const QUERY_PREFIX: &str = "Search query:";
/// Characters of a query that are used.
const QUERY_CHARS_MAX: usize = 400;

/// The day of a time, as `YYYY-MM-DD` in UTC.
///
/// # Errors
/// When the time lies outside the calendar.
pub fn date(unix_ms: u64) -> anyhow::Result<String> {
    let outside = || anyhow!("{unix_ms} ms since 1970 is outside the calendar");
    let ms = i64::try_from(unix_ms).map_err(|_| outside())?;
    let time = Timestamp::from_millisecond(ms).map_err(|_| outside())?;
    Ok(time.to_zoned(TimeZone::UTC).date().to_string())
}

/// Whom the model plays.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Persona {
    /// A given name, one of 300 and more.
    pub name: &'static str,
    /// The country that it says it is from.
    pub country: &'static str,
}

/// What a prompt is made of, before its passage is rewritten.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Draft {
    /// What it is about.
    pub passage: String,
    /// What is to be done with it, in one or two sentences.
    pub task: String,
    /// Whom the model plays.
    pub persona: Persona,
    /// The day, as `YYYY-MM-DD`.
    pub date: String,
}

/// What the model reads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DrawnPrompt {
    /// Who it is and how it answers.
    pub system: String,
    /// The text that it is to answer.
    pub user: String,
}

impl Draft {
    /// Draws passage, task and persona.
    pub fn draw(source: &Passages, date: &str, chance: &mut Chance) -> Self {
        let persona = Persona { name: chance.line(NAMES), country: chance.line(COUNTRIES) };
        let passage = source.passage(chance).to_owned();
        Self { passage, task: ours::task(chance), persona, date: date.to_owned() }
    }

    /// The request for a query in the engine's own words, as a body of `/v1/chat/completions`.
    pub fn rewriting(&self, model: &str, chance: &mut Chance) -> Value {
        let (low, high) = REWRITING_TOKENS;
        let max_tokens = u64::from(low) + chance.below(u64::from(high - low) + 1);
        let system = format!(
            "Today is {}. The user gives you a passage. Write one sentence that somebody who wants \
             to know more about its subject would type into a search engine. Do not answer it, and \
             write nothing else. Begin with \"{QUERY_PREFIX} \".",
            self.date
        );
        json!({
            "model": model,
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": self.passage},
            ],
            "temperature": REWRITING_TEMPERATURE,
            "seed": chance.bits() >> 33,
            "max_tokens": max_tokens,
            "stream": false,
        })
    }

    /// The prompt, about the query where there is one and else about the passage itself.
    pub fn finish(&self, query: Option<&str>) -> DrawnPrompt {
        let Persona { name, country } = self.persona;
        let system = format!(
            "Today is {}. You are {name}, an expert assistant that was built in {country}. First \
             say in one sentence who you are. Then repeat the question in your own words and \
             mention today's date. Then answer it. Always write in English.",
            self.date
        );
        DrawnPrompt { system, user: format!("{}\n\n{}", query.unwrap_or(&self.passage), self.task) }
    }
}

impl DrawnPrompt {
    /// For the chat endpoint.
    pub fn messages(&self) -> Value {
        json!([
            {"role": "system", "content": self.system},
            {"role": "user", "content": self.user},
        ])
    }

    /// For the completion endpoint.
    pub fn text(&self) -> String {
        format!("{}\n\n{}", self.system, self.user)
    }
}

/// The query in what the engine wrote for [`Draft::rewriting`]: its first line with words, without
/// prefix and quotation marks, shortened.
///
/// # Errors
/// When there are no words.
pub fn read_query(content: &str) -> anyhow::Result<String> {
    let mut lines = content.lines().map(query).filter(|q| q.chars().any(char::is_alphabetic));
    let query = lines.next().context("the engine wrote no words to search for")?;
    Ok(query.chars().take(QUERY_CHARS_MAX).collect())
}

fn query(line: &str) -> &str {
    let line = line.trim();
    let prefix = line.get(..QUERY_PREFIX.len());
    let is_marked = prefix.is_some_and(|p| p.eq_ignore_ascii_case(QUERY_PREFIX));
    let rest = if is_marked { &line[QUERY_PREFIX.len()..] } else { line };
    rest.trim_matches(|c: char| c.is_whitespace() || matches!(c, '"' | '\u{201c}' | '\u{201d}'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    /// A context that every prompt of ours leaves room in. A tokenizer over bytes has at most one
    /// token for each, so bytes bound tokens whatever the model.
    const OURS_BYTES_MAX: usize = 1024;

    #[test]
    fn ten_thousand_prompts_are_all_different_and_fit() {
        let mut chance = Chance::seeded(1);
        let (mut seen, mut tasks, mut passages) =
            (BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
        for _ in 0..10_000 {
            let draft = Draft::draw(&Passages::Ours, "2026-01-31", &mut chance);
            let prompt = draft.finish(None);
            let text = prompt.text();
            assert!((300..OURS_BYTES_MAX).contains(&text.len()), "{} bytes: {text}", text.len());
            assert!(!text.contains("  ") && text.is_ascii(), "{text}");
            assert!(text.contains("2026-01-31") && text.contains(draft.persona.name));
            assert_eq!(prompt.messages()[1]["content"], prompt.user);
            assert!(seen.insert(text), "twice: {prompt:?}");
            tasks.insert(draft.task);
            *passages.entry(draft.passage).or_insert(0) += 1;
        }
        assert!(tasks.len() > 9_000, "{} tasks", tasks.len());
        // All passages come up, none often.
        assert_eq!(passages.len(), ours::passages());
        assert!(passages.values().all(|n| (10..120).contains(n)), "{passages:?}");
    }

    #[test]
    fn a_seed_decides() {
        let draw = |key| {
            let mut chance = Chance::seeded(key);
            let draft = Draft::draw(&Passages::Ours, "2026-01-31", &mut chance);
            (draft.rewriting("m", &mut chance), draft)
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }

    #[test]
    fn lists_are_long_and_without_repetition() {
        for (list, at_least) in [(NAMES, 300), (COUNTRIES, 150)] {
            let lines: BTreeSet<&str> = list.lines().collect();
            assert_eq!(lines.len(), list.lines().count());
            assert!(lines.len() >= at_least && lines.iter().all(|l| !l.trim().is_empty()));
        }
        assert!(ours::passages() >= 200);
    }

    #[test]
    fn an_engine_is_asked_for_a_query_and_its_answer_is_read() {
        let mut chance = Chance::seeded(5);
        let draft = Draft::draw(&Passages::Ours, "2026-01-31", &mut chance);
        for _ in 0..200 {
            let body = draft.rewriting("a/model", &mut chance);
            assert!((16..=64).contains(&body["max_tokens"].as_u64().unwrap()));
            assert_eq!(body["messages"][1]["content"], draft.passage);
        }
        let read = read_query;
        for (content, query) in [
            ("Search query: why is the sea salty?", "why is the sea salty?"),
            ("\n  search QUERY: \"why salt\" \n\nIt is salty.", "why salt"),
            ("why salt", "why salt"),
            ("Search query:\nwhy salt", "why salt"),
            (
                "\u{e9}t\u{e9} caf\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}",
                "\u{e9}t\u{e9} caf\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}",
            ),
        ] {
            assert_eq!(read(content).unwrap(), query, "{content:?}");
        }
        assert_eq!(read(&"long ".repeat(500)).unwrap().chars().count(), QUERY_CHARS_MAX);
        for content in ["", "\n", "Search query:", "?! 123"] {
            assert!(read(content).unwrap_err().to_string().contains("no words"), "{content:?}");
        }
        let prompt = draft.finish(Some("why salt"));
        assert!(prompt.user.starts_with("why salt\n\n") && prompt.user.ends_with(&draft.task));
        assert!(!prompt.text().contains(&draft.passage));
    }

    #[test]
    fn dates_are_of_the_calendar() {
        assert_eq!(date(0).unwrap(), "1970-01-01");
        assert_eq!(date(1_709_251_199_999).unwrap(), "2024-02-29");
        assert!(date(u64::MAX).unwrap_err().to_string().contains("outside the calendar"));
    }
}
