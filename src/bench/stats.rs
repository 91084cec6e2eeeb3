//! Statistics of measurements: shares with exact intervals, quantiles, sequential tests, and a
//! fixed generator for orders and choices.

use crate::proof::philox::philox;
use crate::verify::bounds::interval;
use serde::Serialize;

/// A share of all with its exact (Clopper-Pearson) interval of 95 %.
#[derive(Clone, Copy, PartialEq, Serialize, Debug)]
pub struct Rate {
    /// How many.
    pub count: usize,
    /// Of how many.
    pub of: usize,
    /// The true share is hardly below this.
    pub low: f64,
    /// Nor above this.
    pub high: f64,
}

impl Rate {
    /// `count` of `of`.
    pub fn new(count: usize, of: usize) -> Self {
        let (low, high) = interval(count, of);
        Self { count, of, low, high }
    }

    /// The members of `all` that are `chosen`.
    pub fn of<T>(all: &[T], chosen: impl Fn(&T) -> bool) -> Self {
        Self::new(all.iter().filter(|x| chosen(x)).count(), all.len())
    }

    /// The share itself; nothing of nothing is 0.
    pub fn share(&self) -> f64 {
        self.count as f64 / self.of.max(1) as f64
    }
}

/// The value below which a share `q` of the sorted values lies; `None` where there are none.
pub fn quantile<T: Copy>(sorted: &[T], q: f64) -> Option<T> {
    let last = sorted.len().checked_sub(1)?;
    sorted.get(((last as f64 * q).round() as usize).min(last)).copied()
}

/// The value in the middle, or the mean of the two there: a noisy neighbour moves it least.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = sorted.get(sorted.len() / 2)?;
    Some((sorted[(sorted.len() - 1) / 2] + upper) / 2.0)
}

/// Shuffles (Fisher and Yates) by a seed.
pub fn shuffle<T>(items: &mut [T], seed: u64) {
    for i in (1..items.len()).rev() {
        items.swap(i, choice(seed, i as u32, i + 1));
    }
}

/// A number below `limit` that follows from a seed and a counter.
pub fn choice(seed: u64, counter: u32, limit: usize) -> usize {
    let word = philox(seed, [counter, 0, 0, 0x6265_6e63])[0];
    ((u64::from(word) * limit as u64) >> 32) as usize
}

/// Likelihood ratio at which a sequential test speaks: an honest miner ever gets there with a
/// probability of at most one in a thousand.
pub const ALARM: f64 = 1e3;
/// Share of tokens of honest miners on other stacks that are not the ones the verifier draws, and
/// their mean margin (clipped at one): 1.7 to 2.5 % and 0.0009 to 0.0013 were measured between bf16
/// stacks and this engine on SmolLM2-135M.
pub const HONEST_MISMATCH: f64 = 0.025;
/// See [`HONEST_MISMATCH`].
pub const HONEST_MARGIN: f64 = 0.002;
/// Mismatch rates that a cheat may have.
const CHEAT_MISMATCH: [f64; 4] = [0.05, 0.1, 0.2, 0.4];
/// What is staked on each token's margin being above the honest mean.
const STAKES: [f64; 4] = [4.0, 16.0, 64.0, 256.0];

/// Evidence against a sampler, token by token: the mean of likelihood ratios of mismatches
/// (Bernoulli, several alternatives) and of wealths won by betting on margins (Waudby-Smith and
/// Ramdas, 2024). Under honest rates its expectation never exceeds one, at whatever token it is
/// looked at.
#[derive(Clone, Debug)]
pub struct Evidence([f64; 8]);

impl Default for Evidence {
    fn default() -> Self {
        Self([1.0; 8])
    }
}

impl Evidence {
    /// Takes the next token's margin and returns the ratio so far.
    pub fn push(&mut self, margin: f64) -> f64 {
        let (mismatches, margins) = self.0.split_at_mut(4);
        for (ratio, cheat) in mismatches.iter_mut().zip(CHEAT_MISMATCH) {
            *ratio *= match margin > 0.0 {
                true => cheat / HONEST_MISMATCH,
                false => (1.0 - cheat) / (1.0 - HONEST_MISMATCH),
            };
        }
        for (wealth, stake) in margins.iter_mut().zip(STAKES) {
            *wealth *= 1.0 + stake * (margin.min(1.0) - HONEST_MARGIN);
        }
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }
}

/// Random orders of the answers that are tried.
const ORDERS: u64 = 500;

/// When a rule speaks, over random orders of answers.
#[derive(Clone, Default, Serialize, Debug)]
pub struct Stopping {
    /// Tokens in half of the orders; `None` where the answers end before.
    pub median: Option<usize>,
    /// In 95 % of them.
    pub p95: Option<usize>,
    /// Tokens and share of the orders in which the rule has spoken by then.
    pub curve: Vec<(usize, f64)>,
}

impl Stopping {
    /// Feeds the margins of answers to a rule in random orders, each time to a new one of `rule`.
    pub fn new<R: FnMut(f64) -> bool>(answers: &[Vec<f64>], rule: impl Fn() -> R) -> Self {
        let mut order: Vec<usize> = (0..answers.len()).collect();
        let stop = |seed| {
            shuffle(&mut order, seed);
            let mut margins = order.iter().flat_map(|i| &answers[*i]).copied();
            margins.position(rule()).map_or(usize::MAX, |at| at + 1)
        };
        let mut stops: Vec<usize> = (0..ORDERS).map(stop).collect();
        stops.sort_unstable();
        let at = |q| quantile(&stops, q).filter(|tokens| *tokens < usize::MAX);
        let by =
            |tokens: usize| stops.partition_point(|s| *s <= tokens) as f64 / stops.len() as f64;
        let total: usize = answers.iter().map(Vec::len).sum();
        let grid = std::iter::successors(Some(1_usize), |t| Some((t * 5 / 4).max(t + 1)));
        let curve = grid.take_while(|t| *t <= total).map(|t| (t, by(t))).collect();
        Self { median: at(0.5), p95: at(0.95), curve }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_and_orders_are_what_they_say() {
        assert_eq!(quantile(&[1, 2, 3, 4, 5], 0.5), Some(3));
        assert_eq!(quantile(&[1, 2, 3, 4, 5], 0.95), Some(5));
        assert_eq!(quantile::<u8>(&[], 0.5), None);
        assert_eq!((median(&[3.0, 1.0, 2.0, 10.0]), median(&[])), (Some(2.5), None));
        let mut order: Vec<u32> = (0..100).collect();
        shuffle(&mut order, 1);
        assert!(order.iter().enumerate().any(|(i, x)| i as u32 != *x));
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<u32>>());
    }

    #[test]
    fn an_honest_sampler_rarely_alarms_and_a_cheat_soon_does() {
        // A stream in which one token in `every` misses by `margin`, at random places.
        let stream = |every: usize, margin: f64, seed: u64| {
            (0..2_000_u32).map(move |i| if choice(seed, i, every) == 0 { margin } else { 0.0 })
        };
        let alarms = |every, margin| {
            let ever = |seed: &u64| {
                let mut evidence = Evidence::default();
                stream(every, margin, *seed).any(|m| evidence.push(m) >= ALARM)
            };
            (0..200).filter(ever).count()
        };
        assert!(alarms(50, 0.05) <= 1);
        assert_eq!(alarms(5, 0.2), 200);
        let wrong_seed = vec![vec![0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]; 10];
        let rule = || {
            let mut evidence = Evidence::default();
            move |m: f64| evidence.push(m) >= ALARM
        };
        let stopping = Stopping::new(&wrong_seed, rule);
        assert_eq!(stopping.median, stopping.p95);
        assert!(stopping.median.is_some_and(|t| (2..8).contains(&t)), "{:?}", stopping.median);
        let honest = Stopping::new(&vec![vec![0.0; 50]; 4], rule);
        assert_eq!((honest.median, honest.p95), (None, None));
        assert!(honest.curve.iter().all(|(_, share)| *share == 0.0) && honest.curve.len() > 10);
    }
}
