//! Computes rotary position embedding (Su et al., 2021) in the half-split form of Hugging Face.
//!
//! Frequencies are f32, an angle is the f32 product of position and frequency, its sine and cosine
//! are computed in f64 by our own code and rounded once: the same on every platform.

use super::lanes::{Kernel, LANES, Lanes, dispatch};
use super::math;
use super::pool::{Disjoint, Turn};
use super::rowwise::{load_padded, store_padded};
use std::f64::consts::TAU;

/// How frequencies are stretched for long contexts.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum RopeScaling {
    /// Frequencies are those of the training.
    None,
    /// Positions divided by `factor`.
    Linear {
        /// What positions are divided by.
        factor: f64,
    },
    /// Llama 3: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// Divisor of long wavelengths.
        factor: f64,
        /// Wavelengths above `original_context / low` are divided.
        low: f64,
        /// Wavelengths below `original_context / high` are kept.
        high: f64,
        /// Context length of pre-training.
        original_context: f64,
    },
}

/// Frequencies of one model.
pub struct Rope {
    frequencies: Vec<f32>, // (head_dim / 2)
}

impl Rope {
    /// Frequencies `theta^(-2i / head_dim)`, stretched by `scaling`.
    pub fn new(head_dim: usize, theta: f64, scaling: RopeScaling) -> Self {
        let frequencies = (0..head_dim / 2)
            .map(|i| {
                let base = math::pow64(theta, -2.0 * i as f64 / head_dim as f64);
                // Rounded before stretching, as the reference implementations do.
                stretch(f64::from(base as f32), scaling) as f32
            })
            .collect();
        Self { frequencies }
    }

    /// Divides each frequency (GGUF files carry Llama 3 scaling as a vector of divisors).
    pub fn divided_by(mut self, divisors: &[f32]) -> Self {
        self.frequencies.iter_mut().zip(divisors).for_each(|(f, d)| *f /= d);
        self
    }

    /// Sines and cosines for `positions`, computed on all threads.
    pub fn table(&self, turn: &Turn<'_>, positions: &[u32]) -> RopeTable {
        let half = self.frequencies.len();
        let mut table = RopeTable {
            half,
            cos: vec![0.0; positions.len() * half],
            sin: vec![0.0; positions.len() * half],
        };
        let (cos, sin) = (Disjoint::new(&mut table.cos), Disjoint::new(&mut table.sin));
        turn.run_ranges(positions.len(), 8, |rows| {
            for row in rows {
                let at = row * half..(row + 1) * half;
                // SAFETY: each row belongs to one task.
                let (cos, sin) = unsafe { (cos.piece(at.clone()), sin.piece(at)) };
                for (i, frequency) in self.frequencies.iter().enumerate() {
                    let angle = positions[row] as f32 * frequency;
                    let (s, c) = math::sin_cos64(f64::from(angle));
                    (sin[i], cos[i]) = (s as f32, c as f32);
                }
            }
        });
        table
    }
}

fn stretch(frequency: f64, scaling: RopeScaling) -> f64 {
    match scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 { factor, low, high, original_context } => {
            let turns = original_context * frequency / TAU;
            if turns < low {
                frequency / factor
            } else if turns > high {
                frequency
            } else {
                let smooth = (turns - low) / (high - low);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}

/// Sines and cosines of the rows of one step.
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>, // (rows, head_dim / 2)
    sin: Vec<f32>, // (rows, head_dim / 2)
}

impl RopeTable {
    /// Cosines and sines, (rows, head_dim / 2) each: what a device is given.
    pub fn parts(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// Cosines and sines of row `row`.
    pub(super) fn row(&self, row: usize) -> (&[f32], &[f32]) {
        let at = row * self.half..(row + 1) * self.half;
        (&self.cos[at.clone()], &self.sin[at])
    }

    /// Cosines and sines of all rows, to be rounded.
    pub(super) fn parts_mut(&mut self) -> [&mut [f32]; 2] {
        [&mut self.cos, &mut self.sin]
    }

    /// Rotates one head of row `row` in place.
    pub fn rotate(&self, isa: super::lanes::Isa, row: usize, head: &mut [f32]) {
        let (cos, sin) = self.row(row);
        dispatch(isa, Rotate { cos, sin, head });
    }
}

struct Rotate<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    head: &'a mut [f32],
}

impl Kernel for Rotate<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let half = self.cos.len();
        let (first, second) = self.head.split_at_mut(half);
        for at in (0..half).step_by(LANES) {
            let (x, y) = (load_padded::<L>(&first[at..]), load_padded::<L>(&second[at..half]));
            let (cos, sin) = (load_padded::<L>(&self.cos[at..]), load_padded::<L>(&self.sin[at..]));
            store_padded(x.mul_add(cos, L::splat(0.0).sub(y.mul(sin))), &mut first[at..]);
            store_padded(y.mul_add(cos, x.mul(sin)), &mut second[at..half]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lanes::Isa;
    use super::super::pool::Pool;
    use super::*;

    #[test]
    fn rotation_matches_its_formula_on_every_instruction_set() {
        for head_dim in [8, 16, 64, 96] {
            let mut first: Option<Vec<f32>> = None;
            for isa in Isa::available() {
                let pool = Pool::new(1, isa).unwrap();
                let table = Rope::new(head_dim, 10_000.0, RopeScaling::None)
                    .table(&pool.turn(), &[3, 8_000]);
                let x: Vec<f32> = (0..head_dim).map(|i| i as f32 * 0.1 - 1.0).collect();
                let mut y = x.clone();
                table.rotate(isa, 1, &mut y);
                for i in 0..head_dim / 2 {
                    let frequency = 10_000_f64.powf(-2.0 * i as f64 / head_dim as f64) as f32;
                    let (sin, cos) = f64::from(8_000.0 * frequency).sin_cos();
                    let (a, b) = (f64::from(x[i]), f64::from(x[i + head_dim / 2]));
                    assert!((f64::from(y[i]) - (a * cos - b * sin)).abs() < 1e-5);
                    assert!((f64::from(y[i + head_dim / 2]) - (b * cos + a * sin)).abs() < 1e-5);
                }
                assert_eq!(&y, first.get_or_insert_with(|| y.clone()), "{isa}");
            }
        }
    }

    #[test]
    fn llama3_keeps_short_wavelengths_and_divides_long_ones() {
        let scaling =
            RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original_context: 8192.0 };
        assert_eq!(stretch(1.0, scaling), 1.0);
        assert_eq!(stretch(1e-5, scaling), 1e-5 / 8.0);
        let middle = stretch(0.0015, scaling);
        assert!(middle > 0.0015 / 8.0 && middle < 0.0015);
        assert_eq!(stretch(0.5, RopeScaling::Linear { factor: 4.0 }), 0.125);
    }
}
