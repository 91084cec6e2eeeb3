//! Compares the kernels of attention: the portable ones with the CPU's bits, those of tensor cores
//! with each other, and both with a softmax in f64.

use super::runner::{KernelRunner, same};
use crate::models::cuda::launch::{AttentionShape, Memory, Pointer, QueryTile, args};
use crate::ops::attention::{Attention, BLOCK_TOKENS, KvCache, KvDims, PARTITION_TOKENS, Segment};
use crate::ops::dtype::Dtype;
use crate::ops::rounded::Rounded;
use anyhow::{Context, ensure};

/// How far a result may be from the one in f64, in units of the mean magnitude of the values:
/// weights and results are each rounded to the type, scores to f32.
fn error_max(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::Bf16 => 2.0_f64.powi(-6),
        Dtype::F16 => 2.0_f64.powi(-9),
    }
}

/// One sequence: `rows` queries at the end of its context.
struct Case<'a> {
    runner: &'a KernelRunner<'a>,
    shape: AttentionShape,
    start: usize,
    rows: usize,
    qkv: Vec<f32>, // (positions, heads + 2 * kv_heads, head_dim), rounded
    queries: Memory,
    keys: Memory,
    values: [Memory; 2], // by positions, and packed
    tables: Memory,
}

/// All of them on a sequence of `start + rows` positions; results by kernel.
pub(super) fn compare(
    runner: &KernelRunner<'_>,
    (start, rows): (usize, usize),
) -> anyhow::Result<Vec<(&'static str, usize)>> {
    let (mut portable, mut tensor) = (0, 0);
    for (heads, kv_heads, head_dim, window, cap) in
        [(8, 2, 64, 0, 0.0), (4, 4, 80, 0, 20.0), (4, 2, 128, 40, 0.0)]
    {
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape = AttentionShape { heads, kv_heads, head_dim, window, scale, cap };
        let case = Case::new(runner, shape, start, rows)?;
        let (by_cpu, exact) = (case.on_the_cpu()?, case.exact());
        case.near("the CPU's attention", &by_cpu, &exact)?;
        for size in [1, 4, 8] {
            for is_split in [false, true] {
                let (got, name) = case.run(size, is_split, false)?;
                portable += same(name, &got, &by_cpu)?;
            }
        }
        let (first, name) = case.run(8, false, true)?;
        case.near(name, &first, &exact)?;
        for (size, is_split) in [(8, true), (32, false), (32, true)] {
            let (got, name) = case.run(size, is_split, true)?;
            tensor += same(name, &got, &first)?;
        }
    }
    Ok(vec![("attend_* and attend_merge", portable), ("attend_mma_*", tensor)])
}

impl<'a> Case<'a> {
    fn new(
        runner: &'a KernelRunner<'a>,
        shape: AttentionShape,
        start: usize,
        rows: usize,
    ) -> anyhow::Result<Self> {
        let [heads, kv_heads, head_dim] =
            [shape.heads, shape.kv_heads, shape.head_dim].map(|n| n as usize);
        let (all, positions) = (heads + 2 * kv_heads, start + rows);
        let noise: Vec<f32> =
            runner.noise(positions * all * head_dim).iter().map(|x| 3.0 * x).collect();
        let qkv = runner.widened(&runner.rounded(&noise));
        let blocks = positions.div_ceil(BLOCK_TOKENS);
        // Blocks lie in descending order.
        let table: Vec<u32> = (0..blocks as u32).rev().collect();
        let slot = |p: usize| table[p / BLOCK_TOKENS] * 32 + (p % BLOCK_TOKENS) as u32;
        let slots: Vec<u32> = (0..positions).map(slot).collect();
        let len = blocks * kv_heads * head_dim.next_multiple_of(32) * BLOCK_TOKENS;
        let empty = || runner.put(&vec![0_u16; len]);
        let (keys, values) = (empty()?, [empty()?, empty()?]);
        let queries = runner.put(&vec![0_u16; positions * heads * head_dim])?;
        // No rotation: angles of zero.
        let angles = positions * head_dim / 2;
        let (cos, sin) = (runner.put(&vec![1.0_f32; angles])?, runner.put(&vec![0.0_f32; angles])?);
        let (x, places) = (runner.put(&qkv)?, runner.put(&slots)?);
        let none = Pointer::NULL;
        for (packs_values, values) in values.iter().enumerate() {
            let args = args![
                &x,
                none,
                none,
                none,
                &cos,
                &sin,
                &places,
                &queries,
                &keys,
                values,
                shape.heads,
                shape.kv_heads,
                shape.head_dim,
                0.0_f32,
                runner.is_f16(),
                packs_values as i32,
            ];
            runner.launch("qkv_finish", [positions, all, 1], (128, 0), args)?;
        }
        let tables = runner.put(&table)?;
        Ok(Self { runner, shape, start, rows, qkv, queries, keys, values, tables })
    }

    fn dims(&self) -> [usize; 3] {
        [self.shape.heads, self.shape.kv_heads, self.shape.head_dim].map(|n| n as usize)
    }

    /// The last rows by the CPU's attention.
    fn on_the_cpu(&self) -> anyhow::Result<Vec<f32>> {
        let ([heads, kv_heads, head_dim], positions) = (self.dims(), self.start + self.rows);
        let (row_len, dtype) = ((heads + 2 * kv_heads) * head_dim, self.runner.dtype);
        let blocks = positions.div_ceil(BLOCK_TOKENS);
        let dims = KvDims { layers: 1, kv_heads, head_dim };
        let mut cache = KvCache::new(dims, dtype, blocks).context("the CPU's cache")?;
        let turn = self.runner.pool.turn();
        let segment = |rows: usize, start: usize| Segment {
            rows: 0..rows,
            start,
            blocks: (0..blocks as u32).collect(),
        };
        let all = [segment(positions, 0)];
        cache.store(&turn, 0, &all, (&self.qkv, row_len, heads * head_dim));
        let attention = Attention {
            heads,
            scale: self.shape.scale,
            softcap: (self.shape.cap != 0.0).then_some(self.shape.cap),
            window: (self.shape.window != 0).then_some(self.shape.window as usize),
        };
        let mut out = Rounded::new(dtype, heads * head_dim);
        let last = (&self.qkv[self.start * row_len..], row_len);
        let segments = [segment(self.rows, self.start)];
        cache.attend(&turn, 0, attention, &segments, last, &mut out);
        Ok((0..self.rows).flat_map(|row| self.runner.widened(out.bits(row))).collect())
    }

    /// The last rows in f64, each with the mean magnitude of its values.
    fn exact(&self) -> Vec<[f64; 2]> {
        let [heads, kv_heads, head_dim] = self.dims();
        let head = |position: usize, index: usize| {
            &self.qkv[(position * (heads + 2 * kv_heads) + index) * head_dim..][..head_dim]
        };
        let mut exact = Vec::with_capacity(self.rows * heads * head_dim);
        for position in self.start..self.start + self.rows {
            let first = match self.shape.window {
                0 => 0,
                window => (position + 1).saturating_sub(window as usize),
            };
            for index in 0..heads {
                let (query, kv_head) = (head(position, index), index / (heads / kv_heads));
                let score = |p: usize| {
                    let products = query.iter().zip(head(p, heads + kv_head));
                    let x = products.map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>()
                        * f64::from(self.shape.scale);
                    let cap = f64::from(self.shape.cap);
                    (if cap == 0.0 { x } else { (x / cap).tanh() * cap }).exp()
                };
                let weights: Vec<f64> = (first..=position).map(score).collect();
                let sum: f64 = weights.iter().sum();
                for d in 0..head_dim {
                    let mut result = [0.0; 2];
                    for (weight, p) in weights.iter().zip(first..) {
                        let value = f64::from(head(p, heads + kv_heads + kv_head)[d]);
                        result[0] += weight * value / sum;
                        result[1] += weight * value.abs() / sum;
                    }
                    exact.push(result);
                }
            }
        }
        exact
    }

    fn near(&self, name: &str, got: &[f32], exact: &[[f64; 2]]) -> anyhow::Result<()> {
        for (at, (got, [exact, size])) in got.iter().zip(exact).enumerate() {
            let error = (f64::from(*got) - exact).abs() / size;
            ensure!(
                error < error_max(self.runner.dtype),
                "{name}: element {at} is {got:e}, and {exact:e} in f64"
            );
        }
        Ok(())
    }

    /// The last rows by one kernel, and its name.
    fn run(
        &self,
        size: usize,
        is_split: bool,
        is_tensor: bool,
    ) -> anyhow::Result<(Vec<f32>, &'static str)> {
        let ([heads, kv_heads, head_dim], runner) = (self.dims(), self.runner);
        let partitions = (self.start + self.rows).div_ceil(PARTITION_TOKENS);
        let queries = self.rows * heads / kv_heads;
        let tile = |first: usize| QueryTile {
            row_zero: self.start as i32,
            start: self.start as i32,
            first_query: first as i32,
            queries: (queries - first).min(size) as i32,
            table: 0,
            unused: 0,
        };
        let tiles: Vec<QueryTile> = (0..queries).step_by(size).map(tile).collect();
        let on_card = runner.put(&tiles)?;
        let all = self.start + self.rows;
        let out = runner.put(&vec![0_u16; all * heads * head_dim])?;
        let parts = runner.put(&vec![0.0_f32; all * heads * partitions * (head_dim + 2)])?;
        let (name, threads, shared) = variant(runner, size, head_dim, is_tensor);
        let (depth, values) = (if is_split { partitions } else { 1 }, usize::from(is_tensor));
        let args = args![
            &self.queries,
            &self.keys,
            &self.values[values],
            &self.tables,
            &on_card,
            &parts,
            &out,
            self.shape,
            partitions as i32,
            i32::from(is_split),
        ];
        runner.launch(name, [tiles.len(), kv_heads, depth], (threads, shared), args)?;
        if is_split {
            // Rows before the last ones have no partial results, and are not read.
            let positions: Vec<u32> = (0..all as u32).collect();
            let positions = runner.put(&positions)?;
            let args =
                args![&parts, &positions, &out, self.shape, partitions as i32, runner.is_f16(),];
            runner.launch("attend_merge", [all, heads, 1], (128, 0), args)?;
        }
        let bits: Vec<u16> = runner.get(&out, all * heads * head_dim)?;
        Ok((runner.widened(&bits[self.start * heads * head_dim..]), name))
    }
}

/// The kernel for tiles of `size` queries, its threads and its dynamic shared memory.
fn variant(
    runner: &KernelRunner<'_>,
    size: usize,
    head_dim: usize,
    is_tensor: bool,
) -> (&'static str, u32, usize) {
    let names = match (size, is_tensor) {
        (1, _) => ["attend_bf16_1", "attend_f16_1"],
        (4, _) => ["attend_bf16_4", "attend_f16_4"],
        (8, false) => ["attend_bf16_8", "attend_f16_8"],
        (8, true) => ["attend_mma_bf16_8", "attend_mma_f16_8"],
        (_, _) => ["attend_mma_bf16_32", "attend_mma_f16_32"],
    };
    let (warps, padded) = (if size == 8 { 4 } else { 8 }, head_dim.next_multiple_of(32));
    let (threads, shared) = match is_tensor {
        false => (32 * warps, 4 * size * (PARTITION_TOKENS + padded + warps * head_dim)),
        true => (512, 16 * size * (4 * ((padded / 32) | 1) + PARTITION_TOKENS / 8 + 4)),
    };
    (runner.name(names), threads as u32, shared)
}
