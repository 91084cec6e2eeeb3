//! Defines what a vector of sixteen lanes can do, and computations that are written over it.

use crate::dtype::round_bf16;

/// Lanes in one vector, whatever the hardware width.
pub const LANES: usize = 16;

/// The high half of a lane.
const HIGH: u32 = 0xffff_0000;

/// Sixteen f32 values; the text of [`lanes`](super) is the contract.
pub trait Lanes: Copy + Send + Sync {
    /// Vectors that fit into the registers.
    const REGISTERS: usize;
    /// Accumulators that a tile keeps in registers. Where the two chains of all its outputs fit,
    /// they run side by side, else one after the other. The bits are the same.
    const CHAINS: usize;
    /// Whether [`dot_bf16`](Self::dot_bf16) is one instruction. Where it is not, products use
    /// [`mul_add`](Self::mul_add).
    const HAS_DOT: bool = false;

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
    /// The bf16 values in the high halves of 16 lanes' bits.
    ///
    /// # Safety
    /// `pairs` must be readable for 32 values.
    unsafe fn high_bf16(pairs: *const u16) -> Self;
    /// Those in the low halves.
    ///
    /// # Safety
    /// `pairs` must be readable for 32 values.
    unsafe fn low_bf16(pairs: *const u16) -> Self;
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

    /// `c`, and the products of the high and then of the low bf16 halves of the lanes' bits and of
    /// `x` added to it: two fused multiply-adds.
    #[inline(always)]
    fn dot_bf16(self, x: &u32, c: Self) -> Self {
        let high = |bits: u32| f32::from_bits(bits & HIGH);
        let low = |bits: u32| f32::from_bits(bits << 16);
        let mut sums = c.to_array();
        for (sum, w) in sums.iter_mut().zip(self.to_array().map(f32::to_bits)) {
            *sum = low(w).mul_add(low(*x), high(w).mul_add(high(*x), *sum));
        }
        // SAFETY: `sums` holds 16 values.
        unsafe { Self::load(sums.as_ptr()) }
    }
    /// Writes lanes that are bf16 values to 8 places at `to`, as halves: of each four values, the
    /// first and the third to one place, the second and the fourth to the next.
    ///
    /// # Safety
    /// `to` must be writable for 8 values.
    #[inline(always)]
    unsafe fn store_fours(self, to: *mut u32) {
        let bits = self.to_array().map(f32::to_bits);
        for place in 0..LANES / 2 {
            let first = place / 2 * 4 + place % 2;
            // SAFETY: the caller's promise.
            unsafe { *to.add(place) = bits[first] | bits[first + 2] >> 16 };
        }
    }

    /// The same place, of which the compiler does not know that it is the same: what was loaded
    /// from it is loaded again where registers are too few to keep it.
    #[inline(always)]
    fn again(from: *const u16) -> *const u16 {
        from
    }

    /// The lanes rounded to bf16 as [`round_bf16`] does it.
    #[inline(always)]
    fn nearest_bf16(self) -> Self {
        let nearest = self.to_array().map(|x| f32::from_bits(u32::from(round_bf16(x)) << 16));
        // SAFETY: `nearest` holds 16 values.
        unsafe { Self::load(nearest.as_ptr()) }
    }
    /// Writes lanes that are bf16 values to 16 places at `to`, as bits.
    ///
    /// # Safety
    /// `to` must be writable for 16 values.
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        let bits = self.to_array().map(|x| (x.to_bits() >> 16) as u16);
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(bits) };
    }

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

    /// Lane t is the [`sum`](Self::sum) of `of[t]`; those beyond `T` say nothing.
    #[inline(always)]
    fn sums<const T: usize>(of: &[Self; T]) -> Self {
        let mut lanes = [0.0; LANES];
        for t in 0..T {
            lanes[t] = of[t].sum();
        }
        // SAFETY: `lanes` holds 16 values.
        unsafe { Self::load(lanes.as_ptr()) }
    }

    /// Lane t is the [largest lane](Self::max_lane) of `of[t]`; those beyond `T` say nothing.
    #[inline(always)]
    fn max_lanes<const T: usize>(of: &[Self; T]) -> Self {
        let mut lanes = [0.0; LANES];
        for t in 0..T {
            lanes[t] = of[t].max_lane();
        }
        // SAFETY: `lanes` holds 16 values.
        unsafe { Self::load(lanes.as_ptr()) }
    }
}

/// A computation written once over [`Lanes`]. `run` must be `#[inline(always)]`.
pub trait Kernel {
    /// What the computation returns.
    type Out;
    /// The computation.
    fn run<L: Lanes>(self) -> Self::Out;
}

#[cfg(test)]
mod tests {
    use super::super::{Isa, Scalar, dispatch};
    use super::*;
    use crate::lcg::Lcg;

    /// The sums and the largest lanes of one to six vectors, at once and one by one.
    struct Reductions;

    impl Kernel for Reductions {
        type Out = Vec<[u32; 2]>;

        #[inline(always)]
        fn run<L: Lanes>(self) -> Self::Out {
            let mut numbers = Lcg::new(5);
            let mut out = Vec::new();
            for _ in 0..64 {
                reduce::<L, 1>(&mut numbers, &mut out);
                reduce::<L, 2>(&mut numbers, &mut out);
                reduce::<L, 3>(&mut numbers, &mut out);
                reduce::<L, 6>(&mut numbers, &mut out);
            }
            out
        }
    }

    #[inline(always)]
    fn reduce<L: Lanes, const T: usize>(numbers: &mut Lcg, out: &mut Vec<[u32; 2]>) {
        let mut of = [L::splat(0.0); T];
        for vec in &mut of {
            let lanes: [f32; LANES] = std::array::from_fn(|_| value(numbers.bits()));
            // SAFETY: an array of 16 values.
            *vec = unsafe { L::load(lanes.as_ptr()) };
        }
        let (sums, largest) = (L::sums(&of).to_array(), L::max_lanes(&of).to_array());
        for t in 0..T {
            let bits = |x: f32| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() };
            assert_eq!(bits(sums[t]), bits(of[t].sum()), "sum {t} of {T}");
            assert_eq!(bits(largest[t]), bits(of[t].max_lane()), "largest of {t} of {T}");
            out.push([bits(sums[t]), bits(largest[t])]);
        }
    }

    /// Of any size; now and then what scores of masked or damaged positions are.
    fn value(bits: u32) -> f32 {
        match bits >> 24 {
            0 | 1 => f32::NEG_INFINITY,
            2 => f32::NAN,
            3 => -0.0,
            _ => (bits & 0xffff) as f32 * 2.0_f32.powi((bits >> 16 & 15) as i32 - 20) - 1.0,
        }
    }

    #[test]
    fn sums_and_largest_lanes_are_the_same_on_every_instruction_set() {
        let want = Reductions.run::<Scalar>();
        let plain = |[sum, max]: &[u32; 2]| f32::from_bits(*sum) != f32::from_bits(*max);
        assert!(want.iter().filter(|of| plain(of)).count() > want.len() / 2);
        for isa in Isa::available() {
            assert_eq!(dispatch(isa, Reductions), want, "{isa}");
        }
    }
}
