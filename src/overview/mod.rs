//! Serves the HTTP routes for operators of a running validator: health, readiness and counters.
//!
//! Nothing here changes anything: the records are a handle that cannot write, and the state is a
//! copy. Other modules can add routes to [`Overview::router`].

mod metrics;
mod page;

use crate::clock::Clock;
use crate::intake::translate::Defaults;
use crate::server::door::access::observe;
use crate::server::error::ApiError;
use crate::server::layers::catch_panics;
use crate::server::operations::metrics::metrics;
use crate::server::operations::status;
use crate::server::registry::Registry;
use crate::server::state::ServerState;
use crate::store::{Store, StoreError};
use crate::validator::run::progress::{RunProgress, RunSnapshot};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use metrics::Counted;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

/// A loop that has not come round for so long hangs: nothing that it waits for takes longer.
const BEAT_TIME: Duration = Duration::from_secs(60);
/// Without a block for so long, the chain is out of reach: ten blocks of it.
const BLOCK_TIME: Duration = Duration::from_secs(120);

/// Pages that are made at once: each reads the records.
const PAGES_MAX: usize = 2;

/// What the routes share. Clones show the same validator.
#[derive(Clone)]
pub struct Overview {
    state: ServerState,
    progress: Arc<RunProgress>,
    store: Store,
    netuid: u16,
    pages: Arc<Semaphore>,
}

impl Overview {
    /// Shows `progress`, and the records of subnet `netuid`.
    pub fn new(progress: Arc<RunProgress>, store: &Store, netuid: u16, clock: Clock) -> Self {
        let counted = Counted { progress: Arc::clone(&progress), clock: clock.clone() };
        let state = ServerState::new(Registry::default(), Defaults::TARGON, clock);
        let state = state.counting(Box::new(counted));
        let pages = Arc::new(Semaphore::new(PAGES_MAX));
        Self { state, progress, store: store.reading(), netuid, pages }
    }

    /// What drains when the program stops.
    pub fn state(&self) -> &ServerState {
        &self.state
    }

    /// How the validator is now.
    pub fn snapshot(&self) -> RunSnapshot {
        self.progress.snapshot()
    }

    /// The records, which cannot be written through it.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The number of the subnet that the records are of.
    pub fn netuid(&self) -> u16 {
        self.netuid
    }

    /// The routes for operators, over these records.
    pub fn router(&self) -> Router {
        let shared = Router::new()
            .route("/version", get(status::version))
            .route("/metrics", get(metrics))
            .with_state(self.state.clone());
        Router::new()
            .route("/health", get(health))
            .route("/ready", get(ready))
            .route("/", get(index))
            .route("/answers/{round}/{uid}", get(answer))
            .with_state(self.clone())
            .merge(shared)
            .fallback(|| async { ApiError::not_found("no such route") })
            .method_not_allowed_fallback(status::wrong_method)
            .layer(catch_panics())
            .layer(from_fn_with_state(self.state.clone(), observe))
    }

    /// Time since a moment, and whether it is longer than `limit`. A clock that was set back makes
    /// nothing old.
    fn age(&self, since_ms: u64) -> Duration {
        Duration::from_millis(self.state.clock().unix_ms().saturating_sub(since_ms))
    }

    /// Why the validator is not at work, or nothing.
    fn troubles(&self) -> Vec<String> {
        let now = self.snapshot();
        let mut troubles = Vec::new();
        if now.beat_ms == 0 {
            troubles.push("it has not begun yet".to_owned());
        } else if let age = self.age(now.beat_ms)
            && age > BEAT_TIME
        {
            troubles.push(format!("its loop has not moved for {} s", age.as_secs()));
        }
        if let age = self.age(now.block_ms)
            && age > BLOCK_TIME
        {
            troubles.push(format!("no block has come for {} s", age.as_secs()));
        }
        if now.rounds_unsaved > 0 {
            let count = now.rounds_unsaved;
            troubles.push(format!("{count} rounds that are over are not remembered yet"));
        }
        if now.is_stopping || self.state.is_draining() {
            troubles.push("it is stopping".to_owned());
        }
        troubles
    }
}

fn status_of(is_fine: bool) -> StatusCode {
    if is_fine { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

/// `GET /health`: the program runs and its loop makes progress.
async fn health(State(overview): State<Overview>) -> Response {
    let beat = overview.snapshot().beat_ms;
    let age = overview.age(beat);
    let is_fine = beat == 0 || age <= BEAT_TIME;
    let body = json!({
        "status": if is_fine { "ok" } else { "stalled" },
        "seconds_since_beat": (beat > 0).then_some(age.as_secs_f64()),
    });
    (status_of(is_fine), Json(body)).into_response()
}

/// `GET /ready`: it holds rounds, hears the chain, and remembers what it finds.
async fn ready(State(overview): State<Overview>) -> Response {
    let troubles = overview.troubles();
    let is_ready = troubles.is_empty();
    let body = json!({"ready": is_ready, "why": troubles});
    (status_of(is_ready), Json(body)).into_response()
}

/// `GET /`: miners, verdicts, weights and an answer, for people.
async fn index(State(overview): State<Overview>) -> Result<Response, ApiError> {
    let _turn = overview.pages.try_acquire().map_err(|_| busy())?;
    let (store, netuid, now) = (&overview.store, overview.netuid, overview.snapshot());
    let rounds = store.rounds(netuid, u64::MAX, page::ROUNDS).await.map_err(unread)?;
    let verdicts = store.verdicts(netuid, page::ROUNDS).await.map_err(unread)?;
    let weights = store.last_weights(netuid).await.map_err(unread)?;
    let answer = match page::newest(&verdicts) {
        Some((round, uid)) => {
            store.response(&round, uid).await.map_err(unread)?.map(|response| (round, response))
        }
        None => None,
    };
    Ok(page::index(&page::PageContent { netuid, now, rounds, verdicts, weights, answer }))
}

/// `GET /answers/{round}/{uid}`: one answer, for people.
async fn answer(
    State(overview): State<Overview>,
    Path((round, uid)): Path<(String, u16)>,
) -> Result<Response, ApiError> {
    let _turn = overview.pages.try_acquire().map_err(|_| busy())?;
    let found = overview.store.response(&round, uid).await.map_err(unread)?;
    let found = found.ok_or_else(|| ApiError::not_found("no such answer is recorded"))?;
    Ok(page::one(&round, &found))
}

fn busy() -> ApiError {
    ApiError::unavailable("other pages are being made; try again")
}

fn unread(e: StoreError) -> ApiError {
    tracing::warn!("a page cannot be made: {e}");
    ApiError::unavailable("the records cannot be read now; the log says why")
}

#[cfg(test)]
mod tests;
