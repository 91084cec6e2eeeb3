//! Implements the pass on an NVIDIA card (feature `cuda`): the kernels of `kernels/`, in the order
//! of the CPU's decoder. By portable arithmetic rows have the CPU's bits; by tensor arithmetic
//! products and attention have orders of their own.
//!
//! None of it has run on a card. It has run on a stand-in for the driver that executes the kernels
//! on the CPU (`scripts/cuda-check`), where its bits were compared with the CPU engine's.

mod answer;
mod asks;
mod choose;
mod error;
mod graphs;
pub mod launch;
mod layout;
mod memory;
mod noise;
mod pass;
mod step;
mod weights;

pub use error::CudaError;
pub use launch::{Card, cards};
pub use pass::CudaPass;
pub use weights::CudaWeights;

use super::spec::Spec;

/// Bytes that a model takes on a card.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sizes {
    /// Bytes of all packed weights, as a step reads them.
    pub weights: u64,
    /// The same with what fills up their allocations.
    pub held: u64,
    /// One block of the KV cache.
    pub block: u64,
    /// Buffers of a step, logits and results, with what fills up their allocations.
    pub workspace: u64,
}

impl Sizes {
    /// Of a shape, for steps of `rows` rows.
    pub fn new(spec: &Spec, rows: usize) -> Self {
        let answers = memory::held(asks::answer_bytes(spec, rows) as u64);
        Self {
            weights: weights::weight_bytes(spec, |bytes| bytes),
            held: weights::weight_bytes(spec, memory::held),
            block: memory::block_bytes(spec) as u64,
            workspace: step::workspace_bytes(spec, rows) + answers,
        }
    }

    /// What a KV cache of so many bytes takes.
    pub fn cache(bytes: u64) -> u64 {
        memory::held(bytes)
    }
}
