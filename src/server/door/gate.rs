//! Holds the state behind the checks of signed requests: the members, the running requests, and the
//! counters.

use super::bodies::{BODIES_BYTES_MAX, Bodies};
use super::counts::Counts;
use super::fair::Fair;
use super::models::WantedModels;
use super::replay::Replays;
use crate::chain::Head;
use crate::chain::keys::Hotkey;
use crate::chain::metagraph::{Metagraph, Rao};
use crate::clock::Clock;
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use parking_lot::{Mutex, RwLock};
use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

/// Who may ask, and how much.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Policy {
    /// Stake that a signer must have; `None` asks for none.
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

/// A cloneable handle to the state.
#[derive(Clone)]
pub struct Gate(pub(super) Arc<Inner>);

/// What the handles share.
pub(super) struct Inner {
    pub(super) own: Hotkey,
    pub(super) policy: Policy,
    pub(super) clock: Clock,
    pub(super) metagraph: RwLock<Arc<Metagraph>>,
    pub(super) head: RwLock<Option<(Head, u64)>>, // and when it came, in Unix ms
    pub(super) replays: Mutex<Replays>,
    pub(super) rates: DefaultKeyedRateLimiter<Hotkey>,
    pub(super) door: Fair<Hotkey>,
    pub(super) bodies: Bodies,
    pub(super) counts: Counts,
    pub(super) asked: Mutex<BTreeMap<Hotkey, WantedModels>>,
    pub(super) refused_axon: RwLock<Option<String>>,
}

impl Gate {
    /// The state for the hotkey `own`. Until a metagraph is set nobody is a member.
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

    /// The miner's own hotkey.
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
            tracing::warn!("requests are accepted from {rule} from now on");
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

    /// The members of the subnet, as they were last read.
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

    pub(super) fn now_ms(&self) -> u64 {
        self.0.clock.unix_ms()
    }
}
