//! Causal attention over a paged KV cache, and the cache itself.
//!
//! A block holds 32 positions aligned to absolute positions. Keys lie as a small packed matrix
//! (positions side by side, head dimension in pairs), so that scores are products of the canon;
//! values lie row by row. A query walks the blocks in ascending order with an online softmax
//! (Milakov and Gimelshein, 2018): per block the new maximum, the rescaling of the running sums,
//! the block's exponentials, then values in ascending position. Masked positions have weight
//! exactly zero, so a query's result does not depend on which other queries share its tile.

mod heads;

pub use heads::HeadAt;

use super::buffer::Buffer;
use super::dtype::{Dtype, Rounded};
use super::lanes::{Kernel, LANES, Lanes, dispatch};
use super::math;
use super::matmul::{VEC_STRIDE, fma_tile, offset};
use super::pool::{Disjoint, Turn};
use super::rowwise::round_piece;
use std::io;
use std::ops::Range;

/// Positions in a KV block.
pub const BLOCK_TOKENS: usize = 32;
/// Largest head dimension.
pub const HEAD_DIM_MAX: usize = 256;

const KEY_VECS: usize = BLOCK_TOKENS / LANES;
const PAIR_STRIDE: usize = 2 * BLOCK_TOKENS;
const TILE_QUERIES: usize = 6;
const VALUE_VECS: usize = 4;

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
    dims: KvDims,
    dtype: Dtype,
    layers: Vec<KvLayer>,
}

struct KvLayer {
    keys: Buffer,   // (blocks, kv_heads, head_dim / 2, BLOCK_TOKENS, 2)
    values: Buffer, // (blocks, kv_heads, BLOCK_TOKENS, head_dim)
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
    fn position(&self, row: usize) -> usize {
        self.start + row - self.rows.start
    }
}

/// What attention needs to know of a layer.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// `cap * tanh(score / cap)` before the softmax.
    pub softcap: Option<f32>,
    /// A query sees this many positions, its own included.
    pub window: Option<usize>,
}

impl KvCache {
    /// Room for `blocks` blocks; memory is only backed once it is written.
    ///
    /// # Errors
    /// When the system refuses the address space.
    pub fn new(dims: KvDims, dtype: Dtype, blocks: usize) -> io::Result<Self> {
        let len = blocks * dims.block_len();
        let layer = || Ok(KvLayer { keys: Buffer::zeroed(len)?, values: Buffer::zeroed(len)? });
        let layers = (0..dims.layers).map(|_| layer()).collect::<io::Result<_>>()?;
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
                for (d, k) in k.iter().enumerate() {
                    keys[offset(dtype, PAIR_STRIDE, slot, d)] = dtype.round(*k);
                }
                for (to, v) in values[slot * head_dim..].iter_mut().zip(v) {
                    *to = dtype.round(*v);
                }
            }
        });
    }

    /// Attends in `layer`: queries are the first `heads * head_dim` columns of `qkv`
    /// (rows, row_len); the result, rounded, goes to `out` (rows, heads * head_dim).
    pub fn attend(
        &self,
        turn: &Turn<'_>,
        layer: usize,
        attention: Attention,
        segments: &[Segment],
        (qkv, row_len): (&[f32], usize),
        out: &mut Rounded,
    ) {
        let group = attention.heads / self.dims.kv_heads;
        let tasks = tasks(segments, self.dims.kv_heads, group, turn.threads());
        let (dtype, out_len) = (out.dtype(), out.cols());
        out.set_rows(qkv.len() / row_len);
        let (bits, values) = out.parts_mut();
        let (bits, values) = (Disjoint::new(bits), Disjoint::new(values));
        let sink = |row: usize, head: usize, result: &[f32]| {
            let at = row * out_len + head * self.dims.head_dim;
            // SAFETY: each (row, head) is computed by one task.
            unsafe { round_piece(dtype, result, &bits, &values, at) };
        };
        turn.run(tasks.len(), |i| {
            let Task { segment, kv_head, queries } = tasks[i].clone();
            let segment = &segments[segment];
            for first in queries.clone().step_by(TILE_QUERIES) {
                let queries = first..(first + TILE_QUERIES).min(queries.end);
                let tile = Tile {
                    cache: self,
                    layer: &self.layers[layer],
                    attention,
                    segment,
                    kv_head,
                    group,
                    queries,
                    qkv,
                    row_len,
                    sink: &sink,
                };
                dispatch(turn.isa(), tile);
            }
        });
    }
}

/// Queries `row * group + head-in-group` of one segment and key/value head.
#[derive(Clone)]
struct Task {
    segment: usize,
    kv_head: usize,
    queries: Range<usize>,
}

fn tasks(segments: &[Segment], kv_heads: usize, group: usize, threads: usize) -> Vec<Task> {
    let total: usize = segments.iter().map(|s| s.rows.len() * kv_heads * group).sum();
    let size = match total / (threads * 3) {
        small @ 0..TILE_QUERIES => small.max(1),
        large => large.min(8 * TILE_QUERIES).next_multiple_of(TILE_QUERIES),
    };
    let mut tasks = Vec::new();
    // Long contexts first within a segment: the late rows cost most and finish last otherwise.
    for (index, segment) in segments.iter().enumerate() {
        let queries = segment.rows.len() * group;
        for first in (0..queries).step_by(size).rev() {
            tasks.extend((0..kv_heads).map(|kv_head| Task {
                segment: index,
                kv_head,
                queries: first..(first + size).min(queries),
            }));
        }
    }
    tasks
}

/// Up to six queries that share a key/value head.
struct Tile<'a, S> {
    cache: &'a KvCache,
    layer: &'a KvLayer,
    attention: Attention,
    segment: &'a Segment,
    kv_head: usize,
    group: usize,
    queries: Range<usize>,
    qkv: &'a [f32],
    row_len: usize,
    sink: &'a S,
}

/// Online softmax of one query.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f32,
}

impl<S: Fn(usize, usize, &[f32])> Kernel for Tile<'_, S> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        match (self.cache.dtype, self.queries.len()) {
            (Dtype::Bf16, 1) => self.tile::<L, 1, false>(),
            (Dtype::Bf16, 2) => self.tile::<L, 2, false>(),
            (Dtype::Bf16, 3) => self.tile::<L, 3, false>(),
            (Dtype::Bf16, 4) => self.tile::<L, 4, false>(),
            (Dtype::Bf16, 5) => self.tile::<L, 5, false>(),
            (Dtype::Bf16, _) => self.tile::<L, TILE_QUERIES, false>(),
            (Dtype::F16, 1) => self.tile::<L, 1, true>(),
            (Dtype::F16, 2) => self.tile::<L, 2, true>(),
            (Dtype::F16, 3) => self.tile::<L, 3, true>(),
            (Dtype::F16, 4) => self.tile::<L, 4, true>(),
            (Dtype::F16, 5) => self.tile::<L, 5, true>(),
            (Dtype::F16, _) => self.tile::<L, TILE_QUERIES, true>(),
        }
    }
}

impl<S: Fn(usize, usize, &[f32])> Tile<'_, S> {
    /// Row and head of query `t` of the tile.
    #[inline(always)]
    fn query(&self, t: usize) -> (usize, usize) {
        let index = self.queries.start + t;
        let row = self.segment.rows.start + index / self.group;
        (row, self.kv_head * self.group + index % self.group)
    }

    #[inline(always)]
    fn tile<L: Lanes, const T: usize, const F16: bool>(&self) {
        let head_dim = self.cache.dims.head_dim;
        let head_len = BLOCK_TOKENS * head_dim;
        let mut seen = [const { 0..0 }; T];
        seen.iter_mut().enumerate().for_each(|(t, s)| *s = self.seen(t));
        let first = seen.iter().map(|s| s.start).min().unwrap_or(0) / BLOCK_TOKENS;
        let end = seen.iter().map(|s| s.end).max().unwrap_or(0);
        let mut running = [Running { max: f32::NEG_INFINITY, sum: 0.0 }; T];
        let mut out = [[0.0_f32; HEAD_DIM_MAX]; T];
        for block in first..end.div_ceil(BLOCK_TOKENS) {
            let base = block * BLOCK_TOKENS;
            let at = self.segment.blocks[block] as usize * self.cache.dims.block_len()
                + self.kv_head * head_len;
            let mut scores = [[0.0_f32; BLOCK_TOKENS]; T];
            self.scores::<L, T, F16>(&self.layer.keys[at..at + head_len], &mut scores);
            let mut valid = [const { 0..0 }; T];
            for (valid, seen) in valid.iter_mut().zip(&seen) {
                *valid = seen.start.clamp(base, base + BLOCK_TOKENS) - base
                    ..seen.end.clamp(base, base + BLOCK_TOKENS) - base;
            }
            let rescale = self.soften::<L, T>(&mut scores, &valid, &mut running);
            let keys = (end - base).min(BLOCK_TOKENS);
            let values = &self.layer.values[at..at + keys * head_dim];
            accumulate::<L, T, F16>(values, head_dim, &scores, rescale, &mut out);
        }
        for t in 0..T {
            let (row, head) = self.query(t);
            let result = &mut out[t][..head_dim];
            result.iter_mut().for_each(|o| *o /= running[t].sum);
            (self.sink)(row, head, result);
        }
    }

    /// Positions that query `t` attends to.
    #[inline(always)]
    fn seen(&self, t: usize) -> Range<usize> {
        let position = self.segment.position(self.query(t).0);
        let window = self.attention.window.unwrap_or(usize::MAX);
        (position + 1).saturating_sub(window)..position + 1
    }

    /// `scores[t][j] = sum_d q[t][d] * k[j][d]`.
    #[inline(always)]
    fn scores<L: Lanes, const T: usize, const F16: bool>(
        &self,
        keys: &[u16],
        scores: &mut [[f32; BLOCK_TOKENS]; T],
    ) {
        let head_dim = self.cache.dims.head_dim;
        let query = |t: usize| {
            let (row, head) = self.query(t);
            &self.qkv[row * self.row_len + head * head_dim..][..head_dim]
        };
        if L::ROW_VECS >= KEY_VECS {
            let acc = fma_tile::<L, T, KEY_VECS, PAIR_STRIDE, F16>(keys, head_dim / 2, query);
            for t in 0..T {
                for v in 0..KEY_VECS {
                    scores[t][v * LANES..][..LANES].copy_from_slice(&acc[t][v].to_array());
                }
            }
            return;
        }
        for v in 0..KEY_VECS {
            let keys = &keys[v * VEC_STRIDE..];
            let acc = fma_tile::<L, T, 1, PAIR_STRIDE, F16>(keys, head_dim / 2, query);
            for t in 0..T {
                scores[t][v * LANES..][..LANES].copy_from_slice(&acc[t][0].to_array());
            }
        }
    }

    /// Turns scores into weights relative to each query's new maximum, updates the running sums
    /// and returns the factors on what was accumulated before. A query that sees nothing of the
    /// block gets weights of zero and a factor of one.
    #[inline(always)]
    fn soften<L: Lanes, const T: usize>(
        &self,
        scores: &mut [[f32; BLOCK_TOKENS]; T],
        valid: &[Range<usize>; T],
        running: &mut [Running; T],
    ) -> [f32; T] {
        let mut falls = [0.0_f32; LANES]; // old maximum - new maximum
        for t in 0..T {
            let block_max = self.mask::<L>(&mut scores[t], &valid[t]);
            let old = running[t].max;
            running[t].max = if old > block_max { old } else { block_max };
            falls[t] = if valid[t].is_empty() { 0.0 } else { old - running[t].max };
        }
        // SAFETY: the array holds 16 values.
        let factors = math::exp(unsafe { L::load(falls.as_ptr()) }).to_array();
        let mut rescale = [1.0; T];
        for t in 0..T {
            rescale[t] = factors[t];
            if valid[t].is_empty() {
                scores[t].fill(0.0);
                continue;
            }
            let mut vecs: [L; KEY_VECS] = load_vecs(&scores[t]);
            let max = L::splat(running[t].max);
            for v in &mut vecs {
                *v = math::exp(v.sub(max));
            }
            store_vecs(&vecs, &mut scores[t]);
            running[t].sum = running[t].sum.mul_add(rescale[t], vecs[0].add(vecs[1]).sum());
        }
        rescale
    }

    /// Scales and caps one query's scores, puts -infinity where it does not see, and returns the
    /// largest.
    #[inline(always)]
    fn mask<L: Lanes>(&self, scores: &mut [f32; BLOCK_TOKENS], valid: &Range<usize>) -> f32 {
        let mut vecs: [L; KEY_VECS] = load_vecs(scores);
        for v in &mut vecs {
            *v = v.mul(L::splat(self.attention.scale));
            if let Some(cap) = self.attention.softcap {
                *v = math::tanh(v.div(L::splat(cap))).mul(L::splat(cap));
            }
        }
        store_vecs(&vecs, scores);
        if *valid != (0..BLOCK_TOKENS) {
            scores[..valid.start].fill(f32::NEG_INFINITY);
            scores[valid.end..].fill(f32::NEG_INFINITY);
            vecs = load_vecs(scores);
        }
        vecs[0].max(vecs[1]).max_lane()
    }
}

#[inline(always)]
fn load_vecs<L: Lanes>(from: &[f32; BLOCK_TOKENS]) -> [L; KEY_VECS] {
    let mut vecs = [L::splat(0.0); KEY_VECS];
    for (v, vec) in vecs.iter_mut().enumerate() {
        // SAFETY: the array holds KEY_VECS times 16 values.
        *vec = unsafe { L::load(from.as_ptr().add(v * LANES)) };
    }
    vecs
}

#[inline(always)]
fn store_vecs<L: Lanes>(vecs: &[L; KEY_VECS], to: &mut [f32; BLOCK_TOKENS]) {
    for (v, vec) in vecs.iter().enumerate() {
        to[v * LANES..][..LANES].copy_from_slice(&vec.to_array());
    }
}

/// `out[t] = out[t] * rescale[t] + sum_j weights[t][j] * values[j]`, j ascending.
#[inline(always)]
fn accumulate<L: Lanes, const T: usize, const F16: bool>(
    values: &[u16],
    head_dim: usize,
    weights: &[[f32; BLOCK_TOKENS]; T],
    rescale: [f32; T],
    out: &mut [[f32; HEAD_DIM_MAX]; T],
) {
    let mut d = 0;
    while d < head_dim {
        if L::ROW_VECS == VALUE_VECS && head_dim - d >= VALUE_VECS * LANES {
            accumulate_vecs::<L, T, VALUE_VECS, F16>(values, (head_dim, d), weights, rescale, out);
            d += VALUE_VECS * LANES;
        } else {
            accumulate_vecs::<L, T, 1, F16>(values, (head_dim, d), weights, rescale, out);
            d += LANES;
        }
    }
}

#[inline(always)]
fn accumulate_vecs<L: Lanes, const T: usize, const V: usize, const F16: bool>(
    values: &[u16],
    (head_dim, d): (usize, usize),
    weights: &[[f32; BLOCK_TOKENS]; T],
    rescale: [f32; T],
    out: &mut [[f32; HEAD_DIM_MAX]; T],
) {
    assert!(d + V * LANES <= head_dim && head_dim <= HEAD_DIM_MAX);
    let mut acc = [[L::splat(0.0); V]; T];
    for t in 0..T {
        for v in 0..V {
            // SAFETY: `d + V * LANES` is within the row, asserted above.
            let before = unsafe { L::load(out[t].as_ptr().add(d + v * LANES)) };
            acc[t][v] = before.mul(L::splat(rescale[t]));
        }
    }
    for j in 0..values.len() / head_dim {
        let mut row = [L::splat(0.0); V];
        for v in 0..V {
            // SAFETY: `d + V * LANES` is within row j of the values.
            row[v] = unsafe {
                let at = values.as_ptr().add(j * head_dim + d + v * LANES);
                if F16 { L::load_f16(at) } else { L::load_bf16(at) }
            };
        }
        for t in 0..T {
            let weight = L::splat(weights[t][j]);
            for v in 0..V {
                acc[t][v] = weight.mul_add(row[v], acc[t][v]);
            }
        }
    }
    for t in 0..T {
        for v in 0..V {
            // SAFETY: as for the loads.
            unsafe { acc[t][v].store(out[t].as_mut_ptr().add(d + v * LANES)) };
        }
    }
}

#[cfg(test)]
mod tests;
