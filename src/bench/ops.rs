//! Measures kernels against the ceilings of this machine, which are measured in the same run.

use super::ceilings::{best_of, product_peak, read_bandwidth};
use super::host::{self, Say};
use crate::ops::attention::{Attention, BLOCK_TOKENS, KvCache, KvDims, Segment};
use crate::ops::dtype::Dtype;
use crate::ops::matmul::{Packed, matmul_into};
use crate::ops::pool::Turn;
use crate::ops::rounded::Rounded;
use std::ops::Range;

/// Measures matrix products and attention, on an otherwise idle machine.
///
/// # Errors
/// When threads cannot be started or there is not enough memory.
pub fn run(say: Say<'_>) -> anyhow::Result<()> {
    let pool = host::pool()?;
    let turn = pool.turn();
    say(format!("{} threads, {}", turn.threads(), turn.isa()));
    let bandwidth = read_bandwidth(&turn)? / 1e9;
    let peak = product_peak(&turn, Dtype::Bf16) / 1e9;
    say(format!("read bandwidth {bandwidth:6.1} GB/s   bf16 peak {peak:6.1} GFLOP/s"));
    for (rows, cols) in [(576, 576), (3072, 576), (576, 1536), (49_152, 576)] {
        product(say, &turn, (rows, cols), (bandwidth, peak))?;
    }
    attention(say, &turn, peak)?;
    long_contexts(say, &turn, bandwidth)
}

fn product(
    say: Say<'_>,
    turn: &Turn<'_>,
    (rows, cols): (usize, usize),
    (bandwidth, peak): (f64, f64),
) -> anyhow::Result<()> {
    // Copies enough to defeat the cache, as the layers of a model do.
    let copies = (256_usize << 20).div_ceil(rows * cols * 2);
    let fill = |r: usize, out: &mut [u16]| {
        out.iter_mut().enumerate().for_each(|(k, o)| *o = 0x3c00 + ((r * 31 + k * 7) % 512) as u16);
        Ok::<_, std::io::Error>(())
    };
    let weights = (0..copies).map(|_| Packed::pack(turn, (rows, cols), Dtype::Bf16, fill));
    let weights = weights.collect::<Result<Vec<Packed>, _>>()?;
    for tokens in [1, 4, 16, 512] {
        let mut x = Rounded::new(Dtype::Bf16, cols);
        x.set_rows(tokens);
        (0..tokens).for_each(|t| x.set_row(t, &vec![0.01 * (t + 1) as f32; cols]));
        let mut out = vec![0.0; tokens * rows];
        let used = if tokens > 16 { copies.min(8) } else { copies };
        let seconds = best_of(3, || {
            weights[..used].iter().for_each(|w| matmul_into(turn, w, &x, &mut out));
        });
        let bytes = (used * rows * cols * 2) as f64 / seconds / 1e9;
        let flops = (used * rows * cols * 2 * tokens) as f64 / seconds / 1e9;
        say(format!(
            "matmul {rows:6} x {cols:4}  tokens {tokens:4}  {bytes:6.1} GB/s ({:3.0} % of read)  \
             {flops:6.1} GFLOP/s ({:3.0} % of peak)",
            100.0 * bytes / bandwidth,
            100.0 * flops / peak
        ));
    }
    Ok(())
}

fn attention(say: Say<'_>, turn: &Turn<'_>, peak: f64) -> anyhow::Result<()> {
    let dims = KvDims { layers: 1, kv_heads: 3, head_dim: 64 };
    let (heads, context) = (9, 512);
    let row_len = (heads + 2 * dims.kv_heads) * dims.head_dim;
    let qkv = vec![0.1; context * row_len];
    let mut cache = KvCache::new(dims, Dtype::Bf16, 16)?;
    let args = Attention { heads, scale: 0.125, softcap: None, window: None };
    for (rows, runs) in [(context, 5), (1, 200)] {
        let start = context - rows;
        let segments = [Segment { rows: 0..rows, start, blocks: (0..16).collect() }];
        let mut out = Rounded::new(Dtype::Bf16, heads * dims.head_dim);
        let qkv = &qkv[..rows * row_len];
        let seconds = best_of(runs, || {
            cache.store(turn, 0, &segments, (qkv, row_len, heads * dims.head_dim));
            cache.attend(turn, 0, args, &segments, (qkv, row_len), &mut out);
        });
        let pairs: usize = (start..context).map(|p| p + 1).sum();
        let flops = (pairs * heads * dims.head_dim * 4) as f64 / seconds / 1e9;
        say(format!(
            "attention {rows:4} rows at context {context}  {:8.1} us  {flops:6.1} GFLOP/s \
             ({:3.0} % of peak)",
            seconds * 1e6,
            100.0 * flops / peak
        ));
    }
    Ok(())
}

/// Attention of rows that each see a long context, in all layers of SmolLM2's shape: as many bytes
/// as no cache of a processor holds.
fn long_contexts(say: Say<'_>, turn: &Turn<'_>, bandwidth: f64) -> anyhow::Result<()> {
    let dims = KvDims { layers: 30, kv_heads: 3, head_dim: 64 };
    let (heads, context) = (9, 8000);
    let args = Attention { heads, scale: 0.125, softcap: None, window: None };
    let row_len = (heads + 2 * dims.kv_heads) * dims.head_dim;
    let (blocks, k_at) = (context / BLOCK_TOKENS, heads * dims.head_dim);
    let qkv: Vec<f32> = (0..context * row_len).map(|i| (i % 97) as f32 * 0.01).collect();
    for rows in [1, 4] {
        let mut cache = KvCache::new(dims, Dtype::Bf16, rows * blocks)?;
        let mut out = Rounded::new(Dtype::Bf16, k_at);
        let segment = |row: usize, rows: Range<usize>, start: usize| {
            let blocks = row * blocks..(row + 1) * blocks;
            Segment { rows, start, blocks: blocks.map(|b| b as u32).collect() }
        };
        for (row, layer) in (0..rows).flat_map(|row| (0..dims.layers).map(move |l| (row, l))) {
            cache.store(turn, layer, &[segment(row, 0..context, 0)], (&qkv, row_len, k_at));
        }
        let last: Vec<Segment> =
            (0..rows).map(|row| segment(row, row..row + 1, context - 1)).collect();
        let qkv = &qkv[..rows * row_len];
        let seconds = best_of(20, || {
            for layer in 0..dims.layers {
                cache.attend(turn, layer, args, &last, (qkv, row_len), &mut out);
            }
        });
        let bytes = (rows * blocks * dims.block_bytes()) as f64 / seconds / 1e9;
        say(format!(
            "attention {rows:4} rows at contexts of {context}, {} layers  {:8.2} ms  {bytes:6.1} \
             GB/s ({:3.0} % of read)",
            dims.layers,
            seconds * 1e3,
            100.0 * bytes / bandwidth
        ));
    }
    Ok(())
}
