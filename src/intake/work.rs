//! Runs work on large texts on a bounded number of threads.
//!
//! Parsing a large body, rendering a template and tokenising take from microseconds to seconds. On
//! an async thread they would delay all other connections, so they run on threads that may block.
//! There are two queues, so that a small text never waits behind a large one.

use super::error::RequestError;
use std::io::{self, Write};
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tokio::sync::Semaphore;

/// Bytes up to which a text is small: its reading takes a few milliseconds.
pub const SMALL_BYTES_MAX: usize = 64 << 10;
/// Small texts that wait for a thread.
const SMALL_WAITING_MAX: usize = 1024;
/// Large texts that wait for a thread; each is held in memory.
const LARGE_WAITING_MAX: usize = 16;
/// How long a text waits for a thread.
const WAIT_TIMEOUT: Duration = Duration::from_secs(20);

/// A bounded number of threads, and of jobs that wait for them.
struct Lane {
    running: Arc<Semaphore>,
    places: Semaphore,
    timeout: Duration,
}

static SMALL: LazyLock<Lane> =
    LazyLock::new(|| Lane::new((cores() / 2).max(2), SMALL_WAITING_MAX, WAIT_TIMEOUT));
static LARGE: LazyLock<Lane> =
    LazyLock::new(|| Lane::new((cores() / 4).max(1), LARGE_WAITING_MAX, WAIT_TIMEOUT));

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Runs `job`, which reads a text of about `bytes` bytes, on a thread that may block.
///
/// # Errors
/// The job's own, and "busy" where too many wait or none gets a thread in time.
pub async fn run<T: Send + 'static>(
    bytes: usize,
    job: impl FnOnce() -> Result<T, RequestError> + Send + 'static,
) -> Result<T, RequestError> {
    let lane = if bytes <= SMALL_BYTES_MAX { &*SMALL } else { &*LARGE };
    lane.run(job).await
}

impl Lane {
    fn new(threads: usize, waiting: usize, timeout: Duration) -> Self {
        let (running, places) = (Semaphore::new(threads), Semaphore::new(threads + waiting));
        Self { running: Arc::new(running), places, timeout }
    }

    async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> Result<T, RequestError> + Send + 'static,
    ) -> Result<T, RequestError> {
        let busy = || RequestError::busy("too many large requests are being read: try again");
        let _place = self.places.try_acquire().map_err(|_| busy())?;
        let thread = Arc::clone(&self.running).acquire_owned();
        let thread = tokio::time::timeout(self.timeout, thread).await;
        let thread = thread.map_err(|_| busy())?.map_err(|_| busy())?;
        let done = tokio::task::spawn_blocking(move || {
            // As long as the thread is in use, and not as long as somebody waits.
            let _thread = thread;
            job()
        });
        done.await.map_err(|_| {
            RequestError::ours("the request could not be read, because the server failed")
        })?
    }
}

/// How many bytes `value` has as JSON; counting ends once they are more than `most`.
pub fn weight(value: &impl serde::Serialize, most: usize) -> usize {
    let mut counter = Counter { bytes: 0, most };
    // The only failure is the counter's own, at which the count is large enough.
    let _ = serde_json::to_writer(&mut counter, value);
    counter.bytes
}

struct Counter {
    bytes: usize,
    most: usize,
}

impl Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes += bytes.len();
        if self.bytes > self.most {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::error::FaultKind;
    use super::*;
    use std::sync::mpsc::channel;

    #[tokio::test]
    async fn a_full_lane_is_busy_in_words_and_frees_itself() {
        let lane = Arc::new(Lane::new(1, 1, Duration::from_millis(100)));
        let (release, held) = channel::<()>();
        let (other, started) = (Arc::clone(&lane), Arc::new(Semaphore::new(0)));
        let starts = Arc::clone(&started);
        let running = tokio::spawn(async move {
            other
                .run(move || {
                    starts.add_permits(1);
                    held.recv().map_err(|e| RequestError::new(e.to_string()))
                })
                .await
        });
        let _ = started.acquire().await.unwrap();
        let other = Arc::clone(&lane);
        let waiting = tokio::spawn(async move { other.run(|| Ok(1)).await });
        tokio::task::yield_now().await;
        // One runs, one waits: a third has no place, and the one that waits is not kept for ever.
        let refused = lane.run(|| Ok(2)).await.unwrap_err();
        assert_eq!(refused.kind, FaultKind::Busy, "{refused}");
        assert_eq!(waiting.await.unwrap().unwrap_err().kind, FaultKind::Busy);
        release.send(()).unwrap();
        running.await.unwrap().unwrap();
        assert_eq!(lane.run(|| Ok(3)).await, Ok(3));
    }

    #[tokio::test]
    async fn a_job_that_panics_is_a_fault_of_ours() {
        let lane = Lane::new(1, 0, Duration::from_secs(1));
        let broken = lane.run::<()>(|| panic!("on purpose")).await.unwrap_err();
        assert_eq!(broken.kind, FaultKind::Ours);
        assert_eq!(lane.run(|| Ok(1)).await, Ok(1), "its thread is free again");
    }

    #[test]
    fn weights_are_counted_no_further_than_they_matter() {
        assert_eq!(weight(&"abc", SMALL_BYTES_MAX), 5);
        assert!(
            (SMALL_BYTES_MAX..SMALL_BYTES_MAX + (8 << 20))
                .contains(&weight(&"a".repeat(1 << 20), SMALL_BYTES_MAX))
        );
    }
}
