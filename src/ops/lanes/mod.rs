//! Sixteen f32 lanes, once per instruction set.
//!
//! Every kernel of the CPU engine is written once over [`Lanes`] and run through [`dispatch`],
//! which picks the instruction set at run time. All methods are lane-wise IEEE operations with one
//! rounding each, and the two reductions have a fixed tree, so every instruction set gives the same
//! bits (`tests/engine/canon.rs`). [`Scalar`] is the reference.
//!
//! The types are only ever named by `dispatch`, after the CPU was asked for the features: that is
//! what makes the intrinsics inside them sound. Deliberately absent: reciprocal and square-root
//! estimates, horizontal adds of hardware order, anything whose result differs between vendors.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

use std::fmt;
use std::str::FromStr;

pub use scalar::Scalar;

/// Lanes in one vector, whatever the hardware width.
pub const LANES: usize = 16;

/// Sixteen f32 values; see the module text for the contract.
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
    /// `self * 2^n`, n being the integer in the low bits of `magic` (see [`super::math::exp`]).
    /// `self` must lie in [0.5, 2] and n in [-126, 127].
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

/// Instruction set of the CPU kernels. All give equal bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Isa {
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// Arm NEON.
    Neon,
    /// Plain Rust; the reference.
    Scalar,
}

impl Isa {
    const ALL: [Isa; 4] = [Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Scalar];

    /// The fastest set this CPU has.
    pub fn best() -> Isa {
        Isa::available()[0]
    }

    /// Every set this CPU has, fastest first; never empty.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    #[cfg(target_arch = "x86_64")]
    fn is_available(self) -> bool {
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        match self {
            Isa::Avx512 => avx512,
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            Isa::Neon => false,
            Isa::Scalar => true,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_available(self) -> bool {
        match self {
            Isa::Neon => cfg!(target_arch = "aarch64"),
            Isa::Scalar => true,
            Isa::Avx512 | Isa::Avx2 => false,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Neon => "neon",
            Isa::Scalar => "scalar",
        })
    }
}

impl FromStr for Isa {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Isa::ALL.into_iter().find(|isa| isa.to_string() == name);
        match known {
            Some(isa) if isa.is_available() => Ok(isa),
            Some(isa) => Err(format!("this CPU has no {isa}; it has {:?}", Isa::available())),
            None => Err(format!("unknown instruction set `{name}`; known: {:?}", Isa::ALL)),
        }
    }
}

/// A computation written once over [`Lanes`]. `run` must be `#[inline(always)]`.
pub trait Kernel {
    /// What the computation returns.
    type Out;
    /// The computation.
    fn run<L: Lanes>(self) -> Self::Out;
}

/// Runs `kernel` with the vectors of `isa`.
///
/// # Panics
/// When this CPU lacks `isa`: an [`Isa`] value is meant to come from [`Isa::available`].
#[inline]
pub fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Out {
    debug_assert!(isa.is_available());
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `isa` comes from `Isa::available`, so the CPU has the features.
        Isa::Avx512 => unsafe { avx512::run(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { avx2::run(kernel) },
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => kernel.run::<neon::Neon>(),
        Isa::Scalar => kernel.run::<Scalar>(),
        #[allow(unreachable_patterns, reason = "the sets of other architectures")]
        other => panic!("this CPU has no {other}"),
    }
}
