//! Queues requests fairly: a limited number run, and the caller with the fewest running requests is
//! served next, so that no caller can starve another.
//!
//! If no slot is free and one caller runs two more than another, the other one is admitted all the
//! same, and the engine preempts the newest request of the caller that runs most
//! ([`scheduler`](crate::engine::scheduler)).

use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// The queue, for callers named by `K`.
pub struct Fair<K: Copy + Eq + Hash>(Arc<Mutex<Lanes<K>>>);

impl<K: Copy + Eq + Hash> Clone for Fair<K> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

struct Lanes<K: Copy + Eq + Hash> {
    slots: usize,
    free: isize, // below zero where slots were taken away, or callers came in without one
    waiting_max: usize,
    running: HashMap<K, usize>,
    // Callers that wait; the one that was served longest ago comes first.
    queues: VecDeque<(K, VecDeque<oneshot::Sender<Ticket<K>>>)>,
}

/// Leave to run, until dropped.
pub struct Ticket<K: Copy + Eq + Hash>(Option<(Fair<K>, K)>);

/// Why a request does not run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Busy {
    /// Too many requests of its caller wait already.
    Full,
    /// Its turn did not come in time.
    Late,
}

impl<K: Copy + Eq + Hash> Fair<K> {
    /// A queue for `slots` requests at once; each caller may have `waiting_max` more that wait.
    pub fn new(slots: usize, waiting_max: usize) -> Self {
        let (running, queues) = (HashMap::new(), VecDeque::new());
        let free = slots as isize;
        Self(Arc::new(Mutex::new(Lanes { slots, free, waiting_max, running, queues })))
    }

    /// Waits for leave to run, up to `time_max`. Who stops waiting loses nothing for others.
    ///
    /// # Errors
    /// Where the caller's queue is full, or the time is over.
    pub async fn enter_within(&self, caller: K, time_max: Duration) -> Result<Ticket<K>, Busy> {
        let entered = tokio::time::timeout(time_max, self.enter(caller)).await;
        entered.unwrap_or(Err(Busy::Late))
    }

    async fn enter(&self, caller: K) -> Result<Ticket<K>, Busy> {
        let receiver = {
            let mut lanes = self.0.lock();
            // Only where nobody waits for it is there ever room.
            if lanes.has_room(&caller) {
                lanes.start(caller);
                return Ok(Ticket(Some((self.clone(), caller))));
            }
            let (sender, receiver) = oneshot::channel();
            lanes.queue(caller, sender)?;
            receiver
        };
        // The sender lives in the queue until it sends.
        receiver.await.map_err(|_| Busy::Full)
    }

    /// Requests that run and wait, by caller.
    pub fn load(&self, caller: &K) -> (usize, usize) {
        let lanes = self.0.lock();
        let waiting = lanes.queues.iter().find(|(key, _)| key == caller);
        (lanes.running(caller), waiting.map_or(0, |(_, queue)| queue.len()))
    }

    /// How many may run from now on; those that run go on.
    pub fn set_slots(&self, slots: usize) {
        let mut lanes = self.0.lock();
        lanes.free += slots as isize - lanes.slots as isize;
        lanes.slots = slots;
        self.admit(&mut lanes);
    }

    fn leave(&self, caller: K) {
        let mut lanes = self.0.lock();
        lanes.stop(caller);
        self.admit(&mut lanes);
    }

    /// Admits the next requests while there are free slots.
    fn admit(&self, lanes: &mut Lanes<K>) {
        while let Some((next, sender)) = lanes.next() {
            lanes.start(next);
            if let Err(mut unwanted) = sender.send(Ticket(Some((self.clone(), next)))) {
                // Dropping it as it is would lock again.
                unwanted.0 = None;
                lanes.stop(next);
            }
        }
    }
}

impl<K: Copy + Eq + Hash> Lanes<K> {
    fn queue(&mut self, caller: K, sender: oneshot::Sender<Ticket<K>>) -> Result<(), Busy> {
        match self.queues.iter_mut().find(|(key, _)| *key == caller) {
            Some((_, queue)) => {
                // Those who have gone do not count.
                queue.retain(|waiting| !waiting.is_closed());
                if queue.len() >= self.waiting_max {
                    return Err(Busy::Full);
                }
                queue.push_back(sender);
            }
            None if self.waiting_max == 0 => return Err(Busy::Full),
            None => self.queues.push_back((caller, VecDeque::from([sender]))),
        }
        Ok(())
    }

    fn running(&self, caller: &K) -> usize {
        self.running.get(caller).copied().unwrap_or(0)
    }

    /// Whether a request of `caller` may run: a slot is free, or somebody runs two more than it and
    /// fewer than twice the slots are taken.
    fn has_room(&self, caller: &K) -> bool {
        let most = self.running.values().copied().max().unwrap_or(0);
        let overtakes = self.running(caller) + 2 <= most && self.free > -(self.slots as isize);
        self.free > 0 || overtakes
    }

    fn start(&mut self, caller: K) {
        *self.running.entry(caller).or_default() += 1;
        self.free -= 1;
    }

    fn stop(&mut self, caller: K) {
        self.free += 1;
        if let Some(count) = self.running.get_mut(&caller) {
            *count -= 1;
            if *count == 0 {
                self.running.remove(&caller);
            }
        }
    }

    /// The oldest request of the caller that runs least, where it has room; among equals, of who
    /// waits longest.
    fn next(&mut self) -> Option<(K, oneshot::Sender<Ticket<K>>)> {
        // Those who have gone must not cost their caller a turn.
        self.queues.retain_mut(|(_, queue)| {
            queue.retain(|waiting| !waiting.is_closed());
            !queue.is_empty()
        });
        let place = (0..self.queues.len()).min_by_key(|i| self.running(&self.queues[*i].0))?;
        if !self.has_room(&self.queues[place].0) {
            return None;
        }
        let (caller, mut queue) = self.queues.remove(place)?;
        let sender = queue.pop_front();
        if !queue.is_empty() {
            self.queues.push_back((caller, queue));
        }
        sender.map(|sender| (caller, sender))
    }
}

impl<K: Copy + Eq + Hash> Drop for Ticket<K> {
    fn drop(&mut self) {
        if let Some((door, caller)) = self.0.take() {
            door.leave(caller);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use proptest::prelude::*;

    #[tokio::test]
    async fn a_quiet_caller_is_let_in_however_many_a_loud_one_has_running_and_waiting() {
        let door = Fair::new(2, 100);
        let first = door.enter("loud").await.unwrap();
        let second = door.enter("loud").await.unwrap();
        let mut loud: Vec<_> = (0..50).map(|_| Box::pin(door.enter("loud"))).collect();
        loud.iter_mut().for_each(|f| assert!(f.now_or_never().is_none()));
        // Two run more than none does.
        let quiet = door.enter("quiet").now_or_never().unwrap().unwrap();
        let mut second_quiet = Box::pin(door.enter("quiet"));
        assert!((&mut second_quiet).now_or_never().is_none());
        drop(first);
        assert!(loud.iter_mut().all(|f| f.now_or_never().is_none()));
        drop(second);
        // Now nothing of the loud one runs.
        let next: Vec<_> = loud.iter_mut().filter_map(|f| f.now_or_never()).collect();
        assert_eq!(next.len(), 1);
        assert!((&mut second_quiet).now_or_never().is_none());
        drop(quiet);
        assert!((&mut second_quiet).now_or_never().is_some());
    }

    #[tokio::test]
    async fn who_runs_one_less_waits_for_a_slot() {
        let door = Fair::new(1, 1);
        let running = door.enter("first").await.unwrap();
        let mut other = Box::pin(door.enter("other"));
        assert!((&mut other).now_or_never().is_none());
        drop(running);
        assert!((&mut other).now_or_never().is_some());
    }

    #[tokio::test]
    async fn queues_are_bounded_and_those_who_leave_make_room() {
        let door = Fair::new(1, 1);
        let running = door.enter(1).await.unwrap();
        let mut waiting = Box::pin(door.enter(1));
        assert!((&mut waiting).now_or_never().is_none());
        assert_eq!(door.enter(1).await.err(), Some(Busy::Full));
        drop(waiting);
        let mut again = Box::pin(door.enter(1));
        assert!((&mut again).now_or_never().is_none());
        assert_eq!(door.load(&1), (1, 1));
        drop(running);
        let ticket = (&mut again).now_or_never().unwrap().unwrap();
        drop(ticket);
        assert_eq!(door.load(&1), (0, 0));
        assert_eq!(door.0.lock().free, 1);
    }

    #[tokio::test]
    async fn who_waits_too_long_is_sent_away_and_leaves_room() {
        let (door, time_max) = (Fair::new(1, 1), Duration::from_millis(10));
        let running = door.enter_within(1, time_max).await.unwrap();
        assert_eq!(door.enter_within(1, time_max).await.err(), Some(Busy::Late));
        let mut next = Box::pin(door.enter_within(1, Duration::from_secs(60)));
        assert!((&mut next).now_or_never().is_none());
        drop(running);
        drop((&mut next).now_or_never().unwrap().unwrap());
        assert_eq!(door.0.lock().free, 1);
    }

    proptest! {
        /// Whatever comes and goes, slots are neither lost nor made, and all get in at last.
        #[test]
        fn slots_are_conserved(moves in proptest::collection::vec((0..4_u8, 0..3_u8), 1..120)) {
            let door = Fair::new(3, 10);
            let (mut inside, mut waiting) = (Vec::new(), Vec::new());
            for (caller, kind) in moves {
                match kind {
                    0 => waiting.push(Box::pin({
                        let door = door.clone();
                        async move { door.enter(caller).await }
                    })),
                    1 if !inside.is_empty() => {
                        drop(inside.swap_remove(usize::from(caller) % inside.len()));
                    }
                    _ if !waiting.is_empty() => {
                        drop(waiting.swap_remove(usize::from(caller) % waiting.len()));
                    }
                    _ => {}
                }
                waiting.retain_mut(|f| match f.now_or_never() {
                    Some(outcome) => { inside.extend(outcome.ok()); false }
                    None => true,
                });
                prop_assert!(inside.len() <= 6);
                prop_assert!(waiting.is_empty() || inside.len() >= 3);
                let lanes = door.0.lock();
                let most = lanes.running.values().copied().max().unwrap_or(0);
                for (caller, queue) in &lanes.queues {
                    let has_gone = queue.iter().all(|waiting| waiting.is_closed());
                    let is_behind = lanes.running(caller) + 2 <= most && inside.len() < 6;
                    prop_assert!(has_gone || !is_behind, "{caller} waits although it runs least");
                }
            }
            drop(waiting);
            drop(inside);
            prop_assert_eq!(door.0.lock().free, 3);
            prop_assert!(door.0.lock().running.is_empty());
        }
    }
}
