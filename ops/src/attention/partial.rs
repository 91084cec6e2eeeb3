//! Holds the softmax attention of one query over some positions, and appends two of them to each
//! other.

use super::cache::HEAD_DIM_MAX;
use crate::lanes::{LANES, Lanes};
use crate::math;

/// The largest score, the sum of the weights relative to it, and the values weighted by them.
#[derive(Clone, Copy)]
pub(super) struct Partial {
    pub(super) max: f32,
    pub(super) sum: f32,
    pub(super) out: [f32; HEAD_DIM_MAX],
}

impl Partial {
    /// The state before any position is added.
    pub(super) const NOTHING: Self =
        Self { max: f32::NEG_INFINITY, sum: 0.0, out: [0.0; HEAD_DIM_MAX] };

    /// Brings it back to that state, for heads of `head_dim` elements.
    #[inline(always)]
    pub(super) fn clear(&mut self, head_dim: usize) {
        (self.max, self.sum) = (f32::NEG_INFINITY, 0.0);
        self.out[..head_dim].fill(0.0);
    }

    /// 32-bit values of a stored one.
    pub(super) fn stored_len(head_dim: usize) -> usize {
        head_dim + 2
    }

    /// Writes it to `to`.
    pub(super) fn store(&self, to: &mut [f32]) {
        let (head, out) = to.split_at_mut(2);
        head.copy_from_slice(&[self.max, self.sum]);
        out.copy_from_slice(&self.out[..out.len()]);
    }

    /// Reads what [`store`](Self::store) wrote.
    pub(super) fn load(from: &[f32]) -> Self {
        let mut partial = Self { max: from[0], sum: from[1], ..Self::NOTHING };
        partial.out[..from.len() - 2].copy_from_slice(&from[2..]);
        partial
    }

    /// Appends the positions of `next`. Both are brought to the larger maximum:
    /// `sum = sum * f + next.sum * g`, the product with g rounded, the one with f fused.
    #[inline(always)]
    pub(super) fn append<L: Lanes>(&mut self, next: &Self, head_dim: usize) {
        // Where something was seen, the largest score has weight one; NaN is not zero.
        if next.sum == 0.0 {
            return;
        }
        let max = if self.max > next.max { self.max } else { next.max };
        let mut falls = [0.0; LANES];
        (falls[0], falls[1]) = (self.max - max, next.max - max);
        // SAFETY: the array holds 16 values.
        let factors = math::exp(unsafe { L::load(falls.as_ptr()) }).to_array();
        let [f, g] = [L::splat(factors[0]), L::splat(factors[1])];
        self.max = max;
        self.sum = self.sum.mul_add(factors[0], next.sum * factors[1]);
        let own = self.out[..head_dim].chunks_exact_mut(LANES);
        for (own, next) in own.zip(next.out[..head_dim].chunks_exact(LANES)) {
            // SAFETY: chunks have 16 values.
            unsafe {
                let next = L::load(next.as_ptr()).mul(g);
                L::load(own.as_ptr()).mul_add(f, next).store(own.as_mut_ptr());
            }
        }
    }

    /// The weighted mean of the values.
    #[inline(always)]
    pub(super) fn mean(&mut self, head_dim: usize) -> &[f32] {
        let out = &mut self.out[..head_dim];
        out.iter_mut().for_each(|o| *o /= self.sum);
        out
    }
}
