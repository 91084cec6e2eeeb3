//! `matmul_portable.cu` against a scalar text of the canon.

use super::{Kernels, args, assert_same, broken, first_difference, kernels};
use crate::common::Noise;
use std::ffi::c_void;
use targon_engine::ops::dtype::Dtype;

/// Elements of k that are summed together.
const BLOCK: usize = 32;

/// One block of the canon: the chain over even elements plus the one over odd elements.
pub(super) fn block(w: &[f32], x: &[f32]) -> f32 {
    let chain = |first: usize| {
        let pairs = w.iter().zip(x).skip(first).step_by(2);
        pairs.fold(0.0_f32, |sum, (w, x)| w.mul_add(*x, sum))
    };
    chain(0) + chain(1)
}

/// One element of a product in the order of the canon.
pub(super) fn product(w: &[f32], x: &[f32]) -> f32 {
    let blocks = w.chunks(BLOCK).zip(x.chunks(BLOCK));
    blocks.fold(0.0_f32, |sum, (w, x)| sum + block(w, x))
}

/// The canon, element by element: `x` (tokens, cols) by `w` (rows, cols).
fn reference(w: &[f32], x: &[f32], cols: usize) -> Vec<f32> {
    let of_token = |x| w.chunks_exact(cols).map(move |w| product(w, x));
    x.chunks_exact(cols).flat_map(of_token).collect()
}

/// `rows` packed on the device, in launches of at most seven rows.
pub(super) fn packed(rows: &[u16], cols: usize, dtype: Dtype, seed: u64) -> Vec<u16> {
    let count = rows.len() / cols;
    let mut out = vec![0_u16; count.next_multiple_of(32) * cols.next_multiple_of(32)];
    let (o, c, f16) = (out.as_mut_ptr(), cols as i32, i32::from(dtype == Dtype::F16));
    for (i, piece) in rows.chunks(7 * cols).enumerate() {
        let (from, first) = (piece.as_ptr(), 7 * i as i32);
        let args = args![from, o, c, first, f16];
        kernels().launch("pack", [(piece.len() / cols) as u32, 1, 1], 256, 0, seed, &args);
    }
    out
}

/// `rows` packed by the text of the layout: tiles of 32 rows by 32 columns, each as four planes of
/// 32 rows by 8; tiny magnitudes of bf16 become zero.
fn packed_by_text(rows: &[u16], cols: usize, dtype: Dtype) -> Vec<u16> {
    let count = rows.len() / cols;
    let tiles = cols.div_ceil(32);
    let mut out = vec![0_u16; count.next_multiple_of(32) * tiles * 32];
    for (i, bits) in rows.iter().enumerate() {
        let (row, k) = (i / cols, i % cols);
        let (tile, plane) = (row / 32 * tiles + k / 32, k % 32 / 8);
        out[tile * 1_024 + (plane * 32 + row % 32) * 8 + k % 8] = dtype.round(dtype.widen(*bits));
    }
    out
}

#[test]
fn the_card_packs_by_the_layout() {
    let mut noise = Noise(36);
    for dtype in [Dtype::Bf16, Dtype::F16] {
        for [rows, cols] in [[1, 1], [32, 32], [33, 40], [65, 96], [7, 514]] {
            let mut case = Case::new(&mut noise, dtype, [1, rows, cols]);
            // One that is flushed in bf16, and one that is kept.
            (case.w[0], case.w[rows * cols / 2]) = (0x2600, 0x2680);
            let want = packed_by_text(&case.w, cols, dtype);
            assert!(packed(&case.w, cols, dtype, 2) == want, "{dtype} {rows} {cols}");
        }
    }
}

struct Case {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    w: Vec<u16>,
    x: Vec<u16>,
}

impl Case {
    fn new(noise: &mut Noise, dtype: Dtype, [tokens, rows, cols]: [usize; 3]) -> Self {
        let mut values = |n: usize| -> Vec<u16> {
            (0..n)
                .map(|_| {
                    let spread = 2.0_f32.powi(noise.below(12) as i32 - 6);
                    dtype.round(noise.next() * spread)
                })
                .collect()
        };
        let (w, x) = (values(rows * cols), values(tokens * cols));
        Self { dtype, rows, cols, w, x }
    }

    fn tokens(&self) -> usize {
        self.x.len() / self.cols
    }

    fn want(&self) -> Vec<f32> {
        let widen =
            |bits: &[u16]| -> Vec<f32> { bits.iter().map(|b| self.dtype.widen(*b)).collect() };
        // Packing flushes what rounding would flush.
        let flushed = |x: f32| self.dtype.widen(self.dtype.round(x));
        let w: Vec<f32> = widen(&self.w).into_iter().map(flushed).collect();
        reference(&w, &widen(&self.x), self.cols)
    }

    /// The product by one variant: `decode_.._T` for T > 0, else `prefill_..`.
    fn run(&self, kernels: &Kernels, variant: usize, seed: u64) -> Vec<f32> {
        let packed = packed(&self.w, self.cols, self.dtype, seed);
        let mut out = vec![f32::NAN; self.tokens() * self.rows];
        let (w, x, o) = (packed.as_ptr(), self.x.as_ptr(), out.as_mut_ptr());
        let (rows, cols, tokens) = (self.rows as i32, self.cols as i32, self.tokens() as i32);
        let args = args![w, x, o, rows, cols, tokens];
        let dtype = self.dtype;
        let (name, tile, threads) = match variant {
            0 => (format!("prefill_{dtype}"), [64, 64], 128),
            t => (format!("decode_{dtype}_{t}"), [32, t], 256),
        };
        let grid = [self.tokens().div_ceil(tile[1]) as u32, self.rows.div_ceil(tile[0]) as u32, 1];
        kernels.launch(&name, grid, threads, 0, seed, &args);
        out
    }
}

const VARIANTS: [usize; 4] = [1, 4, 8, 0];

#[test]
fn products_equal_the_canon() {
    let mut noise = Noise(31);
    // tokens, rows, columns: one of each, tails of every tile, several rounds of sums.
    let shapes = [
        [1, 1, 2],
        [1, 33, 32],
        [3, 31, 34],
        [5, 64, 30],
        [9, 70, 96],
        [2, 40, 2_080],
        [65, 129, 66],
        [13, 5, 4_120],
    ];
    for (dtype, shape) in [Dtype::Bf16, Dtype::F16].into_iter().flat_map(|d| shapes.map(|s| (d, s)))
    {
        let case = Case::new(&mut noise, dtype, shape);
        let want = case.want();
        for (i, variant) in VARIANTS.into_iter().enumerate() {
            let got = case.run(kernels(), variant, i as u64);
            assert_same(&got, &want, &format!("{dtype} {shape:?} variant {variant}"));
        }
    }
}

#[test]
fn extremes_come_out_as_on_the_cpu() {
    let mut noise = Noise(32);
    let specials: [(Dtype, &[u16]); 2] = [
        // Infinities, NaN, largest finite, smallest kept, both zeros, one that is flushed.
        (Dtype::Bf16, &[0x7f80, 0xff80, 0x7fc1, 0x7f7f, 0xff7f, 0x2680, 0xa680, 0, 0x8000, 0x2600]),
        (Dtype::F16, &[0x7c00, 0xfc00, 0x7e01, 0x7bff, 0xfbff, 0x0001, 0x8001, 0, 0x8000, 0x03ff]),
    ];
    for (dtype, specials) in specials {
        for (i, special) in specials.iter().enumerate() {
            let mut case = Case::new(&mut noise, dtype, [4, 40, 100]);
            let (at, other) = (37 * 100 + i * 9, 100 + (i * 9 + 1) % 100);
            case.w[at] = *special;
            // Inputs are rounded before, which flushes.
            case.x[other] = dtype.round(dtype.widen(*special));
            case.w[200..300].fill(0x8000);
            case.x[300..400].fill(0);
            let want = case.want();
            for variant in VARIANTS {
                let got = case.run(kernels(), variant, i as u64);
                assert_same(&got, &want, &format!("{dtype} {special:#06x} variant {variant}"));
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let mut noise = Noise(33);
    let all = Case::new(&mut noise, Dtype::Bf16, [17, 48, 160]);
    let want = all.run(kernels(), 0, 0);
    for token in [0, 7, 16] {
        let x = all.x[token * 160..][..160].to_vec();
        let alone = Case { w: all.w.clone(), x, ..all };
        assert_same(&alone.run(kernels(), 1, 1), &want[token * 48..][..48], "alone");
    }
}

#[test]
fn another_block_length_is_noticed() {
    let case = Case::new(&mut Noise(34), Dtype::Bf16, [9, 64, 256]);
    let (want, broken) = (case.want(), broken("matmul_portable", "CANON_BLOCK=16"));
    for variant in VARIANTS {
        assert!(first_difference(&case.run(broken, variant, 0), &want).is_some(), "{variant}");
    }
}

#[test]
fn a_product_without_its_barrier_is_noticed() {
    let case = Case::new(&mut Noise(35), Dtype::Bf16, [9, 64, 2_112]);
    let (want, broken) = (case.want(), broken("matmul_portable", "CONTROL_NO_BARRIER"));
    for variant in VARIANTS {
        let caught =
            (0..4).any(|seed| first_difference(&case.run(broken, variant, seed), &want).is_some());
        assert!(caught, "{variant}");
    }
}
