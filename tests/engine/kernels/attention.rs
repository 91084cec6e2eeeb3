//! `qkv_finish.cu` and `attend.cu`: what is stored in the paged cache, and what is read from it.
//!
//! Attention is compared with a scalar text of the canon.

use super::matmul::{block, product};
use super::{Kernels, Shape, args, assert_same, broken, first_difference, kernels};
use crate::common::Noise;
use std::ffi::c_void;
use targon_engine::ops::dtype::Dtype;
use targon_engine::ops::lanes::{Isa, Lanes, Scalar};
use targon_engine::ops::math;
use targon_engine::ops::pool::Pool;
use targon_engine::ops::rope::{Rope, RopeScaling};
use targon_engine::ops::rowwise::Norm;

/// Positions of a block and of a partition.
pub(super) const BLOCK: usize = 32;
pub(super) const PARTITION: usize = 512;

/// Queries of a sequence that a thread block takes.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Tile {
    row_zero: i32,
    start: i32,
    first_query: i32,
    queries: i32,
    table: i32,
    unused: i32,
}

/// Rows of one sequence at the end of its context.
#[derive(Clone, Copy)]
pub(super) struct Sequence {
    pub(super) start: usize,
    pub(super) rows: usize,
}

pub(super) struct Case {
    pub(super) dtype: Dtype,
    pub(super) shape: Shape,
    pub(super) sequences: Vec<Sequence>,
    pub(super) queries: Vec<u16>,     // (rows, heads, head_dim)
    pub(super) keys: Vec<Vec<f32>>,   // by sequence: (positions, kv_heads, head_dim), rounded
    pub(super) values: Vec<Vec<f32>>, // the same
}

pub(super) fn exp(x: f32) -> f32 {
    math::exp(Scalar::splat(x)).to_array()[0]
}

pub(super) fn tanh(x: f32) -> f32 {
    math::tanh(Scalar::splat(x)).to_array()[0]
}

fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Sixteen lanes, one tree.
fn sum_of_block(x: &[f32; BLOCK]) -> f32 {
    // SAFETY: both halves have 16 values.
    unsafe { Scalar::load(x.as_ptr()).add(Scalar::load(x.as_ptr().add(16))).sum() }
}

fn max_of_block(x: &[f32; BLOCK]) -> f32 {
    // SAFETY: both halves have 16 values.
    unsafe { Scalar::load(x.as_ptr()).max(Scalar::load(x.as_ptr().add(16))).max_lane() }
}

/// Maximum, sum and weighted values of some positions.
pub(super) struct Partial {
    pub(super) max: f32,
    pub(super) sum: f32,
    pub(super) out: Vec<f32>,
}

impl Partial {
    pub(super) fn nothing(head_dim: usize) -> Self {
        Self { max: f32::NEG_INFINITY, sum: 0.0, out: vec![0.0; head_dim] }
    }

    pub(super) fn append(&mut self, next: &Self) {
        if next.sum == 0.0 {
            return;
        }
        let max = larger(self.max, next.max);
        let (f, g) = (exp(self.max - max), exp(next.max - max));
        self.sum = self.sum.mul_add(f, next.sum * g);
        self.out.iter_mut().zip(&next.out).for_each(|(o, n)| *o = o.mul_add(f, n * g));
        self.max = max;
    }
}

impl Case {
    pub(super) fn new(
        noise: &mut Noise,
        dtype: Dtype,
        shape: Shape,
        sequences: &[Sequence],
    ) -> Self {
        let mut values = |n: usize, size: f32| -> Vec<f32> {
            (0..n).map(|_| dtype.widen(dtype.round(noise.next() * size))).collect()
        };
        let width = (shape.kv_heads * shape.head_dim) as usize;
        let queries = |s: &Sequence| s.rows * (shape.heads * shape.head_dim) as usize;
        let count = sequences.iter().map(queries).sum();
        let rounded: Vec<f32> = values(count, 3.0);
        let positions: Vec<usize> = sequences.iter().map(|s| s.start + s.rows).collect();
        Self {
            dtype,
            shape,
            sequences: sequences.to_vec(),
            queries: rounded.iter().map(|x| dtype.round(*x)).collect(),
            keys: positions.iter().map(|n| values(n * width, 2.0)).collect(),
            values: positions.iter().map(|n| values(n * width, 2.0)).collect(),
        }
    }

    /// Key or value head of one position.
    pub(super) fn head<'a>(&self, of: &'a [f32], position: usize, head: usize) -> &'a [f32] {
        let (kv_heads, head_dim) = (self.shape.kv_heads as usize, self.shape.head_dim as usize);
        &of[(position * kv_heads + head) * head_dim..][..head_dim]
    }

    /// One query over the positions of `blocks`.
    fn partial(
        &self,
        s: usize,
        kv_head: usize,
        query: &[f32],
        position: usize,
        blocks: std::ops::Range<usize>,
    ) -> Partial {
        let shape = self.shape;
        let start = match shape.window {
            0 => 0,
            window => (position + 1).saturating_sub(window as usize),
        };
        let mut part = Partial::nothing(shape.head_dim as usize);
        for first in blocks.map(|b| b * BLOCK) {
            let sees = |j: usize| (start..=position).contains(&(first + j));
            if !(0..BLOCK).any(sees) {
                continue;
            }
            let mut scores = [f32::NEG_INFINITY; BLOCK];
            for j in (0..BLOCK).filter(|j| sees(*j)) {
                let x = product(self.head(&self.keys[s], first + j, kv_head), query) * shape.scale;
                scores[j] = if shape.cap == 0.0 { x } else { tanh(x / shape.cap) * shape.cap };
            }
            let max = larger(part.max, max_of_block(&scores));
            let factor = exp(part.max - max);
            let weights = scores.map(|x| self.dtype.widen(self.dtype.round(exp(x - max))));
            part.max = max;
            part.sum = part.sum.mul_add(factor, sum_of_block(&weights));
            for (d, out) in part.out.iter_mut().enumerate() {
                let column: Vec<f32> = (0..BLOCK)
                    .map(|j| match first + j <= position {
                        true => self.head(&self.values[s], first + j, kv_head)[d],
                        false => 0.0,
                    })
                    .collect();
                *out = out.mul_add(factor, block(&column, &weights));
            }
        }
        part
    }

    pub(super) fn partitions(&self) -> usize {
        let last = self.sequences.iter().map(|s| s.start + s.rows - 1).max().unwrap();
        last / PARTITION + 1
    }

    /// The rounded rows, and after them the partial results of all partitions: NaN where a query
    /// sees nothing.
    fn want(&self) -> [Vec<f32>; 2] {
        self.joined(self.partitions(), |[s, kv_head, position], query, partition| {
            let blocks = partition * 16..(partition + 1) * 16;
            self.partial(s, kv_head, query, position, blocks)
        })
    }

    /// The same with so many partitions, each of which is what `partial` gives for a sequence, a
    /// key/value head and a position, a query, and the partition.
    pub(super) fn joined(
        &self,
        partitions: usize,
        partial: impl Fn([usize; 3], &[f32], usize) -> Partial,
    ) -> [Vec<f32>; 2] {
        let (heads, head_dim) = (self.shape.heads as usize, self.shape.head_dim as usize);
        let group = heads / self.shape.kv_heads as usize;
        let (mut row, mut rows, mut parts) = (0, Vec::new(), Vec::new());
        for (s, sequence) in self.sequences.iter().enumerate() {
            for position in sequence.start..sequence.start + sequence.rows {
                for head in 0..heads {
                    let query = &self.queries[(row * heads + head) * head_dim..][..head_dim];
                    let query: Vec<f32> = query.iter().map(|b| self.dtype.widen(*b)).collect();
                    let mut total = Partial::nothing(head_dim);
                    for partition in 0..partitions {
                        let part = partial([s, head / group, position], &query, partition);
                        total.append(&part);
                        match part.sum == 0.0 {
                            true => parts.resize(parts.len() + head_dim + 2, f32::NAN),
                            false => parts.extend([part.max, part.sum].iter().chain(&part.out)),
                        }
                    }
                    let mean = total.out.iter().map(|o| o / total.sum);
                    rows.extend(mean.map(|x| self.dtype.widen(self.dtype.round(x))));
                }
                row += 1;
            }
        }
        [rows, parts]
    }

    /// Keys and values in the layout of the cache; what belongs to nobody is NaN, but the columns
    /// that fill up a tile are zero. Blocks lie in no order.
    pub(super) fn cache(&self) -> (Vec<u16>, Vec<u16>, Vec<Vec<u32>>) {
        let (kv_heads, head_dim) = (self.shape.kv_heads as usize, self.shape.head_dim as usize);
        let tiles = head_dim.div_ceil(32);
        let counts = self.sequences.iter().map(|s| (s.start + s.rows).div_ceil(BLOCK));
        let total: usize = counts.clone().sum::<usize>() + 1;
        let nan = self.dtype.round(f32::NAN);
        let mut keys = vec![nan; total * kv_heads * tiles * 32 * BLOCK];
        let mut values = vec![nan; total * kv_heads * BLOCK * head_dim];
        let (mut next, mut tables) = (0, Vec::new());
        let stride = (0..).map(|i| i * 2 + 1).find(|s| gcd(*s, total) == 1 && *s > 2).unwrap();
        for (s, count) in counts.enumerate() {
            let place = |i: usize| ((next + i) * stride % total) as u32;
            let table: Vec<u32> = (0..count).map(place).collect();
            next += count;
            for (position, head) in (0..self.sequences[s].start + self.sequences[s].rows)
                .flat_map(|p| (0..kv_heads).map(move |h| (p, h)))
            {
                let place = table[position / BLOCK] as usize * kv_heads + head;
                let slot = position % BLOCK;
                for d in 0..tiles * 32 {
                    let word = (d / 32) * 128 + d % 32 / 8 * 32 + slot;
                    let at = place * tiles * 32 * BLOCK + word * 8 + d % 8;
                    let key = self.head(&self.keys[s], position, head).get(d).copied();
                    keys[at] = self.dtype.round(key.unwrap_or(0.0));
                }
                let value = self.head(&self.values[s], position, head);
                let to = &mut values[(place * BLOCK + slot) * head_dim..][..head_dim];
                to.iter_mut().zip(value).for_each(|(to, x)| *to = self.dtype.round(*x));
            }
            tables.push(table);
        }
        (keys, values, tables)
    }

    pub(super) fn tiles(&self, size: usize, tables: &[Vec<u32>]) -> Vec<Tile> {
        let group = (self.shape.heads / self.shape.kv_heads) as usize;
        let (mut row, mut table, mut tiles) = (0, 0, Vec::new());
        for (sequence, blocks) in self.sequences.iter().zip(tables) {
            for first in (0..sequence.rows * group).step_by(size) {
                tiles.push(Tile {
                    row_zero: row as i32,
                    start: sequence.start as i32,
                    first_query: first as i32,
                    queries: (sequence.rows * group - first).min(size) as i32,
                    table: table as i32,
                    unused: 0,
                });
            }
            row += sequence.rows;
            table += blocks.len();
        }
        tiles
    }

    /// By tiles of `size` queries, in one walk or split over partitions.
    fn run(&self, kernels: &Kernels, size: usize, is_split: bool, seed: u64) -> [Vec<f32>; 2] {
        let (keys, values, tables) = self.cache();
        let tiles = self.tiles(size, &tables);
        let table: Vec<u32> = tables.concat();
        let positions: Vec<u32> = self
            .sequences
            .iter()
            .flat_map(|s| (s.start..s.start + s.rows).map(|p| p as u32))
            .collect();
        let (heads, head_dim) = (self.shape.heads as usize, self.shape.head_dim as usize);
        let partitions = self.partitions() as i32;
        let mut out = vec![0_u16; positions.len() * heads * head_dim];
        let mut parts =
            vec![f32::NAN; positions.len() * heads * partitions as usize * (head_dim + 2)];
        let (q, k, v) = (self.queries.as_ptr(), keys.as_ptr(), values.as_ptr());
        let (t, tl, p, o) = (table.as_ptr(), tiles.as_ptr(), parts.as_mut_ptr(), out.as_mut_ptr());
        let (shape, split) = (self.shape, i32::from(is_split));
        let args = args![q, k, v, t, tl, p, o, shape, partitions, split];
        let padded = head_dim.next_multiple_of(32);
        let warps = if size == 8 { 4 } else { 8 };
        let smem = 4 * size * (PARTITION + padded + warps * head_dim);
        let depth = if is_split { partitions as u32 } else { 1 };
        let grid = [tiles.len() as u32, self.shape.kv_heads as u32, depth];
        let name = format!("attend_{}_{size}", self.dtype);
        kernels.launch(&name, grid, 32 * warps as u32, smem, seed, &args);
        if is_split {
            let (at, f16) = (positions.as_ptr(), i32::from(self.dtype == Dtype::F16));
            let args = args![p, at, o, shape, partitions, f16];
            let grid = [positions.len() as u32, heads as u32, 1];
            kernels.launch("attend_merge", grid, 128, 0, seed, &args);
        }
        // What no query sees may be written or not.
        for part in parts.chunks_exact_mut(head_dim + 2).filter(|part| part[1] == 0.0) {
            part.fill(f32::NAN);
        }
        [out.iter().map(|b| self.dtype.widen(*b)).collect(), parts]
    }

    /// Whether a run has the bits of the canon.
    fn difference(
        &self,
        [rows, parts]: &[Vec<f32>; 2],
        is_split: bool,
        got: &[Vec<f32>; 2],
    ) -> Option<usize> {
        let of_parts = is_split.then(|| first_difference(&got[1], parts)).flatten();
        first_difference(&got[0], rows).or(of_parts)
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

pub(super) fn shape(heads: i32, kv_heads: i32, head_dim: i32, window: i32, cap: f32) -> Shape {
    let scale = 1.0 / (head_dim as f32).sqrt();
    Shape { heads, kv_heads, head_dim, window, scale, cap }
}

pub(super) fn sequences(of: &[[usize; 2]]) -> Vec<Sequence> {
    of.iter().map(|[start, rows]| Sequence { start: *start, rows: *rows }).collect()
}

#[test]
fn attention_equals_the_canon() {
    let mut noise = Noise(41);
    let cases = [
        (shape(1, 1, 16, 0, 0.0), sequences(&[[0, 1]])),
        (shape(4, 2, 64, 0, 0.0), sequences(&[[0, 9], [31, 1], [40, 3]])),
        (shape(3, 1, 80, 0, 0.0), sequences(&[[505, 12], [63, 2]])),
        (shape(8, 1, 128, 0, 20.0), sequences(&[[1_100, 1], [0, 2]])),
        (shape(2, 2, 96, 40, 0.0), sequences(&[[500, 30], [7, 1]])),
        (shape(2, 1, 32, 600, 5.0), sequences(&[[1_600, 2]])),
    ];
    for (i, (shape, sequences)) in cases.iter().enumerate() {
        for dtype in [Dtype::Bf16, Dtype::F16] {
            let case = Case::new(&mut noise, dtype, *shape, sequences);
            let want = case.want();
            for (seed, size) in [1, 4, 8].into_iter().enumerate() {
                for is_split in [false, true] {
                    let got = case.run(kernels(), size, is_split, seed as u64);
                    let difference = case.difference(&want, is_split, &got);
                    assert_eq!(difference, None, "case {i} {dtype} {size} {is_split}");
                }
            }
        }
    }
}

#[test]
fn wide_heads_equal_the_canon() {
    let case = Case::new(
        &mut Noise(42),
        Dtype::Bf16,
        shape(2, 1, 256, 0, 50.0),
        &sequences(&[[20, 2], [530, 1]]),
    );
    let want = case.want();
    for (size, is_split) in [(1, false), (4, true), (4, false)] {
        let got = case.run(kernels(), size, is_split, 3);
        assert_eq!(case.difference(&want, is_split, &got), None, "{size}");
    }
}

#[test]
fn broken_numbers_come_out_as_on_the_cpu() {
    let mut noise = Noise(43);
    for (i, broken) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38].into_iter().enumerate() {
        let sequences = sequences(&[[515, 1]]);
        let mut case = Case::new(&mut noise, Dtype::Bf16, shape(2, 1, 32, 0, 0.0), &sequences);
        let broken = case.dtype.widen(case.dtype.round(broken));
        match i % 2 {
            0 => case.keys[0][300 * 32 + i] = broken,
            _ => case.values[0][514 * 32 + i] = broken,
        }
        case.keys[0][40 * 32] = f32::INFINITY;
        let want = case.want();
        for is_split in [false, true] {
            let got = case.run(kernels(), 4, is_split, 0);
            assert_eq!(case.difference(&want, is_split, &got), None, "{broken}");
        }
    }
}

#[test]
fn control_arms_of_attention_are_noticed() {
    let case = Case::new(
        &mut Noise(44),
        Dtype::Bf16,
        shape(4, 1, 64, 0, 0.0),
        &sequences(&[[1_700, 2], [90, 1]]),
    );
    let want = case.want();
    for (define, is_split) in [("CANON_BLOCK=16", true), ("CONTROL_NO_BARRIER", false)] {
        let broken = broken("attend", define);
        let caught = (0..3).any(|seed| {
            let got = case.run(broken, 4, is_split, seed);
            case.difference(&want, is_split, &got).is_some()
        });
        assert!(caught, "{define}");
    }
}

#[test]
fn partitions_are_appended_in_ascending_order() {
    // (1e8 - 1e8) + 1 is 1, (1 - 1e8) + 1e8 is 0.
    let (head_dim, dtype) = (16_usize, Dtype::Bf16);
    let part = |value: f32| [vec![0.0, 1.0], vec![value; head_dim]].concat();
    let parts = [part(1e8), part(-1e8), part(1.0)].concat();
    let run = |kernels: &Kernels| -> Vec<f32> {
        let (positions, mut out) = ([1_100_u32], vec![0_u16; head_dim]);
        let (p, at, o) = (parts.as_ptr(), positions.as_ptr(), out.as_mut_ptr());
        let (shape, partitions, f16) = (shape(1, 1, 16, 0, 0.0), 3_i32, 0_i32);
        let args = args![p, at, o, shape, partitions, f16];
        kernels.launch("attend_merge", [1, 1, 1], 128, 0, 0, &args);
        out.iter().map(|b| dtype.widen(*b)).collect()
    };
    let want = dtype.widen(dtype.round(1.0 / 3.0));
    assert_same(&run(kernels()), &vec![want; head_dim], "ascending");
    let descending = run(broken("attend", "CONTROL_MERGES_DESCENDING"));
    assert_eq!(descending, vec![0.0; head_dim]);
}

/// Where element (row, column) of a packed matrix of so many tiles a row lies.
fn at(row: usize, column: usize, tiles: usize) -> usize {
    let word = (row / 32 * tiles + column / 32) * 128 + column % 32 / 8 * 32 + row % 32;
    word * 8 + column % 8
}

#[test]
fn finished_heads_equal_their_twin() {
    let (mut noise, pool) = (Noise(45), Pool::new(1, Isa::best()).unwrap());
    let eps = 1e-6_f32;
    for (i, (heads, kv_heads, head_dim)) in
        [(1, 1, 16), (4, 2, 64), (6, 2, 80), (2, 1, 256)].into_iter().enumerate()
    {
        for dtype in [Dtype::Bf16, Dtype::F16] {
            let (rows, row_len) = (3_usize, (heads + 2 * kv_heads) * head_dim);
            let mut values =
                |n: usize| -> Vec<f32> { (0..n).map(|_| noise.next() * 3.0).collect() };
            let mut qkv = values(rows * row_len);
            qkv[row_len + 3] = f32::NAN;
            qkv[row_len * 2 - 1] = 3e38;
            qkv[..head_dim].fill(0.0);
            let (bias, q_norm, k_norm) = (values(row_len), values(head_dim), values(head_dim));
            let (has_bias, has_norm) = (i % 2 == 0, i > 1);
            let positions = [5_u32, 100_000, 31];
            let slots = [5_u32, 2 * 32 + 4, 32 + 31];
            let table =
                Rope::new(head_dim, 10_000.0, RopeScaling::None).table(&pool.turn(), &positions);
            let (tiles, len) = (head_dim.div_ceil(32), head_dim.next_multiple_of(32) * 32);
            let mut queries = vec![1_u16; rows * heads * head_dim];
            let mut keys = vec![1_u16; 3 * kv_heads * len];
            let mut stored = vec![1_u16; keys.len()];
            let none = std::ptr::null::<f32>();
            let (x, b) = (qkv.as_ptr(), if has_bias { bias.as_ptr() } else { none });
            let qn = if has_norm { q_norm.as_ptr() } else { none };
            let kn = if has_norm { k_norm.as_ptr() } else { none };
            let (cos, sin) = (table.parts().0.as_ptr(), table.parts().1.as_ptr());
            let (sl, q, k, v) =
                (slots.as_ptr(), queries.as_mut_ptr(), keys.as_mut_ptr(), stored.as_mut_ptr());
            let (h, kh, hd) = (heads as i32, kv_heads as i32, head_dim as i32);
            let (f16, packs_values) = (i32::from(dtype == Dtype::F16), (i / 2) as i32);
            let args =
                args![x, b, qn, kn, cos, sin, sl, q, k, v, h, kh, hd, eps, f16, packs_values];
            let grid = [rows as u32, (heads + 2 * kv_heads) as u32, 1];
            kernels().launch("qkv_finish", grid, 128, 0, i as u64, &args);
            for (row, head) in
                (0..rows).flat_map(|r| (0..heads + 2 * kv_heads).map(move |h| (r, h)))
            {
                let mut want = qkv[row * row_len + head * head_dim..][..head_dim].to_vec();
                if has_bias {
                    let bias = &bias[head * head_dim..];
                    want.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
                }
                if head < heads + kv_heads {
                    let weight = if head < heads { &q_norm } else { &k_norm };
                    if has_norm {
                        Norm::new(weight.clone(), eps).apply(Isa::best(), &mut want);
                    }
                    table.rotate(Isa::best(), row, &mut want);
                }
                let (block, slot) = ((slots[row] / 32) as usize, (slots[row] % 32) as usize);
                let key = (block * kv_heads + head).wrapping_sub(heads);
                let value = key.wrapping_sub(kv_heads);
                let got = |d: usize| match head {
                    h if h < heads => queries[(row * heads + head) * head_dim + d],
                    h if h < heads + kv_heads => keys[key * len + at(slot, d, tiles)],
                    _ if packs_values == 1 => stored[value * len + at(d, slot, 1)],
                    _ => stored[(value * 32 + slot) * head_dim + d],
                };
                let got: Vec<f32> = (0..head_dim).map(|d| dtype.widen(got(d))).collect();
                let want: Vec<f32> = want.iter().map(|x| dtype.widen(dtype.round(*x))).collect();
                assert_same(&got, &want, &format!("case {i} {dtype} row {row} head {head}"));
            }
            let written = keys.iter().filter(|b| **b != 1).count();
            assert!(written <= rows * kv_heads * head_dim, "keys outside their slots");
        }
    }
}
