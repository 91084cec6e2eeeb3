//! Arithmetic of the CPU engine: one file per operation, written once over sixteen lanes.
//!
//! The numeric canon (what makes a row's bits depend on its tokens and the weights alone):
//! - matrix inputs are rounded to the weights' 16-bit type, everything else is f32;
//! - each output element of a matrix product is one f32 accumulator that runs over k in ascending
//!   pairs, odd index first, then even, each step one fused multiply-add; k is never split;
//! - attention walks the KV cache in blocks aligned to absolute positions, in one order;
//! - reductions over a row have sixteen lanes and one tree; elementary functions are our own.
//!
//! Operations take a [`pool::Turn`] and split over output rows or heads only. Nothing here knows
//! about models or requests.

pub mod attention;
pub mod buffer;
pub mod dtype;
pub mod lanes;
pub mod logits;
pub mod math;
pub mod matmul;
pub mod pool;
pub mod rope;
pub mod rowwise;
