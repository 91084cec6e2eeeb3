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
        all.extend(self.api_keys.unwrap_or_default());
        if let Some(file) = self.api_keys_file {
            let path = directory.join(file);
            let text = std::fs::read_to_string(&path).map_err(|e| {
                KeyError::new("api_keys_file", format!("{} cannot be read: {e}", path.display()))
            })?;
            let before = all.len();
            all.extend(text.lines().map(|l| l.trim().to_owned()).filter(|l| !l.is_empty()));
            // Without a key the API is open, which nobody means who names a file of keys.
            if all.len() == before {
                let what = format!("{} holds no key", path.display());
                return Err(KeyError::new("api_keys_file", what));
            }
        }
        if let Some(short) = all.iter().find(|k| k.chars().count() < KEY_CHARS_MIN) {
            let got = short.chars().count();
            let what = format!("must have at least {KEY_CHARS_MIN} characters each, one has {got}");
            return Err(KeyError::new("api_keys", what));
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
        let settings = Settings {
            keys: ApiKeys::new(all.iter().map(String::as_str)),
            limits,
            cors_origins: self.cors_origins.unwrap_or_default(),
        };
        Ok(ServerConfig { settings, log })
    }
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
