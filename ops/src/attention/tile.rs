//! Computes attention of a few queries that share a key/value head: scores, softmax, values.

use super::cache::{BLOCK_TOKENS, HEAD_DIM_MAX, KEY_STRIDE, KvCache, Segment};
use super::layer::{Attention, PARTITION_BLOCKS, PARTITION_TOKENS};
use super::partial::Partial;
use crate::dtype::{Dtype, round_f16};
use crate::lanes::{Isa, Kernel, LANES, Lanes, dispatch};
use crate::math;
use crate::product::{At, FOUR, Input, Inputs, VEC_STRIDE, block, product, vecs_at_once};
use std::cell::RefCell;
use std::ops::Range;

/// Queries of one tile at most.
pub(super) const TILE_QUERIES: usize = 6;
const KEY_VECS: usize = BLOCK_TOKENS / LANES;

/// `N` values rounded to the cache's type, in the forms of an [`Input`]; `PAIRS` is half of `N`.
#[derive(Clone, Copy)]
struct Row<const N: usize, const PAIRS: usize> {
    values: [f32; N],
    fours: [u32; PAIRS],
}
/// A query.
type Query = Row<HEAD_DIM_MAX, { HEAD_DIM_MAX / 2 }>;
/// The weights of the positions of a block.
type Weights = Row<BLOCK_TOKENS, { BLOCK_TOKENS / 2 }>;

/// Up to six queries that share a key/value head.
pub(super) struct Tile<'a> {
    pub(super) cache: &'a KvCache,
    pub(super) layer: usize,
    pub(super) attention: Attention,
    pub(super) segment: &'a Segment,
    pub(super) kv_head: usize,
    /// `row * group + head-in-group`.
    pub(super) queries: Range<usize>,
    /// Only the positions of this one, or all.
    pub(super) partition: Option<usize>,
    /// (rows, row_len), and row_len.
    pub(super) qkv: (&'a [f32], usize),
}

/// Room for the queries of a tile. It is kept from one tile to the next, because filling it anew
/// took a tenth of attention's time in a prefill of 512 tokens.
struct Room {
    queries: [Query; TILE_QUERIES],
    weights: [Weights; TILE_QUERIES],
    part: [Partial; TILE_QUERIES],
    total: [Partial; TILE_QUERIES],
}

thread_local! {
    static ROOM: RefCell<Room> = const { RefCell::new(Room::NEW) };
}

impl Room {
    const NEW: Self = Self {
        queries: [Query::ZERO; TILE_QUERIES],
        weights: [Weights::ZERO; TILE_QUERIES],
        part: [Partial::NOTHING; TILE_QUERIES],
        total: [Partial::NOTHING; TILE_QUERIES],
    };
}

/// Computes a tile; `sink` gets the row, the head and the result of each query.
pub(super) fn run(isa: Isa, tile: Tile<'_>, sink: impl Fn(usize, usize, &mut Partial)) {
    ROOM.with_borrow_mut(|room| run_in(room, isa, tile, sink));
}

/// Each width is a function of its own, whose frame stays small without optimisation too.
fn run_in(room: &mut Room, isa: Isa, tile: Tile<'_>, sink: impl Fn(usize, usize, &mut Partial)) {
    match (tile.cache.dtype, tile.queries.len()) {
        (Dtype::Bf16, 1) => dispatch(isa, Run::<_, 1, false> { room, tile, sink }),
        (Dtype::Bf16, 2) => dispatch(isa, Run::<_, 2, false> { room, tile, sink }),
        (Dtype::Bf16, 3) => dispatch(isa, Run::<_, 3, false> { room, tile, sink }),
        (Dtype::Bf16, 4) => dispatch(isa, Run::<_, 4, false> { room, tile, sink }),
        (Dtype::Bf16, 5) => dispatch(isa, Run::<_, 5, false> { room, tile, sink }),
        (Dtype::Bf16, _) => dispatch(isa, Run::<_, TILE_QUERIES, false> { room, tile, sink }),
        (Dtype::F16, 1) => dispatch(isa, Run::<_, 1, true> { room, tile, sink }),
        (Dtype::F16, 2) => dispatch(isa, Run::<_, 2, true> { room, tile, sink }),
        (Dtype::F16, 3) => dispatch(isa, Run::<_, 3, true> { room, tile, sink }),
        (Dtype::F16, 4) => dispatch(isa, Run::<_, 4, true> { room, tile, sink }),
        (Dtype::F16, 5) => dispatch(isa, Run::<_, 5, true> { room, tile, sink }),
        (Dtype::F16, _) => dispatch(isa, Run::<_, TILE_QUERIES, true> { room, tile, sink }),
    }
}

/// A tile of `T` queries.
struct Run<'a, S, const T: usize, const F16: bool> {
    room: &'a mut Room,
    tile: Tile<'a>,
    sink: S,
}

/// Appends stored partitions in ascending order.
pub(super) struct Join<'a> {
    pub(super) parts: &'a [f32], // (partitions, stored_len)
    pub(super) head_dim: usize,
}

impl Kernel for Join<'_> {
    type Out = Partial;

    #[inline(always)]
    fn run<L: Lanes>(self) -> Partial {
        let mut total = Partial::NOTHING;
        for part in self.parts.chunks_exact(Partial::stored_len(self.head_dim)) {
            total.append::<L>(&Partial::load(part), self.head_dim);
        }
        total
    }
}

impl<S, const T: usize, const F16: bool> Kernel for Run<'_, S, T, F16>
where
    S: Fn(usize, usize, &mut Partial),
{
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { room: Room { queries, weights, part, total }, tile, sink } = self;
        let (queries, weights) = (&mut queries[..T], &mut weights[..T]);
        let (part, total) = (&mut part[..T], &mut total[..T]);
        let head_dim = tile.cache.dims.head_dim;
        let mut seen = [const { 0..0 }; T];
        for t in 0..T {
            let ((row, head), (qkv, row_len)) = (tile.query(t), tile.qkv);
            let from = &qkv[row * row_len + head * head_dim..][..head_dim];
            queries[t].round::<L, F16>(from);
            seen[t] = tile.attention.seen(tile.segment.position(row));
        }
        if let Some(partition) = tile.partition {
            tile.partition::<L, T, F16>(partition, (queries, &seen), weights, total);
        } else {
            total.iter_mut().for_each(|total| total.clear(head_dim));
            for partition in partitions(&seen) {
                tile.partition::<L, T, F16>(partition, (queries, &seen), weights, part);
                for t in 0..T {
                    total[t].append::<L>(&part[t], head_dim);
                }
            }
        }
        for (t, result) in total.iter_mut().enumerate() {
            let (row, head) = tile.query(t);
            sink(row, head, result);
        }
    }
}

impl Tile<'_> {
    /// Row and head of query `t` of the tile.
    #[inline(always)]
    fn query(&self, t: usize) -> (usize, usize) {
        let group = self.attention.heads / self.cache.dims.kv_heads;
        let index = self.queries.start + t;
        (self.segment.rows.start + index / group, self.kv_head * group + index % group)
    }

    /// The online softmax over the blocks of one partition, ascending, into `part`; `weights` is
    /// room for those of a block.
    #[inline(always)]
    fn partition<L: Lanes, const T: usize, const F16: bool>(
        &self,
        partition: usize,
        (queries, seen): (&[Query], &[Range<usize>; T]),
        weights: &mut [Weights],
        part: &mut [Partial],
    ) {
        let head_dim = self.cache.dims.head_dim;
        part.iter_mut().for_each(|part| part.clear(head_dim));
        let mut so_far = SoFar { max: L::splat(f32::NEG_INFINITY), sum: L::splat(0.0) };
        let first = seen.iter().map(|s| s.start).min().unwrap_or(0) / BLOCK_TOKENS;
        let end = seen.iter().map(|s| s.end).max().unwrap_or(0);
        let own = partition * PARTITION_BLOCKS..(partition + 1) * PARTITION_BLOCKS;
        let blocks = end.div_ceil(BLOCK_TOKENS);
        for block in first.max(own.start)..blocks.min(own.end) {
            let base = block * BLOCK_TOKENS;
            let (keys, values) = self.block(block);
            let next = (block + 1 < blocks).then(|| self.block(block + 1));
            let next_keys = next.map(|(keys, _)| keys);
            let scores = scores::<L, T, F16>(keys, head_dim, queries, next_keys);
            let mut valid = [const { 0..0 }; T];
            for (valid, seen) in valid.iter_mut().zip(seen) {
                *valid = seen.start.clamp(base, base + BLOCK_TOKENS) - base
                    ..seen.end.clamp(base, base + BLOCK_TOKENS) - base;
            }
            let rescale = self.soften::<L, T, F16>(scores, &valid, &mut so_far, weights);
            let pairs = (end - base).min(BLOCK_TOKENS).next_multiple_of(FOUR) / 2;
            let values = Values { pairs, head_dim, now: values, next: next.map(|next| next.1) };
            accumulate::<L, T, F16>(values, weights, rescale, part);
        }
        let (max, sum) = (so_far.max.to_array(), so_far.sum.to_array());
        for (t, part) in part.iter_mut().enumerate() {
            (part.max, part.sum) = (max[t], sum[t]);
        }
    }

    /// Keys and values of this head in one block of the segment.
    #[inline(always)]
    fn block(&self, block: usize) -> (&[u16], &[u16]) {
        self.cache.block(self.layer, self.segment.blocks[block], self.kv_head)
    }

    /// Turns scores into weights relative to each query's new maximum, rounded to the cache's type,
    /// and updates the sums. Returns the factors on what was accumulated before. A query that sees
    /// nothing of the block gets weights of zero and a factor of one.
    #[inline(always)]
    fn soften<L: Lanes, const T: usize, const F16: bool>(
        &self,
        mut scores: [[L; KEY_VECS]; T],
        valid: &[Range<usize>; T],
        so_far: &mut SoFar<L>,
        weights: &mut [Weights],
    ) -> [f32; LANES] {
        let mut larger = [L::splat(0.0); T];
        for t in 0..T {
            self.mask(&mut scores[t], &valid[t]);
            larger[t] = scores[t][0].max(scores[t][1]);
        }
        let max = so_far.max.max(L::max_lanes(&larger));
        let mut falls = so_far.max.sub(max);
        so_far.max = max;
        if valid.iter().any(Range::is_empty) {
            let mut each = falls.to_array();
            for t in 0..T {
                each[t] = if valid[t].is_empty() { 0.0 } else { each[t] };
            }
            // SAFETY: the array holds 16 values.
            falls = unsafe { L::load(each.as_ptr()) };
        }
        let (factors, max) = (math::exp(falls), max.to_array());
        let mut sums = [L::splat(0.0); T];
        for t in 0..T {
            if valid[t].is_empty() {
                weights[t] = Weights::ZERO;
                continue;
            }
            let max = L::splat(max[t]);
            for v in 0..KEY_VECS {
                scores[t][v] = nearest::<L, F16>(math::exp(scores[t][v].sub(max)));
                weights[t].set::<L, F16>(v, scores[t][v]);
            }
            sums[t] = scores[t][0].add(scores[t][1]);
        }
        so_far.sum = so_far.sum.mul_add(factors, L::sums(&sums));
        factors.to_array()
    }

    /// Scales and caps one query's scores, and puts -infinity where it does not see.
    #[inline(always)]
    fn mask<L: Lanes>(&self, scores: &mut [L; KEY_VECS], valid: &Range<usize>) {
        for v in &mut *scores {
            *v = v.mul(L::splat(self.attention.scale));
            if let Some(cap) = self.attention.softcap {
                *v = math::tanh(v.div(L::splat(cap))).mul(L::splat(cap));
            }
        }
        if *valid == (0..BLOCK_TOKENS) {
            return;
        }
        for (v, vec) in scores.iter_mut().enumerate() {
            let mut each = vec.to_array();
            for (i, score) in each.iter_mut().enumerate() {
                let is_seen = valid.contains(&(v * LANES + i));
                *score = if is_seen { *score } else { f32::NEG_INFINITY };
            }
            // SAFETY: the array holds 16 values.
            *vec = unsafe { L::load(each.as_ptr()) };
        }
    }
}

/// The largest scores so far and the sums of the weights relative to them; lanes are queries.
struct SoFar<L> {
    max: L,
    sum: L,
}

/// Partitions that hold what these queries see.
fn partitions(seen: &[Range<usize>]) -> Range<usize> {
    let first = seen.iter().map(|s| s.start).min().unwrap_or(0) / PARTITION_TOKENS;
    first..seen.iter().map(|s| s.end).max().unwrap_or(0).div_ceil(PARTITION_TOKENS)
}

impl<const N: usize, const PAIRS: usize> Row<N, PAIRS> {
    const ZERO: Self = Self { values: [0.0; N], fours: [0; PAIRS] };

    /// Rounds `from`, whole vectors, to the cache's type.
    #[inline(always)]
    fn round<L: Lanes, const F16: bool>(&mut self, from: &[f32]) {
        for (v, from) in from.chunks_exact(LANES).enumerate() {
            // SAFETY: chunks have 16 values.
            self.set::<L, F16>(v, nearest::<L, F16>(unsafe { L::load(from.as_ptr()) }));
        }
    }

    /// Sets vector `v` of it to values of the cache's type.
    #[inline(always)]
    fn set<L: Lanes, const F16: bool>(&mut self, v: usize, values: L) {
        // SAFETY: the slices have 8 and 16 values.
        unsafe {
            if L::HAS_DOT && !F16 {
                values.store_fours(self.fours[v * LANES / 2..][..LANES / 2].as_mut_ptr());
            } else {
                values.store(self.values[v * LANES..][..LANES].as_mut_ptr());
            }
        }
    }

    /// The first `count` values, whole fours.
    #[inline(always)]
    fn first(&self, count: usize) -> Input<'_> {
        Input { values: &self.values[..count], fours: &self.fours[..count / 2] }
    }
}

/// The lanes rounded to the cache's type.
#[inline(always)]
fn nearest<L: Lanes, const F16: bool>(x: L) -> L {
    if !F16 {
        return x.nearest_bf16();
    }
    let bits = x.to_array().map(round_f16);
    // SAFETY: the array holds 16 values.
    unsafe { L::load_f16(bits.as_ptr()) }
}

/// `scores[t][j] = sum_d queries[t][d] * keys[j][d]`, the keys of the `next` block being
/// prefetched.
#[inline(always)]
fn scores<L: Lanes, const T: usize, const F16: bool>(
    keys: &[u16],
    head_dim: usize,
    queries: &[Query],
    next: Option<&[u16]>,
) -> [[L; KEY_VECS]; T] {
    let mut rows = [Input::NOTHING; T];
    for t in 0..T {
        rows[t] = queries[t].first(head_dim);
    }
    let queries = Inputs::new(head_dim / 2, rows);
    if vecs_at_once::<L>(T) >= KEY_VECS {
        return product::<L, T, KEY_VECS, F16>(keys, KEY_STRIDE, &queries, next);
    }
    let mut scores = [[L::splat(0.0); KEY_VECS]; T];
    for v in 0..KEY_VECS {
        let (keys, next) = (&keys[v * VEC_STRIDE..], next.map(|next| &next[v * VEC_STRIDE..]));
        let acc = product::<L, T, 1, F16>(keys, KEY_STRIDE, &queries, next);
        for t in 0..T {
            scores[t][v] = acc[t][0];
        }
    }
    scores
}

/// Values of a block, of which the first `pairs` pairs of positions are read, and those of the next
/// block, which are prefetched.
#[derive(Clone, Copy)]
struct Values<'a> {
    pairs: usize,
    head_dim: usize,
    now: &'a [u16],
    next: Option<&'a [u16]>,
}

/// `out[t] = out[t] * rescale[t] + sum_j weights[t][j] * values[j]`, the sum one block of the canon
/// over the pairs of positions.
#[inline(always)]
fn accumulate<L: Lanes, const T: usize, const F16: bool>(
    values: Values<'_>,
    weights: &[Weights],
    rescale: [f32; LANES],
    part: &mut [Partial],
) {
    let mut d = 0;
    while d < values.head_dim {
        let vecs = vecs_at_once::<L>(T).min((values.head_dim - d) / LANES);
        d += match vecs {
            4 => accumulate_vecs::<L, T, 4, F16>(values, d, weights, rescale, part),
            2 | 3 => accumulate_vecs::<L, T, 2, F16>(values, d, weights, rescale, part),
            _ => accumulate_vecs::<L, T, 1, F16>(values, d, weights, rescale, part),
        };
    }
}

/// The elements of the head from `d` on, `V` vectors; returns how many they are.
#[inline(always)]
fn accumulate_vecs<L: Lanes, const T: usize, const V: usize, const F16: bool>(
    Values { pairs, head_dim, now, next }: Values<'_>,
    d: usize,
    weights: &[Weights],
    rescale: [f32; LANES],
    part: &mut [Partial],
) -> usize {
    assert!(d + V * LANES <= head_dim && head_dim <= HEAD_DIM_MAX);
    assert!(pairs <= BLOCK_TOKENS / 2 && pairs.is_multiple_of(2));
    assert!(pairs == 0 || now.len() >= (pairs - 1) * 2 * head_dim + 2 * (d + V * LANES));
    let mut inputs = [At::NOWHERE; T];
    for t in 0..T {
        inputs[t] = weights[t].first(2 * pairs).start();
    }
    let next = next.map(|next| next.as_ptr().wrapping_add(2 * d));
    // SAFETY: in bounds by the assertions above; a row of weights has two for each pair.
    let sums = unsafe {
        block::<L, T, V, F16>(now.as_ptr().add(2 * d), (pairs, 2 * head_dim), &inputs, next)
    };
    for t in 0..T {
        for v in 0..V {
            // SAFETY: `d + V * LANES` is within the row, asserted above.
            unsafe {
                let out = part[t].out.as_mut_ptr().add(d + v * LANES);
                L::load(out).mul_add(L::splat(rescale[t]), sums[t][v]).store(out);
            }
        }
    }
    V * LANES
}
