//! Reads the `[server]` table of models.toml.

use super::log::{LogError, LogFilter};
use super::units;
use crate::files::KeyError;
use crate::server::connections::CONNECTIONS_MAX;
use crate::server::settings::{ApiKeys, HttpLimits, Settings};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Names of the table's keys, for hints.
pub const KEYS: [&str; 10] = [
    "api_keys",
    "api_keys_file",
    "cors_origins",
    "log",
    "body_max",
    "connections_per_address",
    "header_seconds",
    "body_seconds",
    "write_seconds",
    "stall_seconds",
];
/// Characters of a key: shorter ones can be guessed.
const KEY_CHARS_MIN: usize = 16;
/// Most seconds of any limit: a day.
const SECONDS_MAX: u64 = 86_400;

/// What an origin is.
const ORIGIN_RULE: &str = "must be `*` or origins as browsers send them, such as \
    https://example.org:8443: scheme and host in lower case, no path, no usual port";

/// A key of the API that is no use. It does not say which.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ApiKeyError {
    /// It can be guessed.
    #[error("must have at least {KEY_CHARS_MIN} characters each, one has {0}")]
    Short(usize),
    /// No header of a request can have it.
    #[error("must have no control characters and no blanks at their ends, one has")]
    Unsendable,
}

/// The table as it is written.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct ServerTable {
    api_keys: Option<Vec<String>>,
    api_keys_file: Option<PathBuf>,
    cors_origins: Option<Vec<String>>,
    log: Option<String>,
    body_max: Option<String>,
    connections_per_address: Option<u64>,
    header_seconds: Option<u64>,
    body_seconds: Option<u64>,
    write_seconds: Option<u64>,
    stall_seconds: Option<u64>,
}

/// What the `[server]` table says, checked.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct ServerConfig {
    /// What the server follows.
    pub settings: Settings,
    /// What is logged; `None` is as the flag says.
    pub log: Option<LogFilter>,
}

impl ServerTable {
    /// Checks the table; relative paths start at `directory`, `keys` are added to its own.
    ///
    /// # Errors
    /// A key and what is wrong with it.
    pub fn check(self, directory: &Path, keys: &[String]) -> Result<ServerConfig, KeyError> {
        let mut all = keys.to_vec();
        let own = self.api_keys.unwrap_or_default();
        check_keys(&own).map_err(|e| KeyError::new("api_keys", e))?;
        all.extend(own);
        if let Some(file) = self.api_keys_file {
            let path = directory.join(file);
            let text = std::fs::read_to_string(&path).map_err(|e| {
                KeyError::new("api_keys_file", format!("{} cannot be read: {e}", path.display()))
            })?;
            let lines = text.lines().map(|l| l.trim().to_owned()).filter(|l| !l.is_empty());
            let lines: Vec<String> = lines.collect();
            let fault = |what: String| KeyError::new("api_keys_file", what);
            // Without a key the API is open, which nobody means who names a file of keys.
            if lines.is_empty() {
                return Err(fault(format!("{} holds no key", path.display())));
            }
            check_keys(&lines).map_err(|e| fault(format!("{}: its keys {e}", path.display())))?;
            all.extend(lines);
        }
        let cors_origins = self.cors_origins.unwrap_or_default();
        if let Some(origin) = cors_origins.iter().find(|origin| !is_origin(origin)) {
            let what = format!("{ORIGIN_RULE}, got {origin:?}");
            return Err(KeyError::new("cors_origins", what));
        }
        let defaults = HttpLimits::default();
        let limits = HttpLimits {
            body_bytes: match self.body_max {
                Some(text) => units::size(&text).map_err(|e| KeyError::new("body_max", e))?,
                None => defaults.body_bytes,
            },
            connections_per_address: connections(
                self.connections_per_address,
                defaults.connections_per_address,
            )?,
            header_time: seconds("header_seconds", self.header_seconds, defaults.header_time)?,
            body_time: seconds("body_seconds", self.body_seconds, defaults.body_time)?,
            write_time: seconds("write_seconds", self.write_seconds, defaults.write_time)?,
            stall_time: seconds("stall_seconds", self.stall_seconds, defaults.stall_time)?,
        };
        let log = self.log.as_deref().map(str::parse).transpose();
        let log = log.map_err(|e: LogError| KeyError::new("log", e))?;
        let settings =
            Settings { keys: ApiKeys::new(all.iter().map(String::as_str)), limits, cors_origins };
        Ok(ServerConfig { settings, log })
    }
}

/// Refuses keys that can be guessed, or that no request can carry. None of them is repeated.
///
/// # Errors
/// The rule for each key, and what one of them is.
pub fn check_keys(keys: &[String]) -> Result<(), ApiKeyError> {
    for key in keys {
        let count = key.chars().count();
        if count < KEY_CHARS_MIN {
            return Err(ApiKeyError::Short(count));
        }
        if key.chars().any(char::is_control) || key.trim().len() < key.len() {
            return Err(ApiKeyError::Unsendable);
        }
    }
    Ok(())
}

/// Whether a browser can send this as the origin of a page: scheme, host and port, as it spells
/// them.
fn is_origin(text: &str) -> bool {
    let Some((scheme, host)) = text.split_once("://") else { return text == "*" };
    let is_spelled =
        |c: char| matches!(c, 'a'..='z' | '0'..='9' | '-' | '.' | '_' | ':' | '[' | ']');
    let is_scheme = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '+' | '-' | '.');
    let is_usual = match scheme {
        "http" => host.ends_with(":80"),
        "https" => host.ends_with(":443"),
        _ => false,
    };
    // The port that a scheme has anyway is left out.
    let is_host = !host.is_empty() && host.chars().all(is_spelled) && !is_usual;
    !scheme.is_empty() && scheme.chars().all(is_scheme) && is_host
}

fn connections(value: Option<u64>, default: usize) -> Result<usize, KeyError> {
    match value {
        None => Ok(default),
        Some(n) if (1..=CONNECTIONS_MAX as u64).contains(&n) => Ok(n as usize),
        Some(n) => {
            let what = format!("must lie in 1..={CONNECTIONS_MAX}, got {n}");
            Err(KeyError::new("connections_per_address", what))
        }
    }
}

fn seconds(key: &'static str, value: Option<u64>, default: Duration) -> Result<Duration, KeyError> {
    match value {
        None => Ok(default),
        Some(s) if (1..=SECONDS_MAX).contains(&s) => Ok(Duration::from_secs(s)),
        Some(s) => Err(KeyError::new(key, format!("must lie in 1..={SECONDS_MAX}, got {s}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_those_that_browsers_send() {
        for origin in [
            "*",
            "https://example.org",
            "http://localhost:3000",
            "http://[::1]:8080",
            "chrome-extension://abcdef",
        ] {
            assert!(is_origin(origin), "{origin}");
        }
        for other in [
            "",
            "example.org",
            "https://example.org/",
            "https://example.org/page",
            "https://Example.org",
            "https://example.org:443",
            "http://example.org:80",
            "https://",
            "://example.org",
            "https://exam\nple.org",
            "https://*.example.org",
        ] {
            assert!(!is_origin(other), "{other:?}");
        }
        let table: ServerTable = toml::from_str("cors_origins = [\"*\", \"x/\"]").unwrap();
        let error = table.check(Path::new("."), &[]).unwrap_err().to_string();
        assert!(error.starts_with("`cors_origins` must be `*` or origins as"), "{error}");
        assert!(error.ends_with("got \"x/\""), "{error}");
    }

    #[test]
    fn keys_are_long_and_can_be_sent() {
        let check = |key: &str| check_keys(&[key.to_owned()]);
        assert_eq!(check("0123456789abcdef"), Ok(()));
        assert_eq!(check("0123456789"), Err(ApiKeyError::Short(10)));
        for key in ["0123456789abcde\u{7f}", "0123456789abcdef ", "\t0123456789abcdef"] {
            assert_eq!(check(key), Err(ApiKeyError::Unsendable));
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("keys"), "0123456789abcdef\nshort\n").unwrap();
        let table: ServerTable = toml::from_str("api_keys_file = \"keys\"").unwrap();
        let error = table.check(dir.path(), &[]).unwrap_err().to_string();
        assert!(error.ends_with("keys: its keys must have at least 16 characters each, one has 5"));
    }
}
