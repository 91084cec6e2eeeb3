//! Runs the sequence of checks that a signed request passes, from its first header to its place in
//! the queue.

use super::access::{announced, check_encoding};
use super::bodies::{BODY_BYTES_MAX, BodyError, Received, Terms};
use super::checks::Claimed;
use super::fair::{Busy, Ticket};
use super::replay::Replays;
use super::{Gate, Refused, SignedOutcome};
use crate::chain::epistula::WINDOW_MS;
use crate::chain::keys::Hotkey;
use crate::server::keeping::KeepingBody;
use crate::server::state::ServerState;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

/// How long a request is remembered: as long as its timestamp can be accepted.
const REMEMBER_MS: u64 = 2 * WINDOW_MS;
/// How long a request waits for its turn.
const TURN_TIME_MAX: Duration = Duration::from_secs(120);
/// Bodies above this are hashed on a thread that may block.
const INLINE_BYTES_MAX: usize = 64 << 10;

/// Who sent a request: what handlers may rely on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Caller {
    /// The hotkey that signed the request.
    pub hotkey: Hotkey,
    /// What names the request among the signer's: its uuid.
    pub name: String,
}

impl Gate {
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
        let (claimed, received) = self.check_signature(claimed, received).await?;
        received.count_signed()?;
        self.check_new(&claimed)?;
        // It counts until the handler has read it.
        let body = KeepingBody { body: Body::from(received.bytes.clone()), _kept: received };
        Ok(Checked { claimed, waited, request: Request::from_parts(head, Body::new(body)) })
    }

    /// Reads a body whose sender claims to be this signer.
    async fn body(
        &self,
        headers: &HeaderMap,
        body: Body,
        (from, signer): (IpAddr, Hotkey),
        state: &ServerState,
    ) -> Result<Received, Refused> {
        check_encoding(headers)
            .map_err(|e| Refused::new(e.status, SignedOutcome::BadRequest, e.message))?;
        let limits = state.settings().limits;
        let bytes_max = limits.body_bytes.min(BODY_BYTES_MAX);
        if announced(headers).is_some_and(|bytes| bytes > bytes_max) {
            return Err(BodyError::Large(bytes_max).into());
        }
        let terms = Terms { from, signer, bytes_max, time_max: limits.body_time };
        Ok(self.0.bodies.read(terms, body).await?)
    }

    async fn check_signature(
        &self,
        claimed: Claimed,
        received: Received,
    ) -> Result<(Claimed, Received), Refused> {
        let (own, is_small) = (self.own(), received.bytes.len() <= INLINE_BYTES_MAX);
        let check = move || (claimed.is_signed(own, &received.bytes), claimed, received);
        let (is_signed, claimed, received) = match is_small {
            true => check(),
            false => tokio::task::spawn_blocking(check).await.map_err(|_| {
                let (status, what) = (StatusCode::INTERNAL_SERVER_ERROR, "a check failed");
                Refused::new(status, SignedOutcome::BadRequest, what)
            })?,
        };
        match is_signed {
            true => Ok((claimed, received)),
            false => Err(Refused::new(
                StatusCode::BAD_REQUEST,
                SignedOutcome::BadSignature,
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
            let refused =
                Refused::new(StatusCode::TOO_MANY_REQUESTS, SignedOutcome::Limited, detail);
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
                Err(Refused::new(StatusCode::BAD_REQUEST, SignedOutcome::Replayed, detail))
            }
            false => Ok(()),
        }
    }

    async fn ticket(&self, claimed: &Claimed) -> Result<Ticket<Hotkey>, Refused> {
        self.0.door.enter_within(claimed.signer, TURN_TIME_MAX).await.map_err(|busy| {
            // It was not served, so it may come again.
            self.0.replays.lock().remove(claimed.signer, &claimed.name);
            let most = self.0.policy.waiting_max;
            let detail = match busy {
                Busy::Full => format!("Too many requests: {most} of this hotkey wait already"),
                Busy::Late => {
                    let seconds = TURN_TIME_MAX.as_secs();
                    format!("Too many requests: this one's turn did not come within {seconds} s")
                }
            };
            let refused = Refused::new(StatusCode::TOO_MANY_REQUESTS, SignedOutcome::Busy, detail);
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
    gate.0.counts.count(SignedOutcome::Accepted);
    gate.0.counts.count_signer(claimed.signer);
    request.extensions_mut().insert(Caller { hotkey: claimed.signer, name: claimed.name });
    let response = next.run(request).await;
    response.map(|body| Body::new(KeepingBody { body, _kept: ticket }))
}
