//! `experts.cu`: routing, the experts' products and their sum, against a text of `models/moe.rs`.

use super::matmul::{packed, product};
use super::{Kernels, args, assert_same, broken, first_difference, kernels};
use crate::common::Noise;
use std::ffi::c_void;
use targon_engine::ops::dtype::Dtype;
use targon_engine::ops::lanes::{Lanes, Scalar};
use targon_engine::ops::math;

fn exp(x: f32) -> f32 {
    math::exp(Scalar::splat(x)).to_array()[0]
}

/// The chosen experts of a token with their weights, ascending.
fn route(scores: &[f32], used: usize, renormalises: bool) -> Vec<(u32, f32)> {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let shares: Vec<f32> = scores.iter().map(|x| exp(x - max)).collect();
    let total: f32 = shares.iter().sum();
    let shares: Vec<f32> = shares.iter().map(|p| p / total).collect();
    let mut order: Vec<usize> = (0..shares.len()).collect();
    order.sort_by(|a, b| shares[*b].total_cmp(&shares[*a]).then(a.cmp(b)));
    order.truncate(used);
    order.sort_unstable();
    let total: f32 = order.iter().map(|e| shares[*e]).sum();
    let scale = if renormalises { total } else { 1.0 };
    order.into_iter().map(|e| (e as u32, shares[e] / scale)).collect()
}

#[test]
fn routes_equal_their_twin() {
    let mut noise = Noise(61);
    for (experts, used) in [(1, 1), (5, 2), (8, 2), (60, 4), (128, 8), (256, 8)] {
        for renormalises in [false, true] {
            let tokens = 4_usize;
            // Steps of a quarter, so that there are ties.
            let mut scores: Vec<f32> =
                (0..tokens * experts).map(|_| (noise.next() * 20.0).round() * 0.25).collect();
            scores[..experts].fill(1.0);
            let mut chosen = vec![0_u32; tokens * used];
            let mut weights = vec![0.0_f32; tokens * used];
            let (s, c, w) = (scores.as_ptr(), chosen.as_mut_ptr(), weights.as_mut_ptr());
            let (e, u, r) = (experts as i32, used as i32, i32::from(renormalises));
            let args = args![s, c, w, e, u, r];
            kernels().launch("route", [tokens as u32, 1, 1], 32, 0, used as u64, &args);
            for (t, scores) in scores.chunks_exact(experts).enumerate() {
                let got: Vec<(u32, f32)> =
                    (t * used..(t + 1) * used).map(|i| (chosen[i], weights[i])).collect();
                assert_eq!(got, route(scores, used, renormalises), "{experts} {used} token {t}");
            }
        }
    }
}

struct Case {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    w: Vec<Vec<u16>>, // by expert: (rows, cols)
    x: Vec<u16>,
    chosen: Vec<u32>, // (tokens, used)
    used: usize,
    is_shared: bool,
}

impl Case {
    fn run(&self, kernels: &Kernels, seed: u64) -> Vec<f32> {
        let w: Vec<u16> = self.w.iter().flat_map(|w| packed(w, self.cols, self.dtype, 0)).collect();
        let mut out = vec![f32::NAN; self.chosen.len() * self.rows];
        let (w, c, x, o) = (w.as_ptr(), self.chosen.as_ptr(), self.x.as_ptr(), out.as_mut_ptr());
        let (rows, cols) = (self.rows as i32, self.cols as i32);
        let (used, shared) = (self.used as i32, i32::from(self.is_shared));
        let args = args![w, c, x, o, rows, cols, used, shared];
        let grid = [self.rows.div_ceil(32) as u32, self.chosen.len() as u32, 1];
        kernels.launch(&format!("expert_{}", self.dtype), grid, 256, 0, seed, &args);
        out
    }

    fn want(&self) -> Vec<f32> {
        let widen =
            |bits: &[u16]| -> Vec<f32> { bits.iter().map(|b| self.dtype.widen(*b)).collect() };
        let of_slot = |slot: usize| {
            let input = if self.is_shared { slot / self.used } else { slot };
            let x = widen(&self.x[input * self.cols..][..self.cols]);
            let w = &self.w[self.chosen[slot] as usize];
            w.chunks_exact(self.cols).map(move |w| product(&widen(w), &x)).collect::<Vec<_>>()
        };
        (0..self.chosen.len()).flat_map(of_slot).collect()
    }
}

fn case(noise: &mut Noise, dtype: Dtype, cols: usize, is_shared: bool) -> Case {
    let (experts, used, rows, tokens) = (5, 2, 45, 3);
    let mut values =
        |n: usize| -> Vec<u16> { (0..n).map(|_| dtype.round(noise.next() * 2.0)).collect() };
    let inputs = if is_shared { tokens } else { tokens * used };
    let w = (0..experts).map(|_| values(rows * cols)).collect();
    let chosen = vec![0, 4, 2, 3, 1, 4];
    Case { dtype, rows, cols, w, x: values(inputs * cols), chosen, used, is_shared }
}

#[test]
fn products_of_experts_equal_the_canon() {
    let mut noise = Noise(62);
    for dtype in [Dtype::Bf16, Dtype::F16] {
        for (cols, is_shared) in [(34, true), (64, false), (600, true)] {
            let case = case(&mut noise, dtype, cols, is_shared);
            assert_same(&case.run(kernels(), 1), &case.want(), &format!("{dtype} {cols}"));
        }
    }
}

#[test]
fn control_arms_of_experts_are_noticed() {
    let case = case(&mut Noise(63), Dtype::Bf16, 600, true);
    for define in ["CANON_BLOCK=16", "CONTROL_NO_BARRIER"] {
        let broken = broken("experts", define);
        let is_caught = |seed| first_difference(&case.run(broken, seed), &case.want()).is_some();
        assert!((0..3).any(is_caught), "{define}");
    }
}

#[test]
fn sums_over_experts_equal_their_twin() {
    let (mut noise, hidden, used, tokens) = (Noise(64), 300_usize, 3_usize, 2_usize);
    let y: Vec<f32> = (0..tokens * used * hidden).map(|_| noise.next() * 3.0).collect();
    let weights: Vec<f32> = (0..tokens * used).map(|_| noise.next().abs()).collect();
    let mut out = vec![f32::NAN; tokens * hidden];
    let (y_ptr, w, o) = (y.as_ptr(), weights.as_ptr(), out.as_mut_ptr());
    let (h, u) = (hidden as i32, used as i32);
    let args = args![y_ptr, w, o, h, u];
    kernels().launch("combine", [tokens as u32, 1, 1], 256, 0, 0, &args);
    let mut want = vec![0.0_f32; tokens * hidden];
    for (slot, y) in y.chunks_exact(hidden).enumerate() {
        let row = &mut want[slot / used * hidden..][..hidden];
        row.iter_mut().zip(y).for_each(|(o, y)| *o += weights[slot] * y);
    }
    assert_same(&out, &want, "combine");
}
