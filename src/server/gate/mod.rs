//! The door of a subnet's miner: requests signed by members with stake pass, each once, and no
//! member can crowd out another.
//!
//! Checks run in the order of [`checks`]: headers, membership, stake, age, repetition; then the
//! body is read ([`bodies`]) and the signature checked; then repetition again, rate, and the
//! [`fair`] queue. A request that was refused leaves no trace that could harm its signer.

pub mod bodies;
pub mod checks;
pub mod fair;
pub mod members;
pub mod models;
pub mod replay;
pub mod report;

use super::access::check_encoding;
use super::state::ServerState;
use crate::chain::Head;
use crate::chain::epistula::WINDOW_MS;
use crate::chain::keys::Hotkey;
use crate::chain::metagraph::{Metagraph, Rao};
use crate::clock::Clock;
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bodies::{BODIES_BYTES_MAX, BODY_BYTES_MAX, Bodies, BodyError, Received, Terms};
use checks::Claimed;
use fair::{Fair, Ticket};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use http_body::{Frame, SizeHint};
use models::Asked;
use parking_lot::{Mutex, RwLock};
use replay::Replays;
use report::Counts;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU32;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// How long a request is remembered: as long as its timestamp can be accepted.
const REMEMBER_MS: u64 = 2 * WINDOW_MS;
/// Bodies above this are hashed on a thread that may block.
const INLINE_BYTES_MAX: usize = 64 << 10;

/// Who may ask, and how much.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Policy {
    /// Stake that a signer must have; none where absent.
    pub stake_min: Option<Rao>,
    /// Signers that need neither membership nor stake.
    pub allow: BTreeSet<Hotkey>,
    /// Signers that are refused.
    pub deny: BTreeSet<Hotkey>,
    /// Requests a second of one signer; bursts of twice as many.
    pub rate: NonZeroU32,
    /// Requests that run at once. Up to twice as many are let in where one signer runs more than
    /// others: the engine then sets its newest aside.
    pub slots: usize,
    /// Requests of one signer that wait.
    pub waiting_max: usize,
}

/// What Targon's miner asks for: 10,000 TAO.
pub const STAKE_MIN: Rao = Rao(10_000_000_000_000);

impl Default for Policy {
    fn default() -> Self {
        Self {
            stake_min: Some(STAKE_MIN),
            allow: BTreeSet::new(),
            deny: BTreeSet::new(),
            rate: NonZeroU32::new(50).unwrap_or(NonZeroU32::MIN),
            slots: 64,
            waiting_max: 64,
        }
    }
}

/// How a signed request fared at the door.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Outcome {
    /// It was let in.
    Accepted,
    /// A header is missing or malformed, or the request is for somebody else.
    BadRequest,
    /// The signer is no member, or denied.
    UnknownSigner,
    /// The signer has too little stake.
    LowStake,
    /// Too old, or from the future.
    Stale,
    /// The signature is not the signer's.
    BadSignature,
    /// It was served already.
    Replayed,
    /// The signer asks too often.
    Limited,
    /// Too many of the signer's requests wait.
    Busy,
}

impl Outcome {
    /// The word in metrics.
    pub fn word(self) -> &'static str {
        match self {
            Outcome::Accepted => "accepted",
            Outcome::BadRequest => "bad_request",
            Outcome::UnknownSigner => "unknown_signer",
            Outcome::LowStake => "low_stake",
            Outcome::Stale => "stale",
            Outcome::BadSignature => "bad_signature",
            Outcome::Replayed => "replayed",
            Outcome::Limited => "limited",
            Outcome::Busy => "busy",
        }
    }
}

/// A request that was turned away.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refused {
    /// The status.
    pub status: StatusCode,
    /// Why, for the counters.
    pub outcome: Outcome,
    /// Why, for the caller.
    pub detail: String,
    /// Seconds after which it may work.
    pub retry_after: Option<u64>,
}

impl Refused {
    /// With a status and a message.
    pub fn new(status: StatusCode, outcome: Outcome, detail: impl Into<String>) -> Self {
        Self { status, outcome, detail: detail.into(), retry_after: None }
    }
}

impl From<BodyError> for Refused {
    fn from(error: BodyError) -> Self {
        let (status, retry_after) = match error {
            BodyError::Large(_) => (StatusCode::PAYLOAD_TOO_LARGE, None),
            BodyError::Slow { .. } => (StatusCode::REQUEST_TIMEOUT, None),
            BodyError::Crowded => (StatusCode::SERVICE_UNAVAILABLE, Some(1)),
            BodyError::Broken(_) => (StatusCode::BAD_REQUEST, None),
        };
        Self { retry_after, ..Self::new(status, Outcome::BadRequest, error.to_string()) }
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        // The shape in which validators expect it.
        let mut response = (self.status, Json(json!({"detail": self.detail}))).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// Who sent a request: what handlers may rely on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Caller {
    /// The signer.
    pub hotkey: Hotkey,
    /// What names the request among the signer's: its uuid.
    pub name: String,
}

/// The door; a cloneable handle.
#[derive(Clone)]
pub struct Gate(Arc<Inner>);

struct Inner {
    own: Hotkey,
    policy: Policy,
    clock: Clock,
    metagraph: RwLock<Arc<Metagraph>>,
    head: RwLock<Option<(Head, u64)>>, // and when it came, in Unix ms
    replays: Mutex<Replays>,
    rates: DefaultKeyedRateLimiter<Hotkey>,
    door: Fair<Hotkey>,
    bodies: Bodies,
    counts: Counts,
    asked: Mutex<BTreeMap<Hotkey, Asked>>,
    refused_axon: RwLock<Option<String>>,
}

impl Gate {
    /// The door of `own`. Until a metagraph is set nobody is a member.
    pub fn new(own: Hotkey, policy: Policy, clock: Clock) -> Self {
        let burst = policy.rate.saturating_mul(NonZeroU32::MIN.saturating_add(1));
        let rates = RateLimiter::keyed(Quota::per_second(policy.rate).allow_burst(burst));
        let door = Fair::new(policy.slots, policy.waiting_max);
        let bodies = Bodies::new(BODIES_BYTES_MAX, clock.clone());
        Self(Arc::new(Inner {
            own,
            policy,
            clock,
            metagraph: RwLock::default(),
            head: RwLock::new(None),
            replays: Mutex::default(),
            rates,
            door,
            bodies,
            counts: Counts::default(),
            asked: Mutex::default(),
            refused_axon: RwLock::new(None),
        }))
    }

    /// Whose door it is.
    pub fn own(&self) -> Hotkey {
        self.0.own
    }

    /// Who is a member from now on.
    pub fn set_metagraph(&self, metagraph: Arc<Metagraph>) {
        // Signers come and go with the metagraph: what is kept of them must not pile up.
        let policy = &self.0.policy;
        let stays = |key: &Hotkey| metagraph.neuron(key).is_some() || policy.allow.contains(key);
        self.0.asked.lock().retain(|key, _| stays(key));
        self.0.counts.retain(stays);
        self.0.rates.retain_recent();
        let before = self.rule();
        *self.0.metagraph.write() = metagraph;
        let rule = self.rule();
        if rule != before {
            tracing::warn!("from now on {rule} may ask");
        }
    }

    /// Why the chain refused this miner's address for good; `None` where it did not.
    pub fn set_refused_axon(&self, why: Option<String>) {
        *self.0.refused_axon.write() = why;
    }

    /// The clock that it goes by.
    pub fn clock(&self) -> &Clock {
        &self.0.clock
    }

    /// Bodies that are being received, and their bytes.
    pub fn bodies(&self) -> (usize, usize) {
        self.0.bodies.load()
    }

    /// How many requests run at once from now on.
    pub fn set_slots(&self, slots: usize) {
        self.0.door.set_slots(slots);
    }

    /// The members.
    pub fn metagraph(&self) -> Arc<Metagraph> {
        Arc::clone(&self.0.metagraph.read())
    }

    /// A new block has come.
    pub fn set_head(&self, head: Head) {
        *self.0.head.write() = Some((head, self.now_ms()));
    }

    /// The last block, and how long ago it came.
    pub fn head(&self) -> Option<(Head, Duration)> {
        let (head, at) = (*self.0.head.read())?;
        Some((head, Duration::from_millis(self.now_ms().saturating_sub(at))))
    }

    fn now_ms(&self) -> u64 {
        self.0.clock.unix_ms()
    }

    /// Everything but the queue: what can be known before the body, the body, who signed it, and
    /// that it is new.
    async fn admit(&self, request: Request, state: &ServerState) -> Result<Checked, Refused> {
        let (head, body) = request.into_parts();
        let claimed = Claimed::read(self, &head.headers, &head.method, &head.uri)?;
        self.check_unknown(&claimed, &mut self.0.replays.lock(), self.now_ms())?;
        let peer = head.extensions.get::<ConnectInfo<SocketAddr>>();
        let from = peer.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |peer| peer.0.ip());
        let started = self.0.clock.elapsed();
        let received = self.body(&head.headers, body, (from, claimed.signer), state).await?;
        let waited = self.0.clock.elapsed().saturating_sub(started);
        let (claimed, body) = self.check_signature(claimed, received).await?;
        self.check_new(&claimed)?;
        Ok(Checked { claimed, waited, request: Request::from_parts(head, Body::from(body)) })
    }

    /// Reads a body of whoever says to be this signer.
    async fn body(
        &self,
        headers: &HeaderMap,
        body: Body,
        (from, signer): (IpAddr, Hotkey),
        state: &ServerState,
    ) -> Result<Received, Refused> {
        check_encoding(headers)
            .map_err(|e| Refused::new(e.status, Outcome::BadRequest, e.message))?;
        let limits = state.settings().limits;
        let bytes_max = limits.body_bytes.min(BODY_BYTES_MAX);
        let announced = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok());
        if announced.and_then(|n| n.parse::<usize>().ok()).is_some_and(|n| n > bytes_max) {
            return Err(BodyError::Large(bytes_max).into());
        }
        let terms = Terms { from, signer, bytes_max, time_max: limits.body_time };
        Ok(self.0.bodies.read(terms, body).await?)
    }

    async fn check_signature(
        &self,
        claimed: Claimed,
        received: Received,
    ) -> Result<(Claimed, Bytes), Refused> {
        let (own, is_small) = (self.own(), received.bytes.len() <= INLINE_BYTES_MAX);
        let check = move || (claimed.is_signed(own, &received.bytes), claimed, received);
        let (is_signed, claimed, received) = match is_small {
            true => check(),
            false => tokio::task::spawn_blocking(check).await.map_err(|_| {
                let (status, what) = (StatusCode::INTERNAL_SERVER_ERROR, "a check failed");
                Refused::new(status, Outcome::BadRequest, what)
            })?,
        };
        match is_signed {
            true => Ok((claimed, received.bytes)),
            false => Err(Refused::new(
                StatusCode::BAD_REQUEST,
                Outcome::BadSignature,
                "Signature Mismatch",
            )),
        }
    }

    /// A signed request counts once. One that comes too early is not remembered: it may come again.
    fn check_new(&self, claimed: &Claimed) -> Result<(), Refused> {
        let (signer, name) = (claimed.signer, claimed.name.as_str());
        let mut replays = self.0.replays.lock();
        // After the lock, so that time does not go back between two requests.
        let now = self.now_ms();
        claimed.check_age(now)?;
        self.check_unknown(claimed, &mut replays, now)?;
        if self.0.rates.check_key(&signer).is_err() {
            let rate = self.0.policy.rate;
            let detail = format!("Too many requests: at most {rate} a second for one hotkey");
            let refused = Refused::new(StatusCode::TOO_MANY_REQUESTS, Outcome::Limited, detail);
            return Err(Refused { retry_after: Some(1), ..refused });
        }
        replays.insert(signer, name, now, REMEMBER_MS);
        Ok(())
    }

    fn check_unknown(
        &self,
        claimed: &Claimed,
        replays: &mut Replays,
        now: u64,
    ) -> Result<(), Refused> {
        match replays.contains(claimed.signer, &claimed.name, now) {
            true => {
                let detail = "Request was received already";
                Err(Refused::new(StatusCode::BAD_REQUEST, Outcome::Replayed, detail))
            }
            false => Ok(()),
        }
    }

    async fn ticket(&self, claimed: &Claimed) -> Result<Ticket<Hotkey>, Refused> {
        self.0.door.enter(claimed.signer).await.map_err(|_| {
            // It was not served, so it may come again.
            self.0.replays.lock().remove(claimed.signer, &claimed.name);
            let most = self.0.policy.waiting_max;
            let detail = format!("Too many requests: {most} of this hotkey wait already");
            let refused = Refused::new(StatusCode::TOO_MANY_REQUESTS, Outcome::Busy, detail);
            Refused { retry_after: Some(1), ..refused }
        })
    }
}

/// A request that may run once it is its turn.
struct Checked {
    claimed: Claimed,
    waited: Duration, // for the body
    request: Request,
}

/// Lets signed requests pass, in turn.
pub async fn guard(
    State((state, gate)): State<(ServerState, Gate)>,
    request: Request,
    next: Next,
) -> Response {
    let started = state.clock().elapsed();
    let is_light = !request.uri().path().starts_with("/v1/");
    let checked = gate.admit(request, &state).await;
    let took = state.clock().elapsed().saturating_sub(started);
    if let Ok(checked) = &checked {
        gate.0.counts.observe(took.saturating_sub(checked.waited));
    }
    let refuse = |refused: Refused| {
        gate.0.counts.count(refused.outcome);
        tracing::debug!(outcome = refused.outcome.word(), detail = refused.detail, "refused");
        refused.into_response()
    };
    let Checked { claimed, mut request, .. } = match checked {
        Ok(checked) => checked,
        Err(refused) => return refuse(refused),
    };
    // What costs nothing does not wait behind what does: a validator that gets no list of models in
    // three seconds counts the miner as serving none.
    let ticket = match is_light {
        true => None,
        false => match gate.ticket(&claimed).await {
            Ok(ticket) => Some(ticket),
            Err(refused) => return refuse(refused),
        },
    };
    gate.0.counts.count(Outcome::Accepted);
    gate.0.counts.count_signer(claimed.signer);
    request.extensions_mut().insert(Caller { hotkey: claimed.signer, name: claimed.name });
    let response = next.run(request).await;
    response.map(|body| Body::new(Held { body, _ticket: ticket }))
}

/// A body that keeps its request's place until it is written or given up.
struct Held {
    body: Body,
    _ticket: Option<Ticket<Hotkey>>,
}

impl http_body::Body for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
