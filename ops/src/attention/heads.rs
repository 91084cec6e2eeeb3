//! Reads one head of one position from the cache, and puts it back.

use super::cache::{KEY_STRIDE, KvCache};
use crate::product::offset;

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
        let (head_dim, dtype) = (self.dims.head_dim, self.dtype);
        let (keys, values) = self.block(at.layer, at.block, at.kv_head);
        let key = |d| keys[offset(dtype, KEY_STRIDE, at.slot, d)];
        let value = |d| values[offset(dtype, 2 * head_dim, d, at.slot)];
        ((0..head_dim).map(key).collect(), (0..head_dim).map(value).collect())
    }

    /// Puts a key and a value in the place of those at `at`.
    pub fn set_head(&mut self, at: HeadAt, key: &[u16], value: &[u16]) {
        let (head_dim, dtype) = (self.dims.head_dim, self.dtype);
        let (keys, values) = self.block_mut(at.layer, at.block, at.kv_head);
        for (d, (key, value)) in key.iter().zip(value).enumerate() {
            keys[offset(dtype, KEY_STRIDE, at.slot, d)] = *key;
            values[offset(dtype, 2 * head_dim, d, at.slot)] = *value;
        }
    }
}
