//! Draws Gumbel noise for tokens, and runs the race that a token wins over a whole vocabulary.
//!
//! Noise: `u = (x + 0.5) / 2^32` for the 32-bit word x of token v (word `v mod 4` of the Philox
//! counter `(position, v / 4, 0, DOMAIN)`), `g = -ln(-ln u)` in f64.

use super::lanes::{Isa, Kernel, Lanes, dispatch};
use super::logits::argmax;
use super::math::ln64;
use super::philox::{philox, philox_lanes};

/// Fourth counter word of the sampler's noise.
const DOMAIN: u32 = 0x736d_706c;
/// Noise words drawn at once.
const GROUPS: usize = 16;

/// Gumbel noise of one token.
pub fn gumbel(key: u64, position: u32, token: u32) -> f64 {
    gumbel_of(philox(key, [position, token / 4, 0, DOMAIN])[token as usize % 4])
}

fn gumbel_of(word: u32) -> f64 {
    let u = (f64::from(word) + 0.5) / 4_294_967_296.0;
    -ln64(-ln64(u))
}

/// The token of `row` with the largest `logit * inverse + noise`, the lowest id among equals:
/// a draw from its softmax at the temperature `1 / inverse`.
pub fn race(isa: Isa, row: &[f32], inverse: f64, key: u64, position: u32) -> u32 {
    dispatch(isa, Race { row, inverse, key, position })
}

struct Race<'a> {
    row: &'a [f32],
    inverse: f64,
    key: u64,
    position: u32,
}

/// Largest value that Gumbel noise takes: `-ln(-ln(1 - 2^-33))`, rounded up.
const NOISE_MAX: f64 = 22.9;

impl Kernel for Race<'_> {
    type Out = u32;

    #[inline(always)]
    fn run<L: Lanes>(self) -> u32 {
        let scaled = |id: usize| f64::from(self.row[id]) * self.inverse;
        // The largest logit sets a bar that most tokens cannot reach even with the best noise.
        let first = argmax(Isa::SCALAR, self.row);
        let mut best = (first, scaled(first as usize) + gumbel(self.key, self.position, first));
        for (block, logits) in self.row.chunks(4 * GROUPS).enumerate() {
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            if f64::from(largest) * self.inverse + NOISE_MAX < best.1 {
                continue;
            }
            let mut counter = [[self.position; GROUPS], [0; GROUPS], [0; GROUPS], [DOMAIN; GROUPS]];
            for (i, group) in counter[1].iter_mut().enumerate() {
                *group = (block * GROUPS + i) as u32;
            }
            let words = philox_lanes::<GROUPS>(self.key, counter);
            for (i, logit) in logits.iter().enumerate() {
                let word = words[i % 4][i / 4];
                let value = f64::from(*logit) * self.inverse;
                if value + noise_bound(word) < best.1 {
                    continue;
                }
                let candidate = ((block * 4 * GROUPS + i) as u32, value + gumbel_of(word));
                if candidate.1 > best.1 || (candidate.1 == best.1 && candidate.0 < best.0) {
                    best = candidate;
                }
            }
        }
        best.0
    }
}

/// A cheap upper bound on the noise of `word`: `1 - u >= 2^-(lz + 1)` for lz leading one bits,
/// and `-ln u >= 1 - u`.
#[inline(always)]
fn noise_bound(word: u32) -> f64 {
    f64::from(word.leading_ones() + 2) * std::f64::consts::LN_2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_noise_bound_holds() {
        let mut words = vec![0, 1, u32::MAX, u32::MAX - 1, 1 << 31, (1 << 31) - 1];
        words.extend((0..200_000_u32).map(|i| i.wrapping_mul(2_654_435_761)));
        words.extend((0..32).map(|b| !(u32::MAX >> b)));
        for word in words {
            let g = gumbel_of(word);
            assert!(g <= noise_bound(word) && g <= NOISE_MAX, "{word:#x} {g}");
        }
    }
}
