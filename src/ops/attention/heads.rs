//! One head of one position, read from the cache and put back.

use super::{BLOCK_TOKENS, KvCache, PAIR_STRIDE};
use crate::ops::matmul::offset;

/// Where a key and a value of the cache lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HeadAt {
    /// Decoder layer.
    pub layer: usize,
    /// KV block.
    pub block: u32,
    /// Position within the block.
    pub slot: usize,
    /// Key/value head.
    pub kv_head: usize,
}

impl KvCache {
    /// The 16-bit patterns of the key and of the value at `at`.
    pub fn head(&self, at: HeadAt) -> (Vec<u16>, Vec<u16>) {
        let (first, head_dim) = (self.first_of(at), self.dims.head_dim);
        let layer = &self.layers[at.layer];
        let key = |d| layer.keys[first + offset(self.dtype, PAIR_STRIDE, at.slot, d)];
        let value = &layer.values[first + at.slot * head_dim..][..head_dim];
        ((0..head_dim).map(key).collect(), value.to_vec())
    }

    /// Puts a key and a value in the place of those at `at`.
    pub fn set_head(&mut self, at: HeadAt, key: &[u16], value: &[u16]) {
        let (first, head_dim, dtype) = (self.first_of(at), self.dims.head_dim, self.dtype);
        let layer = &mut self.layers[at.layer];
        for (d, bits) in key.iter().enumerate() {
            layer.keys[first + offset(dtype, PAIR_STRIDE, at.slot, d)] = *bits;
        }
        layer.values[first + at.slot * head_dim..][..head_dim].copy_from_slice(value);
    }

    /// Where a block's keys and values of a head begin.
    fn first_of(&self, at: HeadAt) -> usize {
        at.block as usize * self.dims.block_len() + at.kv_head * BLOCK_TOKENS * self.dims.head_dim
    }
}
