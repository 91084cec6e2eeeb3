//! Reads what is to be logged: a level, or levels for parts, separated by commas.
//!
//! It is stricter than the filter that follows it, which takes a misspelt level for the name of a
//! part and then logs nothing.

use std::fmt;
use std::str::FromStr;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// The words for levels, from the fewest lines to the most.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
/// What the other engine says of itself is for those who ask for it.
const QUIET: &str = "mistralrs_core=warn,mistralrs_quant=warn";
/// The part of a filter that means this program, and its name in log lines.
const ENGINE: (&str, &str) = ("engine", "targon_engine");

/// A text that is no filter of the log.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "must be error, warn, info, debug, trace or off, or PART=LEVEL such as engine=debug, several \
     separated by commas, got `{0}`"
)]
pub struct LogError(String);

/// What is logged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogFilter {
    text: String,
    directives: String,
}

impl LogFilter {
    /// A level for everything.
    pub fn level(level: LevelFilter) -> Self {
        Self { text: level.to_string(), directives: level.to_string() }
    }

    /// The filter that the running log follows.
    ///
    /// # Errors
    /// When the library refuses what the rules here allow.
    pub fn filter(&self) -> anyhow::Result<EnvFilter> {
        Ok(EnvFilter::try_new(format!("{QUIET},{}", self.directives))?)
    }
}

impl fmt::Display for LogFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for LogFilter {
    type Err = LogError;

    fn from_str(text: &str) -> Result<Self, LogError> {
        let directives = text.split(',').map(|part| directive(part.trim()));
        let directives = directives.collect::<Option<Vec<_>>>();
        let directives = directives.ok_or_else(|| LogError(text.to_owned()))?.join(",");
        Ok(Self { text: text.to_owned(), directives })
    }
}

/// A level, or a part with its level, under the names that the log has for them.
fn directive(text: &str) -> Option<String> {
    let is_level = |word: &str| LEVELS.iter().any(|level| level.eq_ignore_ascii_case(word));
    let Some((part, level)) = text.split_once('=') else {
        return is_level(text).then(|| text.to_owned());
    };
    let is_word = |word: &str| {
        let is_in_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        !word.is_empty() && word.chars().all(is_in_word)
    };
    if !part.split("::").all(is_word) || !is_level(level) {
        return None;
    }
    let (short, name) = ENGINE;
    let rest = part.strip_prefix(short).filter(|rest| rest.is_empty() || rest.starts_with("::"));
    let part = rest.map_or_else(|| part.to_owned(), |rest| format!("{name}{rest}"));
    Some(format!("{part}={level}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_parts_are_read_and_misspelt_ones_refused() {
        for (text, want) in [
            ("info", "info"),
            ("WARN", "WARN"),
            ("off", "off"),
            ("engine=debug", "targon_engine=debug"),
            ("warn, engine::server=trace", "warn,targon_engine::server=trace"),
            ("targon_engine=debug,hyper=info", "targon_engine=debug,hyper=info"),
            ("engines=info", "engines=info"),
        ] {
            let filter: LogFilter = text.parse().unwrap();
            assert_eq!((filter.directives.as_str(), filter.to_string()), (want, text.to_owned()));
            filter.filter().unwrap();
        }
        for text in [
            "",
            " ",
            "inof",
            "verbose",
            "9",
            "3",
            "engine",
            "engine=",
            "engine=foo",
            "=info",
            "info,",
            "info,inof",
            "a b=info",
            "a:b=info",
            "engine=debug=info",
            "[span]=info",
        ] {
            let error = text.parse::<LogFilter>().unwrap_err().to_string();
            assert!(error.ends_with(&format!("commas, got `{text}`")), "{error}");
        }
        let debug = LogFilter::level(LevelFilter::DEBUG);
        assert_eq!(debug.filter().unwrap().max_level_hint(), Some(LevelFilter::DEBUG));
    }
}
