//! Implements the lanes with AVX-512: one register each.
//!
//! VDPBF16PS has no place here: it adds the odd and the even product of a pair to one accumulator,
//! and the canon keeps them in two chains.

use super::{Kernel, Lanes};
use std::arch::x86_64::*;

/// Sixteen lanes in one register.
#[derive(Clone, Copy)]
pub(super) struct Avx512(__m512);

/// Runs `kernel` with AVX-512.
///
/// # Safety
/// The CPU must have the features named here.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Out {
    kernel.run::<Avx512>()
}

/// Calls intrinsics of the features above.
macro_rules! simd {
    ($e:expr) => {
        // SAFETY: the type is only named by `dispatch`, which checked the CPU's features;
        // pointers are covered by the contract of the method that uses them.
        unsafe { $e }
    };
}

impl Lanes for Avx512 {
    const ROW_VECS: usize = 4;
    const CHAINS: usize = 24; // of 32 registers

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self(simd!(_mm512_set1_ps(x)))
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(simd!(_mm512_loadu_ps(from)))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        simd!(_mm512_storeu_ps(to, self.0))
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        Self(simd!(_mm512_fmadd_ps(self.0, b.0, c.0)))
    }

    #[inline(always)]
    fn add(self, b: Self) -> Self {
        Self(simd!(_mm512_add_ps(self.0, b.0)))
    }

    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        Self(simd!(_mm512_sub_ps(self.0, b.0)))
    }

    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        Self(simd!(_mm512_mul_ps(self.0, b.0)))
    }

    #[inline(always)]
    fn div(self, b: Self) -> Self {
        Self(simd!(_mm512_div_ps(self.0, b.0)))
    }

    #[inline(always)]
    fn max(self, b: Self) -> Self {
        Self(simd!(_mm512_max_ps(self.0, b.0)))
    }

    #[inline(always)]
    fn min(self, b: Self) -> Self {
        Self(simd!(_mm512_min_ps(self.0, b.0)))
    }

    #[inline(always)]
    fn zero_where_lt(self, x: Self, limit: Self) -> Self {
        Self(simd!(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x.0, limit.0), self.0)))
    }

    #[inline(always)]
    fn scale_by_power(self, magic: Self) -> Self {
        Self(simd!(_mm512_castsi512_ps(_mm512_add_epi32(
            _mm512_castps_si512(self.0),
            _mm512_slli_epi32::<23>(_mm512_castps_si512(magic.0))
        ))))
    }

    #[inline(always)]
    unsafe fn odd_bf16(pairs: *const u16) -> Self {
        Self(simd!(_mm512_castsi512_ps(_mm512_and_si512(
            _mm512_loadu_si512(pairs.cast()),
            _mm512_set1_epi32(0xffff_0000_u32 as i32)
        ))))
    }

    #[inline(always)]
    unsafe fn even_bf16(pairs: *const u16) -> Self {
        Self(simd!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(pairs.cast())))))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        Self(simd!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(
            _mm256_loadu_si256(from.cast())
        )))))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        Self(simd!(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))))
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        simd!({
            let half =
                _mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0));
            super::avx2::sum_tree(half)
        })
    }

    #[inline(always)]
    fn max_lane(self) -> f32 {
        simd!({
            let half =
                _mm256_max_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0));
            super::avx2::max_tree(half)
        })
    }
}
