//! Sends requests: at times of a Poisson process, however long answers take (open loop), or as
//! many at once as are asked for (closed loop).

use super::heard::{Heard, LoadRequest, Transport};
use crate::bench::host::cpu_seconds;
use crate::bench::report::schema::Client;
use crate::bench::stats::quantile;
use crate::clock::Clock;
use crate::ops::philox::philox;
use parking_lot::Mutex;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// Requests that may run at once in an open loop: more of them wait, and the client is marked.
pub const IN_FLIGHT_MAX: usize = 4096;
/// Failures one after the other after which a server is given up.
const FAILURES_MAX: usize = 16;
/// How often an interrupt is looked for.
const POLL: Duration = Duration::from_millis(50);
/// How often the client's own timers are tested.
const TICK: Duration = Duration::from_millis(10);
/// Timers that are tested.
const TICKS_MAX: usize = 1 << 20;

/// When requests are sent.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Load {
    /// So many a second, as a Poisson process.
    Rate(f64),
    /// So many at once, always.
    Concurrency(usize),
}

impl Load {
    /// Requests that run at once, where that is what is asked for.
    pub fn at_once(self) -> Option<usize> {
        match self {
            Self::Rate(_) => None,
            Self::Concurrency(many) => Some(many),
        }
    }

    /// Requests a second, where that is what is asked for.
    pub fn rate(self) -> Option<f64> {
        match self {
            Self::Rate(rate) => Some(rate),
            Self::Concurrency(_) => None,
        }
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rate(rate) => write!(f, "{rate}/s"),
            Self::Concurrency(many) => write!(f, "{many} at once"),
        }
    }
}

/// An answer, and when it was asked for.
#[derive(Clone, PartialEq, Debug)]
pub struct TimedAnswer {
    /// Seconds since the load began.
    pub at: f64,
    /// What came back, and when.
    pub heard: Heard,
}

/// What came of a load.
#[derive(Clone, PartialEq, Debug)]
pub struct Driven {
    /// The answers, in the order in which they ended.
    pub sent: Vec<TimedAnswer>,
    /// Requests that were sent and had not ended when the load was broken off.
    pub unfinished: usize,
    /// Seconds that it took.
    pub seconds: f64,
    /// How the client fared.
    pub client: Client,
    /// Why it ended early.
    pub stop: Option<LoadStop>,
}

/// Why a load ended early.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LoadStop {
    /// Nobody wants it any more.
    Unwanted,
    /// The server failed too often in a row.
    ServerFailed,
}

/// Seconds from the start to each arrival of a Poisson process.
fn arrivals(rate: f64, seed: u64) -> impl Iterator<Item = f64> {
    let gap = move |i: u32| {
        let word = philox(seed, [i, 0, 0, 0x706f_6973])[0];
        // In (0, 1], so that the logarithm is finite.
        -((f64::from(word) + 1.0) / 4_294_967_296.0).ln() / rate
    };
    let sum = |at: &mut f64, gap: f64| {
        *at += gap;
        Some(*at)
    };
    (0..).map(gap).scan(0.0, sum)
}

/// Sends `asked` and waits for all answers. A request is made when the one before it is sent, so
/// that only one waits in memory.
pub async fn drive(
    ask: &Arc<dyn Transport>,
    asked: impl Iterator<Item = LoadRequest>,
    load: Load,
    (seed, threads): (u64, usize),
    is_wanted: &(dyn Fn() -> bool + Sync),
) -> Driven {
    let (clock, cpu) = (Clock::system(), cpu_seconds());
    let ticks = Arc::new(Mutex::new(Vec::new()));
    let ticker = tokio::spawn(tick(clock.clone(), Arc::clone(&ticks)));
    let (times, limit): (Box<dyn Iterator<Item = f64> + Send>, _) = match load {
        Load::Rate(rate) => (Box::new(arrivals(rate, seed)), IN_FLIGHT_MAX),
        Load::Concurrency(many) => (Box::new(std::iter::repeat(0.0)), many.max(1)),
    };
    let mut run = Run { clock: clock.clone(), sent: Vec::new(), failures: 0, late: Vec::new() };
    let mut running = JoinSet::new();
    let mut stop = None;
    for (asked, time) in asked.zip(times) {
        stop = run.wait(&mut running, time, limit, is_wanted).await;
        if stop.is_some() {
            break;
        }
        let at = clock.elapsed().as_secs_f64();
        if matches!(load, Load::Rate(_)) {
            run.late.push((at - time).max(0.0));
        }
        let answering = ask.ask(asked);
        running.spawn(async move { TimedAnswer { at, heard: answering.await } });
    }
    while stop.is_none() && !running.is_empty() {
        stop = run.wait(&mut running, f64::INFINITY, usize::MAX, is_wanted).await;
    }
    let seconds = clock.elapsed().as_secs_f64();
    let unfinished = running.len();
    running.abort_all();
    ticker.abort();
    let ticks = std::mem::take(&mut *ticks.lock());
    let busy = (cpu_seconds() - cpu) / (seconds.max(1e-9) * threads.max(1) as f64);
    let client = Client { busy, timer_late: rare(ticks), send_late: rare(run.late) };
    Driven { sent: run.sent, unfinished, seconds, client, stop }
}

/// The 99 % quantile; 0 of nothing.
fn rare(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    quantile(&values, 0.99).unwrap_or(0.0)
}

/// Notes how late timers of this process fire.
async fn tick(clock: Clock, late: Arc<Mutex<Vec<f64>>>) {
    for _ in 0..TICKS_MAX {
        let asked = clock.elapsed() + TICK;
        tokio::time::sleep(TICK).await;
        late.lock().push(clock.elapsed().saturating_sub(asked).as_secs_f64());
    }
}

/// What is known while a load runs.
struct Run {
    clock: Clock,
    sent: Vec<TimedAnswer>,
    failures: usize,
    late: Vec<f64>,
}

impl Run {
    /// Takes answers until it is `time` and fewer than `limit` requests run, or, where `time` is
    /// infinite, until none runs.
    async fn wait(
        &mut self,
        running: &mut JoinSet<TimedAnswer>,
        time: f64,
        limit: usize,
        is_wanted: &(dyn Fn() -> bool + Sync),
    ) -> Option<LoadStop> {
        loop {
            if !is_wanted() {
                return Some(LoadStop::Unwanted);
            }
            while let Some(ended) = running.try_join_next() {
                self.take(ended.ok());
            }
            if self.failures >= FAILURES_MAX {
                return Some(LoadStop::ServerFailed);
            }
            let left = time - self.clock.elapsed().as_secs_f64();
            let is_over = if time.is_finite() { left <= 0.0 } else { running.is_empty() };
            if is_over && running.len() < limit {
                return None;
            }
            let nap = match left > 0.0 {
                true => POLL.min(Duration::try_from_secs_f64(left).unwrap_or(POLL)),
                false => POLL,
            };
            match running.is_empty() {
                true => tokio::time::sleep(nap).await,
                false => {
                    if let Ok(Some(ended)) = tokio::time::timeout(nap, running.join_next()).await {
                        self.take(ended.ok());
                    }
                }
            }
        }
    }

    fn take(&mut self, ended: Option<TimedAnswer>) {
        let Some(sent) = ended else { return };
        self.failures = if sent.heard.failure.is_some() { self.failures + 1 } else { 0 };
        self.sent.push(sent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::traffic::heard::{Answering, Chunk};
    use serde_json::Value;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Answers after 20 ms; after `good` answers it fails.
    struct Server {
        good: usize,
        asked: AtomicUsize,
        running: Arc<AtomicUsize>,
        most: Arc<AtomicUsize>,
    }

    impl Transport for Server {
        fn ask(&self, _: LoadRequest) -> Answering {
            let is_good = self.asked.fetch_add(1, Ordering::SeqCst) < self.good;
            let (running, most) = (Arc::clone(&self.running), Arc::clone(&self.most));
            Box::pin(async move {
                most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(20)).await;
                running.fetch_sub(1, Ordering::SeqCst);
                let chunks = vec![Chunk { at: 0.01, has_choice: true, has_text: true }];
                let failure = (!is_good).then(|| "status 500".to_owned());
                Heard { chunks, ended: 0.02, failure, ..Heard::default() }
            })
        }
    }

    fn server(good: usize) -> (Arc<dyn Transport>, Arc<AtomicUsize>) {
        let most = Arc::new(AtomicUsize::new(0));
        let (asked, running) = (AtomicUsize::new(0), Arc::default());
        (Arc::new(Server { good, asked, running, most: Arc::clone(&most) }), most)
    }

    fn asked(count: usize) -> impl Iterator<Item = LoadRequest> {
        std::iter::repeat_n(LoadRequest { path: "/", body: Value::Null }, count)
    }

    #[test]
    fn arrivals_are_a_poisson_process() {
        let drawn = |seed| arrivals(50.0, seed).take(20_000).collect::<Vec<_>>();
        let times = drawn(3);
        assert!(times.is_sorted() && times == drawn(3));
        assert_ne!(times, drawn(4));
        let gaps: Vec<f64> = times.windows(2).map(|w| w[1] - w[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        assert!((mean - 0.02).abs() < 0.001, "{mean}");
        // Of exponential gaps 1/e are longer than the mean.
        let longer = gaps.iter().filter(|g| **g > mean).count() as f64 / gaps.len() as f64;
        assert!((longer - 0.368).abs() < 0.02, "{longer}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_closed_loop_keeps_its_number_and_an_open_one_its_times() {
        let (ask, most) = server(100);
        let driven = drive(&ask, asked(12), Load::Concurrency(3), (1, 1), &|| true).await;
        assert_eq!((driven.sent.len(), driven.stop, driven.unfinished), (12, None, 0));
        assert_eq!(most.load(Ordering::SeqCst), 3);
        // All at once would take 20 ms; four rounds take 80.
        assert!(driven.seconds >= 0.08, "{}", driven.seconds);

        let (ask, _) = server(100);
        let driven = drive(&ask, asked(20), Load::Rate(200.0), (1, 1), &|| true).await;
        let drawn: Vec<f64> = arrivals(200.0, 1).take(20).collect();
        let mut sent: Vec<f64> = driven.sent.iter().map(|s| s.at).collect();
        sent.sort_by(f64::total_cmp);
        assert!(sent.iter().zip(&drawn).all(|(at, time)| at >= time), "{sent:?} {drawn:?}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_was_heard_stays_when_a_server_dies_or_nobody_wants_more() {
        let (ask, _) = server(5);
        let driven = drive(&ask, asked(500), Load::Concurrency(4), (1, 1), &|| true).await;
        assert_eq!(driven.stop, Some(LoadStop::ServerFailed));
        let good = driven.sent.iter().filter(|s| s.heard.failure.is_none()).count();
        assert!(good == 5 && driven.sent.len() < 40, "{good} of {}", driven.sent.len());

        let (ask, _) = server(500);
        let clock = Clock::system();
        let is_wanted = || clock.elapsed() < Duration::from_millis(150);
        let made = AtomicUsize::new(0);
        let asked = asked(5_000).inspect(|_| _ = made.fetch_add(1, Ordering::SeqCst));
        let driven = drive(&ask, asked, Load::Concurrency(2), (1, 1), &is_wanted).await;
        assert_eq!(driven.stop, Some(LoadStop::Unwanted));
        // One is made ahead of those that were sent.
        let sent = driven.sent.len() + driven.unfinished;
        assert_eq!(made.load(Ordering::SeqCst), sent + 1);
        assert!(!driven.sent.is_empty() && driven.sent.len() < 100, "{}", driven.sent.len());
    }
}
