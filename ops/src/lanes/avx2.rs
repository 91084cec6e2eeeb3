//! Implements the lanes with AVX2: two registers each.

use super::{Kernel, Lanes};
use crate::dtype::BF16_FLUSH;
use std::arch::asm;
use std::arch::x86_64::*;

/// Sixteen lanes in two registers.
#[derive(Clone, Copy)]
pub(super) struct Avx2(__m256, __m256);

/// Runs `kernel` with AVX2.
///
/// # Safety
/// The CPU must have the features named here.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Out {
    kernel.run::<Avx2>()
}

/// Calls intrinsics of the features above.
macro_rules! simd {
    ($e:expr) => {
        // SAFETY: the type is only named by `dispatch`, which checked the CPU's features;
        // pointers are covered by the contract of the method that uses them.
        unsafe { $e }
    };
}

impl Avx2 {
    #[inline(always)]
    fn each(self, b: Self, f: impl Fn(__m256, __m256) -> __m256) -> Self {
        Self(f(self.0, b.0), f(self.1, b.1))
    }

    /// Two integer registers reinterpreted.
    #[inline(always)]
    fn from_bits(lo: __m256i, hi: __m256i) -> Self {
        simd!(Self(_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)))
    }
}

/// Half of the lanes of [`Lanes::nearest_bf16`].
#[target_feature(enable = "avx2")]
#[inline]
fn nearest_bf16(x: __m256) -> __m256 {
    let bits = _mm256_castps_si256(x);
    let last = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let half = _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff));
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
    let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
    let nearest = _mm256_blendv_epi8(_mm256_add_epi32(bits, half), quiet, is_nan);
    let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    let size = _mm256_andnot_ps(_mm256_set1_ps(-0.0), x);
    let is_kept = _mm256_cmp_ps::<_CMP_NLT_UQ>(size, _mm256_set1_ps(BF16_FLUSH));
    _mm256_and_ps(_mm256_castsi256_ps(_mm256_and_si256(nearest, high)), is_kept)
}

/// The last three levels of the tree of [`Lanes::sum`].
///
/// # Safety
/// The CPU must have AVX.
#[inline(always)]
pub(super) unsafe fn sum_tree(v: __m256) -> f32 {
    simd!({
        let quarter = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
        _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
    })
}

/// The last three levels of the tree of [`Lanes::max_lane`].
///
/// # Safety
/// The CPU must have AVX.
#[inline(always)]
pub(super) unsafe fn max_tree(v: __m256) -> f32 {
    simd!({
        let quarter = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let pair = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
        _mm_cvtss_f32(_mm_max_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
    })
}

impl Lanes for Avx2 {
    const REGISTERS: usize = 8; // of two registers each; 16 in all
    const CHAINS: usize = 6;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        let v = simd!(_mm256_set1_ps(x));
        Self(v, v)
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        simd!(Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        simd!({
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1);
        })
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        simd!(Self(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)))
    }

    #[inline(always)]
    fn add(self, b: Self) -> Self {
        self.each(b, |a, b| simd!(_mm256_add_ps(a, b)))
    }

    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        self.each(b, |a, b| simd!(_mm256_sub_ps(a, b)))
    }

    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        self.each(b, |a, b| simd!(_mm256_mul_ps(a, b)))
    }

    #[inline(always)]
    fn div(self, b: Self) -> Self {
        self.each(b, |a, b| simd!(_mm256_div_ps(a, b)))
    }

    #[inline(always)]
    fn max(self, b: Self) -> Self {
        self.each(b, |a, b| simd!(_mm256_max_ps(a, b)))
    }

    #[inline(always)]
    fn min(self, b: Self) -> Self {
        self.each(b, |a, b| simd!(_mm256_min_ps(a, b)))
    }

    #[inline(always)]
    fn zero_where_lt(self, x: Self, limit: Self) -> Self {
        let mask = x.each(limit, |x, l| simd!(_mm256_cmp_ps::<_CMP_NLT_UQ>(x, l)));
        self.each(mask, |a, m| simd!(_mm256_and_ps(a, m)))
    }

    #[inline(always)]
    fn scale_by_power(self, magic: Self) -> Self {
        self.each(magic, |a, m| {
            simd!(_mm256_castsi256_ps(_mm256_add_epi32(
                _mm256_castps_si256(a),
                _mm256_slli_epi32::<23>(_mm256_castps_si256(m))
            )))
        })
    }

    #[inline(always)]
    fn again(from: *const u16) -> *const u16 {
        let mut address = from.addr();
        // SAFETY: no instruction.
        unsafe {
            asm!("/* {0} */", inout(reg) address, options(pure, nomem, nostack, preserves_flags));
        }
        from.with_addr(address)
    }

    #[inline(always)]
    unsafe fn high_bf16(pairs: *const u16) -> Self {
        simd!({
            let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            Self::from_bits(
                _mm256_and_si256(_mm256_loadu_si256(pairs.cast()), mask),
                _mm256_and_si256(_mm256_loadu_si256(pairs.add(16).cast()), mask),
            )
        })
    }

    #[inline(always)]
    unsafe fn low_bf16(pairs: *const u16) -> Self {
        simd!(Self::from_bits(
            _mm256_slli_epi32::<16>(_mm256_loadu_si256(pairs.cast())),
            _mm256_slli_epi32::<16>(_mm256_loadu_si256(pairs.add(16).cast())),
        ))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        let widen = |at: *const u16| {
            simd!(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()))))
        };
        simd!(Self::from_bits(widen(from), widen(from.add(8))))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        let widen = |at: *const u16| simd!(_mm256_cvtph_ps(_mm_loadu_si128(at.cast())));
        simd!(Self(widen(from), widen(from.add(8))))
    }

    #[inline(always)]
    fn nearest_bf16(self) -> Self {
        Self(simd!(nearest_bf16(self.0)), simd!(nearest_bf16(self.1)))
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        const LOW_QUARTERS_FIRST: i32 = 0b11_01_10_00;
        simd!({
            let quarters = _mm256_packus_epi32(
                _mm256_srli_epi32::<16>(_mm256_castps_si256(self.0)),
                _mm256_srli_epi32::<16>(_mm256_castps_si256(self.1)),
            );
            let bits = _mm256_permute4x64_epi64::<LOW_QUARTERS_FIRST>(quarters);
            _mm256_storeu_si256(to.cast(), bits);
        });
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        simd!(sum_tree(_mm256_add_ps(self.0, self.1)))
    }

    #[inline(always)]
    fn max_lane(self) -> f32 {
        simd!(max_tree(_mm256_max_ps(self.0, self.1)))
    }
}
