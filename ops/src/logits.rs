//! Reduces one row of logits: log-sum-exp, arg-max, rank and top-k, without a softmax buffer.
//!
//! Ties go to the lowest token id. A NaN or an infinite logit makes the log-sum-exp NaN, which is
//! how a broken row is noticed.

use super::lanes::{Isa, Kernel, LANES, Lanes, dispatch};
use super::math;

/// Exponentials summed in f32 lanes before they join the f64 sum.
const CHUNK: usize = 32 * LANES;

/// `ln sum exp(x / temperature)` of a row, as the pieces that log-probabilities need.
#[derive(Clone, Copy, Debug)]
pub struct LogSumExp {
    max: f32,
    inverse_temperature: f32,
    ln_sum: f64,
}

impl LogSumExp {
    /// Reduces `row` at `temperature` (> 0).
    pub fn new(isa: Isa, row: &[f32], temperature: f32) -> Self {
        let inverse_temperature = 1.0 / temperature;
        let max = dispatch(isa, Max(row));
        let sum = dispatch(isa, SumExp { row, max, inverse_temperature });
        Self { max, inverse_temperature, ln_sum: math::ln64(sum) }
    }

    /// From what another device reduced a row to at `temperature`: its largest logit and the sum of
    /// exponentials relative to it.
    pub fn of_sum(max: f32, sum: f64, temperature: f32) -> Self {
        Self { max, inverse_temperature: 1.0 / temperature, ln_sum: math::ln64(sum) }
    }

    /// Log-probability of a token with logit `logit`.
    pub fn logprob(&self, logit: f32) -> f64 {
        f64::from(logit - self.max) * f64::from(self.inverse_temperature) - self.ln_sum
    }

    /// Largest logit of the row.
    pub fn max(&self) -> f32 {
        self.max
    }

    /// False when the row held a NaN or an infinity.
    pub fn is_finite(&self) -> bool {
        self.ln_sum.is_finite()
    }
}

/// What the distribution of a row is like as a whole.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Moments {
    /// Nats by which a token drawn from it surprises on average.
    pub entropy: f64,
    /// The variance of that surprise, in nats squared.
    pub variance: f64,
    /// The sum of the squares of all probabilities.
    pub squares: f64,
}

impl LogSumExp {
    /// The moments of `row`, whose log-sum-exp this is.
    pub fn moments(&self, row: &[f32]) -> Moments {
        let (mut entropy, mut second, mut squares) = (0.0, 0.0, 0.0);
        for logit in row {
            let surprise = -self.logprob(*logit);
            let probability = (-surprise).exp();
            entropy += probability * surprise;
            second += probability * surprise * surprise;
            squares += probability * probability;
        }
        Moments { entropy, variance: (second - entropy * entropy).max(0.0), squares }
    }
}

struct Max<'a>(&'a [f32]);

impl Kernel for Max<'_> {
    type Out = f32;

    #[inline(always)]
    fn run<L: Lanes>(self) -> f32 {
        let mut max = L::splat(f32::NEG_INFINITY);
        let chunks = self.0.chunks_exact(LANES);
        let tail = chunks.remainder();
        for chunk in chunks {
            // SAFETY: the chunk has 16 values.
            max = max.max(unsafe { L::load(chunk.as_ptr()) });
        }
        tail.iter().fold(max.max_lane(), |m, x| if m > *x { m } else { *x })
    }
}

struct SumExp<'a> {
    row: &'a [f32],
    max: f32,
    inverse_temperature: f32,
}

impl Kernel for SumExp<'_> {
    type Out = f64;

    #[inline(always)]
    fn run<L: Lanes>(self) -> f64 {
        let (max, scale) = (L::splat(self.max), L::splat(self.inverse_temperature));
        let mut total = 0.0;
        for chunk in self.row.chunks(CHUNK) {
            let mut sum = L::splat(0.0);
            let vecs = chunk.chunks_exact(LANES);
            let tail = vecs.remainder();
            for vec in vecs {
                // SAFETY: the chunk has 16 values.
                let x = unsafe { L::load(vec.as_ptr()) };
                sum = sum.add(math::exp(x.sub(max).mul(scale)));
            }
            if !tail.is_empty() {
                let mut padded = [f32::NEG_INFINITY; LANES];
                padded[..tail.len()].copy_from_slice(tail);
                // SAFETY: the array has 16 values.
                let x = unsafe { L::load(padded.as_ptr()) };
                sum = sum.add(math::exp(x.sub(max).mul(scale)));
            }
            total += f64::from(sum.sum());
        }
        total
    }
}

/// Token with the largest logit.
pub fn argmax(isa: Isa, row: &[f32]) -> u32 {
    let max = dispatch(isa, Max(row));
    row.iter().position(|x| *x == max).unwrap_or(0) as u32
}

/// 1 + the number of tokens with a larger logit: ties share the better rank.
pub fn rank(row: &[f32], token: u32) -> u32 {
    let logit = row[token as usize];
    1 + row.iter().map(|x| u32::from(*x > logit)).sum::<u32>()
}

/// The `k` largest logits with their tokens, largest first.
pub fn top_k(isa: Isa, row: &[f32], k: usize) -> Vec<(u32, f32)> {
    if k == 0 {
        return Vec::new();
    }
    dispatch(isa, TopK { row, k: k.min(row.len()) })
}

struct TopK<'a> {
    row: &'a [f32],
    k: usize,
}

impl Kernel for TopK<'_> {
    type Out = Vec<(u32, f32)>;

    #[inline(always)]
    fn run<L: Lanes>(self) -> Vec<(u32, f32)> {
        let mut best: Vec<(u32, f32)> = Vec::with_capacity(self.k + 1);
        let mut bar = f32::NEG_INFINITY; // what a further token must exceed once `best` is full
        for (i, chunk) in self.row.chunks(LANES).enumerate() {
            if best.len() == self.k && chunk.len() == LANES {
                // SAFETY: the chunk has 16 values.
                let largest = unsafe { L::load(chunk.as_ptr()) }.max_lane();
                if largest <= bar {
                    continue;
                }
            }
            for (lane, x) in chunk.iter().enumerate() {
                if best.len() < self.k || *x > bar {
                    insert(&mut best, self.k, ((i * LANES + lane) as u32, *x));
                    bar = best[best.len() - 1].1;
                }
            }
        }
        best
    }
}

/// Keeps `best` sorted: larger logits first, then smaller ids (ids arrive in ascending order).
fn insert(best: &mut Vec<(u32, f32)>, k: usize, entry: (u32, f32)) {
    let at = best.partition_point(|(_, x)| *x >= entry.1);
    best.insert(at, entry);
    best.truncate(k);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 % 1013) as f32) * 0.02 - 10.0).collect()
    }

    #[test]
    fn log_sum_exp_matches_f64_and_is_equal_on_every_instruction_set() {
        for n in [1, 16, 31, 512, 1025, 49_152] {
            for temperature in [1.0_f32, 0.7, 1.5] {
                let x = row(n);
                let scaled = |v: f32| f64::from(v) / f64::from(temperature);
                let want: f64 = x.iter().map(|v| scaled(*v).exp()).sum::<f64>().ln();
                let mut first = None;
                for isa in Isa::available() {
                    let lse = LogSumExp::new(isa, &x, temperature);
                    assert!((lse.logprob(x[0]) - (scaled(x[0]) - want)).abs() < 2e-6, "{n}");
                    assert_eq!(lse.ln_sum, *first.get_or_insert(lse.ln_sum), "{isa} {n}");
                }
            }
        }
    }

    #[test]
    fn moments_are_those_of_the_softmax() {
        let x = row(300);
        for temperature in [1.0_f32, 0.7] {
            let weights: Vec<f64> =
                x.iter().map(|v| (f64::from(*v) / f64::from(temperature)).exp()).collect();
            let total: f64 = weights.iter().sum();
            let p: Vec<f64> = weights.iter().map(|w| w / total).collect();
            let entropy: f64 = p.iter().map(|p| -p * p.ln()).sum();
            let variance: f64 = p.iter().map(|p| p * (-p.ln() - entropy).powi(2)).sum();
            let squares: f64 = p.iter().map(|p| p * p).sum();
            let got = LogSumExp::new(Isa::best(), &x, temperature).moments(&x);
            assert!((got.entropy - entropy).abs() < 1e-5, "{got:?}");
            assert!((got.variance - variance).abs() < 1e-4, "{got:?}");
            assert!((got.squares - squares).abs() < 1e-6, "{got:?}");
        }
    }

    #[test]
    fn a_broken_row_is_noticed() {
        for bad in [f32::NAN, f32::INFINITY] {
            for at in [0, 17, 40] {
                let mut x = row(41);
                x[at] = bad;
                for isa in Isa::available() {
                    assert!(!LogSumExp::new(isa, &x, 1.0).is_finite(), "{isa} {bad} {at}");
                }
            }
        }
    }

    #[test]
    fn ranks_and_top_k_agree_with_sorting() {
        let x = row(5_000);
        let mut sorted: Vec<(u32, f32)> =
            x.iter().enumerate().map(|(i, v)| (i as u32, *v)).collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        for isa in Isa::available() {
            assert_eq!(argmax(isa, &x), sorted[0].0);
            for k in [1, 5, 20, 4_999, 6_000] {
                assert_eq!(top_k(isa, &x, k), sorted[..k.min(5_000)], "{isa} {k}");
            }
        }
        for (i, (token, logit)) in sorted.iter().enumerate().step_by(371) {
            let strictly_better = sorted.iter().filter(|(_, v)| v > logit).count();
            assert_eq!(rank(&x, *token) as usize, strictly_better + 1);
            assert!(strictly_better <= i);
        }
    }
}
