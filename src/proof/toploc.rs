//! Computes TOPLOC proofs (Prime Intellect, arXiv 2501.16007): the largest activations of a chunk,
//! as a polynomial over GF(65497) through (index, bf16 bits). They are byte-compatible with the
//! published library; ties at the k-th magnitude go to the lowest index, as on its GPU path.
//!
//! Decoding is strict: a malformed proof is refused by name, never evaluated.

use std::collections::HashSet;

/// The field, and the largest modulus of indices.
const PRIME: u32 = 65_497;
/// Activations in a proof.
pub const TOP_K: usize = 128;

/// A proof by TOPLOC, decoded: a polynomial through the largest activations.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Proof {
    modulus: u32,
    coefficients: Vec<u32>, // ascending degree
}

/// How far a proof is from a verifier's own activations.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Distance {
    /// Of the top activations, how many have another exponent.
    pub exponent_mismatches: usize,
    /// Mean difference of mantissas where exponents agree; infinite where none does.
    pub mantissa_mean: f64,
    /// Upper median of the same.
    pub mantissa_median: f64,
}

impl Distance {
    /// The thresholds of the published experiments (k = 128).
    pub fn passes_published(&self) -> bool {
        self.exponent_mismatches <= 38 && self.mantissa_mean <= 10.0 && self.mantissa_median <= 8.0
    }
}

/// Why bytes are not a proof.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DecodeError {
    /// Wrong number of bytes.
    #[error("a TOPLOC proof of {k} points has {want} bytes, got {got}")]
    Length {
        /// How many activations a proof has.
        k: usize,
        /// Bytes that a proof of so many points has.
        want: usize,
        /// Bytes that were sent.
        got: usize,
    },
    /// A modulus that cannot hold the points.
    #[error("the modulus must lie in {k}..=65497, got {got}")]
    Modulus {
        /// How many activations a proof has.
        k: usize,
        /// The modulus that was sent.
        got: u32,
    },
    /// A coefficient outside the field.
    #[error("coefficient {index} is {got}, outside GF(65497)")]
    Coefficient {
        /// Place of the coefficient in its polynomial.
        index: usize,
        /// The value that was found.
        got: u32,
    },
}

/// Indices of the `k` largest magnitudes of bf16 patterns: largest first, then lowest index.
fn top(activations: &[u16], k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..activations.len() as u32).collect();
    let key = |i: &u32| (std::cmp::Reverse(activations[*i as usize] & 0x7fff), *i);
    if k < order.len() {
        order.select_nth_unstable_by_key(k, key);
        order.truncate(k);
    }
    order.sort_unstable_by_key(key);
    order
}

impl Proof {
    /// Proves a chunk: its rows one after the other, as bf16 patterns; `None` when it has fewer
    /// than `k` values.
    pub fn build(activations: &[u16], k: usize) -> Option<Self> {
        if k == 0 || activations.len() < k {
            return None;
        }
        let indices = top(activations, k);
        let values = indices.iter().map(|i| u32::from(activations[*i as usize]));
        Some(Self::through(&indices, &values.collect::<Vec<_>>()))
    }

    /// The polynomial through distinct points.
    fn through(indices: &[u32], values: &[u32]) -> Self {
        let modulus = injective_modulus(indices);
        let x: Vec<u32> = indices.iter().map(|i| i % modulus).collect();
        let mut slopes: Vec<u32> = values.iter().map(|v| v % PRIME).collect();
        let n = x.len();
        for k in 1..n {
            for i in (k..n).rev() {
                let rise = sub(slopes[i], slopes[i - 1]);
                slopes[i] = mul(rise, inverse(sub(x[i], x[i - k])));
            }
        }
        // Newton's form, expanded by Horner's rule from the innermost factor.
        let mut coefficients = vec![0; n];
        for i in (0..n).rev() {
            for d in (1..n).rev() {
                coefficients[d] = sub(coefficients[d - 1], mul(coefficients[d], x[i]));
            }
            coefficients[0] = sub(slopes[i], mul(coefficients[0], x[i]));
        }
        Self { modulus, coefficients }
    }

    /// The wire form: modulus and coefficients as big-endian u16.
    pub fn to_bytes(&self) -> Vec<u8> {
        let words = std::iter::once(&self.modulus).chain(&self.coefficients);
        words.flat_map(|w| (*w as u16).to_be_bytes()).collect()
    }

    /// Reads a proof of `k` points.
    ///
    /// # Errors
    /// When it is malformed.
    pub fn from_bytes(bytes: &[u8], k: usize) -> Result<Self, DecodeError> {
        let want = 2 + 2 * k;
        if bytes.len() != want {
            return Err(DecodeError::Length { k, want, got: bytes.len() });
        }
        let mut words = bytes.chunks_exact(2).map(|b| u32::from(u16::from_be_bytes([b[0], b[1]])));
        let modulus = words.next().unwrap_or(0);
        if modulus < (k as u32).max(1) || modulus > PRIME {
            return Err(DecodeError::Modulus { k, got: modulus });
        }
        let coefficients: Vec<u32> = words.collect();
        match coefficients.iter().position(|c| *c >= PRIME) {
            Some(index) => Err(DecodeError::Coefficient { index, got: coefficients[index] }),
            None => Ok(Self { modulus, coefficients }),
        }
    }

    /// Compares with the verifier's own activations of the chunk.
    pub fn distance(&self, activations: &[u16]) -> Distance {
        let k = self.coefficients.len();
        let mut exponent_mismatches = 0;
        let mut errors: Vec<u32> = Vec::with_capacity(k);
        for index in top(activations, k) {
            let proved = self.evaluate(index % self.modulus);
            let own = u32::from(activations[index as usize]);
            if (proved >> 7) & 0xff == (own >> 7) & 0xff {
                errors.push((proved & 0x7f).abs_diff(own & 0x7f));
            } else {
                exponent_mismatches += 1;
            }
        }
        errors.sort_unstable();
        let count = errors.len() as f64;
        let mean = errors.iter().sum::<u32>() as f64 / count;
        let median = errors.get(errors.len() / 2);
        Distance {
            exponent_mismatches,
            mantissa_mean: if errors.is_empty() { f64::INFINITY } else { mean },
            mantissa_median: median.map_or(f64::INFINITY, |m| f64::from(*m)),
        }
    }

    fn evaluate(&self, x: u32) -> u32 {
        self.coefficients.iter().rev().fold(0, |sum, c| (mul(sum, x) + c) % PRIME)
    }
}

/// The largest modulus up to the prime under which the indices stay distinct.
fn injective_modulus(indices: &[u32]) -> u32 {
    let is_injective = |m: &u32| {
        let mut seen = HashSet::with_capacity(indices.len());
        indices.iter().all(|i| seen.insert(i % m))
    };
    (1..=PRIME).rev().find(is_injective).unwrap_or(1)
}

fn sub(a: u32, b: u32) -> u32 {
    (a + PRIME - b % PRIME) % PRIME
}

fn mul(a: u32, b: u32) -> u32 {
    (u64::from(a) * u64::from(b) % u64::from(PRIME)) as u32
}

/// `1 / a` by Fermat; `a` is not zero because indices are distinct.
fn inverse(a: u32) -> u32 {
    let (mut base, mut exponent, mut result) = (a % PRIME, PRIME - 2, 1);
    while exponent > 0 {
        if exponent & 1 == 1 {
            result = mul(result, base);
        }
        base = mul(base, base);
        exponent >>= 1;
    }
    result
}

#[cfg(test)]
mod tests;
