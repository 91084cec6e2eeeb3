//! Holds the paged KV cache: blocks of 32 positions, packed for the products of attention.
//!
//! Keys of a head are a packed matrix with positions side by side and the head dimension in pairs;
//! values one with the head dimension side by side and positions in pairs
//! ([`product`](crate::product)). So scores and weighted values are both products of the
//! canon.

use crate::buffer::Buffer;
use crate::dtype::Dtype;
use crate::lanes::LANES;
use crate::pool::{Disjoint, Turn};
use crate::product::{FOUR, chain_offset};
use crate::rounded::round_bits;
use std::io;
use std::ops::Range;

/// Positions in a KV block.
pub const BLOCK_TOKENS: usize = 32;
/// Elements of the largest head that attention computes.
pub const HEAD_DIM_MAX: usize = 256;
/// 16-bit values of one pair of the head dimension over the positions of a block.
pub(super) const KEY_STRIDE: usize = 2 * BLOCK_TOKENS;

/// Shape of the KV cache of one model.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvDims {
    /// Decoder layers.
    pub layers: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl KvDims {
    /// 16-bit values in the keys (or values) of one block, one layer.
    fn block_len(self) -> usize {
        self.kv_heads * BLOCK_TOKENS * self.head_dim
    }

    /// Bytes of one block over all layers, keys and values.
    pub fn block_bytes(self) -> usize {
        self.layers * self.block_len() * 2 * 2
    }
}

/// Keys and values of all blocks.
pub struct KvCache {
    pub(super) dims: KvDims,
    pub(super) dtype: Dtype,
    layers: Vec<KvLayer>,
}

struct KvLayer {
    keys: Buffer,   // (blocks, kv_heads, head_dim / 2, BLOCK_TOKENS, 2)
    values: Buffer, // (blocks, kv_heads, BLOCK_TOKENS / 2, head_dim, 2)
}

/// Where the elements of one key/value head lie in a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockLayout {
    dtype: Dtype,
    head_dim: usize,
}

impl BlockLayout {
    /// Element `d` of the key of the position `slot` of the block, among the block's keys.
    #[inline(always)]
    pub fn key(self, slot: usize, d: usize) -> usize {
        chain_offset(self.dtype, KEY_STRIDE, slot, d)
    }

    /// Element `d` of the value of the position `slot` of the block, among the block's values.
    #[inline(always)]
    pub fn value(self, slot: usize, d: usize) -> usize {
        chain_offset(self.dtype, 2 * self.head_dim, d, slot)
    }

    /// Writes the key of the position `slot` among the block's keys. Places are counted on from the
    /// first ones, which takes half the time of asking for each.
    fn scatter_key(self, bits: &[u16], slot: usize, keys: &mut [u16]) {
        let first: [usize; FOUR] = std::array::from_fn(|d| self.key(slot, d));
        for (keys, bits) in keys.chunks_exact_mut(2 * KEY_STRIDE).zip(bits.chunks_exact(FOUR)) {
            for (at, bits) in first.into_iter().zip(bits) {
                keys[at] = *bits;
            }
        }
    }

    /// The same of its value, whole vectors.
    fn scatter_value(self, bits: &[u16], slot: usize, values: &mut [u16]) {
        let step = self.value(slot, 1) - self.value(slot, 0);
        for (vec, bits) in bits.chunks_exact(LANES).enumerate() {
            let to = values[self.value(slot, vec * LANES)..].iter_mut().step_by(step);
            to.zip(bits).for_each(|(to, bits)| *to = *bits);
        }
    }
}

/// The rows of one sequence in a step, consecutive in the batch and in position.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Rows of the batch.
    pub rows: Range<usize>,
    /// Absolute position of the first row.
    pub start: usize,
    /// Block table: the block that holds each 32 positions, from position 0.
    pub blocks: Vec<u32>,
}

impl Segment {
    pub(super) fn position(&self, row: usize) -> usize {
        self.start + row - self.rows.start
    }
}

impl KvCache {
    /// Room for `blocks` blocks; memory is only backed once it is written.
    ///
    /// # Errors
    /// When the system refuses the address space.
    pub fn new(dims: KvDims, dtype: Dtype, blocks: usize) -> io::Result<Self> {
        let len = blocks * dims.block_len();
        let mut buffers = Buffer::all_zeroed(len, 2 * dims.layers)?.into_iter();
        let pairs = std::iter::from_fn(|| buffers.next().zip(buffers.next()));
        let layers = pairs.map(|(keys, values)| KvLayer { keys, values }).collect();
        Ok(Self { dims, dtype, layers })
    }

    /// Shape of the cache.
    pub fn dims(&self) -> KvDims {
        self.dims
    }

    /// Type of the keys and values.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Where the elements of one head lie in a block.
    pub fn layout(&self) -> BlockLayout {
        BlockLayout { dtype: self.dtype, head_dim: self.dims.head_dim }
    }

    /// Stores the keys and values of a step in `layer`. `qkv` is (rows, row_len); keys start at
    /// column `k_at`, values follow them.
    pub fn store(
        &mut self,
        turn: &Turn<'_>,
        layer: usize,
        segments: &[Segment],
        (qkv, row_len, k_at): (&[f32], usize, usize),
    ) {
        let KvDims { kv_heads, head_dim, .. } = self.dims;
        let (block_len, head_len, dtype) =
            (self.dims.block_len(), BLOCK_TOKENS * head_dim, self.dtype);
        assert!(head_dim.is_multiple_of(LANES) && head_dim <= HEAD_DIM_MAX);
        let layout = self.layout();
        let KvLayer { keys, values } = &mut self.layers[layer];
        let (keys, values) = (Disjoint::new(keys), Disjoint::new(values));
        turn.run(segments.len() * kv_heads, |task| {
            let (segment, head) = (&segments[task / kv_heads], task % kv_heads);
            for row in segment.rows.clone() {
                let position = segment.position(row);
                let (block, slot) = (position / BLOCK_TOKENS, position % BLOCK_TOKENS);
                let at = segment.blocks[block] as usize * block_len + head * head_len;
                // SAFETY: a block that is written belongs to one sequence, a head to one task.
                let (keys, values) =
                    unsafe { (keys.piece(at..at + head_len), values.piece(at..at + head_len)) };
                if slot == 0 {
                    // Stale values would meet a weight of zero; they must be finite.
                    values.fill(0);
                }
                let k = &qkv[row * row_len + k_at + head * head_dim..][..head_dim];
                let v = &qkv[row * row_len + k_at + (kv_heads + head) * head_dim..][..head_dim];
                let mut bits = [0; HEAD_DIM_MAX];
                let bits = &mut bits[..head_dim];
                round_bits(turn.isa(), dtype, k, bits);
                layout.scatter_key(bits, slot, keys);
                round_bits(turn.isa(), dtype, v, bits);
                layout.scatter_value(bits, slot, values);
            }
        });
    }

    /// Keys and values of one head of a block in `layer`.
    #[inline(always)]
    pub(super) fn block(&self, layer: usize, block: u32, kv_head: usize) -> (&[u16], &[u16]) {
        let head_len = BLOCK_TOKENS * self.dims.head_dim;
        let at = block as usize * self.dims.block_len() + kv_head * head_len;
        let KvLayer { keys, values } = &self.layers[layer];
        (&keys[at..at + head_len], &values[at..at + head_len])
    }

    /// The same, to be changed: 16-bit patterns that lie as [`layout`](Self::layout) says.
    pub fn block_mut(
        &mut self,
        layer: usize,
        block: u32,
        kv_head: usize,
    ) -> (&mut [u16], &mut [u16]) {
        let head_len = BLOCK_TOKENS * self.dims.head_dim;
        let at = block as usize * self.dims.block_len() + kv_head * head_len;
        let KvLayer { keys, values } = &mut self.layers[layer];
        (&mut keys[at..at + head_len], &mut values[at..at + head_len])
    }
}
