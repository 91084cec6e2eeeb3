//! Provides sixteen f32 lanes, once per instruction set.
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
#[cfg(target_arch = "x86_64")]
mod dot;
mod isa;
#[cfg(target_arch = "aarch64")]
mod neon;
mod prefetch;
mod scalar;
mod vector;

pub use isa::Isa;
use isa::Set;
pub(crate) use prefetch::prefetch;
pub use scalar::Scalar;
pub use vector::{Kernel, LANES, Lanes};

/// Runs `kernel` with the vectors of `isa`.
#[inline]
pub fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Out {
    match isa.set() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an `Isa` is only made of what the CPU was found to have.
        Set::Avx512Bf16 => unsafe { avx512::run_with_dot(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above; AMX needs AVX-512 too, and was not asked for its BF16.
        Set::Amx if isa.has_dot() => unsafe { avx512::run_with_dot(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Set::Amx | Set::Avx512 => unsafe { avx512::run(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Set::Avx2 => unsafe { avx2::run(kernel) },
        #[cfg(target_arch = "aarch64")]
        Set::Neon => kernel.run::<neon::Neon>(),
        Set::Scalar => kernel.run::<Scalar>(),
        #[allow(unreachable_patterns, reason = "the sets of other architectures")]
        _ => unreachable!("no CPU of this architecture has it"),
    }
}
