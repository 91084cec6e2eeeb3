//! Receives bodies from senders who have only claimed an identity so far, within limits of memory,
//! and counts them until they are read.
//!
//! Bytes count when they arrive, not when they are announced, and a body must arrive at a minimum
//! rate. Bodies of one address in one signer's name form a share, and shares are limited
//! separately: a sender that opens one body too many loses its own oldest body. If all memory is
//! used, the address that holds most loses a body. So senders that falsely claim a member's name
//! cannot block that member.
//!
//! A whole body gives way to none. Its bytes count until its handler has read it, those of a signer
//! whose requests wait up to a limit.

use crate::chain::keys::Hotkey;
use crate::clock::Clock;
use crate::server::connections::network;
use axum::body::{Body, Bytes};
use bytes::BytesMut;
use http_body_util::BodyExt;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Bytes of one body; more are refused, whatever the settings allow.
pub const BODY_BYTES_MAX: usize = 2 << 20;
/// Bytes of all bodies that are being received or wait to be read.
pub const BODIES_BYTES_MAX: usize = 256 << 20;
/// Bytes of one signer's whole bodies that wait to be read.
pub const SIGNED_BYTES_MAX: usize = 32 << 20;
/// Unfinished bodies of one address in one signer's name.
pub const SHARE_MAX: usize = 32;
/// Unfinished bodies of one address in all names.
pub const ADDRESS_MAX: usize = 128;
/// How long a body may take, besides the time of its bytes at the least pace.
pub const GRACE: Duration = Duration::from_secs(3);
/// Bytes a second of a body, at least.
pub const PACE_MIN: u64 = 256 << 10;

/// All bodies that are being received or wait to be read; a cloneable handle.
#[derive(Clone)]
pub struct Bodies(Arc<Inner>);

struct Inner {
    bytes_max: usize,
    clock: Clock,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    next: u64,
    bytes: usize,
    open: BTreeMap<u64, Open>, // oldest first
}

struct Open {
    from: IpAddr,
    signer: Hotkey,
    bytes: usize,
    is_whole: bool,
    is_signed: bool, // by the signer that it names
    given_up: CancellationToken,
}

/// A body that has come as a whole. Its bytes count until this is dropped.
pub struct Received {
    /// The bytes of the whole body.
    pub bytes: Bytes,
    place: Option<Place>,
}

impl Received {
    /// Counts the body as one of its signer's, whose signature was checked: it may wait.
    ///
    /// # Errors
    /// [`BodyError::Waiting`] where too many bytes of the signer wait already.
    pub fn count_signed(&self) -> Result<(), BodyError> {
        let Some(place) = &self.place else { return Ok(()) };
        let mut table = place.bodies.0.table.lock();
        let Some(own) = table.open.get(&place.id) else { return Ok(()) };
        let is_same = |open: &&Open| open.is_signed && open.signer == own.signer;
        let waiting: usize = table.open.values().filter(is_same).map(|open| open.bytes).sum();
        if waiting + own.bytes > SIGNED_BYTES_MAX {
            return Err(BodyError::Waiting);
        }
        if let Some(own) = table.open.get_mut(&place.id) {
            own.is_signed = true;
        }
        Ok(())
    }
}

/// What a body may cost, and who sends it.
#[derive(Clone, Copy)]
pub struct Terms {
    /// The address of the peer, whose share of memory it counts for.
    pub from: IpAddr,
    /// Who it says to have signed it.
    pub signer: Hotkey,
    /// Bytes, at most [`BODY_BYTES_MAX`].
    pub bytes_max: usize,
    /// For all of it to arrive, whatever its pace.
    pub time_max: Duration,
}

/// Why a body was not received.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BodyError {
    /// It has more bytes than this limit.
    #[error("the body must have at most {0} bytes")]
    Large(usize),
    /// Too slow.
    #[error(
        "the body must arrive at {PACE_MIN} bytes a second after {} s, got {bytes} bytes in {} s",
        GRACE.as_secs(),
        took.as_secs()
    )]
    Slow {
        /// Bytes that had arrived.
        bytes: usize,
        /// The time in which they had arrived.
        took: Duration,
    },
    /// It kept up the pace, and was not whole within this time.
    #[error("the body must arrive within {0:?}")]
    Late(Duration),
    /// Its place was needed for another one.
    #[error("too many bodies are being received")]
    Crowded,
    /// Too many bytes of its signer wait.
    #[error("at most {SIGNED_BYTES_MAX} bytes of one hotkey's requests may wait")]
    Waiting,
    /// The connection ended before the body did.
    #[error("the body cannot be read: {0}")]
    Broken(String),
}

impl Bodies {
    /// Room for `bytes_max` bytes in all.
    pub fn new(bytes_max: usize, clock: Clock) -> Self {
        Self(Arc::new(Inner { bytes_max, clock, table: Mutex::default() }))
    }

    /// Reads a body that keeps to `terms`.
    ///
    /// # Errors
    /// The term that it breaks, or that its place was needed.
    pub async fn read(&self, terms: Terms, body: Body) -> Result<Received, BodyError> {
        if http_body::Body::is_end_stream(&body) {
            return Ok(Received { bytes: Bytes::new(), place: None });
        }
        let place = self.open(terms);
        let bytes = self.collect(&place, terms, body).await?;
        place.close();
        Ok(Received { bytes, place: Some(place) })
    }

    async fn collect(
        &self,
        place: &Place,
        terms: Terms,
        mut body: Body,
    ) -> Result<Bytes, BodyError> {
        let started = self.0.clock.elapsed();
        let mut all = BytesMut::new();
        loop {
            let took = self.0.clock.elapsed().saturating_sub(started);
            let paced = time_for(all.len());
            let left = paced.min(terms.time_max).saturating_sub(took);
            let frame = tokio::select! {
                frame = tokio::time::timeout(left, body.frame()) => frame,
                () = place.given_up.cancelled() => return Err(BodyError::Crowded),
            };
            let Ok(frame) = frame else {
                if terms.time_max < paced {
                    return Err(BodyError::Late(terms.time_max));
                }
                let took = self.0.clock.elapsed().saturating_sub(started);
                return Err(BodyError::Slow { bytes: all.len(), took });
            };
            let Some(frame) = frame else { return Ok(all.freeze()) };
            let frame = frame.map_err(|e| BodyError::Broken(e.to_string()))?;
            let Ok(data) = frame.into_data() else { continue };
            if all.len() + data.len() > terms.bytes_max {
                return Err(BodyError::Large(terms.bytes_max));
            }
            place.grow(data.len())?;
            all.extend_from_slice(&data);
        }
    }

    fn open(&self, terms: Terms) -> Place {
        let from = network(terms.from);
        let given_up = CancellationToken::new();
        let mut table = self.0.table.lock();
        table.make_place(from, terms.signer);
        let id = table.next;
        table.next += 1;
        let token = given_up.clone();
        let signer = terms.signer;
        let open =
            Open { from, signer, bytes: 0, is_whole: false, is_signed: false, given_up: token };
        table.open.insert(id, open);
        Place { bodies: self.clone(), id, given_up }
    }

    /// Bodies that are being received or wait to be read, and their bytes.
    pub fn load(&self) -> (usize, usize) {
        let table = self.0.table.lock();
        (table.open.len(), table.bytes)
    }
}

/// How long a body of which so much has come may have taken.
fn time_for(bytes: usize) -> Duration {
    GRACE + Duration::from_millis(bytes as u64 * 1000 / PACE_MIN)
}

impl Table {
    /// Room in the share of `from` and `signer`: the oldest body of a share that is full gives way,
    /// or that of the address's largest share.
    fn make_place(&mut self, from: IpAddr, signer: Hotkey) {
        let mut shares: HashMap<Hotkey, usize> = HashMap::new();
        for open in self.open.values().filter(|open| !open.is_whole && open.from == from) {
            *shares.entry(open.signer).or_default() += 1;
        }
        let largest = shares.iter().max_by_key(|(_, count)| **count).map(|(signer, _)| *signer);
        if shares.get(&signer).is_some_and(|count| *count >= SHARE_MAX) {
            self.give_up(|open| open.from == from && open.signer == signer);
        } else if shares.values().sum::<usize>() >= ADDRESS_MAX {
            self.give_up(|open| open.from == from && Some(open.signer) == largest);
        }
    }

    /// Room for all bytes: of the address that holds most, the oldest body that has some gives way.
    fn make_room(&mut self, bytes_max: usize) {
        while self.bytes > bytes_max {
            let mut held: HashMap<IpAddr, usize> = HashMap::new();
            for open in self.open.values().filter(|open| !open.is_whole) {
                *held.entry(open.from).or_default() += open.bytes;
            }
            let most = held.into_iter().max_by_key(|(_, bytes)| *bytes);
            let Some((most, 1..)) = most else { return };
            self.give_up(|open| open.from == most && open.bytes > 0);
        }
    }

    /// Gives up the oldest unfinished body that is `meant`.
    fn give_up(&mut self, meant: impl Fn(&Open) -> bool) {
        let oldest = self.open.iter().find(|(_, open)| !open.is_whole && meant(open));
        if let Some(id) = oldest.map(|(id, _)| *id) {
            self.remove(id);
        }
    }

    fn remove(&mut self, id: u64) {
        if let Some(open) = self.open.remove(&id) {
            self.bytes -= open.bytes;
            open.given_up.cancel();
        }
    }
}

/// A body's place in the table, until dropped.
struct Place {
    bodies: Bodies,
    id: u64,
    given_up: CancellationToken,
}

impl Place {
    fn grow(&self, bytes: usize) -> Result<(), BodyError> {
        let inner = &self.bodies.0;
        let mut table = inner.table.lock();
        let open = table.open.get_mut(&self.id).ok_or(BodyError::Crowded)?;
        open.bytes += bytes;
        table.bytes += bytes;
        table.make_room(inner.bytes_max);
        // It may have been its own.
        table.open.contains_key(&self.id).then_some(()).ok_or(BodyError::Crowded)
    }

    /// All of it has come: nobody takes its place any more.
    fn close(&self) {
        if let Some(open) = self.bodies.0.table.lock().open.get_mut(&self.id) {
            open.is_whole = true;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.bodies.0.table.lock().remove(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::ReceiverStream;

    type Sender = mpsc::Sender<Result<Vec<u8>, std::io::Error>>;
    type Reading = std::pin::Pin<Box<dyn Future<Output = Result<Received, BodyError>>>>;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    /// A body that is opened and waits for its first bytes.
    fn begin(bodies: &Bodies, from: IpAddr, signer: u8) -> (Sender, Reading) {
        let (sender, receiver) = mpsc::channel(16);
        let body = Body::from_stream(ReceiverStream::new(receiver));
        let time_max = Duration::from_secs(30);
        let signer = Hotkey([signer; 32]);
        let terms = Terms { from, signer, bytes_max: BODY_BYTES_MAX, time_max };
        let bodies = bodies.clone();
        let mut reading: Reading = Box::pin(async move { bodies.read(terms, body).await });
        assert!((&mut reading).now_or_never().is_none());
        (sender, reading)
    }

    fn send(sender: &Sender, count: usize) {
        sender.try_send(Ok(vec![b'x'; count])).unwrap();
    }

    fn now(reading: &mut Reading) -> Option<Result<usize, BodyError>> {
        reading.now_or_never().map(|read| read.map(|received| received.bytes.len()))
    }

    fn bodies(bytes_max: usize) -> Bodies {
        Bodies::new(bytes_max, Clock::system())
    }

    #[tokio::test]
    async fn a_share_that_is_full_loses_its_own_oldest_and_no_other() {
        let bodies = bodies(BODIES_BYTES_MAX);
        let (_quiet, mut quiet) = begin(&bodies, address(1), 9);
        let (_elsewhere, mut elsewhere) = begin(&bodies, address(2), 7);
        let mut crowd: Vec<_> = (0..=SHARE_MAX).map(|_| begin(&bodies, address(1), 7)).collect();
        assert_eq!(now(&mut crowd[0].1), Some(Err(BodyError::Crowded)));
        assert!(crowd[1..].iter_mut().all(|(_, reading)| now(reading).is_none()));
        assert!(now(&mut quiet).is_none() && now(&mut elsewhere).is_none());
        drop((crowd, quiet, elsewhere));
        assert_eq!(bodies.load(), (0, 0));
    }

    #[tokio::test]
    async fn an_address_that_is_full_makes_room_from_its_largest_share() {
        let bodies = bodies(BODIES_BYTES_MAX);
        let (_small, mut small) = begin(&bodies, address(1), 200);
        let counts = [SHARE_MAX, SHARE_MAX - 1, SHARE_MAX - 1, SHARE_MAX - 1, 2];
        assert_eq!(counts.iter().sum::<usize>(), ADDRESS_MAX - 1);
        let mut crowd: Vec<_> = counts
            .iter()
            .enumerate()
            .flat_map(|(signer, count)| std::iter::repeat_n(signer as u8, *count))
            .map(|signer| begin(&bodies, address(1), signer))
            .collect();
        let (newcomer, mut reading) = begin(&bodies, address(1), 201);
        assert_eq!(now(&mut crowd[0].1), Some(Err(BodyError::Crowded)));
        assert!(crowd[1..].iter_mut().all(|(_, reading)| now(reading).is_none()));
        assert!(now(&mut small).is_none());
        send(&newcomer, 5);
        drop(newcomer);
        assert_eq!(now(&mut reading), Some(Ok(5)));
    }

    #[tokio::test]
    async fn the_address_that_holds_most_bytes_gives_way() {
        let bodies = bodies(100);
        let mut greedy: Vec<_> = (0..3).map(|_| begin(&bodies, address(1), 7)).collect();
        greedy.iter_mut().for_each(|(sender, reading)| {
            send(sender, 30);
            assert!(now(reading).is_none());
        });
        let (sender, mut modest) = begin(&bodies, address(2), 7);
        send(&sender, 20);
        assert!(now(&mut modest).is_none());
        assert_eq!(now(&mut greedy[0].1), Some(Err(BodyError::Crowded)));
        assert!(greedy[1..].iter_mut().all(|(_, reading)| now(reading).is_none()));
        assert_eq!(bodies.load(), (3, 80));
        // What has come as a whole keeps its place until it is dropped.
        drop(sender);
        let whole = modest.await.unwrap();
        send(&greedy[1].0, 50);
        assert_eq!(now(&mut greedy[1].1), Some(Err(BodyError::Crowded)));
        assert_eq!(bodies.load(), (2, 50));
        drop(whole);
        assert_eq!(bodies.load(), (1, 30));
    }

    #[tokio::test]
    async fn bodies_must_keep_up_a_pace_and_arrive_in_time() {
        let bodies = bodies(BODIES_BYTES_MAX);
        let (signer, time_max) = (Hotkey([7; 32]), Duration::from_millis(20));
        let terms = Terms { from: address(1), signer, bytes_max: 9, time_max };
        let silent =
            || Body::from_stream(tokio_stream::pending::<Result<Vec<u8>, std::io::Error>>());
        assert_eq!(bodies.read(terms, silent()).await.err(), Some(BodyError::Late(time_max)));
        let terms = Terms { time_max: Duration::from_secs(30), ..terms };
        let reading = bodies.read(terms, silent());
        let error = tokio::time::timeout(2 * GRACE, reading).await.unwrap().err().unwrap();
        assert!(error.to_string().contains("after 3 s, got 0 bytes in 3 s"), "{error}");
        assert_eq!(time_for(0), GRACE);
        assert_eq!(time_for(BODY_BYTES_MAX), GRACE + Duration::from_secs(8));
        let (sender, large) = begin(&bodies, address(1), 7);
        send(&sender, BODY_BYTES_MAX);
        send(&sender, 1);
        assert_eq!(large.await.err(), Some(BodyError::Large(BODY_BYTES_MAX)));
    }

    /// Whole bodies of a signer, whose signature was checked.
    async fn signed(bodies: &Bodies, signer: u8, bytes: usize) -> Result<Received, BodyError> {
        let (sender, reading) = begin(bodies, address(1), signer);
        send(&sender, bytes);
        drop(sender);
        let received = reading.await?;
        received.count_signed().map(|()| received)
    }

    #[tokio::test]
    async fn bodies_that_wait_count_up_to_a_limit_of_their_signer() {
        let bodies = bodies(BODIES_BYTES_MAX);
        let mut waiting = Vec::new();
        for _ in 0..SIGNED_BYTES_MAX / BODY_BYTES_MAX {
            waiting.push(signed(&bodies, 7, BODY_BYTES_MAX).await.unwrap());
        }
        assert_eq!(bodies.load(), (waiting.len(), SIGNED_BYTES_MAX));
        assert_eq!(signed(&bodies, 7, 1).await.err(), Some(BodyError::Waiting));
        assert!(signed(&bodies, 8, 1).await.is_ok());
        waiting.pop();
        assert!(signed(&bodies, 7, 1).await.is_ok());
    }

    #[tokio::test]
    async fn bodies_that_wait_cost_the_next_ones_nothing() {
        let bodies = bodies(BODIES_BYTES_MAX);
        let mut waiting = Vec::new();
        for _ in 0..SHARE_MAX {
            waiting.push(signed(&bodies, 7, 1).await.unwrap());
        }
        let (_sender, mut first) = begin(&bodies, address(1), 7);
        let (_other, mut second) = begin(&bodies, address(1), 7);
        assert!(now(&mut first).is_none() && now(&mut second).is_none());
    }

    #[test]
    fn machines_of_one_network_are_one_address() {
        let of = |text: &str| network(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
    }
}
