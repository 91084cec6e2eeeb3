//! Implements the lanes with AVX-512: one register each, with and without AVX-512 BF16.
//!
//! VDPBF16PS adds two products to an accumulator, one after the other, each rounded: first that of
//! the high halves, then that of the low ones. The canon has a chain of the even elements of k and
//! one of the odd ones, so the halves of a lane hold elements that are 2 apart.

use super::{Kernel, Lanes};
use crate::dtype::BF16_FLUSH;
use std::arch::asm;
use std::arch::x86_64::*;

/// Sixteen lanes in one register.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const DOT: bool>(__m512);

/// Runs `kernel` with AVX-512.
///
/// # Safety
/// The CPU must have the features named here.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Out {
    kernel.run::<Avx512<false>>()
}

/// Runs `kernel` with AVX-512 and AVX-512 BF16.
///
/// # Safety
/// The CPU must have the features named here.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")]
pub(super) unsafe fn run_with_dot<K: Kernel>(kernel: K) -> K::Out {
    kernel.run::<Avx512<true>>()
}

/// Calls intrinsics of the features above.
macro_rules! simd {
    ($e:expr) => {
        // SAFETY: the type is only named by `dispatch`, which checked the CPU's features;
        // pointers are covered by the contract of the method that uses them.
        unsafe { $e }
    };
}

/// `sum` and the two products of each lane of `w` and of the lane `x`. As an intrinsic the compiler
/// would repeat `x` in a register first, by VBROADCASTSS, which costs Zen 4 a tenth of its speed.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn dot(mut sum: __m512, w: __m512, x: &u32) -> __m512 {
    // SAFETY: a reference can be read.
    unsafe {
        asm!(
            "vdpbf16ps {sum}, {w}, dword ptr [{x}]{{1to16}}",
            sum = inout(zmm_reg) sum, w = in(zmm_reg) w, x = in(reg) x,
            options(readonly, nostack, preserves_flags)
        );
    }
    sum
}

impl<const DOT: bool> Lanes for Avx512<DOT> {
    const REGISTERS: usize = 32;
    const CHAINS: usize = 24;
    const HAS_DOT: bool = DOT;

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
    unsafe fn high_bf16(pairs: *const u16) -> Self {
        Self(simd!(_mm512_castsi512_ps(_mm512_and_si512(
            _mm512_loadu_si512(pairs.cast()),
            _mm512_set1_epi32(0xffff_0000_u32 as i32)
        ))))
    }

    #[inline(always)]
    unsafe fn low_bf16(pairs: *const u16) -> Self {
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
    fn dot_bf16(self, x: &u32, c: Self) -> Self {
        Self(simd!(dot(c.0, self.0, x)))
    }

    #[inline(always)]
    unsafe fn store_fours(self, to: *mut u32) {
        const THIRD_AND_FOURTH: i32 = 0b11_10_11_10;
        const FIRST_AND_SECOND: u16 = 0x3333;
        simd!({
            let bits = _mm512_castps_si512(self.0);
            let low = _mm512_srli_epi32::<16>(_mm512_shuffle_epi32::<THIRD_AND_FOURTH>(bits));
            let places = _mm512_maskz_compress_epi32(FIRST_AND_SECOND, _mm512_or_si512(bits, low));
            _mm256_storeu_si256(to.cast(), _mm512_castsi512_si256(places));
        });
    }

    #[inline(always)]
    fn nearest_bf16(self) -> Self {
        simd!({
            let bits = _mm512_castps_si512(self.0);
            let last = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let half = _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff));
            let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let nearest = _mm512_mask_mov_epi32(_mm512_add_epi32(bits, half), is_nan, quiet);
            let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            let flush = _mm512_set1_ps(BF16_FLUSH);
            let is_kept = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(_mm512_abs_ps(self.0), flush);
            Self(_mm512_castsi512_ps(_mm512_maskz_and_epi32(is_kept, nearest, high)))
        })
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        simd!({
            let high = _mm512_srli_epi32::<16>(_mm512_castps_si512(self.0));
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(high));
        });
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

    #[inline(always)]
    fn sums<const T: usize>(of: &[Self; T]) -> Self {
        simd!(Self(tree::<false>(&eight(of))))
    }

    #[inline(always)]
    fn max_lanes<const T: usize>(of: &[Self; T]) -> Self {
        simd!(Self(tree::<true>(&eight(of))))
    }
}

/// `of`, filled up with zeros.
#[inline(always)]
fn eight<const DOT: bool, const T: usize>(of: &[Avx512<DOT>; T]) -> [__m512; 8] {
    const { assert!(T <= 8) };
    let mut all = [simd!(_mm512_setzero_ps()); 8];
    for t in 0..T {
        all[t] = of[t].0;
    }
    all
}

/// Lane t is the sum or the largest lane of vector t, in the tree of one vector: its halves, then
/// quarters, and so on. At each level the halves of two vectors become one vector.
#[target_feature(enable = "avx512f")]
#[inline]
fn tree<const MAX: bool>(of: &[__m512; 8]) -> __m512 {
    let quarters = |a: __m512, b: __m512| {
        // Lanes i and i + 8 of a in the first two quarters, those of b in the others.
        let (low, high) = (_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
        join::<MAX>(low, high)
    };
    let four = |a: __m512, b: __m512| {
        // i and i + 4: a quarter for each of four vectors.
        let (low, high) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
        join::<MAX>(low, high)
    };
    let first = four(quarters(of[0], of[1]), quarters(of[2], of[3]));
    let second = four(quarters(of[4], of[5]), quarters(of[6], of[7]));
    // i and i + 2: half a quarter for each of eight.
    let (low, high) =
        (_mm512_shuffle_ps::<0x44>(first, second), _mm512_shuffle_ps::<0xee>(first, second));
    let two = join::<MAX>(low, high);
    let (low, high) = (_mm512_permute_ps::<0xa0>(two), _mm512_permute_ps::<0xf5>(two));
    let one = join::<MAX>(low, high);
    let order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 4, 8, 12, 2, 6, 10, 14);
    _mm512_permutexvar_ps(order, one)
}

/// The sums or the larger lanes.
#[target_feature(enable = "avx512f")]
#[inline]
fn join<const MAX: bool>(a: __m512, b: __m512) -> __m512 {
    if MAX { _mm512_max_ps(a, b) } else { _mm512_add_ps(a, b) }
}
