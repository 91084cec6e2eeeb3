//! Measures what the canon costs and what its partitions give: a product of the canon and one with
//! a single chain for each output take turns on one thread; then attention of one row over a long
//! context on one thread and on all. Every figure is that of the fastest of many short runs.

use super::ceilings::best_of;
use super::host::Say;
use crate::ops::attention::{Attention, BLOCK_TOKENS, KvCache, KvDims, Segment};
use crate::ops::dtype::Dtype;
use crate::ops::lanes::{Isa, Kernel, Lanes, dispatch};
use crate::ops::matmul::{Packed, matmul_into};
use crate::ops::pool::{Pool, Turn};
use crate::ops::rounded::Rounded;
use std::hint::black_box;

/// Runs of a measurement whose fastest counts.
const RUNS: usize = 500;

/// Measures on an otherwise idle machine.
///
/// # Errors
/// When threads cannot be started or there is not enough memory.
pub fn run(say: Say<'_>) -> anyhow::Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (alone, shared) = (Pool::new(1, Isa::best())?, Pool::new(threads, Isa::best())?);
    say(alone.isa().to_string());
    for (rows, cols) in [(576, 576), (576, 1536), (1536, 576)] {
        chains(say, &alone.turn(), (rows, cols))?;
    }
    for context in [512, 2048, 8192] {
        let (alone, shared) = (decode(&alone.turn(), context)?, decode(&shared.turn(), context)?);
        say(format!(
            "attention of 1 row at context {context:5}: {:8.1} us on one thread, {:8.1} us on \
             {threads}, ratio {:.2}",
            alone * 1e6,
            shared * 1e6,
            alone / shared
        ));
    }
    Ok(())
}

/// Seconds of attention of one row in one layer of SmolLM2's shape.
fn decode(turn: &Turn<'_>, context: usize) -> anyhow::Result<f64> {
    let dims = KvDims { layers: 1, kv_heads: 3, head_dim: 64 };
    let args = Attention { heads: 9, scale: 0.125, softcap: None, window: None };
    let row_len = (args.heads + 2 * dims.kv_heads) * dims.head_dim;
    let blocks = context / BLOCK_TOKENS;
    let mut cache = KvCache::new(dims, Dtype::Bf16, blocks)?;
    let blocks: Vec<u32> = (0..blocks as u32).collect();
    let all = [Segment { rows: 0..context, start: 0, blocks: blocks.clone() }];
    let qkv: Vec<f32> = (0..context * row_len).map(|i| (i % 97) as f32 * 0.01).collect();
    cache.store(turn, 0, &all, (&qkv, row_len, args.heads * dims.head_dim));
    let last = [Segment { rows: 0..1, start: context - 1, blocks }];
    let qkv = &qkv[..row_len];
    let mut out = Rounded::new(Dtype::Bf16, args.heads * dims.head_dim);
    Ok(best_of(RUNS, || {
        cache.attend(turn, 0, args, &last, (qkv, row_len), black_box(&mut out));
    }))
}

/// All tiles of a product with one chain for each output, pair by pair as they lie:
/// the fewest additions that a product can have. What the canon costs is measured against it.
struct OneChain<'a> {
    weights: &'a [u16], // (blocks, cols / 2, 64, 2)
    inputs: &'a [f32],  // (tokens, cols)
    cols: usize,
    out: &'a mut [f32], // (tokens, rows)
}

impl Kernel for OneChain<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let tokens = self.inputs.len() / self.cols;
        let rows = self.out.len() / tokens;
        for block in 0..rows / 64 {
            let weights = &self.weights[block * 64 * self.cols..][..64 * self.cols];
            for first in (0..tokens).step_by(6) {
                let mut acc = [[L::splat(0.0); 4]; 6];
                for k in 0..self.cols {
                    let (is_first, pair) = (k % 2 == 0, k / 2);
                    let mut row = [L::splat(0.0); 4];
                    for (v, row) in row.iter_mut().enumerate() {
                        let at = weights[pair * 128 + v * 32..][..32].as_ptr();
                        // SAFETY: the slice has 32 values.
                        *row = unsafe { if is_first { L::high_bf16(at) } else { L::low_bf16(at) } };
                    }
                    for (t, acc) in acc.iter_mut().enumerate() {
                        let x = self.inputs[(first + t) * self.cols + k];
                        for (acc, row) in acc.iter_mut().zip(row) {
                            *acc = row.mul_add(L::splat(x), *acc);
                        }
                    }
                }
                for (t, acc) in acc.into_iter().enumerate() {
                    for (v, acc) in acc.into_iter().enumerate() {
                        let at = (first + t) * rows + block * 64 + v * 16;
                        self.out[at..at + 16].copy_from_slice(&acc.to_array());
                    }
                }
            }
        }
    }
}

/// A product of the canon beside one with a single chain, in turns.
fn chains(say: Say<'_>, turn: &Turn<'_>, (rows, cols): (usize, usize)) -> anyhow::Result<()> {
    let tokens = 48;
    let bits: Vec<u16> = (0..rows * cols).map(|i| 0x3c00 + (i * 7 % 512) as u16).collect();
    let fill = |r: usize, out: &mut [u16]| {
        out.copy_from_slice(&bits[r * cols..][..cols]);
        Ok::<_, std::io::Error>(())
    };
    let w = Packed::pack(turn, (rows, cols), Dtype::Bf16, fill)?;
    let mut x = Rounded::new(Dtype::Bf16, cols);
    x.set_rows(tokens);
    (0..tokens).for_each(|t| x.set_row(t, &vec![0.01 * (t + 1) as f32; cols]));
    let inputs: Vec<f32> = (0..tokens).flat_map(|t| x.widened(t)).collect();
    let mut out = vec![0.0; tokens * rows];
    let (mut canon, mut single) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..RUNS {
        canon = canon.min(best_of(1, || matmul_into(turn, &w, &x, black_box(&mut out))));
        single = single.min(best_of(1, || {
            let (weights, inputs, out) = (&bits[..], &inputs[..], black_box(&mut out[..]));
            dispatch(turn.isa(), OneChain { weights, inputs, cols, out });
        }));
    }
    let flops = (2 * rows * cols * tokens) as f64 / 1e9;
    say(format!(
        "chains {rows:6} x {cols:4}  tokens {tokens:4}  canon {:6.1} GFLOP/s  one chain {:6.1} \
         GFLOP/s  ratio {:.2}",
        flops / canon,
        flops / single,
        single / canon
    ));
    Ok(())
}
