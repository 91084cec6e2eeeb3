//! Compares the kernels that work row by row with the CPU's bits: packing, embedding, norms, heads
//! of queries, keys and values, gates.

use super::runner::{KernelRunner, same};
use crate::models::cuda::launch::{Pointer, args};
use crate::ops::rope::{Rope, RopeScaling};
use crate::ops::rowwise::{Activation, Norm, softcap};

/// Rows of each test.
const ROWS: usize = 5;
/// Added to the mean square.
const EPS: f32 = 1e-5;

/// All of them on rows of `cols` values; results by kernel.
pub(super) fn compare(
    runner: &KernelRunner<'_>,
    cols: usize,
) -> anyhow::Result<Vec<(&'static str, usize)>> {
    Ok(vec![
        ("pack", pack(runner, cols)?),
        ("embed", embed(runner, cols)?),
        ("add_norm", add_norm(runner, cols)?),
        ("norm_add", norm_add(runner, cols)?),
        ("qkv_finish", heads(runner, 64)? + heads(runner, 80)?),
        ("gate", gate(runner, cols)?),
        ("softcap", caps(runner, cols)?),
    ])
}

/// Where element (row, k) of a packed matrix lies.
fn packed_at(row: usize, k: usize, cols: usize) -> usize {
    let tile = row / 32 * cols.div_ceil(32) + k / 32;
    (tile * 128 + k % 32 / 8 * 32 + row % 32) * 8 + k % 8
}

fn pack(runner: &KernelRunner<'_>, cols: usize) -> anyhow::Result<usize> {
    let rows = 37;
    let mut values = runner.noise(rows * cols);
    // Of bf16, what is smaller than 2^-50 becomes zero.
    values[1] = 1e-20;
    let bits: Vec<u16> = match runner.is_f16() {
        1 => runner.rounded(&values),
        _ => values.iter().map(|x| (x.to_bits() >> 16) as u16).collect(),
    };
    let len = rows.next_multiple_of(32) * cols.next_multiple_of(32);
    let (from, packed) = (runner.put(&bits)?, runner.put(&vec![0_u16; len])?);
    let args = args![&from, &packed, cols as i32, 0_i32, runner.is_f16()];
    runner.launch("pack", [rows, 1, 1], (256, 0), args)?;
    let mut want = vec![0.0; len];
    for (row, k) in (0..rows).flat_map(|row| (0..cols).map(move |k| (row, k))) {
        let exact = runner.dtype.widen(bits[row * cols + k]);
        want[packed_at(row, k, cols)] = runner.dtype.widen(runner.dtype.round(exact));
    }
    same("pack", &runner.widened(&runner.get(&packed, len)?), &want)
}

fn embed(runner: &KernelRunner<'_>, cols: usize) -> anyhow::Result<usize> {
    let (vocab, scale) = (50, 7.5_f32);
    let table = runner.rounded(&runner.noise(vocab * cols));
    let mut tiles = vec![0_u16; vocab.next_multiple_of(32) * cols.next_multiple_of(32)];
    for (row, k) in (0..vocab).flat_map(|row| (0..cols).map(move |k| (row, k))) {
        tiles[packed_at(row, k, cols)] = table[row * cols + k];
    }
    let ids = [49_u32, 0, 31, 32, 49];
    let rows = ids.iter().flat_map(|id| &table[*id as usize * cols..][..cols]);
    let want: Vec<f32> = rows.map(|b| runner.dtype.widen(*b) * scale).collect();
    let mut compared = 0;
    for (table, is_packed) in [(table, 0), (tiles, 1)] {
        let (table, ids) = (runner.put(&table)?, runner.put(&ids)?);
        let out = runner.put(&vec![0.0_f32; want.len()])?;
        let args = args![&table, &ids, &out, cols as i32, is_packed, scale, runner.is_f16()];
        runner.launch("embed", [5, 1, 1], (256, 0), args)?;
        compared += same("embed", &runner.get(&out, want.len())?, &want)?;
    }
    Ok(compared)
}

fn add_norm(runner: &KernelRunner<'_>, cols: usize) -> anyhow::Result<usize> {
    let (x, branch, bias) =
        (runner.noise(ROWS * cols), runner.noise(ROWS * cols), runner.noise(cols));
    let weight = runner.noise(cols);
    let (residual, out) = (runner.put(&x)?, runner.put(&vec![0_u16; x.len()])?);
    let (b, bi, w) = (runner.put(&branch)?, runner.put(&bias)?, runner.put(&weight)?);
    let args =
        args![&residual, &b, &bi, &w, Pointer::NULL, &out, cols as i32, EPS, runner.is_f16()];
    runner.launch("add_norm", [ROWS, 1, 1], (256, 4 * cols), args)?;
    let mut want = x;
    want.iter_mut().zip(&branch).for_each(|(r, b)| *r += b);
    want.iter_mut().enumerate().for_each(|(i, r)| *r += bias[i % cols]);
    let compared = same("add_norm, residual", &runner.get(&residual, want.len())?, &want)?;
    let norm = Norm::new(weight, EPS);
    want.chunks_exact_mut(cols).for_each(|row| norm.apply(runner.pool.isa(), row));
    let want = runner.widened(&runner.rounded(&want));
    Ok(compared + same("add_norm", &runner.widened(&runner.get(&out, want.len())?), &want)?)
}

fn norm_add(runner: &KernelRunner<'_>, cols: usize) -> anyhow::Result<usize> {
    let (x, mut branch, weight) =
        (runner.noise(ROWS * cols), runner.noise(ROWS * cols), runner.noise(cols));
    let (residual, b, w) = (runner.put(&x)?, runner.put(&branch)?, runner.put(&weight)?);
    let args = args![&residual, &b, Pointer::NULL, &w, cols as i32, EPS];
    runner.launch("norm_add", [ROWS, 1, 1], (256, 4 * cols), args)?;
    let mut want = x;
    Norm::new(weight, EPS).apply_add(&runner.pool.turn(), &mut branch, &mut want);
    same("norm_add", &runner.get(&residual, want.len())?, &want)
}

/// Bias, norms, rotation, and where keys and values are stored, in both layouts of values.
fn heads(runner: &KernelRunner<'_>, head_dim: usize) -> anyhow::Result<usize> {
    let (heads, kv_heads) = (4, 2);
    let (all, tiles) = (heads + 2 * kv_heads, head_dim.div_ceil(32));
    let positions = [5_u32, 100_000, 31];
    let slots = [5_u32, 2 * 32 + 4, 32 + 31];
    let table =
        Rope::new(head_dim, 10_000.0, RopeScaling::None).table(&runner.pool.turn(), &positions);
    let qkv = runner.noise(3 * all * head_dim);
    let (bias, norms) =
        (runner.noise(all * head_dim), [runner.noise(head_dim), runner.noise(head_dim)]);
    let finish = |i: usize, head: &[f32]| {
        let (row, index) = (i / all, i % all);
        let own = &bias[index * head_dim..];
        let mut head: Vec<f32> = head.iter().zip(own).map(|(x, b)| x + b).collect();
        if index < heads + kv_heads {
            let weight = norms[usize::from(index >= heads)].clone();
            Norm::new(weight, EPS).apply(runner.pool.isa(), &mut head);
            table.rotate(runner.pool.isa(), row, &mut head);
        }
        runner.widened(&runner.rounded(&head))
    };
    let all_heads = qkv.chunks_exact(head_dim).enumerate();
    let want: Vec<f32> = all_heads.flat_map(|(i, head)| finish(i, head)).collect();
    let on_card =
        [runner.put(&qkv)?, runner.put(&bias)?, runner.put(&norms[0])?, runner.put(&norms[1])?];
    let [cos, sin] = [runner.put(table.parts().0)?, runner.put(table.parts().1)?];
    let [x, b, qn, kn] = &on_card;
    let places = runner.put(&slots)?;
    let len = 3 * kv_heads * tiles * 1024;
    let mut compared = 0;
    for packs_values in [0, 1] {
        let out = runner.put(&vec![0_u16; 3 * heads * head_dim])?;
        let (keys, values) = (runner.put(&vec![0_u16; len])?, runner.put(&vec![0_u16; len])?);
        let (h, kh, hd) = (heads as i32, kv_heads as i32, head_dim as i32);
        let (o, k, v, f16) = (&out, &keys, &values, runner.is_f16());
        let (c, s, p) = (&cos, &sin, &places);
        let args = args![x, b, qn, kn, c, s, p, o, k, v, h, kh, hd, EPS, f16, packs_values];
        runner.launch("qkv_finish", [3, all, 1], (128, 0), args)?;
        let queries: Vec<u16> = runner.get(&out, 3 * heads * head_dim)?;
        let [keys, values]: [Vec<u16>; 2] = [runner.get(&keys, len)?, runner.get(&values, len)?];
        let at = |i: usize| -> u16 {
            let (row, index, d) = (i / head_dim / all, i / head_dim % all, i % head_dim);
            let (block, slot) = (slots[row] as usize / 32, slots[row] as usize % 32);
            let place = |head: usize| block * kv_heads + head;
            if index < heads {
                queries[(row * heads + index) * head_dim + d]
            } else if index < heads + kv_heads {
                keys[place(index - heads) * tiles * 1024 + packed_at(slot, d, head_dim)]
            } else if packs_values == 1 {
                values[place(index - heads - kv_heads) * tiles * 1024 + packed_at(d, slot, 32)]
            } else {
                values[(place(index - heads - kv_heads) * 32 + slot) * head_dim + d]
            }
        };
        let got: Vec<u16> = (0..want.len()).map(at).collect();
        compared += same("qkv_finish", &runner.widened(&got), &want)?;
    }
    Ok(compared)
}

fn gate(runner: &KernelRunner<'_>, inter: usize) -> anyhow::Result<usize> {
    let stride = inter.next_multiple_of(64);
    let x: Vec<f32> = runner.noise(ROWS * 2 * stride).iter().map(|x| 30.0 * x).collect();
    let from = runner.put(&x)?;
    let mut compared = 0;
    for (activation, is_gelu) in [(Activation::Silu, 0), (Activation::GeluTanh, 1)] {
        let out = runner.put(&vec![0_u16; ROWS * inter])?;
        let args = args![&from, &out, inter as i32, stride as i32, is_gelu, runner.is_f16()];
        runner.launch("gate", [inter.div_ceil(256), ROWS, 1], (256, 0), args)?;
        let mut want = Vec::new();
        for row in x.chunks_exact(2 * stride) {
            let mut gate = row[..inter].to_vec();
            activation.gate(runner.pool.isa(), &mut gate, &row[stride..][..inter]);
            want.extend(gate);
        }
        let want = runner.widened(&runner.rounded(&want));
        compared += same("gate", &runner.widened(&runner.get(&out, want.len())?), &want)?;
    }
    Ok(compared)
}

fn caps(runner: &KernelRunner<'_>, cols: usize) -> anyhow::Result<usize> {
    let mut want: Vec<f32> = runner.noise(ROWS * cols).iter().map(|x| 100.0 * x).collect();
    let (out, count) = (runner.put(&want)?, want.len());
    let args = args![&out, count as u64, 30.0_f32];
    runner.launch("softcap", [count.div_ceil(256), 1, 1], (256, 0), args)?;
    softcap(runner.pool.isa(), 30.0, &mut want);
    same("softcap", &runner.get(&out, count)?, &want)
}
