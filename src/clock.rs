//! Provides the clock as a parameter: the program reads it instead of the system clock, so that
//! tests control time.
//!
//! [`Clock::system`] reads the machine's clocks. [`Clock::manual`] changes only when a test changes
//! it. No other part of the program reads the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Tells the time to all who hold a copy.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    System { start: Instant },
    Manual { elapsed_ms: Arc<AtomicU64>, epoch_ms: Arc<AtomicU64> },
}

impl Clock {
    /// Tells the machine's time.
    pub fn system() -> Self {
        Self(Source::System { start: Instant::now() })
    }

    /// A clock that starts at `epoch_ms` (Unix time) and moves by [`advance`](Self::advance).
    pub fn manual(epoch_ms: u64) -> Self {
        let (elapsed_ms, epoch_ms) = (Arc::default(), Arc::new(AtomicU64::new(epoch_ms)));
        Self(Source::Manual { elapsed_ms, epoch_ms })
    }

    /// Time since the clock was made; never goes back.
    pub fn elapsed(&self) -> Duration {
        match &self.0 {
            Source::System { start } => start.elapsed(),
            Source::Manual { elapsed_ms, .. } => {
                Duration::from_millis(elapsed_ms.load(Ordering::SeqCst))
            }
        }
    }

    /// Milliseconds since 1970 (UTC).
    pub fn unix_ms(&self) -> u64 {
        match &self.0 {
            Source::System { .. } => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
            }
            Source::Manual { elapsed_ms, epoch_ms } => {
                epoch_ms.load(Ordering::SeqCst).wrapping_add(elapsed_ms.load(Ordering::SeqCst))
            }
        }
    }

    /// Moves a manual clock; a system clock moves by itself.
    pub fn advance(&self, by: Duration) {
        if let Source::Manual { elapsed_ms, .. } = &self.0 {
            elapsed_ms.fetch_add(by.as_millis() as u64, Ordering::SeqCst);
        }
    }

    /// Sets a manual clock's date, as an operator or a time server does: no time passes by it.
    pub fn set_unix_ms(&self, unix_ms: u64) {
        if let Source::Manual { elapsed_ms, epoch_ms } = &self.0 {
            let elapsed = elapsed_ms.load(Ordering::SeqCst);
            epoch_ms.store(unix_ms.wrapping_sub(elapsed), Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_moves_only_when_told() {
        let clock = Clock::manual(1_000);
        let twin = clock.clone();
        assert_eq!((twin.elapsed(), twin.unix_ms()), (Duration::ZERO, 1_000));
        clock.advance(Duration::from_millis(250));
        assert_eq!((twin.elapsed(), twin.unix_ms()), (Duration::from_millis(250), 1_250));
        clock.set_unix_ms(7);
        assert_eq!((twin.elapsed(), twin.unix_ms()), (Duration::from_millis(250), 7));
    }
}
