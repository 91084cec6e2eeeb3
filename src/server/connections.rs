//! Limits the open connections, in all and for each address. At a limit, the connection that has
//! kept the server waiting longest is closed for the new one.
//!
//! A connection whose request has arrived and is being answered is never closed. So a flood of
//! half-sent requests only displaces its own connections, and a health probe always gets a
//! connection.

use crate::clock::Clock;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Open connections of one listener, where the system allows as many files.
pub const CONNECTIONS_MAX: usize = 4096;
/// Files that are not connections: checkpoints, the chain's sockets, logs, libraries.
const FILES_RESERVE: usize = 256;
/// One in so many connections is kept from any single address.
const OTHERS_SHARE: usize = 8;
/// How long a new connection is safe: its request may be on its way.
const GRACE: Duration = Duration::from_millis(250);

/// How many connections each of `listeners` may have: as many as the system allows files for,
/// whose limit is raised as far as it may be.
pub fn connections_max(listeners: usize) -> usize {
    share(files_max(), listeners)
}

fn share(files: usize, listeners: usize) -> usize {
    let reserve = FILES_RESERVE.min(files / 2);
    ((files - reserve) / listeners.max(1)).clamp(1, CONNECTIONS_MAX)
}

/// Raises the soft limit on open files to the hard one, and says what it is then.
fn files_max() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid place for the answer.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return 2 * FILES_RESERVE;
    }
    let raised = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
    // SAFETY: `raised` is a valid limit, read only.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) } == 0 {
        limit = raised;
    }
    usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX)
}

/// The open connections of one listener; a cloneable handle.
#[derive(Clone)]
pub struct Connections(Arc<Inner>);

struct Inner {
    most: usize,
    clock: Clock,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    next: u64,
    open: BTreeMap<u64, Open>, // by number, the oldest first
    addresses: HashMap<IpAddr, usize>,
}

struct Open {
    address: IpAddr,
    since: Duration,
    peer: Peer,
    leave: CancellationToken,
}

/// What a connection shares with its requests.
#[derive(Clone, Default)]
pub struct Peer(Arc<Progress>);

#[derive(Default)]
struct Progress {
    is_answered: AtomicBool, // a request has arrived and its answer is on its way
    was_answered: AtomicBool,
}

/// Why a connection was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Full {
    /// Its address has too many.
    #[error("at most {0} connections of one address are served at once")]
    Address(usize),
    /// There are too many in all.
    #[error("at most {0} connections are served at once")]
    All(usize),
}

impl Connections {
    /// At most so many.
    pub fn new(most: usize) -> Self {
        let (clock, table) = (Clock::system(), Mutex::default());
        Self(Arc::new(Inner { most: most.max(1), clock, table }))
    }

    /// How many connections are open.
    pub fn len(&self) -> usize {
        self.0.table.lock().open.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes a connection of `address`, which may have `per_address`; another may give way to it.
    ///
    /// # Errors
    /// When there are too many and all of them are new or being answered.
    pub fn admit(&self, address: IpAddr, per_address: usize) -> Result<ConnectionSlot, Full> {
        let address = network(address);
        let most = self.0.most;
        let share = per_address.min(most - most / OTHERS_SHARE).max(1);
        let now = self.0.clock.elapsed();
        let mut table = self.0.table.lock();
        let count = table.addresses.get(&address).copied().unwrap_or(0);
        if count >= share && !table.give_way(now, |a| a == address) {
            return Err(Full::Address(share));
        }
        if table.open.len() >= most {
            let crowded = table.addresses.iter().max_by_key(|(_, count)| **count).map(|(a, _)| *a);
            let is_found =
                table.give_way(now, |a| Some(a) == crowded) || table.give_way(now, |_| true);
            if !is_found {
                return Err(Full::All(most));
            }
        }
        let (peer, leave, id) = (Peer::default(), CancellationToken::new(), table.next);
        table.next += 1;
        *table.addresses.entry(address).or_default() += 1;
        let open = Open { address, since: now, peer: peer.clone(), leave: leave.clone() };
        table.open.insert(id, open);
        drop(table);
        Ok(ConnectionSlot { connections: self.clone(), id, peer, leave })
    }
}

impl Table {
    /// Ends the connection of such an address that has kept the server waiting longest: first one
    /// that has never sent a whole request. False where none may be ended.
    fn give_way(&mut self, now: Duration, is_meant: impl Fn(IpAddr) -> bool) -> bool {
        let may_end = |open: &Open| {
            let is_new = now.saturating_sub(open.since) < GRACE;
            !is_new && !open.peer.is_answered()
        };
        let waiting = self.open.iter().filter(|(_, o)| is_meant(o.address) && may_end(o));
        let order = |(id, o): &(&u64, &Open)| (o.peer.0.was_answered.load(Ordering::SeqCst), **id);
        let Some(id) = waiting.min_by_key(order).map(|(id, _)| *id) else { return false };
        if let Some(open) = self.remove(id) {
            open.leave.cancel();
        }
        true
    }

    fn remove(&mut self, id: u64) -> Option<Open> {
        let open = self.open.remove(&id)?;
        if let Some(count) = self.addresses.get_mut(&open.address) {
            *count -= 1;
            if *count == 0 {
                self.addresses.remove(&open.address);
            }
        }
        Some(open)
    }
}

/// The place of an open connection, until dropped.
pub struct ConnectionSlot {
    connections: Connections,
    id: u64,
    peer: Peer,
    leave: CancellationToken,
}

impl ConnectionSlot {
    /// What its requests tell it.
    pub fn peer(&self) -> Peer {
        self.peer.clone()
    }

    /// Completes when it must be closed for another one.
    pub async fn given_up(&self) {
        self.leave.cancelled().await;
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.connections.0.table.lock().remove(self.id);
    }
}

impl Peer {
    /// Whether a whole request has arrived whose answer is not written yet.
    pub(super) fn is_answered(&self) -> bool {
        self.0.is_answered.load(Ordering::SeqCst)
    }

    /// A whole request has arrived.
    pub(super) fn arrived(&self) {
        self.0.is_answered.store(true, Ordering::SeqCst);
    }

    /// Its answer has been written, or given up.
    pub(super) fn answered(&self) {
        self.0.is_answered.store(false, Ordering::SeqCst);
        self.0.was_answered.store(true, Ordering::SeqCst);
    }
}

/// Who an address belongs to: the owner of one IPv6 address has its whole network.
pub(super) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connections(most: usize) -> (Connections, Clock) {
        let clock = Clock::manual(0);
        let inner = Inner { most, clock: clock.clone(), table: Mutex::default() };
        (Connections(Arc::new(inner)), clock)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn files_become_connections_with_a_reserve() {
        let cases = [(1024, 1, 768), (1024, 2, 384), (64, 1, 32), (1, 1, 1), (0, 1, 1)];
        for (files, listeners, most) in cases {
            assert_eq!(share(files, listeners), most, "{files} {listeners}");
        }
        assert_eq!(share(usize::MAX, 1), CONNECTIONS_MAX);
        assert!(files_max() >= 64);
    }

    #[test]
    fn the_longest_wait_of_the_same_address_ends_for_a_newcomer() {
        let (all, clock) = connections(100);
        let other = all.admit(ip("10.0.0.2"), 3).unwrap();
        let places: Vec<ConnectionSlot> =
            (0..3).map(|_| all.admit(ip("10.0.0.1"), 3).unwrap()).collect();
        // All are new: none is closed for another one.
        assert_eq!(all.admit(ip("10.0.0.1"), 3).err(), Some(Full::Address(3)));
        clock.advance(GRACE);
        // The first is being answered, the second has been before, the third never sent anything.
        places[0].peer.arrived();
        places[1].peer.arrived();
        places[1].peer.answered();
        let fourth = all.admit(ip("10.0.0.1"), 3).unwrap();
        assert!(places[2].leave.is_cancelled() && !places[1].leave.is_cancelled());
        let _fifth = all.admit(ip("10.0.0.1"), 3).unwrap();
        assert!(places[1].leave.is_cancelled() && !places[0].leave.is_cancelled());
        assert_eq!(all.admit(ip("10.0.0.1"), 3).err(), Some(Full::Address(3)));
        assert!(!other.leave.is_cancelled() && !fourth.leave.is_cancelled());
        drop(fourth);
        assert!(all.admit(ip("10.0.0.1"), 3).is_ok());
        assert_eq!(all.len(), 3);
    }

    #[test]
    fn no_address_takes_all_and_the_crowded_one_gives_way() {
        let (all, clock) = connections(16);
        let many: Vec<ConnectionSlot> =
            (0..14).map(|_| all.admit(ip("::1"), 1000).unwrap()).collect();
        assert_eq!(all.admit(ip("::2"), 1000).err(), Some(Full::Address(14)), "the same network");
        let two = [all.admit(ip("10.0.0.1"), 9).unwrap(), all.admit(ip("10.0.0.2"), 9).unwrap()];
        assert_eq!(all.admit(ip("10.0.0.3"), 9).err(), Some(Full::All(16)));
        clock.advance(GRACE);
        let third = all.admit(ip("10.0.0.3"), 9).unwrap();
        assert!(many[0].leave.is_cancelled() && !two[0].leave.is_cancelled());
        drop((many, two, third));
        assert!(all.is_empty() && all.0.table.lock().addresses.is_empty());
        assert_eq!(network(ip("::ffff:10.0.0.1")), ip("10.0.0.1"));
    }
}
