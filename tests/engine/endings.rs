//! Whoever receives a request's last event finds it counted, and may ask again at once.

use crate::common;
use std::future::Future;
use std::pin::pin;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;
use targon_engine::clock::Clock;
use targon_engine::engine::guard::{Stage, Watch};
use targon_engine::engine::output::{Event, Fault};
use targon_engine::engine::request::Request;
use targon_engine::engine::stats::EngineSnapshot;
use targon_engine::engine::{Engine, Options};
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;

/// One request at a time, and none that waits.
fn options() -> Options {
    Options { sequences_max: 1, waiting_max: 0, ..common::options() }
}

/// What the engine's own thread sees in the moment in which it sends an event, before it does
/// anything else: a receiver on another thread cannot be earlier.
struct AtSend {
    engine: Engine,
    seen: Sender<(EngineSnapshot, bool)>,
}

impl Wake for AtSend {
    fn wake(self: Arc<Self>) {
        let snapshot = self.engine.stats().snapshot();
        let is_taken = self.engine.submit(Request::greedy(vec![3], 1)).is_ok();
        self.seen.send((snapshot, is_taken)).unwrap();
    }
}

/// An engine that takes no request before it is let go, and panics where it enters `broken`.
fn held_engine(broken: Option<Stage>) -> (Engine, Sender<()>) {
    let pool = Pool::new(1, Isa::best()).unwrap();
    let (let_go, held) = channel();
    let held = Mutex::new(Some(held));
    let watch = Watch::new(move |stage| {
        if stage == Stage::Take
            && let Some(held) = held.lock().unwrap().take()
        {
            held.recv().unwrap();
        }
        assert!(Some(stage) != broken, "injected");
    });
    let model = common::tiny_model(5, &pool);
    (Engine::start_watched(model, pool, options(), Clock::system(), watch).unwrap(), let_go)
}

/// The only event of a request for one token, and what was seen as it was sent.
fn only_event(broken: Option<Stage>) -> (Event, EngineSnapshot, bool) {
    let (engine, let_go) = held_engine(broken);
    let (seen, receiver) = channel();
    let mut generation = engine.submit(Request::greedy(vec![3, 5, 8], 1)).unwrap();
    let waker = Waker::from(Arc::new(AtSend { engine, seen }));
    let mut context = Context::from_waker(&waker);
    let mut next = pin!(generation.next());
    assert!(next.as_mut().poll(&mut context).is_pending(), "it is held back");
    let_go.send(()).unwrap();
    let (snapshot, is_taken) = receiver.recv_timeout(Duration::from_secs(60)).unwrap();
    match next.as_mut().poll(&mut context) {
        Poll::Ready(Some(event)) => (event, snapshot, is_taken),
        other => panic!("woken for {other:?}"),
    }
}

fn assert_holds_nothing(snapshot: &EngineSnapshot) {
    let load = snapshot.load;
    assert_eq!((load.running, load.waiting, load.blocks_used), (0, 0, 0));
}

#[test]
fn the_last_token_comes_after_its_request_is_counted_and_its_place_is_free() {
    let (event, snapshot, is_taken) = only_event(None);
    assert!(matches!(&event, Event::Step(step) if step.finish.is_some()), "{event:?}");
    let counted = (snapshot.finished, snapshot.prompt_tokens, snapshot.decode_tokens);
    assert_eq!(counted, (1, 3, 1));
    assert_holds_nothing(&snapshot);
    assert!(is_taken, "the only place is still held");
}

#[test]
fn a_fault_comes_after_it_is_counted_and_the_place_is_free() {
    for stage in Stage::ALL {
        let (event, snapshot, is_taken) = only_event(Some(stage));
        assert!(matches!(event, Event::Fault(Fault::Panicked(_))), "{stage:?}: {event:?}");
        assert_eq!((snapshot.finished, snapshot.faults), (0, 1), "{stage:?}");
        assert_holds_nothing(&snapshot);
        assert!(is_taken, "{stage:?}: the only place is still held");
    }
}
