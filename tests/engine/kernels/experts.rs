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
        self.run_by(kernels, "expert_*", seed)
    }

    fn run_by(&self, kernels: &Kernels, name: &str, seed: u64) -> Vec<f32> {
        let w: Vec<u16> = self.w.iter().flat_map(|w| packed(w, self.cols, self.dtype, 0)).collect();
        let mut out = vec![f32::NAN; self.chosen.len() * self.rows];
        let (w, c, x, o) = (w.as_ptr(), self.chosen.as_ptr(), self.x.as_ptr(), out.as_mut_ptr());
        let (rows, cols) = (self.rows as i32, self.cols as i32);
        let (used, shared) = (self.used as i32, i32::from(self.is_shared));
        let args = args![w, c, x, o, rows, cols, used, shared];
        let grid = [self.rows.div_ceil(32) as u32, self.chosen.len() as u32, 1];
        let name = name.replace('*', &self.dtype.to_string());
        kernels.launch(&name, grid, 256, 0, seed, &args);
        out
    }

    /// By slots that were grouped by expert into tiles of `size`; also how often a matrix of an
    /// expert was read.
    fn run_grouped(
        &self,
        kernels: &Kernels,
        (name, size): (&str, usize),
        seed: u64,
    ) -> (Vec<f32>, usize) {
        let w: Vec<u16> = self.w.iter().flat_map(|w| packed(w, self.cols, self.dtype, 0)).collect();
        let slots = self.chosen.len();
        let count = slots / size + self.w.len().min(slots);
        let (mut grouped, mut tiles) = (vec![u32::MAX; slots], vec![[u32::MAX; 4]; count]);
        let (c, g, t) = (self.chosen.as_ptr(), grouped.as_mut_ptr(), tiles.as_mut_ptr());
        let (n, s, tile_count) = (slots as i32, size as i32, count as i32);
        let args = args![c, g, t, n, s, tile_count];
        super::kernels().launch("group_slots", [1, 1, 1], 256, 0, seed, &args);
        self.assert_grouped(&grouped, &tiles, size);
        let mut out = vec![f32::NAN; slots * self.rows];
        let (w, x, o) = (w.as_ptr(), self.x.as_ptr(), out.as_mut_ptr());
        let (rows, cols) = (self.rows as i32, self.cols as i32);
        let used = if self.is_shared { self.used as i32 } else { 1 };
        let args = args![w, x, o, g, t, rows, cols, used];
        let [tile_rows, threads] = if size >= 64 { [64, 128] } else { [32, 256] };
        let grid = [count as u32, self.rows.div_ceil(tile_rows) as u32, 1];
        let name = name.replace('*', &self.dtype.to_string());
        kernels.launch(&name, grid, threads as u32, 0, seed, &args);
        (out, tiles.iter().filter(|tile| tile[2] > 0).count())
    }

    /// Every slot is in one tile, which is its expert's; tiles are full but for an expert's last.
    fn assert_grouped(&self, grouped: &[u32], tiles: &[[u32; 4]], size: usize) {
        let mut seen = vec![0; grouped.len()];
        for [expert, first, count, _] in tiles {
            assert!(*count as usize <= size);
            for slot in &grouped[*first as usize..][..*count as usize] {
                assert_eq!(self.chosen[*slot as usize], *expert);
                seen[*slot as usize] += 1;
            }
        }
        assert!(seen.iter().all(|n| *n == 1), "{seen:?}");
        let of_expert = |e: usize| self.chosen.iter().filter(|c| **c as usize == e).count();
        let least: usize = (0..self.w.len()).map(|e| of_expert(e).div_ceil(size)).sum();
        assert_eq!(tiles.iter().filter(|tile| tile[2] > 0).count(), least);
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

/// Slots of several tiles of an expert, of one, and of none.
fn many(noise: &mut Noise, dtype: Dtype, cols: usize, is_shared: bool) -> Case {
    let (experts, used, rows, tokens) = (5, 2, 45, 90);
    let mut values =
        |n: usize| -> Vec<u16> { (0..n).map(|_| dtype.round(noise.next() * 2.0)).collect() };
    let w = (0..experts).map(|_| values(rows * cols)).collect();
    let x = values(if is_shared { tokens } else { tokens * used } * cols);
    // Expert 4 has every token, 0 seven of them, 2 and 3 the others, 1 none.
    let chosen = (0..tokens as u32).flat_map(|t| [if t % 13 == 0 { 0 } else { 2 + t % 2 }, 4]);
    Case { dtype, rows, cols, w, x, chosen: chosen.collect(), used, is_shared }
}

#[test]
fn grouped_products_equal_those_of_single_slots() {
    let mut noise = Noise(65);
    for dtype in [Dtype::Bf16, Dtype::F16] {
        for (cols, is_shared) in [(34, true), (72, false), (1_096, true)] {
            let case = many(&mut noise, dtype, cols, is_shared);
            let portable = case.run(kernels(), 1);
            assert_same(&portable, &case.want(), &format!("{dtype} {cols}"));
            let tensor = case.run_by(kernels(), "expert_mma_*", 1);
            for (name, size) in [
                ("grouped_*_8", 8),
                ("grouped_*_64", 64),
                ("grouped_mma_*_32", 32),
                ("grouped_mma_*_128", 128),
            ] {
                if size == 128 && cols % 8 != 0 {
                    continue;
                }
                let want = if name.contains("mma") { &tensor } else { &portable };
                for seed in [0, 1, 7] {
                    let (got, reads) = case.run_grouped(kernels(), (name, size), seed);
                    assert_same(&got, want, &format!("{name} {dtype} {cols} {seed}"));
                    // One slot at a time, each of the 180 reads its expert's matrix.
                    let least = [(8, 1 + 6 + 6 + 12), (32, 1 + 2 + 2 + 3), (64, 5), (128, 4)];
                    let least = least.into_iter().find(|(s, _)| *s == size).unwrap().1;
                    assert_eq!(reads, least, "{name}");
                }
            }
        }
    }
}

#[test]
fn control_arms_of_grouped_products_are_noticed() {
    let case = many(&mut Noise(66), Dtype::Bf16, 1_096, true);
    let by_tensor = case.run_by(kernels(), "expert_mma_*", 1);
    let arms = [
        ("matmul_portable", "CANON_BLOCK=16", "grouped_*_8", 8, case.want()),
        ("matmul_portable", "CONTROL_NO_BARRIER", "grouped_*_64", 64, case.want()),
        ("matmul_tensor", "MMA_SLICE=256", "grouped_mma_*_32", 32, by_tensor.clone()),
        ("matmul_tensor", "CONTROL_NO_BARRIER", "grouped_mma_*_128", 128, by_tensor),
    ];
    for (source, define, name, size, want) in arms {
        let broken = broken(source, define);
        let is_caught = |seed| {
            let (got, _) = case.run_grouped(broken, (name, size), seed);
            first_difference(&got, &want).is_some()
        };
        assert!((0..4).any(is_caught), "{name} {define}");
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
