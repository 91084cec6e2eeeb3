//! Finds out whether this CPU has VDPBF16PS, and whether it computes what the canon needs.
//!
//! Manuals describe it as two fused multiply-adds, one after the other. A CPU that kept more bits
//! between them, or added in another order, would give other results: it is tried once.

use super::avx512;
use super::scalar::Scalar;
use super::vector::{Kernel, LANES, Lanes};
use crate::lcg::Lcg;
use std::sync::OnceLock;

/// Steps of the chain that is compared.
const STEPS: usize = 512;

/// Whether it is used: the CPU has it beside the rest of AVX-512, and it gives the bits of the
/// canon. That is found out at the first call.
pub(super) fn is_usable() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    // SAFETY: `run_with_dot` runs where the CPU has it.
    let is_right = || unsafe { avx512::run_with_dot(Chain) } == Chain.run::<Scalar>();
    *FOUND.get_or_init(|| is_there() && is_right())
}

/// Whether the CPU has it.
pub(super) fn is_there() -> bool {
    is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// The bits of a chain after each of its steps.
struct Chain;

impl Kernel for Chain {
    type Out = Vec<[u32; LANES]>;

    #[inline(always)]
    fn run<L: Lanes>(self) -> Self::Out {
        let (mut numbers, mut sum) = (Lcg::new(1), L::splat(0.0));
        let mut out = Vec::with_capacity(STEPS);
        for _ in 0..STEPS {
            let (w, x) = (std::array::from_fn(|_| halves(&mut numbers)), halves(&mut numbers));
            sum = lanes::<L>(w).dot_bf16(&x, sum);
            out.push(sum.to_array().map(f32::to_bits));
        }
        out
    }
}

fn lanes<L: Lanes>(bits: [u32; LANES]) -> L {
    let lanes = bits.map(f32::from_bits);
    // SAFETY: an array of 16 values.
    unsafe { L::load(lanes.as_ptr()) }
}

/// Two bf16 values, of twenty powers of two, so that another order shows.
fn halves(numbers: &mut Lcg) -> u32 {
    let mut half = || {
        let bits = numbers.bits() >> 8;
        let (sign, exponent, mantissa) = (bits & 1, 117 + (bits >> 1) % 20, bits >> 8 & 0x7f);
        sign << 15 | exponent << 7 | mantissa
    };
    half() << 16 | half()
}

#[cfg(test)]
mod tests {
    use super::super::{Isa, dispatch};
    use super::*;

    #[test]
    fn the_trial_tells_another_order() {
        let (mut numbers, mut sum, mut differ) = (Lcg::new(1), Scalar::splat(0.0), 0);
        for right in Chain.run::<Scalar>() {
            let w = std::array::from_fn(|_| halves(&mut numbers).rotate_left(16));
            let x = halves(&mut numbers).rotate_left(16);
            sum = lanes::<Scalar>(w).dot_bf16(&x, sum);
            differ += usize::from(right != sum.to_array().map(f32::to_bits));
        }
        assert!(differ > STEPS / 2, "only {differ} of {STEPS} steps differ");
    }

    /// What lanes are put into as halves, and halves widened.
    struct Halves;

    impl Kernel for Halves {
        type Out = ([u32; LANES / 2], [u32; LANES], [u32; LANES]);

        fn run<L: Lanes>(self) -> Self::Out {
            let halves: [u16; 2 * LANES] = std::array::from_fn(|i| 0x100 * i as u16 + 0x41);
            let mut fours = [0; LANES / 2];
            // SAFETY: 8 places, and 32 values.
            let (high, low) = unsafe {
                lanes::<L>(std::array::from_fn(|i| (i as u32 + 7) << 16))
                    .store_fours(fours.as_mut_ptr());
                (L::high_bf16(halves.as_ptr()), L::low_bf16(halves.as_ptr()))
            };
            (fours, high.to_array().map(f32::to_bits), low.to_array().map(f32::to_bits))
        }
    }

    #[test]
    fn halves_are_the_same_on_every_instruction_set() {
        let want = Halves.run::<Scalar>();
        assert_eq!(want.0[..4], [0x7_0009, 0x8_000a, 0xb_000d, 0xc_000e]);
        assert_eq!((want.1[1], want.2[1]), (0x341 << 16, 0x241 << 16));
        for isa in Isa::available() {
            assert_eq!(dispatch(isa, Halves), want, "{isa}");
        }
    }

    #[test]
    fn a_cpu_that_has_it_computes_the_canon() {
        assert_eq!(is_there(), is_usable(), "VDPBF16PS of this CPU gives other bits");
    }
}
