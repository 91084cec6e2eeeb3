//! Counts signed requests by outcome and signer.

use super::SignedOutcome;
use crate::chain::keys::Hotkey;
use parking_lot::Mutex;
use prometheus_client::metrics::histogram::Histogram;
use std::collections::BTreeMap;
use std::time::Duration;

/// Upper bounds of the time that the checks take, in seconds.
const AUTH_SECONDS: [f64; 8] = [0.0001, 0.0002, 0.0005, 0.001, 0.005, 0.02, 0.1, 1.0];
/// Requests by outcome and by signer, and the time that checks took.
pub(super) struct Counts {
    pub(super) outcomes: Mutex<BTreeMap<SignedOutcome, u64>>,
    pub(super) signers: Mutex<BTreeMap<Hotkey, u64>>,
    pub(super) seconds: Histogram,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            outcomes: Mutex::default(),
            signers: Mutex::default(),
            seconds: Histogram::new(AUTH_SECONDS),
        }
    }
}

impl Counts {
    pub(super) fn count(&self, outcome: SignedOutcome) {
        *self.outcomes.lock().entry(outcome).or_default() += 1;
    }

    /// Only members get this far, so there are few of them.
    pub(super) fn count_signer(&self, signer: Hotkey) {
        *self.signers.lock().entry(signer).or_default() += 1;
    }

    /// Forgets signers that are gone.
    pub(super) fn retain(&self, stays: impl Fn(&Hotkey) -> bool) {
        self.signers.lock().retain(|key, _| stays(key));
    }

    pub(super) fn observe(&self, took: Duration) {
        self.seconds.observe(took.as_secs_f64());
    }
}
