//! Asks for memory before it is read.

/// Lines that are asked for go to the second-level cache. Into the first, fewer can be under way at
/// once, and loads wait behind them.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn prefetch(at: *const u16) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: every x86-64 CPU has the instruction, and it faults at no address.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
}

/// Rust has no stable prefetch for other architectures.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub(crate) fn prefetch(_at: *const u16) {}
