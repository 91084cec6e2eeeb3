//! Holds what handlers share: the models, the defaults, and whether the server still takes
//! requests.

use super::door::Gate;
use super::error::{ApiError, echo};
use super::operations::counters::Metrics;
use super::registry::Registry;
use super::settings::Settings;
use crate::chain::keys::Keypair;
use crate::clock::Clock;
use crate::entropy::Entropy;
use crate::intake::translate::{Defaults, is_ignored};
use parking_lot::{Mutex, RwLock};
use prometheus_client::collector::Collector;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tokio_util::sync::CancellationToken;

/// Names of unknown request fields that are counted apart.
const UNKNOWN_FIELDS_MAX: usize = 100;
/// Bytes of such a name; longer ones are counted together.
const FIELD_NAME_BYTES_MAX: usize = 64;

/// Cloneable state of the server.
#[derive(Clone)]
pub struct ServerState(Arc<Inner>);

struct Inner {
    registry: Registry,
    defaults: Defaults,
    clock: Clock,
    entropy: Entropy,
    is_draining: AtomicBool,
    in_flight: AtomicUsize,
    abort: CancellationToken,
    settings: RwLock<Arc<Settings>>,
    metrics: Metrics,
    unknown_fields: Mutex<BTreeSet<String>>,
    signer: Option<Arc<Keypair>>,
    gate: Option<Gate>,
}

impl ServerState {
    /// A server over `registry`.
    pub fn new(registry: Registry, defaults: Defaults, clock: Clock) -> Self {
        let metrics = Metrics::new(registry.clone(), None);
        Self(Arc::new(Inner {
            registry,
            defaults,
            clock,
            entropy: Entropy::system(),
            is_draining: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
            abort: CancellationToken::new(),
            settings: RwLock::default(),
            metrics,
            unknown_fields: Mutex::new(BTreeSet::new()),
            signer: None,
            gate: None,
        }))
    }

    /// The same server signing its proofs; before it is shared.
    pub fn signed_by(self, signer: Arc<Keypair>) -> Self {
        let Ok(inner) = Arc::try_unwrap(self.0) else {
            unreachable!("a signer is set before the state is shared")
        };
        Self(Arc::new(Inner { signer: Some(signer), ..inner }))
    }

    /// The same server as a subnet's miner; before it is shared.
    pub fn behind(self, gate: Gate) -> Self {
        let Ok(inner) = Arc::try_unwrap(self.0) else {
            unreachable!("a gate is set before the state is shared")
        };
        let metrics = Metrics::new(inner.registry.clone(), Some(gate.clone()));
        Self(Arc::new(Inner { gate: Some(gate), metrics, ..inner }))
    }

    /// The same server with another source of names and seeds; before it is shared.
    pub fn drawing_from(self, entropy: Entropy) -> Self {
        let Ok(inner) = Arc::try_unwrap(self.0) else {
            unreachable!("a source is set before the state is shared")
        };
        Self(Arc::new(Inner { entropy, ..inner }))
    }

    /// The same server with more to report in its metrics; before it is shared.
    pub fn counting(self, collector: Box<dyn Collector>) -> Self {
        let Ok(mut inner) = Arc::try_unwrap(self.0) else {
            unreachable!("what is counted is set before the state is shared")
        };
        inner.metrics.collect(collector);
        Self(Arc::new(inner))
    }

    /// The state of the signed routes, if this is a subnet's miner.
    pub fn gate(&self) -> Option<&Gate> {
        self.0.gate.as_ref()
    }

    /// The key that signs proofs.
    pub fn signer(&self) -> Option<Arc<Keypair>> {
        self.0.signer.clone()
    }

    /// The models by name, and where each stands.
    pub fn registry(&self) -> &Registry {
        &self.0.registry
    }

    /// What applies where a request says nothing.
    pub fn defaults(&self) -> Defaults {
        self.0.defaults
    }

    /// What the operator has set, as of the last reload.
    pub fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.0.settings.read())
    }

    /// Replaces the settings; new requests and connections follow them.
    pub fn set(&self, settings: Settings) {
        *self.0.settings.write() = Arc::new(settings);
    }

    /// What is counted for `/metrics`.
    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// What the server tells time by.
    pub fn clock(&self) -> &Clock {
        &self.0.clock
    }

    /// Where names of requests, nonces and seeds come from.
    pub fn entropy(&self) -> &Entropy {
        &self.0.entropy
    }

    /// Counts a request in, unless the server is draining.
    ///
    /// # Errors
    /// 503 while draining.
    pub fn begin(&self) -> Result<InFlight, ApiError> {
        let guard = InFlight::new(Arc::clone(&self.0));
        if self.is_draining() {
            return Err(ApiError::unavailable("the server is shutting down"));
        }
        Ok(guard)
    }

    /// Stops taking requests; running ones go on.
    pub fn drain(&self) {
        self.0.is_draining.store(true, Ordering::SeqCst);
    }

    /// Whether requests are refused because the server is about to stop.
    pub fn is_draining(&self) -> bool {
        self.0.is_draining.load(Ordering::SeqCst)
    }

    /// How many requests have begun and not ended.
    pub fn in_flight(&self) -> usize {
        self.0.in_flight.load(Ordering::SeqCst)
    }

    /// Ends running requests with an error.
    pub fn abort(&self) {
        self.0.abort.cancel();
    }

    /// Cancelled once running requests must end.
    pub fn abort_token(&self) -> CancellationToken {
        self.0.abort.clone()
    }

    /// Counts request fields that nobody reads, and warns of each name once.
    pub fn note_unknown(&self, fields: &Map<String, Value>) {
        let mut known = self.0.unknown_fields.lock();
        for name in fields.keys().filter(|name| !is_ignored(name)) {
            let is_apart = name.len() <= FIELD_NAME_BYTES_MAX && known.len() < UNKNOWN_FIELDS_MAX;
            if is_apart && !known.contains(name) {
                tracing::warn!(field = echo(name), "unknown request field");
                known.insert(name.clone());
            }
            let label = if known.contains(name) { name } else { "other" };
            self.metrics().count_unknown_field(label);
        }
    }
}

/// A request that runs, until dropped.
pub struct InFlight {
    inner: Arc<Inner>,
    has_ended: bool,
}

impl InFlight {
    fn new(inner: Arc<Inner>) -> Self {
        inner.in_flight.fetch_add(1, Ordering::SeqCst);
        Self { inner, has_ended: false }
    }

    /// Ends it before it is dropped: the last frame of a stream has been written.
    pub fn end(&mut self) {
        if !std::mem::replace(&mut self.has_ended, true) {
            self.inner.in_flight.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_fields_are_counted_by_name_as_long_as_names_are_short_and_few() {
        let state = ServerState::new(Registry::default(), Defaults::default(), Clock::manual(0));
        let note = |name: String| state.note_unknown(&Map::from_iter([(name, Value::Null)]));
        let longest = "x".repeat(FIELD_NAME_BYTES_MAX);
        note(longest.clone());
        note(format!("{longest}y"));
        note("z".repeat(1 << 20));
        let counted = |text: &str, name: &str, count: usize| {
            text.contains(&format!("targon_unknown_fields_total{{field=\"{name}\"}} {count}"))
        };
        let text = state.metrics().encode();
        assert!(counted(&text, &longest, 1) && counted(&text, "other", 2), "{text:.2000}");
        assert!(text.len() < 1 << 16, "{} bytes", text.len());
        (0..UNKNOWN_FIELDS_MAX).for_each(|n| note(format!("field_{n}")));
        assert!(counted(&state.metrics().encode(), "other", 3));
    }
}
