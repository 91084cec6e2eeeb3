//! Implements the reference lanes: plain arrays, one IEEE operation per lane.

use super::{LANES, Lanes};
use half::{bf16, f16};

/// Sixteen lanes in an array.
#[derive(Clone, Copy)]
pub struct Scalar([f32; LANES]);

impl Scalar {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }

    /// Lanes `f(0)..f(15)`.
    #[inline(always)]
    fn from_fn(f: impl FnMut(usize) -> f32) -> Self {
        Self(std::array::from_fn(f))
    }
}

impl Lanes for Scalar {
    const REGISTERS: usize = 8;
    const CHAINS: usize = 6;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller promises 16 readable values.
        unsafe { Self(from.cast::<[f32; LANES]>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller promises 16 writable values.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        Self::from_fn(|i| self.0[i].mul_add(b.0[i], c.0[i]))
    }

    #[inline(always)]
    fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        self.zip(b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        self.zip(b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, b: Self) -> Self {
        self.zip(b, |a, b| a / b)
    }

    #[inline(always)]
    fn max(self, b: Self) -> Self {
        self.zip(b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, b: Self) -> Self {
        self.zip(b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn zero_where_lt(self, x: Self, limit: Self) -> Self {
        Self::from_fn(|i| if x.0[i] < limit.0[i] { 0.0 } else { self.0[i] })
    }

    #[inline(always)]
    fn scale_by_power(self, magic: Self) -> Self {
        Self::from_fn(|i| {
            let exponent = magic.0[i].to_bits() << 23;
            f32::from_bits(self.0[i].to_bits().wrapping_add(exponent))
        })
    }

    #[inline(always)]
    unsafe fn high_bf16(pairs: *const u16) -> Self {
        // SAFETY: the caller promises 32 readable values.
        Self::from_fn(|i| widen(unsafe { pairs.add(2 * i + 1).read() }))
    }

    #[inline(always)]
    unsafe fn low_bf16(pairs: *const u16) -> Self {
        // SAFETY: the caller promises 32 readable values.
        Self::from_fn(|i| widen(unsafe { pairs.add(2 * i).read() }))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller promises 16 readable values.
        Self::from_fn(|i| widen(unsafe { from.add(i).read() }))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the caller promises 16 readable values.
        Self::from_fn(|i| f16::from_bits(unsafe { from.add(i).read() }).to_f32())
    }
}

#[inline(always)]
fn widen(bits: u16) -> f32 {
    bf16::from_bits(bits).to_f32()
}
