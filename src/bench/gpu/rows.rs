//! Compares the kernels that work row by row with the CPU's bits: packing, embedding, norms, heads
//! of queries, keys and values, gates.

use super::lab::{Lab, same};
use crate::models::cuda::launch::{Pointer, args};
use crate::ops::rope::{Rope, RopeScaling};
use crate::ops::rowwise::{Activation, Norm, softcap};

/// Rows of each test.
const ROWS: usize = 5;
/// Added to the mean square.
const EPS: f32 = 1e-5;

/// All of them on rows of `cols` values; results by kernel.
pub(super) fn compare(lab: &Lab<'_>, cols: usize) -> anyhow::Result<Vec<(&'static str, usize)>> {
    Ok(vec![
        ("pack", pack(lab, cols)?),
        ("embed", embed(lab, cols)?),
        ("add_norm", add_norm(lab, cols)?),
        ("norm_add", norm_add(lab, cols)?),
        ("qkv_finish", heads(lab, 64)? + heads(lab, 80)?),
        ("gate", gate(lab, cols)?),
        ("softcap", caps(lab, cols)?),
    ])
}

/// Where element (row, k) of a packed matrix lies.
fn packed_at(row: usize, k: usize, cols: usize) -> usize {
    let tile = row / 32 * cols.div_ceil(32) + k / 32;
    (tile * 128 + k % 32 / 8 * 32 + row % 32) * 8 + k % 8
}

fn pack(lab: &Lab<'_>, cols: usize) -> anyhow::Result<usize> {
    let rows = 37;
    let mut values = lab.noise(rows * cols);
    // Of bf16, what is smaller than 2^-50 becomes zero.
    values[1] = 1e-20;
    let bits: Vec<u16> = match lab.is_f16() {
        1 => lab.rounded(&values),
        _ => values.iter().map(|x| (x.to_bits() >> 16) as u16).collect(),
    };
    let len = rows.next_multiple_of(32) * cols.next_multiple_of(32);
    let (from, packed) = (lab.put(&bits)?, lab.put(&vec![0_u16; len])?);
    let args = args![&from, &packed, cols as i32, 0_i32, lab.is_f16()];
    lab.launch("pack", [rows, 1, 1], (256, 0), args)?;
    let mut want = vec![0.0; len];
    for (row, k) in (0..rows).flat_map(|row| (0..cols).map(move |k| (row, k))) {
        let exact = lab.dtype.widen(bits[row * cols + k]);
        want[packed_at(row, k, cols)] = lab.dtype.widen(lab.dtype.round(exact));
    }
    same("pack", &lab.widened(&lab.get(&packed, len)?), &want)
}

fn embed(lab: &Lab<'_>, cols: usize) -> anyhow::Result<usize> {
    let (vocab, scale) = (50, 7.5_f32);
    let table = lab.rounded(&lab.noise(vocab * cols));
    let mut tiles = vec![0_u16; vocab.next_multiple_of(32) * cols.next_multiple_of(32)];
    for (row, k) in (0..vocab).flat_map(|row| (0..cols).map(move |k| (row, k))) {
        tiles[packed_at(row, k, cols)] = table[row * cols + k];
    }
    let ids = [49_u32, 0, 31, 32, 49];
    let rows = ids.iter().flat_map(|id| &table[*id as usize * cols..][..cols]);
    let want: Vec<f32> = rows.map(|b| lab.dtype.widen(*b) * scale).collect();
    let mut compared = 0;
    for (table, is_packed) in [(table, 0), (tiles, 1)] {
        let (table, ids) = (lab.put(&table)?, lab.put(&ids)?);
        let out = lab.put(&vec![0.0_f32; want.len()])?;
        let args = args![&table, &ids, &out, cols as i32, is_packed, scale, lab.is_f16()];
        lab.launch("embed", [5, 1, 1], (256, 0), args)?;
        compared += same("embed", &lab.get(&out, want.len())?, &want)?;
    }
    Ok(compared)
}

fn add_norm(lab: &Lab<'_>, cols: usize) -> anyhow::Result<usize> {
    let (x, branch, bias) = (lab.noise(ROWS * cols), lab.noise(ROWS * cols), lab.noise(cols));
    let weight = lab.noise(cols);
    let (residual, out) = (lab.put(&x)?, lab.put(&vec![0_u16; x.len()])?);
    let (b, bi, w) = (lab.put(&branch)?, lab.put(&bias)?, lab.put(&weight)?);
    let args = args![&residual, &b, &bi, &w, Pointer::NULL, &out, cols as i32, EPS, lab.is_f16()];
    lab.launch("add_norm", [ROWS, 1, 1], (256, 4 * cols), args)?;
    let mut want = x;
    want.iter_mut().zip(&branch).for_each(|(r, b)| *r += b);
    want.iter_mut().enumerate().for_each(|(i, r)| *r += bias[i % cols]);
    let compared = same("add_norm, residual", &lab.get(&residual, want.len())?, &want)?;
    let norm = Norm::new(weight, EPS);
    want.chunks_exact_mut(cols).for_each(|row| norm.apply(lab.pool.isa(), row));
    let want = lab.widened(&lab.rounded(&want));
    Ok(compared + same("add_norm", &lab.widened(&lab.get(&out, want.len())?), &want)?)
}

fn norm_add(lab: &Lab<'_>, cols: usize) -> anyhow::Result<usize> {
    let (x, mut branch, weight) = (lab.noise(ROWS * cols), lab.noise(ROWS * cols), lab.noise(cols));
    let (residual, b, w) = (lab.put(&x)?, lab.put(&branch)?, lab.put(&weight)?);
    let args = args![&residual, &b, Pointer::NULL, &w, cols as i32, EPS];
    lab.launch("norm_add", [ROWS, 1, 1], (256, 4 * cols), args)?;
    let mut want = x;
    Norm::new(weight, EPS).apply_add(&lab.pool.turn(), &mut branch, &mut want);
    same("norm_add", &lab.get(&residual, want.len())?, &want)
}

/// Bias, norms, rotation, and where keys and values are stored, in both layouts of values.
fn heads(lab: &Lab<'_>, head_dim: usize) -> anyhow::Result<usize> {
    let (heads, kv_heads) = (4, 2);
    let (all, tiles) = (heads + 2 * kv_heads, head_dim.div_ceil(32));
    let positions = [5_u32, 100_000, 31];
    let slots = [5_u32, 2 * 32 + 4, 32 + 31];
    let table =
        Rope::new(head_dim, 10_000.0, RopeScaling::None).table(&lab.pool.turn(), &positions);
    let qkv = lab.noise(3 * all * head_dim);
    let (bias, norms) = (lab.noise(all * head_dim), [lab.noise(head_dim), lab.noise(head_dim)]);
    let finish = |i: usize, head: &[f32]| {
        let (row, index) = (i / all, i % all);
        let own = &bias[index * head_dim..];
        let mut head: Vec<f32> = head.iter().zip(own).map(|(x, b)| x + b).collect();
        if index < heads + kv_heads {
            let weight = norms[usize::from(index >= heads)].clone();
            Norm::new(weight, EPS).apply(lab.pool.isa(), &mut head);
            table.rotate(lab.pool.isa(), row, &mut head);
        }
        lab.widened(&lab.rounded(&head))
    };
    let all_heads = qkv.chunks_exact(head_dim).enumerate();
    let want: Vec<f32> = all_heads.flat_map(|(i, head)| finish(i, head)).collect();
    let on_card = [lab.put(&qkv)?, lab.put(&bias)?, lab.put(&norms[0])?, lab.put(&norms[1])?];
    let [cos, sin] = [lab.put(table.parts().0)?, lab.put(table.parts().1)?];
    let [x, b, qn, kn] = &on_card;
    let places = lab.put(&slots)?;
    let len = 3 * kv_heads * tiles * 1024;
    let mut compared = 0;
    for packs_values in [0, 1] {
        let out = lab.put(&vec![0_u16; 3 * heads * head_dim])?;
        let (keys, values) = (lab.put(&vec![0_u16; len])?, lab.put(&vec![0_u16; len])?);
        let (h, kh, hd) = (heads as i32, kv_heads as i32, head_dim as i32);
        let (o, k, v, f16) = (&out, &keys, &values, lab.is_f16());
        let (c, s, p) = (&cos, &sin, &places);
        let args = args![x, b, qn, kn, c, s, p, o, k, v, h, kh, hd, EPS, f16, packs_values];
        lab.launch("qkv_finish", [3, all, 1], (128, 0), args)?;
        let queries: Vec<u16> = lab.get(&out, 3 * heads * head_dim)?;
        let [keys, values]: [Vec<u16>; 2] = [lab.get(&keys, len)?, lab.get(&values, len)?];
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
        compared += same("qkv_finish", &lab.widened(&got), &want)?;
    }
    Ok(compared)
}

fn gate(lab: &Lab<'_>, inter: usize) -> anyhow::Result<usize> {
    let stride = inter.next_multiple_of(64);
    let x: Vec<f32> = lab.noise(ROWS * 2 * stride).iter().map(|x| 30.0 * x).collect();
    let from = lab.put(&x)?;
    let mut compared = 0;
    for (activation, is_gelu) in [(Activation::Silu, 0), (Activation::GeluTanh, 1)] {
        let out = lab.put(&vec![0_u16; ROWS * inter])?;
        let args = args![&from, &out, inter as i32, stride as i32, is_gelu, lab.is_f16()];
        lab.launch("gate", [inter.div_ceil(256), ROWS, 1], (256, 0), args)?;
        let mut want = Vec::new();
        for row in x.chunks_exact(2 * stride) {
            let mut gate = row[..inter].to_vec();
            activation.gate(lab.pool.isa(), &mut gate, &row[stride..][..inter]);
            want.extend(gate);
        }
        let want = lab.widened(&lab.rounded(&want));
        compared += same("gate", &lab.widened(&lab.get(&out, want.len())?), &want)?;
    }
    Ok(compared)
}

fn caps(lab: &Lab<'_>, cols: usize) -> anyhow::Result<usize> {
    let mut want: Vec<f32> = lab.noise(ROWS * cols).iter().map(|x| 100.0 * x).collect();
    let (out, count) = (lab.put(&want)?, want.len());
    let args = args![&out, count as u64, 30.0_f32];
    lab.launch("softcap", [count.div_ceil(256), 1, 1], (256, 0), args)?;
    softcap(lab.pool.isa(), 30.0, &mut want);
    same("softcap", &lab.get(&out, count)?, &want)
}
