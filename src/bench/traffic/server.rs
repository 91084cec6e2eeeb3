//! Asks a server that speaks OpenAI's API. Each request has a connection of its own, as a
//! validator's has.

use super::heard::{Answering, Chunk, Heard, LoadRequest, TokenUsage, Transport};
use crate::clock::Clock;
use crate::endpoint::shown;
use crate::validator::query::{QueryError, QueryFault, Size, Streamed, Target};
use crate::validator::round::measure::{said_error, timing};
use serde_json::Value;
use std::time::Duration;

/// How long the server may take to say what it is, and bytes of that.
const VERSION_TIMEOUT: Duration = Duration::from_secs(5);
const VERSION_BYTES_MAX: usize = 1000;

/// A server under load.
#[derive(Clone)]
pub struct Server {
    target: Target,
    clock: Clock,
}

/// Why a server's first answer was none.
#[derive(thiserror::Error, Debug)]
pub enum GreetError {
    /// The query failed.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// The stream has an error of the server's in it.
    #[error("{url}: {error}")]
    Said {
        /// URL of the server.
        url: String,
        /// What it said, shortened.
        error: String,
    },
}

impl Server {
    /// The server at `target`, timed by `clock`.
    ///
    /// # Errors
    /// When no client can be made for the target.
    pub fn new(target: Target, clock: Clock) -> Result<Self, QueryError> {
        // Made here, so that no request waits for it.
        target.client()?;
        Ok(Self { target, clock })
    }

    /// Sends one request that is not measured: a wrong address or name is seen here.
    ///
    /// # Errors
    /// When it is not answered well.
    pub async fn greet(&self, asked: &LoadRequest) -> Result<(), GreetError> {
        let streamed = self.stream(asked).await;
        if let Some(error) = said_error(&streamed.arrivals) {
            return Err(GreetError::Said { url: shown(&self.target.url), error });
        }
        Ok(streamed.outcome?)
    }

    /// What the server says it is at `/version`, where it has that: vLLM and this program do.
    pub async fn version(&self) -> Option<Value> {
        let size = Size { bytes: VERSION_BYTES_MAX, ..Size::LARGE };
        let target = Target { timeout: VERSION_TIMEOUT, size, ..self.target.clone() };
        let body = target.call("/version", None, &self.clock).await.ok()?;
        let said: Value = serde_json::from_slice(&body).ok()?;
        said.is_object().then_some(said)
    }

    async fn stream(&self, asked: &LoadRequest) -> Streamed {
        self.target.stream(asked.path, &asked.body, &self.clock, |_| {}).await
    }
}

impl Transport for Server {
    fn ask(&self, asked: LoadRequest) -> Answering {
        let server = self.clone();
        Box::pin(async move {
            let streamed = server.stream(&asked).await;
            let max_tokens = asked.body["max_tokens"].as_u64().unwrap_or(u64::MAX);
            heard(&streamed, u32::try_from(max_tokens).unwrap_or(u32::MAX))
        })
    }
}

fn heard(streamed: &Streamed, max_tokens: u32) -> Heard {
    let Streamed { arrivals, ended, outcome } = streamed;
    let failure = match (outcome, said_error(arrivals)) {
        (Err(e), _) => Some(kind(e)),
        (Ok(()), Some(_)) => Some("an error in the stream".into()),
        (Ok(()), None) => None,
    };
    Heard {
        chunks: arrivals.iter().map(|a| Chunk::read(a.at.as_secs_f64(), &a.chunk)).collect(),
        usage: arrivals.iter().rev().find_map(|a| TokenUsage::read(&a.chunk)),
        ended: ended.as_secs_f64(),
        validator_tps: timing(arrivals, *ended, max_tokens).tps,
        failure,
    }
}

fn kind(e: &QueryError) -> String {
    match (e, e.fault()) {
        (QueryError::Status { status, .. }, _) => format!("status {}", status.as_u16()),
        (_, QueryFault::Own) => "a fault of this machine".into(),
        (_, QueryFault::Unreachable) => "unreachable".into(),
        (_, QueryFault::Late) => "timeout".into(),
        (_, QueryFault::Malformed) => "malformed stream".into(),
        (_, QueryFault::Broken | QueryFault::Status) => "broken connection".into(),
    }
}
