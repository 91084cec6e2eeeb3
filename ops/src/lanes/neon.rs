//! Implements the lanes with NEON: four registers each.
//!
//! Stable Rust has no f16 conversions for NEON, so f16 is widened with integer operations.

use super::Lanes;
use std::arch::aarch64::*;

/// Sixteen lanes in four registers.
#[derive(Clone, Copy)]
pub(super) struct Neon([float32x4_t; 4]);

/// Calls NEON intrinsics.
macro_rules! simd {
    ($e:expr) => {
        // SAFETY: NEON is part of every aarch64 target; pointers are covered by the contract of
        // the method that uses them.
        unsafe { $e }
    };
}

impl Neon {
    #[inline(always)]
    fn each(self, b: Self, f: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }

    /// Four integer registers reinterpreted.
    #[inline(always)]
    fn from_bits(f: impl Fn(usize) -> uint32x4_t) -> Self {
        Self(std::array::from_fn(|i| simd!(vreinterpretq_f32_u32(f(i)))))
    }
}

impl Lanes for Neon {
    const REGISTERS: usize = 8; // of four registers each; 32 in all
    const CHAINS: usize = 6;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([simd!(vdupq_n_f32(x)); 4])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(std::array::from_fn(|i| simd!(vld1q_f32(from.add(4 * i)))))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        for (i, v) in self.0.into_iter().enumerate() {
            simd!(vst1q_f32(to.add(4 * i), v));
        }
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        Self(std::array::from_fn(|i| simd!(vfmaq_f32(c.0[i], self.0[i], b.0[i]))))
    }

    #[inline(always)]
    fn add(self, b: Self) -> Self {
        self.each(b, |a, b| simd!(vaddq_f32(a, b)))
    }

    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        self.each(b, |a, b| simd!(vsubq_f32(a, b)))
    }

    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        self.each(b, |a, b| simd!(vmulq_f32(a, b)))
    }

    #[inline(always)]
    fn div(self, b: Self) -> Self {
        self.each(b, |a, b| simd!(vdivq_f32(a, b)))
    }

    #[inline(always)]
    fn max(self, b: Self) -> Self {
        self.each(b, |a, b| simd!(vbslq_f32(vcgtq_f32(a, b), a, b)))
    }

    #[inline(always)]
    fn min(self, b: Self) -> Self {
        self.each(b, |a, b| simd!(vbslq_f32(vcltq_f32(a, b), a, b)))
    }

    #[inline(always)]
    fn zero_where_lt(self, x: Self, limit: Self) -> Self {
        let zero = simd!(vdupq_n_f32(0.0));
        Self(std::array::from_fn(|i| {
            simd!(vbslq_f32(vcltq_f32(x.0[i], limit.0[i]), zero, self.0[i]))
        }))
    }

    #[inline(always)]
    fn scale_by_power(self, magic: Self) -> Self {
        Self::from_bits(|i| {
            simd!(vaddq_u32(
                vreinterpretq_u32_f32(self.0[i]),
                vshlq_n_u32::<23>(vreinterpretq_u32_f32(magic.0[i]))
            ))
        })
    }

    #[inline(always)]
    unsafe fn high_bf16(pairs: *const u16) -> Self {
        let mask = simd!(vdupq_n_u32(0xffff_0000));
        Self::from_bits(|i| simd!(vandq_u32(vld1q_u32(pairs.add(8 * i).cast()), mask)))
    }

    #[inline(always)]
    unsafe fn low_bf16(pairs: *const u16) -> Self {
        Self::from_bits(|i| simd!(vshlq_n_u32::<16>(vld1q_u32(pairs.add(8 * i).cast()))))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        Self::from_bits(|i| simd!(vshlq_n_u32::<16>(vmovl_u16(vld1_u16(from.add(4 * i))))))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // The f16 bits without sign, moved to f32's exponent field and rebased by a multiplication
        // with 2^112, which also normalises subnormals; infinities and NaN get the full exponent.
        let rebase = simd!(vdupq_n_f32(f32::from_bits((127 + 112) << 23)));
        Self::from_bits(|i| {
            simd!({
                let bits = vmovl_u16(vld1_u16(from.add(4 * i)));
                let magnitude = vandq_u32(bits, vdupq_n_u32(0x7fff));
                let sign = vshlq_n_u32::<16>(vandq_u32(bits, vdupq_n_u32(0x8000)));
                let shifted = vshlq_n_u32::<13>(magnitude);
                let finite =
                    vreinterpretq_u32_f32(vmulq_f32(vreinterpretq_f32_u32(shifted), rebase));
                let special = vorrq_u32(shifted, vdupq_n_u32(0x7f80_0000));
                let is_special = vcgeq_u32(magnitude, vdupq_n_u32(0x7c00));
                vorrq_u32(sign, vbslq_u32(is_special, special, finite))
            })
        })
    }
}
