//! What works row by row: `embed.cu`, `norm.cu` and `gate.cu` against `ops/rowwise.rs`.

use super::{args, assert_same, broken, first_difference, kernels};
use crate::common::Noise;
use std::ffi::c_void;
use targon_engine::ops::dtype::Dtype;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::ops::rowwise::{Activation, Norm, softcap};

const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];
const SIZES: [usize; 9] = [1, 15, 16, 17, 31, 33, 96, 577, 2050];
const EXTREMES: [f32; 8] =
    [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3.0e38, -0.0, 1.0e-30, 1.0e-42, 65_519.0];

/// Rows of noise: the first is plain, the second zero, later ones hold an extreme each.
fn rows(noise: &mut Noise, count: usize, cols: usize) -> Vec<f32> {
    let mut x: Vec<f32> = (0..count * cols).map(|_| noise.next() * 4.0).collect();
    for (r, row) in x.chunks_exact_mut(cols).enumerate().skip(1) {
        if r == 1 {
            row.fill(0.0);
        } else {
            row[r * 7 % cols] = EXTREMES[(r - 2) % EXTREMES.len()];
        }
    }
    x
}

fn widened(dtype: Dtype, bits: &[u16]) -> Vec<f32> {
    bits.iter().map(|b| dtype.widen(*b)).collect()
}

fn rounded(dtype: Dtype, values: &[f32]) -> Vec<f32> {
    values.iter().map(|x| dtype.widen(dtype.round(*x))).collect()
}

#[test]
fn embedding_rows_equal_their_twin() {
    let (mut noise, vocab) = (Noise(21), 70);
    for dtype in DTYPES {
        for (cols, scale) in [(1, 0.0_f32), (33, 0.0), (64, 7.5), (200, 45.25)] {
            let table: Vec<u16> =
                (0..vocab * cols).map(|_| dtype.round(noise.next() * 3.0)).collect();
            let packed = super::matmul::packed(&table, cols, dtype, 0);
            let ids = [69_u32, 0, 31, 32, 69];
            let want: Vec<f32> = ids
                .iter()
                .flat_map(|id| &table[*id as usize * cols..][..cols])
                .map(|b| dtype.widen(*b) * if scale == 0.0 { 1.0 } else { scale })
                .collect();
            for (table, is_packed) in [(&table, 0_i32), (&packed, 1)] {
                let mut out = vec![0.0_f32; ids.len() * cols];
                let (t, i, o) = (table.as_ptr(), ids.as_ptr(), out.as_mut_ptr());
                let (c, f16) = (cols as i32, i32::from(dtype == Dtype::F16));
                let args = args![t, i, o, c, is_packed, scale, f16];
                kernels().launch("embed", [ids.len() as u32, 1, 1], 256, 0, 1, &args);
                assert_same(&out, &want, &format!("{dtype} {cols} packed {is_packed}"));
            }
        }
    }
}

/// What `add_norm` computes, in Rust: the residual stream and the rounded rows.
fn add_norm_twin(
    norm: &Norm,
    dtype: Dtype,
    x: &[f32],
    branch: Option<(&[f32], Option<&[f32]>)>,
) -> (Vec<f32>, Vec<f32>) {
    let cols = norm.cols();
    let mut residual = x.to_vec();
    if let Some((branch, bias)) = branch {
        residual.iter_mut().zip(branch).for_each(|(r, b)| *r += b);
        if let Some(bias) = bias {
            residual.iter_mut().enumerate().for_each(|(i, r)| *r += bias[i % cols]);
        }
    }
    let mut normed = residual.clone();
    normed.chunks_exact_mut(cols).for_each(|row| norm.apply(Isa::best(), row));
    (residual, rounded(dtype, &normed))
}

#[test]
fn a_norm_after_an_addition_equals_its_twin() {
    let mut noise = Noise(22);
    let count = 2 + EXTREMES.len();
    for (dtype, cols) in DTYPES.into_iter().flat_map(|d| SIZES.map(|c| (d, c))) {
        let (x, branch) = (rows(&mut noise, count, cols), rows(&mut noise, count, cols));
        let weight: Vec<f32> = (0..cols).map(|_| noise.next() + 1.0).collect();
        let bias: Vec<f32> = (0..cols).map(|_| noise.next()).collect();
        let (eps, c, f16) = (1e-5_f32, cols as i32, i32::from(dtype == Dtype::F16));
        let norm = Norm::new(weight.clone(), eps);
        let none = std::ptr::null::<f32>();
        let all = std::ptr::null::<u32>();
        for (seed, with) in [
            (0, None),
            (1, Some((branch.as_slice(), None))),
            (9, Some((&branch, Some(bias.as_slice())))),
        ] {
            let (mut residual, mut out) = (x.clone(), vec![0_u16; x.len()]);
            let b = with.map_or(none, |(b, _)| b.as_ptr());
            let bias = with.and_then(|(_, bias)| bias).map_or(none, <[f32]>::as_ptr);
            let (r, w, o) = (residual.as_mut_ptr(), weight.as_ptr(), out.as_mut_ptr());
            let args = args![r, b, bias, w, all, o, c, eps, f16];
            kernels().launch("add_norm", [count as u32, 1, 1], 256, cols * 4, seed, &args);
            let (stream, normed) = add_norm_twin(&norm, dtype, &x, with);
            assert_same(&residual, &stream, &format!("{dtype} {cols} residual"));
            assert_same(&widened(dtype, &out), &normed, &format!("{dtype} {cols} normed"));
        }
    }
}

#[test]
fn chosen_rows_are_normed_where_they_are_named() {
    let (cols, dtype, eps) = (40_usize, Dtype::Bf16, 1e-6_f32);
    let x = rows(&mut Noise(23), 5, cols);
    let weight = vec![0.5_f32; cols];
    let chosen = [4_u32, 0, 4];
    let (_, want) = add_norm_twin(&Norm::new(weight.clone(), eps), dtype, &x, None);
    let (none, mut out) = (std::ptr::null::<f32>(), vec![0_u16; 3 * cols]);
    let (r, w, ch, o) = (x.as_ptr(), weight.as_ptr(), chosen.as_ptr(), out.as_mut_ptr());
    let (c, f16) = (cols as i32, 0_i32);
    let args = args![r, none, none, w, ch, o, c, eps, f16];
    kernels().launch("add_norm", [3, 1, 1], 256, cols * 4, 0, &args);
    let want: Vec<f32> =
        chosen.iter().flat_map(|r| want[*r as usize * cols..][..cols].to_vec()).collect();
    assert_same(&widened(dtype, &out), &want, "chosen rows");
}

#[test]
fn a_norm_before_an_addition_equals_its_twin() {
    let (mut noise, pool) = (Noise(24), Pool::new(1, Isa::best()).unwrap());
    let (count, eps) = (2 + EXTREMES.len(), 1e-6_f32);
    for cols in SIZES {
        let (x, mut branch) = (rows(&mut noise, count, cols), rows(&mut noise, count, cols));
        let weight: Vec<f32> = (0..cols).map(|_| noise.next() + 1.0).collect();
        let (mut residual, none) = (x.clone(), std::ptr::null::<f32>());
        let (r, b, w) = (residual.as_mut_ptr(), branch.as_ptr(), weight.as_ptr());
        let c = cols as i32;
        let args = args![r, b, none, w, c, eps];
        kernels().launch("norm_add", [count as u32, 1, 1], 256, cols * 4, 5, &args);
        let mut want = x;
        Norm::new(weight.clone(), eps).apply_add(&pool.turn(), &mut branch, &mut want);
        assert_same(&residual, &want, &format!("{cols}"));
    }
}

#[test]
fn a_norm_without_its_barrier_is_noticed() {
    let (cols, eps, f16) = (577_usize, 1e-5_f32, 0_i32);
    let x = rows(&mut Noise(25), 1, cols);
    let (weight, mut out) = (vec![1.0_f32; cols], vec![0_u16; cols]);
    let (_, want) = add_norm_twin(&Norm::new(weight.clone(), eps), Dtype::Bf16, &x, None);
    let (none, all) = (std::ptr::null::<f32>(), std::ptr::null::<u32>());
    let (r, w, o, c) = (x.as_ptr(), weight.as_ptr(), out.as_mut_ptr(), cols as i32);
    let args = args![r, none, none, w, all, o, c, eps, f16];
    broken("norm", "CONTROL_NO_BARRIER").launch("add_norm", [1, 1, 1], 256, cols * 4, 0, &args);
    assert!(first_difference(&widened(Dtype::Bf16, &out), &want).is_some());
}

#[test]
fn gates_equal_their_twin() {
    let mut noise = Noise(26);
    for (dtype, inter) in DTYPES.into_iter().flat_map(|d| [1_usize, 63, 64, 300].map(|i| (d, i))) {
        for (activation, is_gelu) in [(Activation::Silu, 0_i32), (Activation::GeluTanh, 1)] {
            let (tokens, stride) = (3_usize, inter.next_multiple_of(64));
            let mut x: Vec<f32> = (0..tokens * 2 * stride).map(|_| noise.next() * 30.0).collect();
            for (i, extreme) in EXTREMES.iter().chain(&[-88.0, 90.0, -200.0]).enumerate() {
                x[(i * 2 * stride + i) % (tokens * 2 * stride)] = *extreme;
            }
            let mut out = vec![0_u16; tokens * inter];
            let (g, o) = (x.as_ptr(), out.as_mut_ptr());
            let (n, s, f16) = (inter as i32, stride as i32, i32::from(dtype == Dtype::F16));
            let args = args![g, o, n, s, is_gelu, f16];
            let grid = [inter.div_ceil(256) as u32, tokens as u32, 1];
            kernels().launch("gate", grid, 256, 0, 3, &args);
            let mut want = Vec::new();
            for row in x.chunks_exact(2 * stride) {
                let mut gate = row[..inter].to_vec();
                activation.gate(Isa::best(), &mut gate, &row[stride..][..inter]);
                want.extend(gate);
            }
            let place = format!("{dtype} {inter} {activation:?}");
            assert_same(&widened(dtype, &out), &rounded(dtype, &want), &place);
        }
    }
}

#[test]
fn soft_caps_equal_their_twin() {
    let mut x = rows(&mut Noise(27), 12, 100);
    let (mut want, cap, n) = (x.clone(), 30.0_f32, x.len() as u64);
    softcap(Isa::best(), cap, &mut want);
    let p = x.as_mut_ptr();
    let args = args![p, n, cap];
    kernels().launch("softcap", [n.div_ceil(256) as u32, 1, 1], 256, 0, 0, &args);
    assert_same(&x, &want, "soft cap");
}
