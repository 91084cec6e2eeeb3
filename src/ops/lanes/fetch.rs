//! Asks the processor for memory before it is used; no result depends on it.

/// Bytes that memory is fetched by, on every CPU that has AVX2.
#[cfg(target_arch = "x86_64")]
const LINE_BYTES: usize = 64;

/// Asks for all of `values`. Processors fetch ahead by themselves within a page of 4 KiB and not
/// into the next one, which is where kernels that walk over pages ask.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub fn fetch(values: &[u16]) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    for line in values.chunks(LINE_BYTES / size_of::<u16>()) {
        // SAFETY: the instruction is part of every x86-64 CPU and cannot fault.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
}

/// Asks for nothing: the other architectures have no stable instruction for it.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub fn fetch(_: &[u16]) {}
