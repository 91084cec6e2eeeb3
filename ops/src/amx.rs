//! Multiplies with the bf16 tiles of AMX, in the order of the canon.
//!
//! A tile has up to 16 rows of 64 bytes. For each of its 16 x 16 outputs one TDPBF16PS computes
//! what the canon says of a block of k: a chain of fused multiply-adds over the even elements and
//! one over the odd ones, both from +0, rounded to the nearest; then their sum is added to the
//! output. It flushes subnormals, and there are none ([`product`](super::product)).
//!
//! A system may name tiles and refuse them, so [`support`] tries them before the first use.

#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
pub(crate) mod emulated;
pub mod support;
pub mod unit;
