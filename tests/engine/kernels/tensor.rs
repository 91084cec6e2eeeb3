//! `matmul_tensor.cu` against a scalar text of its canon, over the host shim's model of `mma`: what
//! the hardware adds within one `mma` is not shown here.

use super::matmul::packed;
use super::{Kernels, args, assert_same, broken, first_difference, kernels};
use crate::common::Noise;
use std::ffi::c_void;
use targon_engine::ops::dtype::Dtype;

/// Elements of k that are summed together.
pub(super) const SLICE: usize = 512;
/// Elements of k whose order within a sum is fixed: two steps of 16.
const BLOCK: usize = 32;

/// The exponent of a value as the hardware takes it from its bits.
fn exponent(x: f32) -> i32 {
    ((x.to_bits() >> 23 & 255) as i32).max(1) - 127
}

/// `x` in units of 2^`unit`, cut off toward zero.
fn in_units(x: f64, unit: i32) -> i128 {
    (x * 2.0_f64.powi(-unit)) as i128
}

/// The model of one step: products and sum cut off at 25 bits below the largest exponent.
pub(super) fn mma(sum: f32, pairs: &[(f32, f32)]) -> f32 {
    let all = pairs.iter().fold(f64::from(sum), |s, (w, x)| s + f64::from(*w) * f64::from(*x));
    if !all.is_finite() {
        return all as f32;
    }
    let products = pairs.iter().filter(|(w, x)| *w != 0.0 && *x != 0.0);
    let own = (sum != 0.0).then(|| exponent(sum));
    let Some(top) = products.clone().map(|(w, x)| exponent(*w) + exponent(*x)).chain(own).max()
    else {
        return 0.0;
    };
    let unit = top - 25;
    let product = |(w, x): &(f32, f32)| in_units(f64::from(*w) * f64::from(*x), unit);
    let total = in_units(f64::from(sum), unit) + products.map(product).sum::<i128>();
    // To f32 toward zero: keep 24 bits.
    let spare = (128 - total.unsigned_abs().leading_zeros() as i32 - 24).max(0);
    let kept = (total.unsigned_abs() >> spare << spare) as f64 * total.signum() as f64;
    (kept * 2.0_f64.powi(unit)) as f32
}

/// One element of a product, slices of `slice` elements.
pub(super) fn product(w: &[f32], x: &[f32], slice: usize) -> f32 {
    let step = |sum: f32, w: &[f32], x: &[f32], is_second: bool| {
        let chosen = (0..w.len()).filter(|k| (k % 8 >= 4) == is_second);
        mma(sum, &chosen.map(|k| (w[k], x[k])).collect::<Vec<_>>())
    };
    let of_slice = |(w, x): (&[f32], &[f32])| {
        let blocks = w.chunks(BLOCK).zip(x.chunks(BLOCK));
        blocks.fold(0.0, |sum, (w, x)| step(step(sum, w, x, false), w, x, true))
    };
    w.chunks(slice).zip(x.chunks(slice)).map(of_slice).fold(0.0, |sum, s| sum + s)
}

struct Case {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    w: Vec<u16>,
    x: Vec<u16>,
}

/// The kernels: tokens and rows of a thread block, its threads.
const VARIANTS: [(&str, usize, usize, u32); 3] = [
    ("decode_mma_*_8", 8, 32, 256),
    ("decode_mma_*_32", 32, 32, 256),
    ("prefill_mma_*", 128, 64, 128),
];

impl Case {
    fn new(noise: &mut Noise, dtype: Dtype, [tokens, rows, cols]: [usize; 3]) -> Self {
        let mut values = |n: usize| -> Vec<u16> {
            (0..n)
                .map(|_| dtype.round(noise.next() * 2.0_f32.powi(noise.below(8) as i32 - 4)))
                .collect()
        };
        Self { dtype, rows, cols, w: values(rows * cols), x: values(tokens * cols) }
    }

    fn tokens(&self) -> usize {
        self.x.len() / self.cols
    }

    fn widened(&self, bits: &[u16]) -> Vec<f32> {
        bits.iter().map(|b| self.dtype.widen(self.dtype.round(self.dtype.widen(*b)))).collect()
    }

    fn want(&self, slice: usize) -> Vec<f32> {
        let (w, x) = (self.widened(&self.w), self.widened(&self.x));
        let of_token =
            |x| w.chunks_exact(self.cols).map(move |w| product(w, x, slice)).collect::<Vec<_>>();
        x.chunks_exact(self.cols).flat_map(of_token).collect()
    }

    /// The variants that take such columns.
    fn variants(&self) -> impl Iterator<Item = (&'static str, usize, usize, u32)> {
        let all = if self.cols.is_multiple_of(8) { 3 } else { 2 };
        VARIANTS.into_iter().take(all)
    }

    fn run(
        &self,
        kernels: &Kernels,
        (name, tokens, rows, threads): (&str, usize, usize, u32),
        seed: u64,
    ) -> Vec<f32> {
        let packed = packed(&self.w, self.cols, self.dtype, seed);
        let mut out = vec![f32::NAN; self.tokens() * self.rows];
        let (w, x, o) = (packed.as_ptr(), self.x.as_ptr(), out.as_mut_ptr());
        let sizes = [self.rows as i32, self.cols as i32, self.tokens() as i32];
        let args = args![w, x, o, sizes[0], sizes[1], sizes[2]];
        let grid = [self.tokens().div_ceil(tokens) as u32, self.rows.div_ceil(rows) as u32, 1];
        let name = name.replace('*', &self.dtype.to_string());
        kernels.launch(&name, grid, threads, 0, seed, &args);
        out
    }
}

#[test]
fn products_equal_their_canon() {
    let mut noise = Noise(61);
    // tokens, rows, columns: one of each, tails of every tile, several slices, more than a round.
    let shapes = [
        [1, 1, 2],
        [1, 33, 32],
        [3, 31, 34],
        [9, 70, 96],
        [2, 40, 1_544],
        [33, 65, 520],
        [130, 5, 40],
        [2, 3, 4_616],
    ];
    for (dtype, shape) in [Dtype::Bf16, Dtype::F16].into_iter().flat_map(|d| shapes.map(|s| (d, s)))
    {
        let case = Case::new(&mut noise, dtype, shape);
        let want = case.want(SLICE);
        for (i, variant) in case.variants().enumerate() {
            // The first order of threads makes copies late, others make them at once.
            for seed in [0, 2 + i as u64] {
                let got = case.run(kernels(), variant, seed);
                assert_same(&got, &want, &format!("{dtype} {shape:?} {} {seed}", variant.0));
            }
        }
    }
}

#[test]
fn products_are_close_to_exact_ones() {
    let case = Case::new(&mut Noise(62), Dtype::Bf16, [4, 64, 2_048]);
    let got = case.run(kernels(), VARIANTS[0], 0);
    let (w, x) = (case.widened(&case.w), case.widened(&case.x));
    for (t, x) in x.chunks_exact(case.cols).enumerate() {
        for (r, w) in w.chunks_exact(case.cols).enumerate() {
            let terms = || w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
            let (exact, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
            let error = (f64::from(got[t * 64 + r]) - exact).abs() / size;
            assert!(error < 2.0_f64.powi(-22), "{t} {r}: {error:e} of the sum of magnitudes");
        }
    }
}

#[test]
fn extremes_come_out_as_the_model_says() {
    let mut noise = Noise(63);
    let specials: [(Dtype, &[u16]); 2] = [
        (Dtype::Bf16, &[0x7f80, 0xff80, 0x7fc1, 0x7f7f, 0xff7f, 0x2680, 0xa680, 0, 0x8000, 0x2600]),
        (Dtype::F16, &[0x7c00, 0xfc00, 0x7e01, 0x7bff, 0xfbff, 0x0001, 0x8001, 0, 0x8000, 0x03ff]),
    ];
    for (dtype, specials) in specials {
        for (i, special) in specials.iter().enumerate() {
            let mut case = Case::new(&mut noise, dtype, [4, 40, 104]);
            let (at, other) = (37 * 104 + i * 9, 104 + (i * 9 + 1) % 104);
            case.w[at] = *special;
            case.x[other] = dtype.round(dtype.widen(*special));
            case.w[208..312].fill(0x8000);
            case.x[312..416].fill(0);
            let want = case.want(SLICE);
            for variant in case.variants() {
                let got = case.run(kernels(), variant, i as u64);
                assert_same(&got, &want, &format!("{dtype} {special:#06x} {}", variant.0));
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let cols = 1_096;
    let all = Case::new(&mut Noise(64), Dtype::Bf16, [17, 48, cols]);
    let want = all.run(kernels(), VARIANTS[2], 0);
    for token in [0, 7, 16] {
        let x = all.x[token * cols..][..cols].to_vec();
        let alone = Case { w: all.w.clone(), x, ..all };
        for variant in VARIANTS {
            assert_same(&alone.run(kernels(), variant, 1), &want[token * 48..][..48], variant.0);
        }
    }
}

#[test]
fn experts_are_products_of_one_row() {
    let (mut noise, cols, rows, used) = (Noise(65), 1_030, 37, 2);
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let experts: Vec<Case> =
            (0..3).map(|_| Case::new(&mut noise, dtype, [3, rows, cols])).collect();
        let packed: Vec<u16> = experts.iter().flat_map(|e| packed(&e.w, cols, dtype, 0)).collect();
        let chosen: [u32; 6] = [2, 0, 1, 2, 0, 1];
        for is_shared in [1, 0] {
            // Inputs of slots: their token's, or each its own.
            let inputs = [&experts[0].x[..], &experts[1].x].concat();
            let mut out = vec![f32::NAN; 6 * rows];
            let (w, c, x, o) =
                (packed.as_ptr(), chosen.as_ptr(), inputs.as_ptr(), out.as_mut_ptr());
            let (r, k, u) = (rows as i32, cols as i32, used as i32);
            let args = args![w, c, x, o, r, k, u, is_shared];
            let name = format!("expert_mma_{dtype}");
            kernels().launch(&name, [rows.div_ceil(32) as u32, 6, 1], 256, 0, 3, &args);
            for (slot, expert) in chosen.into_iter().enumerate() {
                let input = if is_shared == 1 { slot / used } else { slot };
                let x = inputs[input * cols..][..cols].to_vec();
                let want = Case { x, w: experts[expert as usize].w.clone(), ..experts[0] };
                assert_same(
                    &out[slot * rows..][..rows],
                    &want.want(SLICE),
                    &format!("slot {slot}"),
                );
            }
        }
    }
}

#[test]
fn another_slice_length_is_noticed() {
    let case = Case::new(&mut Noise(66), Dtype::Bf16, [9, 64, 1_024]);
    let (want, broken) = (case.want(SLICE), broken("matmul_tensor", "MMA_SLICE=256"));
    for variant in VARIANTS {
        let got = case.run(broken, variant, 0);
        assert!(first_difference(&got, &want).is_some(), "{}", variant.0);
        // It is another canon, not another error.
        assert_same(&got, &case.want(256), variant.0);
    }
}

#[test]
fn a_product_without_its_barriers_is_noticed() {
    let case = Case::new(&mut Noise(67), Dtype::Bf16, [9, 64, 4_160]);
    let (want, broken) = (case.want(SLICE), broken("matmul_tensor", "CONTROL_NO_BARRIER"));
    for variant in VARIANTS {
        let caught =
            (0..4).any(|seed| first_difference(&case.run(broken, variant, seed), &want).is_some());
        assert!(caught, "{}", variant.0);
    }
}
