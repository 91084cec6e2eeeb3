//! One request to a miner as a validator sends it: signed, streamed, every chunk timed at the read.

use crate::chain::epistula::Envelope;
use crate::chain::keys::{Hotkey, Keypair};
use crate::clock::Clock;
use eventsource_stream::Eventsource;
use futures_util::StreamExt;
use reqwest::{Client, Response, StatusCode};
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;

/// How long a connection may take (protocol 5.4).
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of a whole answer, and of an error's body.
const ANSWER_BYTES_MAX: usize = 64 << 20;
const ERROR_BYTES_MAX: usize = 4096;

/// A miner's address, and who asks it.
#[derive(Clone)]
pub struct Target {
    /// `http://ip:port`.
    pub url: String,
    /// Whose it is; signed requests are for this hotkey.
    pub hotkey: Option<Hotkey>,
    /// Who signs; unsigned where absent.
    pub signer: Option<Arc<Keypair>>,
    /// A key of the open API, for a server that wants one.
    pub api_key: Option<String>,
    /// How long may pass between two reads.
    pub read_timeout: Duration,
}

/// Why there is no whole answer.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// Nobody answers, or the answer breaks off.
    #[error("{url}: {what}")]
    Network {
        /// Who was asked.
        url: String,
        /// What happened.
        what: String,
    },
    /// The miner says no.
    #[error("{url} answered {status}: {body}")]
    Status {
        /// Who was asked.
        url: String,
        /// Its status.
        status: StatusCode,
        /// What it said, shortened.
        body: String,
    },
    /// The stream is not one.
    #[error("{url}: the stream is malformed: {what}")]
    Stream {
        /// Who was asked.
        url: String,
        /// What is wrong with it.
        what: String,
    },
}

/// An event of a stream, with the time since the request at which it was read.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// Since the request was sent.
    pub at: Duration,
    /// The chunk.
    pub chunk: Value,
}

impl Target {
    fn client(&self) -> Result<Client, QueryError> {
        // Fails only where a provider is installed already, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(self.read_timeout)
            .user_agent(concat!("targon-engine/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|e| self.network(e))
    }

    fn network(&self, e: reqwest::Error) -> QueryError {
        // The reason is often only in the source.
        let mut what = e.to_string();
        let mut source = std::error::Error::source(&e);
        while let Some(inner) = source {
            what = format!("{what}: {inner}");
            source = inner.source();
        }
        QueryError::Network { url: self.url.clone(), what }
    }

    fn malformed(&self, what: impl std::fmt::Display) -> QueryError {
        let what = what.to_string().chars().take(200).collect();
        QueryError::Stream { url: self.url.clone(), what }
    }

    async fn send(
        &self,
        path: &str,
        body: Option<Vec<u8>>,
        model: Option<&str>,
        clock: &Clock,
    ) -> Result<Response, QueryError> {
        let url = format!("{}{path}", self.url.trim_end_matches('/'));
        let client = self.client()?;
        let mut request = match &body {
            Some(_) => client.post(url).header("content-type", "application/json"),
            None => client.get(url),
        };
        // These bytes are signed, and these bytes are sent.
        let body = body.unwrap_or_default();
        if let Some(signer) = &self.signer {
            let uuid = uuid::Uuid::new_v4().to_string();
            let (timestamp_ms, signed_for) = (clock.unix_ms(), self.hotkey);
            let envelope = Envelope { timestamp_ms, uuid: &uuid, signed_for };
            for (name, value) in envelope.sign(signer, &body) {
                request = request.header(name, value);
            }
        }
        if let Some(model) = model {
            request = request.header("x-targon-model", model);
        }
        if let Some(key) = &self.api_key {
            request = request.bearer_auth(key);
        }
        let response = request.body(body).send().await.map_err(|e| self.network(e))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.text().await.unwrap_or_default();
        let body = body.chars().take(ERROR_BYTES_MAX).collect();
        Err(QueryError::Status { url: self.url.clone(), status, body })
    }

    /// The models that the miner serves, whichever shape it answers in.
    ///
    /// # Errors
    /// When it does not answer with a list or a map of names.
    pub async fn models(&self, clock: &Clock) -> Result<Vec<String>, QueryError> {
        let response = self.send("/models", None, None, clock).await?;
        let text = response.text().await.map_err(|e| self.network(e))?;
        match serde_json::from_str(&text) {
            Ok(Value::Array(list)) => {
                let names = list.iter().map(|v| v.as_str().map(str::to_owned));
                names.collect::<Option<_>>().ok_or_else(|| self.malformed("not a list of names"))
            }
            Ok(Value::Object(map)) => Ok(map.into_iter().map(|(name, _)| name).collect()),
            _ => Err(self.malformed("not a list of names")),
        }
    }

    /// Sends a request whose body says `stream: true` and hands each event to `on_event` as it
    /// arrives.
    ///
    /// # Errors
    /// When the answer is refused, breaks off, or is not a stream of JSON that ends in `[DONE]`.
    pub async fn stream(
        &self,
        path: &str,
        body: &Value,
        clock: &Clock,
        mut on_event: impl FnMut(&Arrival),
    ) -> Result<Vec<Arrival>, QueryError> {
        let bytes = serde_json::to_vec(body).map_err(|e| self.malformed(e))?;
        let started = clock.elapsed();
        let response = self.send(path, Some(bytes), body["model"].as_str(), clock).await?;
        let mut read = 0;
        let mut is_done = false;
        let mut arrivals = Vec::new();
        let counted = response.bytes_stream().map(|part| {
            if let Ok(part) = &part {
                read += part.len();
            }
            if read > ANSWER_BYTES_MAX {
                return Err(format!("the answer has more than {ANSWER_BYTES_MAX} bytes"));
            }
            part.map_err(|e| e.to_string())
        });
        let mut events = std::pin::pin!(counted.eventsource());
        while let Some(event) = events.next().await {
            let at = clock.elapsed().saturating_sub(started);
            let event = event.map_err(|e| self.malformed(e))?;
            if event.data == "[DONE]" {
                is_done = true;
                break;
            }
            let chunk = serde_json::from_str(&event.data).map_err(|e| self.malformed(e))?;
            let arrival = Arrival { at, chunk };
            on_event(&arrival);
            arrivals.push(arrival);
        }
        match is_done {
            true => Ok(arrivals),
            false => Err(self.malformed("it ends without [DONE]")),
        }
    }
}
