//! Defines the two 16-bit weight types and the rounding of matrix inputs to them.
//!
//! A product of two such values is exact in f32. bf16 magnitudes below [`BF16_FLUSH`] become zero
//! when weights are packed and when inputs are rounded: then no product and no partial sum can be
//! subnormal, and instruction sets that flush subnormals (AMX) agree with those that do not.

use half::{bf16, f16};
use std::fmt;

/// bf16 magnitudes below 2^-50 count as zero inside the engine.
pub const BF16_FLUSH: f32 = f32::from_bits((127 - 50) << 23);

/// Element type of weights, matrix inputs and the KV cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dtype {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl Dtype {
    /// Nearest value, ties to even; f16 overflow becomes infinity, tiny bf16 become zero.
    #[inline(always)]
    pub fn round(self, x: f32) -> u16 {
        match self {
            Dtype::Bf16 => round_bf16(x),
            Dtype::F16 => round_f16(x),
        }
    }

    /// The nearest value as f32, tiny ones included: what a checkpoint loader would hold.
    pub fn nearest(self, x: f32) -> f32 {
        match self {
            Dtype::Bf16 => bf16::from_f32(x).to_f32(),
            Dtype::F16 => f16::from_f32(x).to_f32(),
        }
    }

    /// The exact f32 of `bits`.
    #[inline(always)]
    pub fn widen(self, bits: u16) -> f32 {
        match self {
            Dtype::Bf16 => bf16::from_bits(bits).to_f32(),
            Dtype::F16 => f16::from_bits(bits).to_f32(),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
        })
    }
}

/// f32 to bf16 bits: nearest even, NaN stays NaN, magnitudes below 2^-50 become zero.
#[inline(always)]
pub fn round_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet_nan = (bits >> 16) | 0x40;
    let value = if x.is_nan() { quiet_nan } else { rounded };
    if x.abs() < BF16_FLUSH { 0 } else { value as u16 }
}

/// f32 to f16 bits: nearest even, overflow to infinity, NaN stays NaN. Free of branches, so that
/// loops over it vectorise.
#[inline(always)]
pub fn round_f16(x: f32) -> u16 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let sign = (bits >> 16) & 0x8000;
    // Below 2^-14 the result counts units of 2^-24, which is what adding 0.5 rounds to.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits());
    let rebased = magnitude.wrapping_sub(112 << 23);
    let normal = rebased.wrapping_add(0xfff + ((magnitude >> 13) & 1)) >> 13;
    let special = if x.is_nan() { 0x7e00 } else { 0x7c00 };
    let finite = if magnitude < 113 << 23 { subnormal } else { normal };
    let value = if magnitude >= 143 << 23 { special } else { finite };
    (sign | value) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounding_is_nearest_even_with_a_flush() {
        let cases = [
            (1.0, 0x3f80),
            (f32::from_bits(0x3f80_8000), 0x3f80), // tie, to even
            (f32::from_bits(0x3f81_8000), 0x3f82), // tie, to even
            (f32::from_bits(0x3f80_8001), 0x3f81),
            (-1.5, 0xbfc0),
            (f32::INFINITY, 0x7f80),
            (f32::MAX, 0x7f80),
            (1e-20, 0),
            (-1e-20, 0),
            (BF16_FLUSH, ((127 - 50) << 7) as u16),
        ];
        for (x, want) in cases {
            assert_eq!(round_bf16(x), want, "{x}");
        }
        assert!(Dtype::Bf16.widen(round_bf16(f32::NAN)).is_nan());
    }

    #[test]
    fn rounding_agrees_with_the_half_crate_outside_the_flush() {
        let mut state = 1_u32;
        for _ in 0..300_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let x = f32::from_bits(state);
            if x.is_nan() {
                assert!(Dtype::F16.widen(round_f16(x)).is_nan());
                continue;
            }
            if x.abs() >= BF16_FLUSH {
                assert_eq!(round_bf16(x), bf16::from_f32(x).to_bits(), "{state:#x}");
            }
            // The exponent is folded so that most patterns fall into the range of f16.
            let y = f32::from_bits((state & 0x8fff_ffff) | 0x3000_0000);
            for x in [x, y] {
                assert_eq!(round_f16(x), f16::from_f32(x).to_bits(), "{x:e}");
            }
        }
    }
}
