//! Captures of decode steps while other threads use the card, and which steps are one graph.

use crate::answers::Catalogue;
use crate::common::{tiny_config, write_checkpoint};
use crate::failures::{alone, is_alone};
use crate::{Counter, Pair, count, disturb, driver};
use std::sync::atomic::{AtomicBool, Ordering};
use targon_engine::models::pass::{Batch, blocks_of};

/// A model on both devices, and what is asked of it: the calibration stays the same.
type Subject = (Pair, Catalogue);

fn subject(context: usize) -> Subject {
    let dir = tempfile::tempdir().unwrap();
    let mut config = tiny_config();
    config["max_position_embeddings"] = context.into();
    write_checkpoint(dir.path(), &config, 6);
    let pair = Pair::new(dir.path(), None, 0, blocks_of(context));
    let catalogue = Catalogue::new(pair.vocab, pair.hidden, 3);
    (pair, catalogue)
}

/// A proved token at a position; how many graphs were launched for it.
fn decode((pair, catalogue): &mut Subject, at: usize, place: &str) -> i32 {
    let before = count(0, Counter::GraphLaunches);
    pair.step(&Batch::of(&[7], at), &[catalogue.ask(0, at, 0)], place);
    count(0, Counter::GraphLaunches) - before
}

/// Waits for the whole context of a device, as no pass does.
fn synchronise(device: i32) -> i32 {
    type Retain = unsafe extern "C" fn(*mut *mut u8, i32) -> i32;
    type Current = unsafe extern "C" fn(*mut u8) -> i32;
    type Synchronise = unsafe extern "C" fn() -> i32;
    let mut context = std::ptr::null_mut();
    unsafe {
        driver().get::<Retain>(b"cuDevicePrimaryCtxRetain").unwrap()(&mut context, device);
        driver().get::<Current>(b"cuCtxSetCurrent").unwrap()(context);
        driver().get::<Synchronise>(b"cuCtxSynchronize").unwrap()()
    }
}

#[test]
fn a_capture_that_another_thread_breaks_costs_no_answer() {
    if !is_alone() {
        return alone("captures::a_capture_that_another_thread_breaks_costs_no_answer", &[], &[]);
    }
    // The first step of a kind is launched plainly, the second is captured. At which of its
    // launches that ends does not matter.
    for launches in [0, 7, 20] {
        let mut subject = subject(512);
        assert_eq!(decode(&mut subject, 0, "the first of its kind"), 0);
        disturb(0, launches);
        let waited = count(0, Counter::ContextSyncs);
        assert_eq!(decode(&mut subject, 1, "a broken capture"), 0, "after {launches} launches");
        assert_eq!(count(0, Counter::ContextSyncs), waited + 1);
        assert_eq!(decode(&mut subject, 2, "captured again"), 1);
        assert_eq!(decode(&mut subject, 3, "a graph"), 1);
    }
}

#[test]
fn loading_and_proving_leave_the_captures_of_others_alone() {
    if !is_alone() {
        return alone("captures::loading_and_proving_leave_the_captures_of_others_alone", &[], &[]);
    }
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Each one loads weights, and puts a calibration on the card for its first proved row.
        let others = scope.spawn(|| {
            let mut loaded = 0;
            while loaded < 3 || !is_over.load(Ordering::Relaxed) {
                decode(&mut subject(512), 0, "a model beside");
                loaded += 1;
            }
        });
        for _ in 0..5 {
            let mut subject = subject(512);
            let graphs = (0..4).map(|at| decode(&mut subject, at, "beside models that load"));
            assert_eq!(graphs.sum::<i32>(), 3);
        }
        is_over.store(true, Ordering::Relaxed);
        others.join().unwrap();
    });
    assert_eq!(count(0, Counter::ContextSyncs), 0);
    // The count counts, and where nothing is captured nobody is harmed.
    assert_eq!((synchronise(0), count(0, Counter::ContextSyncs)), (0, 1));
}

#[test]
fn contexts_of_three_and_four_partitions_are_one_graph() {
    if !is_alone() {
        return alone("captures::contexts_of_three_and_four_partitions_are_one_graph", &[], &[]);
    }
    let mut subject = subject(4096);
    let ids: Vec<u32> = (0..1_600).map(|i| i * i % 250).collect();
    for first in (0..1_600).step_by(400) {
        let ask = subject.1.ask(399, first + 399, 0);
        subject.0.step(&Batch::of(&ids[first..first + 400], first), &[ask], "a prompt");
    }
    // Two partitions, three, four: as many as there is room for are launched in either of the last
    // two, and the answers have the CPU's bits. No position begins a block of 32, which the CPU
    // empties for a new sequence.
    let mut step = |at: usize| decode(&mut subject, at, &format!("position {at}"));
    assert_eq!([600, 601, 602].map(&mut step), [0, 1, 1]);
    assert_eq!([1_100, 1_590, 1_023, 1_025, 1_535, 1_537].map(&mut step), [0, 1, 1, 1, 1, 1]);
    // A context of one partition is not split, and of another kind.
    assert_eq!([511, 300, 513].map(&mut step), [0, 1, 1]);
}
