//! Decides how long records are kept.

use crate::clock::Clock;
use crate::store::{Removed, Retention, Store};
use anyhow::bail;
use std::time::Duration;

/// What the machine's clock may differ from the time that has passed. With more it was set, and
/// says nothing about the age of records.
const DRIFT_MAX: Duration = Duration::from_secs(3600);

/// How long each kind of record is kept; for ever if absent.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Keeping {
    /// Rounds with their verdicts.
    pub rounds: Option<Duration>,
    /// The newest rounds, so many.
    pub rounds_max: Option<u32>,
    /// Requests and answers.
    pub captures: Option<Duration>,
    /// The evidence of checks.
    pub reports: Option<Duration>,
    /// Samples of each miner and model.
    pub samples_max: Option<u32>,
}

/// Deletes old records, by a clock that is compared with elapsed time.
pub struct Keeper {
    keeping: Keeping,
    clock: Clock,
    /// Its Unix time and its elapsed time, at one moment.
    started: (u64, Duration),
}

impl Keeper {
    /// Counts ages by this clock from now on.
    pub fn new(keeping: Keeping, clock: Clock) -> Self {
        let started = (clock.unix_ms(), clock.elapsed());
        Self { keeping, clock, started }
    }

    /// The limits at this moment.
    ///
    /// # Errors
    /// When the clock was set: records that look old may be new.
    pub fn retention(&self) -> anyhow::Result<Retention> {
        let now = self.clock.unix_ms();
        let (unix_ms, elapsed) = self.started;
        let passed = self.clock.elapsed().saturating_sub(elapsed);
        let expected = unix_ms.saturating_add(passed.as_millis() as u64);
        let drift = Duration::from_millis(now.abs_diff(expected));
        if drift > DRIFT_MAX {
            let seconds = drift.as_secs();
            bail!("the machine's clock was moved by {seconds} s since the start");
        }
        let before = |age: Option<Duration>| {
            age.map(|age| now.saturating_sub(u64::try_from(age.as_millis()).unwrap_or(u64::MAX)))
        };
        let Keeping { rounds, rounds_max, captures, reports, samples_max } = self.keeping;
        Ok(Retention {
            rounds_before_ms: before(rounds),
            rounds_max,
            captures_before_ms: before(captures),
            reports_before_ms: before(reports),
            samples_max,
        })
    }

    /// Deletes what is too old.
    ///
    /// # Errors
    /// When the clock was set, or the records cannot be written.
    pub async fn tidy(&self, store: &Store) -> anyhow::Result<Removed> {
        Ok(store.retain(&self.retention()?).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 86_400_000;

    #[test]
    fn ages_become_times_and_none_stays() {
        let clock = Clock::manual(100 * DAY);
        let days = |n: u64| Some(Duration::from_secs(n * 86_400));
        let keeping = Keeping {
            rounds: days(30),
            captures: days(7),
            samples_max: Some(9),
            ..Keeping::default()
        };
        let keeper = Keeper::new(keeping, clock.clone());
        clock.advance(Duration::from_millis(DAY));
        let expected = Retention {
            rounds_before_ms: Some(71 * DAY),
            captures_before_ms: Some(94 * DAY),
            samples_max: Some(9),
            ..Retention::default()
        };
        assert_eq!(keeper.retention().unwrap(), expected);
    }

    #[test]
    fn a_clock_that_was_moved_forgets_nothing() {
        let clock = Clock::manual(100 * DAY);
        let keeper = Keeper {
            started: (30 * DAY, Duration::ZERO),
            ..Keeper::new(
                Keeping { rounds: Some(Duration::from_secs(1)), ..Keeping::default() },
                clock,
            )
        };
        let error = keeper.retention().unwrap_err().to_string();
        assert_eq!(error, "the machine's clock was moved by 6048000 s since the start");
    }
}
