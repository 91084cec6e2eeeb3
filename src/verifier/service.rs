//! Holds the service that all routes share: models, limits on what runs, counters.

use super::body::BodyMemory;
use super::reply::VerificationCounts;
use super::sent;
use crate::clock::Clock;
use crate::intake::translate::Defaults;
use crate::ops::pool::Pool;
use crate::server::error::ApiError;
use crate::server::registry::{ModelState, Registry, Served};
use crate::server::settings::{ApiKeys, Settings};
use crate::server::state::ServerState;
use crate::verify::Verifier;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Answers that wait or are verified at once; more are told to come back.
pub(super) const REQUESTS_MAX: usize = 64;
/// Answers that are verified at once: each has a KV cache of its own, and they share all cores.
pub(super) const RUNNING_MAX: usize = 2;

/// The service over the models of a registry.
#[derive(Clone)]
pub struct Service {
    pub(super) state: ServerState,
    pub(super) pool: Pool,
    pub(super) bodies: BodyMemory,
    pub(super) slots: Arc<Semaphore>,
    pub(super) running: Arc<Semaphore>,
    pub(super) counts: VerificationCounts,
    /// Bytes of the longest token of each model, once they were counted.
    pub(super) longest: Arc<parking_lot::Mutex<HashMap<String, usize>>>,
}

impl Service {
    /// Over the models of `registry` as they become ready. Of `settings` only the limits count: the
    /// container has no keys, and no pages ask it.
    pub fn new(registry: Registry, settings: &Settings, clock: Clock, pool: &Pool) -> Self {
        let counts = VerificationCounts::default();
        let state = ServerState::new(registry, Defaults::TARGON, clock);
        let state = state.counting(Box::new(counts.clone()));
        let (keys, cors_origins) = (ApiKeys::default(), Vec::new());
        state.set(Settings { keys, cors_origins, limits: settings.limits });
        Self {
            state,
            // One account of compute time for all that is verified, beside the engines' own.
            pool: pool.separate(),
            bodies: BodyMemory::new(),
            slots: Arc::new(Semaphore::new(REQUESTS_MAX)),
            running: Arc::new(Semaphore::new(RUNNING_MAX)),
            counts,
            longest: Arc::default(),
        }
    }

    /// What drains when the process stops.
    pub fn state(&self) -> &ServerState {
        &self.state
    }

    /// The model of that name; without a name the only one.
    pub(super) fn model(&self, name: Option<&str>) -> Result<Served, ApiError> {
        self.state.registry().route(name, None).map(|routed| routed.served)
    }

    pub(super) fn verifier(&self, served: &Served) -> Verifier {
        Verifier::new(
            Arc::clone(&served.model),
            Arc::clone(&served.identity),
            self.pool.clone(),
            served.engine.options().context_max,
        )
    }

    /// Bytes of the longest token of the model `name`.
    pub(super) fn longest_token(&self, name: &str, served: &Served) -> usize {
        let mut known = self.longest.lock();
        *known.entry(name.to_owned()).or_insert_with(|| {
            let text = served.engine.text();
            let bytes = |id| text.tokenizer.bytes_of(id).len();
            (0..text.vocab as u32).map(bytes).max().unwrap_or(0)
        })
    }

    /// Bytes that a body may have: the caller's part as for any server, and the longest answer that
    /// any model here can give, which fills its context with its longest token.
    pub(super) fn body_bytes_max(&self) -> usize {
        let entries = self.state.registry().entries();
        let longest = entries.iter().filter_map(|entry| {
            let ModelState::Ready(served) = &entry.state else { return None };
            let token = self.longest_token(&entry.name, served);
            Some(sent::bytes_max(served.engine.options().context_max, token))
        });
        self.state.settings().limits.body_bytes.saturating_add(longest.max().unwrap_or(0))
    }
}
