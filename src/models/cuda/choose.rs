//! Chooses the kernel of a product and of attention, by arithmetic, type and how many rows there
//! are. Which one is taken changes no bit within an arithmetic.

use super::memory::{TILE, padded};
use crate::models::arithmetic::Arithmetic;
use crate::models::spec::{ExpertSpec, Spec};
use crate::ops::attention::PARTITION_TOKENS;
use crate::ops::dtype::Dtype;

/// Tokens up to which tensor products are spread over slices of k: above, tiles are enough work.
const TENSOR_DECODE_MAX: usize = 64;
/// Slots of an average expert up to which a mixture takes the kernels for few.
const PORTABLE_FEW_MAX: usize = 16;

/// A kernel for products, and what a thread block of it takes.
pub(super) struct Product {
    pub(super) kernel: &'static str,
    /// Tokens of a thread block.
    pub(super) group: usize,
    /// Rows of a thread block.
    pub(super) rows: usize,
    pub(super) threads: u32,
}

impl Product {
    /// For so many tokens and columns.
    pub(super) fn new(arithmetic: Arithmetic, tokens: usize, cols: usize, dtype: Dtype) -> Self {
        match arithmetic {
            Arithmetic::Portable => Self::portable(tokens, dtype),
            Arithmetic::Tensor => Self::tensor(tokens, cols, dtype),
        }
    }

    /// For the slots of a mixture, grouped by expert: few of an average expert, or many.
    pub(super) fn grouped(
        arithmetic: Arithmetic,
        slots: usize,
        (spec, mixture): (&Spec, &ExpertSpec),
        dtype: Dtype,
    ) -> Self {
        let average = slots / mixture.count;
        let are_whole = (spec.hidden | spec.feed_forward.inter).is_multiple_of(8);
        let is_prefill = match arithmetic {
            Arithmetic::Portable => average > PORTABLE_FEW_MAX,
            Arithmetic::Tensor => average > TENSOR_DECODE_MAX && are_whole,
        };
        let (kernel, group) = match (arithmetic, is_prefill, dtype) {
            (Arithmetic::Portable, false, Dtype::Bf16) => ("grouped_bf16_8", 8),
            (Arithmetic::Portable, false, Dtype::F16) => ("grouped_f16_8", 8),
            (Arithmetic::Portable, true, Dtype::Bf16) => ("grouped_bf16_64", 64),
            (Arithmetic::Portable, true, Dtype::F16) => ("grouped_f16_64", 64),
            (Arithmetic::Tensor, false, Dtype::Bf16) => ("grouped_mma_bf16_32", 32),
            (Arithmetic::Tensor, false, Dtype::F16) => ("grouped_mma_f16_32", 32),
            (Arithmetic::Tensor, true, Dtype::Bf16) => ("grouped_mma_bf16_128", 128),
            (Arithmetic::Tensor, true, Dtype::F16) => ("grouped_mma_f16_128", 128),
        };
        let [rows, threads] = if is_prefill { [64, 128] } else { [32, 256] };
        Self { kernel, group, rows, threads: threads as u32 }
    }

    /// The kernel of `matmul_portable.cu`.
    fn portable(tokens: usize, dtype: Dtype) -> Self {
        let (kernel, group) = match (tokens, dtype) {
            (1, Dtype::Bf16) => ("decode_bf16_1", 1),
            (1, Dtype::F16) => ("decode_f16_1", 1),
            (2..=4, Dtype::Bf16) => ("decode_bf16_4", 4),
            (2..=4, Dtype::F16) => ("decode_f16_4", 4),
            (5..=16, Dtype::Bf16) => ("decode_bf16_8", 8),
            (5..=16, Dtype::F16) => ("decode_f16_8", 8),
            (_, Dtype::Bf16) => ("prefill_bf16", 64),
            (_, Dtype::F16) => ("prefill_f16", 64),
        };
        let [rows, threads] = if group == 64 { [64, 128] } else { [32, 256] };
        Self { kernel, group, rows, threads: threads as u32 }
    }

    /// The kernel of `matmul_tensor.cu`. Its prefill copies 16 bytes at once, so rows of inputs
    /// must be whole numbers of them.
    fn tensor(tokens: usize, cols: usize, dtype: Dtype) -> Self {
        let is_prefill = tokens > TENSOR_DECODE_MAX && cols.is_multiple_of(8);
        let (kernel, group) = match (is_prefill, tokens, dtype) {
            (false, 1..=8, Dtype::Bf16) => ("decode_mma_bf16_8", 8),
            (false, 1..=8, Dtype::F16) => ("decode_mma_f16_8", 8),
            (false, _, Dtype::Bf16) => ("decode_mma_bf16_32", 32),
            (false, _, Dtype::F16) => ("decode_mma_f16_32", 32),
            (true, _, Dtype::Bf16) => ("prefill_mma_bf16", 128),
            (true, _, Dtype::F16) => ("prefill_mma_f16", 128),
        };
        let [rows, threads] = if is_prefill { [64, 128] } else { [32, 256] };
        Self { kernel, group, rows, threads: threads as u32 }
    }
}

/// Tiles that so many slots make at most, whatever their experts: every expert may have one that
/// is not full.
pub(super) fn slot_tiles(slots: usize, group: usize, mixture: &ExpertSpec) -> usize {
    slots / group + mixture.count.min(slots)
}

/// A kernel of attention, and what a thread block of it takes.
pub(super) struct AttentionKernel {
    pub(super) kernel: &'static str,
    pub(super) threads: u32,
    /// Bytes of dynamic shared memory.
    pub(super) shared: usize,
}

impl AttentionKernel {
    /// Queries of a thread block, where a sequence has up to `widest` in a step.
    pub(super) fn queries(arithmetic: Arithmetic, widest: usize, head_dim: usize) -> usize {
        match (arithmetic, widest) {
            (Arithmetic::Portable, 1) => 1,
            // Larger tiles of wide heads do not fit in a thread block's memory.
            (Arithmetic::Portable, n) if n <= 4 || head_dim > 128 => 4,
            (Arithmetic::Portable, _) | (Arithmetic::Tensor, 1..=8) => 8,
            (Arithmetic::Tensor, _) => 32,
        }
    }

    /// For thread blocks of so many queries.
    pub(super) fn new(
        arithmetic: Arithmetic,
        queries: usize,
        head_dim: usize,
        dtype: Dtype,
    ) -> Self {
        let kernel = match (arithmetic, queries, dtype) {
            (Arithmetic::Portable, 1, Dtype::Bf16) => "attend_bf16_1",
            (Arithmetic::Portable, 4, Dtype::Bf16) => "attend_bf16_4",
            (Arithmetic::Portable, _, Dtype::Bf16) => "attend_bf16_8",
            (Arithmetic::Portable, 1, Dtype::F16) => "attend_f16_1",
            (Arithmetic::Portable, 4, Dtype::F16) => "attend_f16_4",
            (Arithmetic::Portable, _, Dtype::F16) => "attend_f16_8",
            (Arithmetic::Tensor, 8, Dtype::Bf16) => "attend_mma_bf16_8",
            (Arithmetic::Tensor, _, Dtype::Bf16) => "attend_mma_bf16_32",
            (Arithmetic::Tensor, 8, Dtype::F16) => "attend_mma_f16_8",
            (Arithmetic::Tensor, _, Dtype::F16) => "attend_mma_f16_32",
        };
        match arithmetic {
            Arithmetic::Portable => {
                let warps = if queries == 8 { 4 } else { 8 };
                let floats = PARTITION_TOKENS + padded(head_dim) + warps * head_dim;
                Self { kernel, threads: 32 * warps as u32, shared: 4 * queries * floats }
            }
            Arithmetic::Tensor => {
                // 16-byte words of a query and of its weights. An odd number of four keeps two
                // queries off each other's banks.
                let words = 4 * (head_dim.div_ceil(TILE) | 1) + PARTITION_TOKENS / 8 + 4;
                Self { kernel, threads: 512, shared: 16 * queries * words }
            }
        }
    }
}
