//! Computes operations on single rows: RMS norm and the gated activation.
//!
//! A row is reduced in sixteen lanes (element i goes to lane i mod 16) and one tree, whatever the
//! batch; a tail shorter than sixteen is padded with zeros.

use super::lanes::{Isa, Kernel, LANES, Lanes, dispatch};
use super::math;
use super::pool::{Disjoint, Turn};
use super::rounded::Rounded;

/// RMS norm: `y = x / sqrt(mean(x^2) + eps) * weight` (Zhang and Sennrich, 2019).
pub struct Norm {
    weight: Vec<f32>, // (hidden), Gemma's `1 + w` already added
    eps: f32,
}

impl Norm {
    /// A norm over rows of `weight.len()` elements.
    pub fn new(weight: Vec<f32>, eps: f32) -> Self {
        Self { weight, eps }
    }

    /// Elements in a row.
    pub fn cols(&self) -> usize {
        self.weight.len()
    }

    /// The factors, and what is added to the mean square: what a device is given.
    pub fn parts(&self) -> (&[f32], f32) {
        (&self.weight, self.eps)
    }

    /// Normalises every row of `x` (tokens, cols) into `out`, rounded to its dtype.
    pub fn apply_rounded(&self, turn: &Turn<'_>, x: &[f32], out: &mut Rounded) {
        let cols = self.cols();
        let rows = x.len() / cols;
        out.set_rows(rows);
        let out = out.pieces(turn.isa());
        turn.run_ranges(rows, 8, |range| {
            let mut values = vec![0.0; cols];
            for row in range {
                values.copy_from_slice(&x[row * cols..(row + 1) * cols]);
                self.apply(turn.isa(), &mut values);
                // SAFETY: each row belongs to one task.
                unsafe { out.round(row, 0, &values) };
            }
        });
    }

    /// `residual += norm(x)`, row by row (the post-norms of Gemma 2).
    pub fn apply_add(&self, turn: &Turn<'_>, x: &mut [f32], residual: &mut [f32]) {
        let cols = self.cols();
        let rows = x.len() / cols;
        let (x, residual) = (Disjoint::new(x), Disjoint::new(residual));
        turn.run_ranges(rows, 8, |range| {
            let at = range.start * cols..range.end * cols;
            // SAFETY: `run_ranges` hands out disjoint rows.
            let (x, residual) = unsafe { (x.piece(at.clone()), residual.piece(at)) };
            x.chunks_exact_mut(cols).for_each(|row| self.apply(turn.isa(), row));
            residual.iter_mut().zip(x).for_each(|(r, x)| *r += *x);
        });
    }

    /// What a row is multiplied by before the gain.
    pub(super) fn scale(&self, isa: Isa, row: &[f32]) -> f32 {
        dispatch(isa, Scale { row, eps: self.eps })
    }

    /// Normalises one row in place.
    pub fn apply(&self, isa: Isa, row: &mut [f32]) {
        dispatch(isa, NormRow { norm: self, row });
    }
}

/// `1 / sqrt(mean(x^2) + eps)`.
struct Scale<'a> {
    row: &'a [f32],
    eps: f32,
}

impl Kernel for Scale<'_> {
    type Out = f32;

    #[inline(always)]
    fn run<L: Lanes>(self) -> f32 {
        let mut squares = L::splat(0.0);
        for at in (0..self.row.len()).step_by(LANES) {
            let x = load_padded::<L>(&self.row[at..]);
            squares = x.mul_add(x, squares);
        }
        let mean = squares.sum() / self.row.len() as f32;
        1.0 / (mean + self.eps).sqrt()
    }
}

struct NormRow<'a> {
    norm: &'a Norm,
    row: &'a mut [f32],
}

impl Kernel for NormRow<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        assert_eq!(self.row.len(), self.norm.cols());
        let scale = L::splat(Scale { row: self.row, eps: self.norm.eps }.run::<L>());
        let weight = &self.norm.weight;
        for_each_vec::<L>(self.row, |x, at| x.mul(scale).mul(load_padded::<L>(&weight[at..])));
    }
}

/// `row[i..i+16] = f(row[i..i+16], i)` for every vector; the tail is padded with zeros.
#[inline(always)]
fn for_each_vec<L: Lanes>(row: &mut [f32], mut f: impl FnMut(L, usize) -> L) {
    let mut at = 0;
    while at < row.len() {
        let y = f(load_padded::<L>(&row[at..]), at);
        store_padded(y, &mut row[at..]);
        at += LANES;
    }
}

/// The first 16 values of `from`, zeros where it ends.
#[inline(always)]
pub(super) fn load_padded<L: Lanes>(from: &[f32]) -> L {
    if from.len() >= LANES {
        // SAFETY: 16 values were just counted.
        return unsafe { L::load(from.as_ptr()) };
    }
    let mut padded = [0.0; LANES];
    padded[..from.len()].copy_from_slice(from);
    // SAFETY: the array has 16 values.
    unsafe { L::load(padded.as_ptr()) }
}

/// Writes the first lanes to `to`: 16, or as many as it has room for.
#[inline(always)]
pub(super) fn store_padded<L: Lanes>(x: L, to: &mut [f32]) {
    if to.len() >= LANES {
        // SAFETY: room for 16 values was just counted.
        return unsafe { x.store(to.as_mut_ptr()) };
    }
    to.copy_from_slice(&x.to_array()[..to.len()]);
}

/// Activation of a gated feed-forward layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU in its tanh form.
    GeluTanh,
}

impl Activation {
    /// `gate = activation(gate) * up`.
    pub fn gate(self, isa: Isa, gate: &mut [f32], up: &[f32]) {
        dispatch(isa, Gate { activation: self, gate, up });
    }
}

struct Gate<'a> {
    activation: Activation,
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl Kernel for Gate<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        assert_eq!(self.gate.len(), self.up.len());
        let up = |at: usize| load_padded::<L>(&self.up[at..]);
        match self.activation {
            Activation::Silu => for_each_vec::<L>(self.gate, |x, at| math::silu(x).mul(up(at))),
            Activation::GeluTanh => {
                for_each_vec::<L>(self.gate, |x, at| math::gelu_tanh(x).mul(up(at)));
            }
        }
    }
}

/// `cap * tanh(x / cap)`, the soft cap of Gemma 2.
pub fn softcap(isa: Isa, cap: f32, x: &mut [f32]) {
    dispatch(isa, Softcap { cap, x });
}

struct Softcap<'a> {
    cap: f32,
    x: &'a mut [f32],
}

impl Kernel for Softcap<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let cap = L::splat(self.cap);
        for_each_vec::<L>(self.x, |x, _| math::tanh(x.div(cap)).mul(cap));
    }
}

/// Softmax in place, summed in ascending order.
pub fn softmax(isa: Isa, row: &mut [f32]) {
    dispatch(isa, Softmax(row));
}

struct Softmax<'a>(&'a mut [f32]);

impl Kernel for Softmax<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let max = self.0.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for chunk in self.0.chunks_mut(LANES) {
            let mut padded = [f32::NEG_INFINITY; LANES];
            padded[..chunk.len()].copy_from_slice(chunk);
            // SAFETY: the array has 16 values.
            let x = unsafe { L::load(padded.as_ptr()) };
            let e = math::exp(x.sub(L::splat(max))).to_array();
            chunk.copy_from_slice(&e[..chunk.len()]);
        }
        let total: f32 = self.0.iter().sum();
        self.0.iter_mut().for_each(|p| *p /= total);
    }
}

#[cfg(test)]
mod tests {
    use super::super::dtype::Dtype;
    use super::super::lanes::Isa;
    use super::super::pool::Pool;
    use super::*;

    fn row(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.11).collect()
    }

    #[test]
    fn norm_matches_its_formula_and_is_equal_on_every_instruction_set() {
        for n in [1, 15, 16, 17, 576] {
            let weight: Vec<f32> = (0..n).map(|i| 0.5 + i as f32 * 0.01).collect();
            let norm = Norm::new(weight.clone(), 1e-5);
            let x = row(n);
            let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n as f64;
            let scale = 1.0 / (mean + 1e-5).sqrt();
            let mut first: Option<Vec<f32>> = None;
            for isa in Isa::available() {
                let mut y = x.clone();
                norm.apply(isa, &mut y);
                for i in 0..n {
                    let want = f64::from(x[i]) * scale * f64::from(weight[i]);
                    assert!((f64::from(y[i]) - want).abs() <= 1e-5 * want.abs(), "{isa} {n} {i}");
                }
                assert_eq!(&y, first.get_or_insert_with(|| y.clone()), "{isa}");
            }
        }
    }

    #[test]
    fn a_row_does_not_see_its_neighbours() {
        let norm = Norm::new(vec![1.0; 40], 1e-6);
        let pool = Pool::new(2, Isa::best()).unwrap();
        let x: Vec<f32> = (0..40 * 50).map(|i| (i as f32 * 0.37).fract() - 0.5).collect();
        let (mut all, mut one) = (Rounded::new(Dtype::Bf16, 40), Rounded::new(Dtype::Bf16, 40));
        norm.apply_rounded(&pool.turn(), &x, &mut all);
        for r in 0..50 {
            norm.apply_rounded(&pool.turn(), &x[r * 40..][..40], &mut one);
            assert_eq!(all.bits(r), one.bits(0), "row {r}");
        }
    }

    #[test]
    fn activations_match_their_formulas() {
        let x: Vec<f32> = (0..333).map(|i| i as f32 * 0.09 - 15.0).collect();
        let up = vec![2.0; x.len()];
        for (activation, formula) in [
            (Activation::Silu, (|x| x / (1.0 + (-x).exp())) as fn(f64) -> f64),
            (Activation::GeluTanh, |x| {
                0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044_715 * x.powi(3))).tanh())
            }),
        ] {
            let mut first: Option<Vec<f32>> = None;
            for isa in Isa::available() {
                let mut y = x.clone();
                activation.gate(isa, &mut y, &up);
                for (x, y) in x.iter().zip(&y) {
                    let want = 2.0 * formula(f64::from(*x));
                    assert!((f64::from(*y) - want).abs() <= 2e-6 * want.abs().max(1.0), "{x} {y}");
                }
                assert_eq!(&y, first.get_or_insert_with(|| y.clone()), "{isa}");
            }
        }
    }

    #[test]
    fn softcap_bounds_and_keeps_small_values() {
        let mut x = vec![0.0, 0.5, -0.5, 20.0, 1e4, -1e4];
        softcap(Isa::best(), 30.0, &mut x);
        assert!((x[1] - 0.499_95).abs() < 1e-4 && (x[2] + x[1]).abs() < 1e-5);
        assert!((x[3] - 17.48).abs() < 0.01 && x[4] == 30.0 && x[5] == -30.0);
    }
}
