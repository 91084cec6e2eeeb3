//! What one request of a stranger may cost this process.

use std::time::Duration;
use targon_engine::clock::Clock;

/// Time, on busy cores without optimised code.
const TIME_MAX: Duration = Duration::from_secs(10);
/// Resident memory that stays, or was reached and given back within one sample.
const RESIDENT_BYTES_MAX: usize = 256 << 20;
/// Threads, those of the blocking pool included.
const THREADS_MAX: usize = 64;

/// The process before a request.
pub struct Budget {
    clock: Clock,
    resident: usize,
}

impl Budget {
    pub fn start() -> Self {
        Self { clock: Clock::system(), resident: resident_bytes() }
    }

    /// Fails where what has happened since the start was too dear; `what` names it.
    #[track_caller]
    pub fn check(self, what: &str) {
        let (time, threads) = (self.clock.elapsed(), threads());
        assert!(time <= TIME_MAX, "{what}: took {time:?}, at most {TIME_MAX:?}");
        let grown = resident_bytes().saturating_sub(self.resident);
        assert!(
            grown <= RESIDENT_BYTES_MAX,
            "{what}: {grown} bytes more, at most {RESIDENT_BYTES_MAX}"
        );
        assert!(threads <= THREADS_MAX, "{what}: {threads} threads, at most {THREADS_MAX}");
    }
}

/// Resident memory of this process.
pub fn resident_bytes() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// Threads of this process.
fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}
