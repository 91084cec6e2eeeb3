//! Runs the phases of a step on a pool of threads with low-latency barriers, shared by every engine
//! of the process.
//!
//! A forward pass is a few hundred short parallel phases, so workers spin for the next phase before
//! they park. Work is split over output rows or heads, never over a reduction, so who runs a task
//! does not change a bit.
//!
//! Every thread begins with a share of its own: tasks that lie together, so that it reads weights
//! in one stream and claims them from a counter that nobody else writes. Once it has none left it
//! takes those of others.
//!
//! An engine takes a [`Turn`] for one step. Among those that wait, the one that has used the
//! threads least goes first (start-time fair queueing), so a model with long steps cannot starve
//! one with short steps: both get the same share of time.

use super::lanes::Isa;
use parking_lot::{Condvar, Mutex};
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle, Thread};
use std::time::Instant;

/// Polls before a waiting thread parks: some tens of microseconds.
const SPINS_MAX: u32 = 3_000;

/// A cloneable handle on the threads. Clones share one account of the time they use.
#[derive(Clone)]
pub struct Pool {
    threads: Arc<Threads>,
    used: Arc<AtomicU64>, // nanoseconds, and what was given for idle times
}

struct Threads {
    isa: Isa,
    queue: Mutex<Queue>,
    freed: Condvar,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// Who wants the threads.
#[derive(Default)]
struct Queue {
    is_taken: bool,
    waiting: Vec<(u64, u64)>, // (time used, ticket)
    tickets: u64,
    now: u64, // time used of whoever had the last turn, when it began
}

impl Queue {
    /// Enqueues who has used this much time; being idle saves up nothing.
    fn enter(&mut self, used: u64) -> (u64, u64) {
        let ticket = (used.max(self.now), self.tickets);
        self.tickets += 1;
        self.waiting.push(ticket);
        ticket
    }

    /// Takes the turn if it is this ticket's.
    fn take(&mut self, ticket: (u64, u64)) -> bool {
        if self.is_taken || self.waiting.iter().min() != Some(&ticket) {
            return false;
        }
        self.waiting.retain(|other| *other != ticket);
        (self.is_taken, self.now) = (true, ticket.0);
        true
    }
}

struct Shared {
    phase: Lines<AtomicUsize>, // counts phases; a change wakes the workers
    job: UnsafeCell<Job>,      // written before `phase`, read after it
    shares: Vec<Lines<Share>>, // of the phase: the caller's, then each worker's
    busy: Lines<AtomicUsize>,  // workers that have not finished the phase
    parked: Vec<AtomicBool>,
    failed: AtomicBool, // a task of the phase panicked
    stop: AtomicBool,
    is_running: AtomicBool, // a phase; there is one at a time
}

/// A value on cache lines of its own: two, because processors fetch them in pairs.
#[repr(align(128))]
#[derive(Default)]
struct Lines<T>(T);

/// The tasks that a thread begins with.
#[derive(Default)]
struct Share {
    next: AtomicUsize,
    end: AtomicUsize,
}

#[derive(Clone)]
struct Job {
    run: *const (dyn Fn(usize) + Sync),
    caller: Option<Thread>,
}

// SAFETY: `job` is written only by the thread that set `is_running`, while `busy` is zero, and read
// by workers only between the release of `phase` and their decrement of `busy`; its pointer is only
// followed in that time, during which the caller keeps the closure alive. The rest is atomic.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it is tied to a thread.
unsafe impl Send for Shared {}

impl Pool {
    /// `threads` threads in all (the caller of a phase is one of them), running kernels for `isa`.
    ///
    /// # Errors
    /// When the system refuses to start a thread.
    pub fn new(threads: usize, isa: Isa) -> std::io::Result<Self> {
        let workers = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            phase: Lines::default(),
            job: UnsafeCell::new(Job { run: &|_| {}, caller: None }),
            shares: (0..=workers).map(|_| Lines::default()).collect(),
            busy: Lines::default(),
            parked: (0..workers).map(|_| AtomicBool::new(false)).collect(),
            failed: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            is_running: AtomicBool::new(false),
        });
        let workers = (0..workers)
            .map(|me| {
                let shared = Arc::clone(&shared);
                thread::Builder::new()
                    .name(format!("compute-{}", me + 1))
                    .spawn(move || shared.work(me))
            })
            .collect::<std::io::Result<Vec<_>>>()?;
        let (queue, freed) = (Mutex::new(Queue::default()), Condvar::new());
        let threads = Arc::new(Threads { isa, queue, freed, shared, workers });
        Ok(Self { threads, used: Arc::default() })
    }

    /// A handle with an account of its own: it competes for turns with this one.
    pub fn separate(&self) -> Self {
        Self { threads: Arc::clone(&self.threads), used: Arc::default() }
    }

    /// Waits for exclusive use of the threads.
    pub fn turn(&self) -> Turn<'_> {
        let threads = &*self.threads;
        let mut queue = threads.queue.lock();
        let ticket = queue.enter(self.used.load(Ordering::Relaxed));
        while !queue.take(ticket) {
            threads.freed.wait(&mut queue);
        }
        Turn { threads, used: &self.used, before: ticket.0, began: Instant::now() }
    }

    /// Number of threads, the caller included.
    pub fn threads(&self) -> usize {
        self.threads.workers.len() + 1
    }

    /// Instruction set of the kernels.
    pub fn isa(&self) -> Isa {
        self.threads.isa
    }
}

/// Exclusive use of the pool until dropped.
pub struct Turn<'a> {
    threads: &'a Threads,
    used: &'a AtomicU64,
    before: u64,
    began: Instant,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let nanoseconds = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.used.store(self.before.saturating_add(nanoseconds), Ordering::Relaxed);
        let mut queue = self.threads.queue.lock();
        queue.is_taken = false;
        if !queue.waiting.is_empty() {
            self.threads.freed.notify_all();
        }
    }
}

impl Turn<'_> {
    /// Instruction set of the kernels.
    pub fn isa(&self) -> Isa {
        self.threads.isa
    }

    /// Number of threads, the caller included.
    pub fn threads(&self) -> usize {
        self.threads.workers.len() + 1
    }

    /// Runs `task(0)` to `task(tasks - 1)` on all threads and returns when all are done.
    ///
    /// # Panics
    /// When a task panicked, or runs several tasks itself.
    pub fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        if tasks <= 1 || self.threads.workers.is_empty() {
            (0..tasks).for_each(task);
            return;
        }
        self.run_parallel(tasks, &task);
    }

    /// What `task` makes of 0 to `tasks - 1`, in this order; see [`run`](Self::run).
    pub fn map<T: Send>(&self, tasks: usize, task: impl Fn(usize) -> T + Sync) -> Vec<T> {
        let made: Vec<Mutex<Option<T>>> = (0..tasks).map(|_| Mutex::new(None)).collect();
        self.run(tasks, |i| {
            let one = task(i);
            *made[i].lock() = Some(one);
        });
        made.into_iter().filter_map(Mutex::into_inner).collect()
    }

    fn run_parallel(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.threads.shared;
        let is_free = !shared.is_running.swap(true, Ordering::Acquire);
        assert!(is_free, "a task of the compute pool runs tasks of its own");
        // SAFETY: only the lifetime changes; the pointer is not used after this function returns,
        // because it waits for `busy` to reach zero.
        let run: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
        // SAFETY: no other phase runs, so no worker is busy and nobody reads `job` now.
        unsafe { *shared.job.get() = Job { run, caller: Some(thread::current()) } };
        shared.share(tasks);
        shared.busy.0.store(self.threads.workers.len(), Ordering::Relaxed);
        shared.phase.0.fetch_add(1, Ordering::SeqCst);
        for (parked, worker) in shared.parked.iter().zip(&self.threads.workers) {
            if parked.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        let mine = catch_unwind(AssertUnwindSafe(|| shared.drain(0, run)));
        wait(|| shared.busy.0.load(Ordering::Acquire) == 0);
        let theirs = shared.failed.swap(false, Ordering::Relaxed);
        shared.is_running.store(false, Ordering::Release);
        if let Err(panic) = mine {
            std::panic::resume_unwind(panic);
        }
        assert!(!theirs, "a task of the compute pool panicked");
    }

    /// Like [`run`](Self::run) over `len` items in contiguous ranges of at least `grain`.
    pub fn run_ranges(&self, len: usize, grain: usize, task: impl Fn(Range<usize>) + Sync) {
        let pieces = (len / grain.max(1)).clamp(1, self.threads() * 4);
        let size = len.div_ceil(pieces);
        self.run(len.div_ceil(size.max(1)), |i| task(i * size..((i + 1) * size).min(len)));
    }
}

impl Shared {
    /// Cuts the tasks of the next phase into shares. Whoever sees the phase sees them.
    fn share(&self, tasks: usize) {
        let count = self.shares.len();
        for (i, Lines(share)) in self.shares.iter().enumerate() {
            share.next.store(i * tasks / count, Ordering::Relaxed);
            share.end.store((i + 1) * tasks / count, Ordering::Relaxed);
        }
    }

    /// Runs the tasks of the own share, then what is left of the others'.
    fn drain(&self, own: usize, run: &(dyn Fn(usize) + Sync)) {
        let (before, from) = self.shares.split_at(own);
        for Lines(share) in from.iter().chain(before) {
            let end = share.end.load(Ordering::Relaxed);
            loop {
                let task = share.next.fetch_add(1, Ordering::Relaxed);
                if task >= end {
                    break;
                }
                run(task);
            }
        }
    }

    fn work(&self, me: usize) {
        let mut seen = 0;
        loop {
            self.await_phase(me, seen);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            seen = seen.wrapping_add(1);
            // SAFETY: `phase` moved on, so `job` is set and stays until `busy` is decremented.
            let job = unsafe { (*self.job.get()).clone() };
            // SAFETY: the caller keeps the closure alive until `busy` is zero.
            let run = unsafe { &*job.run };
            if catch_unwind(AssertUnwindSafe(|| self.drain(me + 1, run))).is_err() {
                self.failed.store(true, Ordering::Relaxed);
            }
            if self.busy.0.fetch_sub(1, Ordering::AcqRel) == 1
                && let Some(caller) = job.caller
            {
                caller.unpark();
            }
        }
    }

    fn await_phase(&self, me: usize, seen: usize) {
        let moved =
            || self.phase.0.load(Ordering::SeqCst) != seen || self.stop.load(Ordering::SeqCst);
        for _ in 0..SPINS_MAX {
            if moved() {
                return;
            }
            std::hint::spin_loop();
        }
        self.parked[me].store(true, Ordering::SeqCst);
        while !moved() {
            thread::park();
        }
        self.parked[me].store(false, Ordering::SeqCst);
    }
}

/// Spins, then parks, until `done`; whoever makes it true unparks this thread.
fn wait(done: impl Fn() -> bool) {
    for _ in 0..SPINS_MAX {
        if done() {
            return;
        }
        std::hint::spin_loop();
    }
    while !done() {
        thread::park();
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its tasks, so joining cannot fail.
            let _ = worker.join();
        }
    }
}

/// A mutable slice that tasks of one phase write in disjoint pieces.
pub struct Disjoint<'a, T> {
    data: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: handing out pieces is `unsafe` and demands that they do not overlap.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}
// SAFETY: it stands for a `&mut [T]`.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Shares `slice` between tasks.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { data: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// The elements in `range`.
    ///
    /// # Safety
    /// No two live pieces may overlap.
    ///
    /// # Panics
    /// When `range` is out of bounds.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "that is the purpose; see the contract")]
    pub unsafe fn piece(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: in bounds of the borrowed slice; the caller keeps pieces apart.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_task_runs_once_in_every_phase() {
        let pool = Pool::new(3, Isa::SCALAR).unwrap();
        let turn = pool.turn();
        for phase in 0..2_000 {
            let counts: Vec<AtomicUsize> = (0..phase % 37).map(|_| AtomicUsize::new(0)).collect();
            turn.run(counts.len(), |i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "phase {phase}");
        }
    }

    #[test]
    fn who_has_no_tasks_left_takes_those_of_others() {
        let pool = Pool::new(2, Isa::SCALAR).unwrap();
        let turn = pool.turn();
        for slow in [0, 7] {
            let done = AtomicUsize::new(0);
            turn.run(8, |i| {
                // A thread that is held by one task leaves the rest of its share to the other.
                let began = Instant::now();
                while i == slow && done.load(Ordering::Relaxed) < 7 {
                    assert!(began.elapsed() < Duration::from_secs(20), "nobody took its tasks");
                    thread::yield_now();
                }
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 8);
        }
    }

    #[test]
    fn tasks_that_run_tasks_are_refused() {
        let pool = Pool::new(2, Isa::SCALAR).unwrap();
        let turn = pool.turn();
        let nested = || turn.run(4, |_| turn.run(4, |_| ()));
        assert!(catch_unwind(AssertUnwindSafe(nested)).is_err());
        let done = AtomicUsize::new(0);
        turn.run(4, |_| {
            turn.run(1, |_| _ = done.fetch_add(1, Ordering::Relaxed)); // by the thread itself
        });
        assert_eq!(done.into_inner(), 4, "the pool works on");
    }

    #[test]
    fn ranges_cover_everything_once() {
        let pool = Pool::new(2, Isa::SCALAR).unwrap();
        let turn = pool.turn();
        for len in [0, 1, 5, 64, 1000] {
            let mut hits = vec![0_u8; len];
            let shared = Disjoint::new(&mut hits);
            turn.run_ranges(len, 16, |r| {
                // SAFETY: `run_ranges` hands out disjoint ranges.
                unsafe { shared.piece(r) }.iter_mut().for_each(|h| *h += 1);
            });
            assert!(hits.iter().all(|h| *h == 1), "{len}");
        }
    }

    #[test]
    fn long_and_short_turns_get_the_same_share_of_time() {
        let mut queue = Queue::default();
        let (lengths, mut used, mut got) = ([100, 7, 1], [0; 3], [0; 3]);
        let mut tickets = used.map(|u| queue.enter(u));
        for _ in 0..20_000 {
            let i = (0..3).find(|i| queue.take(tickets[*i])).unwrap();
            assert!(tickets.iter().all(|t| !queue.take(*t)), "one at a time");
            used[i] = tickets[i].0 + lengths[i];
            got[i] += lengths[i];
            queue.is_taken = false;
            tickets[i] = queue.enter(used[i]);
        }
        let spread = got.iter().max().unwrap() - got.iter().min().unwrap();
        assert!(spread <= 200, "{got:?}");
    }

    #[test]
    fn who_was_idle_does_not_take_over() {
        let mut queue = Queue::default();
        let mut busy = 0;
        for _ in 0..10 {
            let ticket = queue.enter(busy);
            assert!(queue.take(ticket));
            busy = ticket.0 + 10;
            queue.is_taken = false;
        }
        let late = queue.enter(0);
        assert_eq!(late.0, 90);
        let ticket = queue.enter(busy);
        assert!(!queue.take(ticket) && queue.take(late));
    }

    #[test]
    fn turns_of_many_handles_exclude_each_other() {
        let pool = Pool::new(2, Isa::SCALAR).unwrap();
        let (inside, sum) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..4 {
                let handle = pool.separate();
                let (inside, sum) = (&inside, &sum);
                scope.spawn(move || {
                    for _ in 0..200 {
                        let turn = handle.turn();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        turn.run(3, |i| {
                            sum.fetch_add(i, Ordering::Relaxed);
                        });
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 4 * 200 * 3);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2, Isa::SCALAR).unwrap();
        let turn = pool.turn();
        for _ in 0..20 {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                turn.run(8, |i| assert!(i != 5, "task five"));
            }));
            assert!(outcome.is_err());
            let sum = AtomicUsize::new(0);
            turn.run(8, |i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 28);
        }
    }
}
