//! Defines what a vector of sixteen lanes can do, and computations that are written over it.

/// Lanes in one vector, whatever the hardware width.
pub const LANES: usize = 16;

/// Sixteen f32 values; the text of [`lanes`](super) is the contract.
pub trait Lanes: Copy + Send + Sync {
    /// Vectors of 16 output rows that a matrix tile keeps in registers.
    const ROW_VECS: usize;
    /// Accumulators that a tile keeps in registers. Where the two chains of all its outputs fit,
    /// they run side by side, else one after the other. The bits are the same.
    const CHAINS: usize;

    /// All lanes `x`.
    fn splat(x: f32) -> Self;
    /// Lanes from the first 16 values at `from`.
    ///
    /// # Safety
    /// `from` must be readable for 16 values.
    unsafe fn load(from: *const f32) -> Self;
    /// Writes the lanes to the first 16 values at `to`.
    ///
    /// # Safety
    /// `to` must be writable for 16 values.
    unsafe fn store(self, to: *mut f32);
    /// `self * b + c`, rounded once.
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// Lane-wise sum.
    fn add(self, b: Self) -> Self;
    /// Lane-wise difference.
    fn sub(self, b: Self) -> Self;
    /// Lane-wise product.
    fn mul(self, b: Self) -> Self;
    /// Lane-wise quotient.
    fn div(self, b: Self) -> Self;
    /// Lane-wise maximum; a NaN in `b` stays.
    fn max(self, b: Self) -> Self;
    /// Lane-wise minimum; a NaN in `b` stays.
    fn min(self, b: Self) -> Self;
    /// Zero where `x < limit`, else `self` (also where `x` is NaN).
    fn zero_where_lt(self, x: Self, limit: Self) -> Self;
    /// `self * 2^n`, n being the integer in the low bits of `magic` (see
    /// [`exp`](crate::math::exp)). `self` must lie in [0.5, 2] and n in [-126, 127].
    fn scale_by_power(self, magic: Self) -> Self;
    /// The odd elements of 16 interleaved bf16 pairs.
    ///
    /// # Safety
    /// `pairs` must be readable for 32 values.
    unsafe fn odd_bf16(pairs: *const u16) -> Self;
    /// The even elements of 16 interleaved bf16 pairs.
    ///
    /// # Safety
    /// `pairs` must be readable for 32 values.
    unsafe fn even_bf16(pairs: *const u16) -> Self;
    /// 16 consecutive bf16 values.
    ///
    /// # Safety
    /// `from` must be readable for 16 values.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// 16 consecutive f16 values.
    ///
    /// # Safety
    /// `from` must be readable for 16 values.
    unsafe fn load_f16(from: *const u16) -> Self;

    /// The lanes as an array.
    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        // SAFETY: `out` holds 16 values.
        unsafe { self.store(out.as_mut_ptr()) };
        out
    }

    /// Sum in the fixed tree: lane i + lane i+8, then +4, +2, +1.
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut lanes = self.to_array();
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
        }
        lanes[0]
    }

    /// Largest lane.
    #[inline(always)]
    fn max_lane(self) -> f32 {
        let mut lanes = self.to_array();
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] = if lanes[i] > lanes[i + half] { lanes[i] } else { lanes[i + half] };
            }
        }
        lanes[0]
    }
}

/// A computation written once over [`Lanes`]. `run` must be `#[inline(always)]`.
pub trait Kernel {
    /// What the computation returns.
    type Out;
    /// The computation.
    fn run<L: Lanes>(self) -> Self::Out;
}
