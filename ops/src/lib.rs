//! Does the arithmetic of the CPU engine: one file per operation, written once over sixteen lanes.
//!
//! The numeric canon (what makes a row's bits depend on its tokens and the weights alone):
//! - inputs of matrix products are rounded to the weights' 16-bit type (weights, activations, and
//!   in attention queries, keys, values and softmax weights), everything else is f32;
//! - a matrix product cuts k into blocks of 32; in each, an even and an odd chain of fused
//!   multiply-adds from +0 are added, and the blocks' sums are added in ascending order
//!   ([`product`]); k is never split otherwise;
//! - attention has blocks of 32 and partitions of 512 at absolute positions, in one order
//!   ([`attention`]);
//! - reductions over a row have sixteen lanes and one tree; elementary functions are our own.
//!
//! All of it together is [`CANON`]. Another order of additions is another canon with another name:
//! proofs are bound to it, and rows of different canons are never compared bit for bit.
//!
//! Operations take a [`pool::Turn`] and split over output rows or heads only. Nothing here knows
//! about models or requests.

/// Name of the numeric canon, which every row of this engine is computed in.
pub const CANON: &str = "canon-2";

pub mod amx;
pub mod attention;
pub mod buffer;
pub mod dtype;
pub mod gated;
pub mod gumbel;
pub mod lanes;
pub mod lcg;
pub mod logits;
pub mod math;
pub mod matmul;
pub mod philox;
pub mod pool;
pub mod product;
pub mod rope;
pub mod rounded;
pub mod rounding;
pub mod rowwise;
mod tasks;
