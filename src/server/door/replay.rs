//! Remembers requests that were served, for as long as their signatures would still be accepted.

use crate::chain::keys::Hotkey;
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

/// Remembers signed requests by signer and name.
#[derive(Default)]
pub struct Replays {
    seen: HashSet<(Hotkey, Arc<str>)>,
    order: VecDeque<(u64, Hotkey, Arc<str>)>,
}

impl Replays {
    /// Whether this request was remembered and not yet forgotten at `now_ms`.
    pub fn contains(&mut self, signer: Hotkey, name: &str, now_ms: u64) -> bool {
        while let Some((until, ..)) = self.order.front()
            && *until < now_ms
        {
            if let Some((_, signer, name)) = self.order.pop_front() {
                self.seen.remove(&(signer, name));
            }
        }
        // A set of pairs cannot be asked by borrowed parts.
        self.seen.contains(&(signer, Arc::from(name)))
    }

    /// Remembers it for `keep_ms`; entries must all be kept for the same time.
    pub fn insert(&mut self, signer: Hotkey, name: &str, now_ms: u64, keep_ms: u64) {
        let name: Arc<str> = Arc::from(name);
        if self.seen.insert((signer, Arc::clone(&name))) {
            self.order.push_back((now_ms + keep_ms, signer, name));
        }
    }

    /// Forgets one that was not served after all.
    pub fn remove(&mut self, signer: Hotkey, name: &str) {
        self.seen.remove(&(signer, Arc::from(name)));
    }

    /// How many are remembered.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether no request is remembered.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_remembered_by_signer_and_forgotten_in_time() {
        let (a, b) = (Hotkey([1; 32]), Hotkey([2; 32]));
        let mut replays = Replays::default();
        assert!(!replays.contains(a, "x", 0));
        replays.insert(a, "x", 0, 20);
        replays.insert(a, "x", 5, 20);
        assert!(replays.contains(a, "x", 20) && !replays.contains(b, "x", 20));
        replays.insert(b, "x", 20, 20);
        assert!(!replays.contains(a, "x", 21));
        assert_eq!(replays.len(), 1);
        assert!(replays.contains(b, "x", 40) && !replays.contains(b, "x", 41));
        assert!(replays.is_empty() && replays.seen.is_empty());
    }
}
