//! Parses where a store is, a SQLite file or a PostgreSQL database, and names it without its
//! password.

use super::error::{Cause, StoreError};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use url::Url;

const URL_BYTES_MAX: usize = 4096;
/// Parameters of a PostgreSQL URL that the driver honours.
const PARAMETERS: [&str; 17] = [
    "application_name",
    "dbname",
    "host",
    "hostaddr",
    "options",
    "password",
    "port",
    "ssl-ca",
    "ssl-cert",
    "ssl-key",
    "ssl-mode",
    "ssl-root-cert",
    "sslcert",
    "sslkey",
    "sslmode",
    "sslrootcert",
    "user",
];
/// What to do about a URL that cannot be taken apart.
const ENCODE: &str = "the form is postgres://USER:PASSWORD@HOST:PORT/DATABASE; in a user name or a \
                      password the characters @ : / ? # % are percent-encoded";

/// Where a store is.
#[derive(Clone)]
pub(super) enum Location {
    /// A SQLite file.
    Sqlite(PathBuf),
    /// A PostgreSQL database.
    Postgres(Postgres),
}

/// A PostgreSQL database.
#[derive(Clone)]
pub(super) struct Postgres {
    /// The whole URL, password included.
    pub(super) url: Url,
    /// What must not be printed, as it is written and as it is meant.
    secrets: Vec<String>,
}

impl Location {
    /// Reads a path or a URL.
    ///
    /// # Errors
    /// When it is neither.
    pub(super) fn parse(text: &str) -> Result<Self, StoreError> {
        let scheme = text.split_once(':').map_or("", |(scheme, _)| scheme);
        let refuse = |why: &str| StoreError {
            database: if scheme.is_empty() { "store".into() } else { format!("{scheme}:...") },
            operation: "be opened".into(),
            cause: Cause::Place(why.into()),
        };
        if text.len() > URL_BYTES_MAX {
            return Err(refuse(&format!("its URL has more than {URL_BYTES_MAX} bytes")));
        }
        if ["postgres", "postgresql"].contains(&scheme) {
            return Postgres::parse(text).map(Self::Postgres).map_err(|e| refuse(&e.to_string()));
        }
        let path = match scheme {
            "sqlite" => {
                let rest = &text["sqlite:".len()..];
                rest.strip_prefix("//").unwrap_or(rest)
            }
            _ if text.contains("://") => {
                let why = "must be a path, sqlite://PATH or postgres://..., not this scheme";
                return Err(refuse(why));
            }
            _ => text,
        };
        match path {
            "" => Err(refuse("it names no file")),
            ":memory:" => Err(refuse("a store in memory would forget with the process")),
            path if scheme == "sqlite" && path.contains('?') => {
                Err(refuse("a SQLite URL takes no parameters"))
            }
            path => Ok(Self::Sqlite(path.into())),
        }
    }

    /// Its name in errors and logs.
    pub(super) fn shown(&self) -> String {
        match self {
            Self::Sqlite(path) => path.display().to_string(),
            Self::Postgres(postgres) => postgres.shown(),
        }
    }

    /// `words` without what must not be printed.
    pub(super) fn scrub(&self, words: String) -> String {
        let Self::Postgres(Postgres { secrets, .. }) = self else { return words };
        secrets.iter().fold(words, |words, secret| words.replace(secret.as_str(), "***"))
    }
}

/// What is wrong with the URL of a PostgreSQL server; never a part of a secret.
#[derive(Debug, thiserror::Error)]
enum UrlError {
    #[error("{0}; {ENCODE}")]
    Parse(#[from] url::ParseError),
    #[error("{ENCODE}")]
    Stray,
    #[error("the parameter `{0}` is unknown; known are {known}", known = PARAMETERS.join(", "))]
    Parameter(String),
}

impl Postgres {
    fn parse(text: &str) -> Result<Self, UrlError> {
        let url = Url::parse(text)?;
        // A password that is not encoded ends up in other parts, whose names would be printed.
        let stray = [url.path(), url.query().unwrap_or(""), url.fragment().unwrap_or("")];
        if stray.iter().any(|part| part.contains('@')) || url.fragment().is_some() {
            return Err(UrlError::Stray);
        }
        let mut secrets: Vec<String> = url.password().map(str::to_owned).into_iter().collect();
        for (key, value) in url.query_pairs() {
            if !PARAMETERS.contains(&&*key) && !key.starts_with("options[") {
                return Err(UrlError::Parameter(key.into_owned()));
            }
            if key == "password" {
                secrets.push(value.into_owned());
            }
        }
        let meant: Vec<String> = secrets.iter().map(|secret| decoded(secret)).collect();
        secrets.extend(meant);
        secrets.retain(|secret| !secret.is_empty());
        Ok(Self { url, secrets })
    }

    fn shown(&self) -> String {
        let url = &self.url;
        let mut shown = "postgres://".to_owned();
        if !url.username().is_empty() {
            let _ = write!(shown, "{}@", url.username());
        }
        shown.push_str(url.host_str().unwrap_or(""));
        if let Some(port) = url.port() {
            let _ = write!(shown, ":{port}");
        }
        shown + url.path()
    }
}

/// Without percent-encoding.
fn decoded(text: &str) -> String {
    // A form's decoder, which takes `+` for a blank.
    let form = format!("={}", text.replace('+', "%2B"));
    let mut pairs = url::form_urlencoded::parse(form.as_bytes());
    pairs.next().map_or_else(String::new, |(_, value)| value.into_owned())
}

/// The driver's URL of a SQLite file at an absolute path; `mode` is `ro` or `rw`.
///
/// # Errors
/// When the path is not UTF-8.
pub(super) fn sqlite_url(path: &Path, mode: &str) -> Result<String, Cause> {
    let path = path.to_str().ok_or_else(|| Cause::Place("its path must be UTF-8".into()))?;
    let mut url = "sqlite://".to_owned();
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'.' | b'_' | b'~' => {
                url.push(char::from(byte));
            }
            other => {
                let _ = write!(url, "%{other:02X}");
            }
        }
    }
    Ok(format!("{url}?mode={mode}"))
}
