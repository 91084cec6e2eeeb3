//! Checks whether the block numbers of an endpoint are plausible: a chain grows with time and never
//! shrinks. Without this check, one number that is far too large would make the numbers of every
//! honest endpoint look old.

use super::error::ChainError;
use super::metagraph::Metagraph;
use crate::clock::Clock;
use parking_lot::Mutex;
use std::fmt::Display;
use std::time::Duration;

/// Blocks that may come at once: a connection that was away for some hours sees that many.
pub const JUMP_MAX: u64 = 1_000;
/// Blocks that a chain makes in a second, at most: finney makes one in twelve seconds, nodes of
/// one's own make them as fast as they like.
pub const BLOCKS_A_SECOND_MAX: u64 = 100;
/// Blocks that an endpoint may be behind the newest one that was believed.
pub const LAG_MAX: u64 = 300;
/// Readings of the metagraph at once, where its block is not believed: each asks another endpoint.
const READINGS_MAX: usize = 3;
/// After so long without a number that can be believed, the next one is: the one before was wrong.
pub const DOUBT_MAX: Duration = Duration::from_secs(600);

/// The newest block that was believed, and since when nothing is.
#[derive(Clone, Copy, Default, Debug)]
pub struct Pace {
    newest: Option<(u64, u64)>, // and when it came, in Unix ms
    doubted_ms: Option<u64>,
}

/// A block number that is not believed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Doubt {
    /// More blocks than time has passed for.
    #[error("block {block} is not believed: block {newest} came {seconds} s ago")]
    Ahead {
        /// The block number that the endpoint gave.
        block: u64,
        /// What was believed last.
        newest: u64,
        /// How long ago that was.
        seconds: u64,
    },
    /// Older than what is known.
    #[error("block {block} is not believed: block {known} is known already")]
    Behind {
        /// The block number that the endpoint gave.
        block: u64,
        /// What must at least be.
        known: u64,
    },
}

impl Pace {
    /// Whether the newest block can have this number.
    ///
    /// # Errors
    /// Why not.
    pub fn head(&mut self, block: u64, now_ms: u64) -> Result<(), Doubt> {
        let known = self.newest.map_or(0, |(newest, _)| newest.saturating_sub(LAG_MAX));
        self.check(block, known, now_ms)
    }

    /// Whether members can be those of this block, where those of block `before` are known.
    ///
    /// # Errors
    /// Why not.
    pub fn members(&mut self, block: u64, before: u64, now_ms: u64) -> Result<(), Doubt> {
        let newest = self.newest.map_or(0, |(newest, _)| newest);
        // Where those before came with a number that is not believed any more, they do not count.
        let known = if before <= newest { before } else { newest.saturating_sub(LAG_MAX) };
        self.check(block, known, now_ms)
    }

    fn check(&mut self, block: u64, known: u64, now_ms: u64) -> Result<(), Doubt> {
        let doubt = self.doubt(block, known, now_ms);
        let Some(doubt) = doubt else {
            let newest = self.newest.filter(|(newest, _)| *newest >= block);
            (self.newest, self.doubted_ms) = (newest.or(Some((block, now_ms))), None);
            return Ok(());
        };
        let since = *self.doubted_ms.get_or_insert(now_ms);
        if Duration::from_millis(now_ms.saturating_sub(since)) < DOUBT_MAX {
            return Err(doubt);
        }
        tracing::warn!(
            block,
            "{doubt}; accepted after all, because no other block number arrived for a long time"
        );
        (self.newest, self.doubted_ms) = (Some((block, now_ms)), None);
        Ok(())
    }

    fn doubt(&self, block: u64, known: u64, now_ms: u64) -> Option<Doubt> {
        let (newest, at_ms) = self.newest?;
        let seconds = now_ms.saturating_sub(at_ms) / 1000;
        let most = newest.saturating_add(JUMP_MAX + BLOCKS_A_SECOND_MAX.saturating_mul(seconds));
        match block {
            _ if block > most => Some(Doubt::Ahead { block, newest, seconds }),
            _ if block < known => Some(Doubt::Behind { block, known }),
            _ => None,
        }
    }
}

/// Reads a metagraph that is believed where the members of block `before` are known: what is
/// doubted is asked again, after `doubt` has made the next answer another endpoint's.
///
/// # Errors
/// When the chain cannot be asked, or `READINGS_MAX` answers in turn are not believed.
pub async fn read_metagraph<E, Asked, Doubted>(
    pace: &Mutex<Pace>,
    (before, clock): (u64, &Clock),
    ask: impl Fn() -> Asked,
    doubt: impl Fn() -> Doubted,
) -> Result<Metagraph, E>
where
    E: From<ChainError> + From<Doubt>,
    Asked: Future<Output = Result<Metagraph, ChainError>>,
    Doubted: Future<Output = ()>,
{
    let mut reading = 1;
    loop {
        let metagraph = ask().await?;
        let checked = pace.lock().members(metagraph.block, before, clock.unix_ms());
        let Err(why) = checked else { return Ok(metagraph) };
        if reading == READINGS_MAX {
            return Err(why.into());
        }
        tracing::warn!("{why}; asking another endpoint");
        doubt().await;
        reading += 1;
    }
}

/// What `ask` says, at a start. What does not pass by itself would end the caller, so another
/// endpoint must say it as well, where there is one: `doubt` makes the next answer that endpoint's.
///
/// # Errors
/// What the last answer says.
pub async fn confirm<T, E: Display, Asked: Future<Output = Result<T, E>>>(
    ask: impl Fn() -> Asked,
    is_passing: impl Fn(&E) -> bool,
    doubt: impl Future<Output = ()>,
) -> Result<T, E> {
    match ask().await {
        Err(e) if !is_passing(&e) => {
            tracing::warn!("{e}; asking another endpoint");
            doubt.await;
            ask().await
        }
        answered => answered,
    }
}

#[cfg(test)]
mod tests {
    use super::super::metagraph::Hyperparameters;
    use super::*;
    use std::cell::Cell;

    #[derive(Debug, PartialEq, thiserror::Error)]
    enum Fault {
        #[error(transparent)]
        Doubted(#[from] Doubt),
        #[error(transparent)]
        Chain(#[from] ChainError),
    }

    #[tokio::test]
    async fn only_what_does_not_pass_is_confirmed_by_another_endpoint() {
        let told = async |answers: [Result<u8, u8>; 2]| {
            let (asked, doubted) = (Cell::new(0), Cell::new(0));
            let ask = || async {
                asked.set(asked.get() + 1);
                answers[asked.get() - 1]
            };
            let doubt = async { doubted.set(doubted.get() + 1) };
            let said = confirm(ask, |e| *e < 10, doubt).await;
            (said, asked.get(), doubted.get())
        };
        assert_eq!(told([Ok(1), Ok(2)]).await, (Ok(1), 1, 0));
        assert_eq!(told([Err(3), Ok(2)]).await, (Err(3), 1, 0));
        assert_eq!(told([Err(30), Ok(2)]).await, (Ok(2), 2, 1));
        assert_eq!(told([Err(30), Err(31)]).await, (Err(31), 2, 1));
    }

    #[tokio::test]
    async fn what_is_doubted_is_asked_of_other_endpoints_and_given_up_after_three() {
        let clock = Clock::manual(0);
        let read = async |blocks: [u64; 3]| {
            let (pace, endpoint) = (Mutex::new(Pace::default()), Cell::new(0));
            pace.lock().head(1000, 0).unwrap();
            let ask = async || {
                let block = blocks[endpoint.get()];
                Ok(Metagraph::new(4, block, Hyperparameters::default(), Vec::new()))
            };
            let doubt = async || endpoint.set(endpoint.get() + 1);
            let read = read_metagraph::<Fault, _, _>(&pace, (999, &clock), ask, doubt).await;
            (read.map(|metagraph| metagraph.block), endpoint.get())
        };
        assert_eq!(read([999, 0, 0]).await, (Ok(999), 0));
        assert_eq!(read([998, u64::MAX, 1001]).await, (Ok(1001), 2));
        let last = Doubt::Behind { block: 7, known: 999 };
        assert_eq!(read([998, u64::MAX, 7]).await, (Err(Fault::Doubted(last)), 2));
    }

    const MINUTE: u64 = 60_000;

    #[test]
    fn numbers_grow_with_time_and_never_by_leaps() {
        let mut pace = Pace::default();
        assert_eq!(pace.head(9_000_000, 0), Ok(()));
        assert_eq!(pace.head(9_001_000, 0), Ok(()));
        let leap = Doubt::Ahead { block: 1 << 60, newest: 9_001_000, seconds: 12 };
        assert_eq!(pace.head(1 << 60, 12_000), Err(leap));
        assert_eq!(
            pace.head(u64::MAX, 12_000).unwrap_err().to_string(),
            "block 18446744073709551615 is not believed: block 9001000 came 12 s ago"
        );
        // Another endpoint says what is right, some blocks behind or ahead.
        assert_eq!(pace.head(9_000_700, 12_000), Ok(()));
        assert_eq!(pace.head(9_001_001, 12_000), Ok(()));
        assert_eq!(
            pace.head(9_000_699, 12_000),
            Err(Doubt::Behind { block: 9_000_699, known: 9_000_701 })
        );
        // A day without a connection.
        assert_eq!(pace.head(9_008_201, 24 * 60 * MINUTE), Ok(()));
    }

    #[test]
    fn members_are_never_older_than_those_that_are_known() {
        let mut pace = Pace::default();
        assert_eq!(pace.head(100, 0), Ok(()));
        assert_eq!(pace.members(98, 0, 0), Ok(()));
        assert_eq!(pace.members(97, 98, 0), Err(Doubt::Behind { block: 97, known: 98 }));
        assert_eq!(pace.members(99, 98, 0), Ok(()));
    }

    #[test]
    fn a_first_word_that_was_wrong_is_given_up_in_time() {
        let mut pace = Pace::default();
        assert_eq!(pace.members(1 << 60, 0, 0), Ok(()));
        let mut believed_at = None;
        for minute in 1..30 {
            if pace.head(9_000_000 + minute * 5, minute * MINUTE).is_ok() {
                believed_at = Some(minute);
                break;
            }
        }
        assert_eq!(believed_at, Some(11));
        assert_eq!(pace.members(9_000_054, 1 << 60, 11 * MINUTE), Ok(()));
        // A number that is believed ends the doubt.
        assert!(pace.head(1 << 60, 12 * MINUTE).is_err());
        assert_eq!(pace.head(9_000_060, 21 * MINUTE), Ok(()));
        assert!(pace.head(1 << 60, 22 * MINUTE).is_err());
    }
}
