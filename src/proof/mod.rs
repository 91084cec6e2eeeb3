//! Pure arithmetic of proofs: bytes in, bytes out; no clock, no I/O, no tensors.

pub mod philox;
pub mod seed;
