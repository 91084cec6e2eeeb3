//! Draws tokens by noise-synced sampling: a token is a function of its logits, the request, and a
//! key.
//!
//! The winner is `argmax_v(logit_v / T + g_v)` over the survivors of min-p, top-k and top-p, with
//! Gumbel noise g from Philox keyed by `(noise_key, position)`; the lowest id wins ties; at T = 0
//! there is no noise. Nothing depends on the batch, on earlier draws or on a generator's state, so
//! a verifier that knows the key can replay every draw.
//!
//! The noise itself, and the race over a whole vocabulary, are in [`crate::ops::gumbel`].

use crate::ops::gumbel::{gumbel, race};
use crate::ops::lanes::Isa;
use crate::ops::logits::{LogSumExp, argmax, top_k};
use crate::ops::math::exp64;
use std::cell::OnceCell;

/// Temperatures below this are greedy.
pub const TEMPERATURE_MIN: f32 = 1e-5;
/// Candidates that are sorted before truncation looks further.
const CANDIDATES: usize = 256;

/// How tokens are drawn.
#[derive(Clone, PartialEq, Debug)]
pub struct Sampling {
    /// Divides the logits; below 1e-5 the largest logit wins.
    pub temperature: f32,
    /// Keeps the k largest; 0 keeps all.
    pub top_k: usize,
    /// Keeps the smallest set with this much probability.
    pub top_p: f32,
    /// Drops tokens less probable than this share of the most probable one.
    pub min_p: f32,
    /// Drops tokens less probable than this times the square of the largest probability.
    pub top_a: f32,
    /// Divides positive and multiplies negative logits of tokens seen anywhere.
    pub repetition_penalty: f32,
    /// Subtracted once for tokens generated before.
    pub presence_penalty: f32,
    /// Subtracted for each time a token was generated.
    pub frequency_penalty: f32,
    /// Added to single logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the Gumbel noise; with the position it decides every draw.
    pub noise_key: u64,
}

impl Sampling {
    /// The largest logit wins.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            top_a: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            noise_key: 0,
        }
    }

    /// Whether there is no noise.
    pub fn is_greedy(&self) -> bool {
        self.temperature < TEMPERATURE_MIN
    }

    /// The temperature that log-probabilities are scaled with: 1 where there is no noise.
    pub fn logprob_temperature(&self) -> f32 {
        if self.is_greedy() { 1.0 } else { self.temperature }
    }

    /// Whether improbable tokens are dropped for being so.
    fn has_floor(&self) -> bool {
        self.min_p > 0.0 || self.top_a > 0.0
    }

    /// Whether tokens that were seen count less.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }
}

/// A row of logits as a token is drawn from it: after bias, bans, penalties and grammar.
pub struct Distribution<'a> {
    isa: Isa,
    row: &'a [f32],
    temperature: f32,
    sum: OnceCell<LogSumExp>, // at this temperature, computed at most once
}

impl<'a> Distribution<'a> {
    /// Of `row`; `sampling` gives the temperature.
    pub fn new(isa: Isa, row: &'a [f32], sampling: &Sampling) -> Self {
        Self { isa, row, temperature: sampling.logprob_temperature(), sum: OnceCell::new() }
    }

    /// The same where the row's sum at this temperature is known.
    pub fn with_sum(self, sum: LogSumExp) -> Self {
        Self { sum: OnceCell::from(sum), ..self }
    }

    /// The row of logits that tokens are drawn from.
    pub fn row(&self) -> &'a [f32] {
        self.row
    }

    /// What log-probabilities at the temperature follow from.
    pub fn sum(&self) -> &LogSumExp {
        self.sum.get_or_init(|| LogSumExp::new(self.isa, self.row, self.temperature))
    }

    /// Draws the token of the row at `position`.
    pub fn draw(&self, sampling: &Sampling, position: u32) -> u32 {
        if sampling.is_greedy() {
            return argmax(self.isa, self.row);
        }
        let inverse = 1.0 / f64::from(sampling.temperature);
        match self.survivors(sampling) {
            Some(kept) => {
                let noisy = kept.into_iter().map(|(id, logit)| {
                    (id, f64::from(logit) * inverse + gumbel(sampling.noise_key, position, id))
                });
                winner(noisy)
            }
            None => race(self.isa, self.row, inverse, sampling.noise_key, position),
        }
    }

    /// What min-p with top-a, top-k and top-p leave, in this order; `None` when nothing truncates.
    pub fn survivors(&self, sampling: &Sampling) -> Option<Vec<(u32, f32)>> {
        let (isa, row) = (self.isa, self.row);
        let top_k_active = sampling.top_k > 0 && sampling.top_k < row.len();
        if !top_k_active && sampling.top_p >= 1.0 && !sampling.has_floor() {
            return None;
        }
        let limit = if top_k_active { sampling.top_k } else { row.len() };
        let mut count = CANDIDATES.min(limit);
        loop {
            let sorted = largest(isa, row, count);
            if let Some(kept) = self.truncate(sampling, &sorted, sorted.len() == limit) {
                return Some(kept);
            }
            count = (count * 8).min(limit);
        }
    }

    /// Truncates the sorted candidates; `None` when more of them are needed to know.
    fn truncate(
        &self,
        sampling: &Sampling,
        sorted: &[(u32, f32)],
        complete: bool,
    ) -> Option<Vec<(u32, f32)>> {
        let temperature = f64::from(sampling.temperature);
        let max = sorted.first()?.1;
        let weight = |logit: f32| exp64(f64::from(logit - max) / temperature);
        let mut kept = sorted;
        let largest = || exp64(self.sum().logprob(max));
        if sampling.has_floor() {
            let floor = match sampling.top_a > 0.0 {
                true => f64::from(sampling.min_p).max(f64::from(sampling.top_a) * largest()),
                false => f64::from(sampling.min_p),
            };
            let end = kept.partition_point(|(_, x)| weight(*x) >= floor);
            if end == kept.len() && !complete {
                return None;
            }
            kept = &kept[..end.max(1)];
        }
        if sampling.top_p < 1.0 {
            // What is known to be the whole set is summed; else the row's own sum counts.
            let whole = complete && sampling.top_k > 0 || kept.len() < sorted.len();
            let total = match whole {
                true => kept.iter().map(|(_, x)| weight(*x)).sum::<f64>(),
                false => 1.0 / largest(),
            };
            let mut sum = 0.0;
            let crossing = kept.iter().position(|(_, x)| {
                sum += weight(*x);
                sum >= f64::from(sampling.top_p) * total
            });
            match crossing {
                Some(last) => kept = &kept[..=last],
                None if !complete => return None,
                None => {}
            }
        } else if !complete && !sampling.has_floor() {
            return None;
        }
        Some(kept.to_vec())
    }
}

/// Largest value, lowest id among equals.
fn winner(candidates: impl Iterator<Item = (u32, f64)>) -> u32 {
    let better = |a: (u32, f64), b: (u32, f64)| b.1 > a.1 || (b.1 == a.1 && b.0 < a.0);
    let best = candidates.reduce(|a, b| if better(a, b) { b } else { a });
    best.map_or(0, |(id, _)| id)
}

/// The `count` largest logits in order.
fn largest(isa: Isa, row: &[f32], count: usize) -> Vec<(u32, f32)> {
    if count <= CANDIDATES {
        return top_k(isa, row, count);
    }
    let mut all: Vec<(u32, f32)> = row.iter().enumerate().map(|(i, x)| (i as u32, *x)).collect();
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if count < all.len() {
        all.select_nth_unstable_by(count, order);
        all.truncate(count);
    }
    all.sort_unstable_by(order);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn row(n: usize, spread: f32, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state as f32 / u32::MAX as f32) * spread
            })
            .collect()
    }

    fn sampling(temperature: f32, key: u64) -> Sampling {
        Sampling { temperature, noise_key: key, ..Sampling::greedy() }
    }

    fn sample(isa: Isa, row: &[f32], sampling: &Sampling, position: u32) -> u32 {
        Distribution::new(isa, row, sampling).draw(sampling, position)
    }

    fn survivors(isa: Isa, row: &[f32], sampling: &Sampling) -> Option<Vec<(u32, f32)>> {
        Distribution::new(isa, row, sampling).survivors(sampling)
    }

    /// The definition, word for word.
    fn naive(row: &[f32], sampling: &Sampling, position: u32) -> u32 {
        let inverse = 1.0 / f64::from(sampling.temperature);
        winner(row.iter().enumerate().map(|(id, x)| {
            let id = id as u32;
            (id, f64::from(*x) * inverse + gumbel(sampling.noise_key, position, id))
        }))
    }

    #[test]
    fn the_pruned_race_equals_the_definition_on_every_instruction_set() {
        for (n, spread) in [(5, 1.0), (64, 0.0), (1_000, 8.0), (3_001, 40.0)] {
            for key in 0..20 {
                let x = row(n, spread, key as u32 + 1);
                let s = sampling(0.7, key);
                let want = naive(&x, &s, key as u32 * 3);
                for isa in Isa::available() {
                    assert_eq!(sample(isa, &x, &s, key as u32 * 3), want, "{isa} {n} {key}");
                }
            }
        }
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let x = [1.0, 0.0, 2.0, -1.0, 0.5];
        let total: f64 = x.iter().map(|v| (f64::from(*v) / 0.8).exp()).sum();
        let draws = 40_000;
        let mut counts = [0; 5];
        for key in 0..draws {
            counts[sample(Isa::best(), &x, &sampling(0.8, key), 11) as usize] += 1;
        }
        for (v, count) in x.iter().zip(counts) {
            let p = (f64::from(*v) / 0.8).exp() / total;
            let deviation =
                (f64::from(count) / draws as f64 - p) / (p * (1.0 - p) / draws as f64).sqrt();
            assert!(deviation.abs() < 4.5, "{counts:?}: {v} off by {deviation} sigma");
        }
    }

    #[test]
    fn truncation_keeps_what_it_should() {
        let x = [3.0_f32, 2.0, 1.0, 0.0];
        let p: Vec<f32> = x.iter().map(|v| (v - 3.0).exp()).collect();
        let z: f32 = p.iter().sum();
        let ids = |s: &Sampling| -> Vec<u32> {
            survivors(Isa::best(), &x, s).unwrap().into_iter().map(|(id, _)| id).collect()
        };
        let base = sampling(1.0, 0);
        assert_eq!(survivors(Isa::best(), &x, &base), None);
        assert_eq!(ids(&Sampling { top_k: 2, ..base.clone() }), [0, 1]);
        assert_eq!(ids(&Sampling { top_p: 0.5, ..base.clone() }), [0]);
        assert_eq!(ids(&Sampling { top_p: (p[0] + p[1]) / z + 1e-3, ..base.clone() }), [0, 1, 2]);
        assert_eq!(ids(&Sampling { min_p: 0.2, ..base.clone() }), [0, 1]);
        // The largest probability is 0.64: of 0.24, 0.09 and 0.03, what exceeds 0.2 * 0.41.
        assert_eq!(ids(&Sampling { top_a: 0.2, ..base.clone() }), [0, 1, 2]);
        assert_eq!(ids(&Sampling { top_a: 0.25, ..base.clone() }), [0, 1]);
        // top-p counts within what top-k left: 0.73 of the two.
        assert_eq!(ids(&Sampling { top_k: 2, top_p: 0.72, ..base.clone() }), [0]);
        assert_eq!(ids(&Sampling { top_k: 2, top_p: 0.74, ..base.clone() }), [0, 1]);
    }

    #[test]
    fn flat_rows_need_more_candidates_than_the_first_few() {
        let x = row(5_000, 0.01, 3);
        let kept =
            survivors(Isa::best(), &x, &Sampling { top_p: 0.5, ..sampling(1.0, 0) }).unwrap();
        assert!((2_400..2_600).contains(&kept.len()), "{}", kept.len());
        let kept =
            survivors(Isa::best(), &x, &Sampling { min_p: 0.995, ..sampling(1.0, 0) }).unwrap();
        assert!((2_300..2_700).contains(&kept.len()), "{}", kept.len());
        let kept =
            survivors(Isa::best(), &x, &Sampling { top_k: 700, ..sampling(1.0, 0) }).unwrap();
        assert_eq!(kept.len(), 700);
    }

    proptest! {
        #[test]
        fn truncated_draws_are_survivors(
            logits in proptest::collection::vec(-20.0_f32..20.0, 1..400),
            top_k in 0..50_usize, top_p in 0.01_f32..1.0, min_p in 0.0_f32..0.9, key: u64,
        ) {
            let s = Sampling { top_k, top_p, min_p, top_a: min_p / 2.0, ..sampling(1.3, key) };
            let kept = survivors(Isa::best(), &logits, &s).unwrap();
            let token = sample(Isa::best(), &logits, &s, 5);
            prop_assert!(kept.iter().any(|(id, _)| *id == token));
            prop_assert!(top_k == 0 || kept.len() <= top_k);
        }
    }
}
