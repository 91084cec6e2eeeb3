//! Sends one request to a miner as a validator does: it is signed and streamed, and every chunk is
//! timed at the read.

use crate::chain::epistula::Envelope;
use crate::chain::keys::{Hotkey, Keypair};
use crate::clock::Clock;
use crate::endpoint::{reasons, shown};
use crate::entropy::Entropy;
use crate::tls;
use anyhow::{Context, anyhow};
use parking_lot::Mutex;
use reqwest::{Client, Response, StatusCode, redirect};
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;

/// How long a connection may take (protocol 5.4).
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of one line of an answer, and of a body that is not a stream.
const LINE_BYTES_MAX: usize = 1 << 20;
const BODY_BYTES_MAX: usize = 256 << 10;
/// What a validator takes of an answer besides its tokens, and for each token: a chunk with
/// log-probability, weight value and its share of a proof has a few hundred bytes.
const ANSWER_EXTRA: Size = Size { bytes: 256 << 10, events: 16, marks: 16 << 10 };
const ANSWER_TOKEN: Size = Size { bytes: 4 << 10, events: 1, marks: 256 };
/// How deep a request or a chunk may nest: a file of captures holds it a little deeper, and must be
/// read again.
pub const DEPTH_MAX: usize = 64;
/// Clients that are kept, by the time between two reads.
const CLIENTS_MAX: usize = 8;
static CLIENTS: Mutex<Vec<(Duration, Client)>> = Mutex::new(Vec::new());
/// Characters of an error's body that are repeated.
const ERROR_CHARS_MAX: usize = 1000;

/// How much of an answer is taken; more is refused, and no more of it is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Size {
    /// Bytes of the whole answer.
    pub bytes: usize,
    /// Server-sent events of the whole answer.
    pub events: usize,
    /// Values of all events, counted by what opens or separates them: a value of one byte takes
    /// many in memory.
    pub marks: usize,
}

impl Size {
    /// For an operator that looks at a miner.
    pub const LARGE: Self = Self { bytes: 64 << 20, events: 1 << 20, marks: 8 << 20 };

    /// Enough for every honest answer of `tokens` tokens.
    pub fn of_tokens(tokens: u32) -> Self {
        let tokens = usize::try_from(tokens).unwrap_or(usize::MAX);
        let of = |extra: usize, each: usize| extra.saturating_add(tokens.saturating_mul(each));
        Self {
            bytes: of(ANSWER_EXTRA.bytes, ANSWER_TOKEN.bytes),
            events: of(ANSWER_EXTRA.events, ANSWER_TOKEN.events),
            marks: of(ANSWER_EXTRA.marks, ANSWER_TOKEN.marks),
        }
    }

    /// Takes an event off what is left.
    fn take(&mut self, data: &[u8]) -> anyhow::Result<()> {
        let marks = data.iter().filter(|b| matches!(b, b',' | b':' | b'[' | b'{')).count();
        self.events = self.events.checked_sub(1).context("more events than it can need")?;
        self.marks = self.marks.checked_sub(marks).context("more values than it can need")?;
        Ok(())
    }
}

/// A miner's address, and who asks it.
#[derive(Clone)]
pub struct Target {
    /// `http://ip:port`.
    pub url: String,
    /// Whose it is; signed requests are for this hotkey.
    pub hotkey: Option<Hotkey>,
    /// Who signs; `None` sends the request unsigned.
    pub signer: Option<QuerySigner>,
    /// A key of the open API, for a server that wants one.
    pub api_key: Option<String>,
    /// How long may pass between two reads.
    pub read_timeout: Duration,
    /// How long the whole answer may take.
    pub timeout: Duration,
    /// How much of an answer is taken.
    pub size: Size,
}

/// Signs requests.
#[derive(Clone)]
pub struct QuerySigner {
    /// The hotkey that signs.
    pub key: Arc<Keypair>,
    /// Where the names of signed requests come from.
    pub entropy: Entropy,
}

/// The kind of a failure, and who is at fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum QueryFault {
    /// This machine is at fault: it lacks something.
    Own,
    /// The connection is refused.
    Unreachable,
    /// It takes too long.
    Late,
    /// The connection breaks, or does not speak HTTP.
    Broken,
    /// A status other than success.
    Status,
    /// A stream that is malformed, or has too much in it.
    Malformed,
}

/// Why there is no whole answer.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// There is no answer, or it breaks off.
    #[error("{url}: {what}")]
    Network {
        /// The URL that was asked.
        url: String,
        /// What went wrong, in one sentence.
        what: String,
        /// Whose failure it is, and of which kind.
        fault: QueryFault,
    },
    /// The miner says no.
    #[error("{url} answered {status}: {body}")]
    Status {
        /// The URL that was asked.
        url: String,
        /// The HTTP status of the answer.
        status: StatusCode,
        /// What it said, shortened.
        body: String,
    },
    /// The stream is not one.
    #[error("{url}: the stream is malformed: {what}")]
    Stream {
        /// The URL that was asked.
        url: String,
        /// What is wrong with it.
        what: String,
    },
}

impl QueryError {
    /// The kind of the failure.
    pub fn fault(&self) -> QueryFault {
        match self {
            QueryError::Network { fault, .. } => *fault,
            QueryError::Status { .. } => QueryFault::Status,
            QueryError::Stream { .. } => QueryFault::Malformed,
        }
    }
}

/// Errors of the operating system that say nothing about the other side: no descriptors, memory or
/// ports left, no interface. A network that cannot be reached is not among them: a miner's router
/// can say that too.
fn is_own(e: &std::io::Error) -> bool {
    let own = [
        libc::EMFILE,
        libc::ENFILE,
        libc::ENOMEM,
        libc::ENOBUFS,
        libc::EADDRNOTAVAIL,
        libc::ENETDOWN,
    ];
    e.raw_os_error().is_some_and(|code| own.contains(&code))
}

/// An event of a stream, with the time since the request at which it was read.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// Since the request was sent.
    pub at: Duration,
    /// The event's data as JSON.
    pub chunk: Value,
}

impl Target {
    /// What requests to it are sent by, kept for others with this time between two reads: making
    /// one costs milliseconds.
    ///
    /// # Errors
    /// When this machine cannot make one.
    pub fn client(&self) -> Result<Client, QueryError> {
        // Held while one is made: many queries begin at once, and one client is enough for them.
        let mut clients = CLIENTS.lock();
        if let Some((_, client)) = clients.iter().find(|(time, _)| *time == self.read_timeout) {
            return Ok(client.clone());
        }
        let client = self.new_client()?;
        if clients.len() == CLIENTS_MAX {
            clients.remove(0);
        }
        clients.push((self.read_timeout, client.clone()));
        Ok(client)
    }

    fn new_client(&self) -> Result<Client, QueryError> {
        tls::install();
        Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(self.read_timeout)
            // Each request has a connection of its own: one that the peer has closed meanwhile
            // would look like its fault.
            .pool_max_idle_per_host(0)
            // A signed request is for this miner, not for where it points.
            .redirect(redirect::Policy::none())
            .user_agent(concat!("targon-engine/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|e| self.network(e))
    }

    fn network(&self, e: reqwest::Error) -> QueryError {
        let mut fault = match &e {
            e if e.is_builder() => QueryFault::Own,
            e if e.is_connect() => QueryFault::Unreachable,
            e if e.is_timeout() => QueryFault::Late,
            _ => QueryFault::Broken,
        };
        let e = e.without_url();
        let what = reasons(&e);
        let mut source = std::error::Error::source(&e);
        while let Some(inner) = source {
            if inner.downcast_ref::<std::io::Error>().is_some_and(is_own) {
                fault = QueryFault::Own;
            }
            source = inner.source();
        }
        QueryError::Network { url: shown(&self.url), what, fault }
    }

    /// An answer that is not what it should be.
    pub(super) fn malformed(&self, what: impl std::fmt::Display) -> QueryError {
        let what = what.to_string().chars().take(200).collect();
        QueryError::Stream { url: shown(&self.url), what }
    }

    async fn send(
        &self,
        client: &Client,
        (path, body): (&str, Option<Vec<u8>>),
        model: Option<&str>,
        clock: &Clock,
    ) -> Result<Response, QueryError> {
        let url = format!("{}{path}", self.url.trim_end_matches('/'));
        let mut request = match &body {
            Some(_) => client.post(url).header("content-type", "application/json"),
            None => client.get(url),
        };
        // The same bytes are signed and sent.
        let body = body.unwrap_or_default();
        if let Some(signer) = &self.signer {
            let uuid = signer.entropy.uuid().to_string();
            let (timestamp_ms, signed_for) = (clock.unix_ms(), self.hotkey);
            let envelope = Envelope { timestamp_ms, uuid: &uuid, signed_for };
            for (name, value) in envelope.sign(&signer.key, &body) {
                request = request.header(name, value);
            }
        }
        if let Some(model) = model {
            request = request.header("x-targon-model", model);
        }
        if let Some(key) = &self.api_key {
            request = request.bearer_auth(key);
        }
        let response =
            request.timeout(self.timeout).body(body).send().await.map_err(|e| self.network(e))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = self.body(response, BODY_BYTES_MAX).await.unwrap_or_default();
        let body = String::from_utf8_lossy(&body).chars().take(ERROR_CHARS_MAX).collect();
        Err(QueryError::Status { url: shown(&self.url), status, body })
    }

    /// A small body, whatever the peer would like to send.
    async fn body(&self, mut response: Response, most: usize) -> Result<Vec<u8>, QueryError> {
        let mut body = Vec::new();
        while let Some(part) = response.chunk().await.map_err(|e| self.network(e))? {
            body.extend_from_slice(&part);
            if body.len() > most {
                let what = format!("the answer has more than {most} bytes");
                return Err(self.malformed(what));
            }
        }
        Ok(body)
    }

    /// Posts a body, or gets what is there without one, and reads the whole answer.
    ///
    /// # Errors
    /// When it does not answer, says no, or says more than a small body holds.
    pub async fn call(
        &self,
        path: &str,
        body: Option<Vec<u8>>,
        clock: &Clock,
    ) -> Result<Vec<u8>, QueryError> {
        let response = self.send(&self.client()?, (path, body), None, clock).await?;
        self.body(response, self.size.bytes).await
    }

    /// Sends a request whose body says `stream: true` and hands each event to `on_event` as it
    /// arrives. What arrived before a failure is kept: it is evidence.
    pub async fn stream(
        &self,
        path: &str,
        body: &Value,
        clock: &Clock,
        mut on_event: impl FnMut(&Arrival),
    ) -> Streamed {
        let mut arrivals = Vec::new();
        let mut keep = |arrival: Arrival| {
            on_event(&arrival);
            arrivals.push(arrival);
        };
        let mut span = Span { started: clock.elapsed(), ended: None };
        let outcome = match self.client() {
            Ok(client) => self.read(&client, (path, body), clock, (&mut span, &mut keep)).await,
            Err(e) => Err(e),
        };
        let ended = span.ended.unwrap_or_else(|| clock.elapsed()).saturating_sub(span.started);
        Streamed { arrivals, ended, outcome }
    }

    async fn read(
        &self,
        client: &Client,
        (path, body): (&str, &Value),
        clock: &Clock,
        (span, keep): (&mut Span, &mut impl FnMut(Arrival)),
    ) -> Result<(), QueryError> {
        let bytes = serde_json::to_vec(body).map_err(|e| self.malformed(e))?;
        let started = clock.elapsed();
        span.started = started;
        let sent = (path, Some(bytes));
        let mut response = self.send(client, sent, body["model"].as_str(), clock).await?;
        let (mut events, mut read, mut left) = (Events::default(), 0, self.size);
        while let Some(part) = response.chunk().await.map_err(|e| self.network(e))? {
            // Before anything is parsed, so that our own work does not count.
            let at = clock.elapsed().saturating_sub(started);
            read += part.len();
            if read > self.size.bytes {
                let what = format!("the answer has more than {} bytes", self.size.bytes);
                return Err(self.malformed(what));
            }
            for data in events.push(&part).map_err(|what| self.malformed(what))? {
                if data == b"[DONE]" {
                    span.ended = Some(started + at);
                    return Ok(());
                }
                left.take(&data).map_err(|what| self.malformed(what))?;
                let chunk = serde_json::from_slice(&data).map_err(|e| self.malformed(e))?;
                if is_deeper(&chunk, DEPTH_MAX) {
                    return Err(self.malformed(format!("a chunk nests more than {DEPTH_MAX} deep")));
                }
                keep(Arrival { at, chunk });
            }
        }
        Err(self.malformed("it ends without [DONE]"))
    }
}

/// Whether a value nests more than `depth` lists and objects.
pub fn is_deeper(value: &Value, depth: usize) -> bool {
    let below = |value: &Value| is_deeper(value, depth.saturating_sub(1));
    match value {
        Value::Array(list) => depth == 0 || list.iter().any(below),
        Value::Object(map) => depth == 0 || map.values().any(below),
        _ => false,
    }
}

/// When a request was sent, and when the part was read that ends its answer: events and the end
/// are timed from the same start, without the work of making a client and of parsing.
struct Span {
    started: Duration,
    ended: Option<Duration>,
}

/// What came of a stream.
#[derive(Debug)]
pub struct Streamed {
    /// Its events, each with the time at which it was read.
    pub arrivals: Vec<Arrival>,
    /// When it ended, since the request was sent.
    pub ended: Duration,
    /// Whether it ended as it should.
    pub outcome: Result<(), QueryError>,
}

/// Server-sent events out of bytes as they come. Not a crate's: the known one breaks on a byte
/// order mark, and reads an unfinished line again with every part.
#[derive(Default)]
struct Events {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
}

impl Events {
    /// The data of all events that these bytes complete.
    fn push(&mut self, part: &[u8]) -> anyhow::Result<Vec<Vec<u8>>> {
        let mut done = Vec::new();
        let mut rest = part;
        while let Some(end) = rest.iter().position(|b| *b == b'\n') {
            self.line.extend_from_slice(&rest[..end]);
            rest = &rest[end + 1..];
            let line = std::mem::take(&mut self.line);
            done.extend(self.take(line.strip_suffix(b"\r").unwrap_or(&line)));
        }
        self.line.extend_from_slice(rest);
        match self.line.len().max(self.data.len()) > LINE_BYTES_MAX {
            true => Err(anyhow!("an event has more than {LINE_BYTES_MAX} bytes")),
            false => Ok(done),
        }
    }

    /// One line; an empty one ends an event. Comments and other fields mean nothing here.
    fn take(&mut self, line: &[u8]) -> Option<Vec<u8>> {
        if line.is_empty() {
            let is_event = std::mem::take(&mut self.has_data);
            let data = std::mem::take(&mut self.data);
            return is_event.then_some(data);
        }
        let value = line.strip_prefix(b"data:")?;
        if std::mem::replace(&mut self.has_data, true) {
            self.data.push(b'\n');
        }
        self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STREAM: &[u8] = b"\xef\xbb\xbf: hello\n\ndata: {\"a\":1}\n\ndata:2\r\n\r\nevent: x\n\n\
        data: 3\ndata: 4\n\ndata: [DONE]\n\n";

    #[test]
    fn events_are_found_wherever_the_bytes_are_cut() {
        for size in 1..STREAM.len() {
            let mut events = Events::default();
            let parts = STREAM.chunks(size).map(|part| events.push(part).unwrap());
            let all: Vec<String> =
                parts.flatten().map(|data| String::from_utf8(data).unwrap()).collect();
            assert_eq!(all, ["{\"a\":1}", "2", "3\n4", "[DONE]"], "{size}");
        }
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let mut events = Events::default();
        let part = [b'x'; 4096];
        assert!((0..300).any(|_| events.push(&part).is_err()));
        let mut events = Events::default();
        assert!(
            (0..400).any(|_| events.push(&[b"data: ", part.as_slice(), b"\n"].concat()).is_err())
        );
    }

    #[test]
    fn an_honest_answer_fits_and_one_of_many_small_values_does_not() {
        let size = Size::of_tokens(100);
        let chunk =
            br#"{"id":"a","choices":[{"index":0,"delta":{"content":"x"},"logprobs":null}]}"#;
        let mut left = size;
        assert!((0..100).all(|_| left.take(chunk).is_ok()));
        let mut left = size;
        assert_eq!((0..200).filter(|_| left.take(chunk).is_ok()).count(), size.events);
        let bomb = format!("[{}0]", "0,".repeat(size.marks));
        let refused = { size }.take(bomb.as_bytes()).unwrap_err().to_string();
        assert_eq!(refused, "more values than it can need");
        assert_eq!(Size::of_tokens(u32::MAX).bytes, (256 << 10) + (4 << 10) * u32::MAX as usize);
    }

    proptest! {
        #[test]
        fn any_bytes_are_events_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut events = Events::default();
            prop_assert!(events.push(&bytes).is_ok());
        }
    }
}
