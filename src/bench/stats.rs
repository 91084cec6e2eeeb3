//! Computes statistics of measurements: shares with exact intervals, quantiles and stopping times.
//! It also has a fixed generator for orders and choices, so that two runs choose alike.

use crate::ops::philox::philox;
use crate::verify::bounds::interval;
use serde::Serialize;

/// A share of all with its exact (Clopper-Pearson) interval of 95 %.
#[derive(Clone, Copy, PartialEq, Serialize, Debug)]
pub struct Rate {
    /// Events that were counted.
    pub count: usize,
    /// Trials among which they were counted.
    pub of: usize,
    /// The true share is hardly below this.
    pub low: f64,
    /// The true share is hardly above this.
    pub high: f64,
}

impl Rate {
    /// A share: `count` events among `of`.
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
    /// Shows answers of these `lengths` in random orders to a rule, each time to a new one of
    /// `rule`, which takes the number of an answer and says at which of its tokens it speaks,
    /// counted from 1.
    pub fn new<R>(lengths: &[usize], rule: impl Fn() -> R) -> Self
    where
        R: FnMut(usize) -> Option<usize>,
    {
        let mut order: Vec<usize> = (0..lengths.len()).collect();
        let stop = |seed| {
            shuffle(&mut order, seed);
            let (mut rule, mut before) = (rule(), 0);
            for answer in &order {
                if let Some(token) = rule(*answer) {
                    return before + token;
                }
                before += lengths[*answer];
            }
            usize::MAX
        };
        let mut stops: Vec<usize> = (0..ORDERS).map(stop).collect();
        stops.sort_unstable();
        let at = |q| quantile(&stops, q).filter(|tokens| *tokens < usize::MAX);
        let by =
            |tokens: usize| stops.partition_point(|s| *s <= tokens) as f64 / stops.len() as f64;
        let total: usize = lengths.iter().sum();
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
    fn a_rule_is_timed_in_tokens_over_orders_of_answers() {
        let lengths = [10, 20, 30];
        // The longest answer shows it at its fourth token: 10 and 20 come before it, or not.
        let stopping = Stopping::new(&lengths, || |answer| (answer == 2).then_some(4));
        let at = |tokens: usize| {
            let known = stopping.curve.iter().rev().find(|(t, _)| *t <= tokens);
            known.map_or(0.0, |(_, share)| *share)
        };
        assert_eq!((at(3), at(60)), (0.0, 1.0));
        assert!((at(13) - 1.0 / 3.0).abs() < 0.1, "{:?}", stopping.curve);
        assert_eq!(stopping.p95, Some(34));
        let second = Stopping::new(&lengths, || {
            let mut seen = 0;
            move |_| {
                seen += 1;
                (seen == 2).then_some(1)
            }
        });
        assert_eq!((second.median, second.p95), (Some(21), Some(31)));
        let never = Stopping::new(&lengths, || |_| None);
        assert_eq!((never.median, never.p95), (None, None));
        assert!(never.curve.iter().all(|(_, share)| *share == 0.0) && never.curve.len() > 10);
    }
}
