//! Defines the coarse grids that quantisation moves numbers to. Only their values count here: a
//! matrix on a grid is multiplied by like any other.

use crate::ops::dtype::Dtype;

/// Largest number of E4M3, an eight-bit float with 3 bits of mantissa.
const E4M3_MAX: f32 = 448.0;
/// Exponent of its smallest normal number.
const E4M3_EXPONENT_MIN: i32 = -6;

/// The values that numbers are moved to.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Grid {
    /// Symmetric integers with a scale for each group of so many neighbours.
    Integers {
        /// Bits of one value.
        bits: u32,
        /// Numbers that share a scale; 0 is a whole row.
        group: usize,
        /// Whether scales are kept in f16, as in the blocks of GGUF, and not in f32.
        half_scales: bool,
    },
    /// E4M3.
    Fp8(Fp8Scale),
}

/// What is divided by before a number becomes an eight-bit float.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fp8Scale {
    /// Nothing.
    One,
    /// What makes the largest number of a row the largest there is.
    Row,
    /// The same of a whole matrix.
    Tensor,
}

impl Grid {
    /// Symmetric integers with scales in f32.
    pub const fn integers(bits: u32, group: usize) -> Self {
        Self::Integers { bits, group, half_scales: false }
    }

    /// Moves a matrix of so many columns to the grid. NaN stays NaN.
    pub fn apply(self, cols: usize, values: &mut [f32]) {
        match self {
            Self::Integers { bits, group, half_scales } => {
                let group = if group == 0 { cols } else { group };
                let largest = ((1 << (bits - 1)) - 1) as f32;
                for part in values.chunks_mut(cols).flat_map(|row| row.chunks_mut(group)) {
                    let exact = scale(part, largest);
                    let scale = if half_scales { Dtype::F16.nearest(exact) } else { exact };
                    let step = |x: f32| nearest(x / scale).clamp(-largest - 1.0, largest);
                    // A scale below what f16 can hold leaves nothing of its group.
                    let moved = |x: f32| if scale > 0.0 { step(x) * scale } else { 0.0 };
                    part.iter_mut().for_each(|x| *x = moved(*x));
                }
            }
            Self::Fp8(Fp8Scale::One) => values.iter_mut().for_each(|x| *x = e4m3(*x)),
            Self::Fp8(Fp8Scale::Row) => values.chunks_mut(cols).for_each(scaled_e4m3),
            Self::Fp8(Fp8Scale::Tensor) => scaled_e4m3(values),
        }
    }
}

/// What divides the largest magnitude to `largest`; one where all are zero.
fn scale(values: &[f32], largest: f32) -> f32 {
    // Magnitudes compare as their patterns do, and integers are compared many at once.
    let magnitude = |x: &f32| x.to_bits() & 0x7fff_ffff;
    let max = f32::from_bits(values.iter().map(magnitude).max().unwrap_or(0));
    if max > 0.0 { max / largest } else { 1.0 }
}

fn scaled_e4m3(values: &mut [f32]) {
    let scale = scale(values, E4M3_MAX);
    values.iter_mut().for_each(|x| *x = e4m3(*x / scale) * scale);
}

/// The nearest number of E4M3; larger ones become the largest.
fn e4m3(x: f32) -> f32 {
    let exponent = (x.to_bits() >> 23 & 0xff) as i32 - 127;
    let step = f32::from_bits(((exponent.max(E4M3_EXPONENT_MIN) - 3 + 127) as u32) << 23);
    (nearest(x / step) * step).clamp(-E4M3_MAX, E4M3_MAX)
}

/// The nearest integer, ties to even, of a magnitude below 2^22; a larger one stays large. It adds
/// only: `f32::round` is a function call where the compiler may not assume newer instructions.
fn nearest(x: f32) -> f32 {
    const INTEGERS: f32 = 12_582_912.0; // 1.5 * 2^23
    (x + INTEGERS) - INTEGERS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_lie_on_the_grid_of_their_group() {
        let original: Vec<f32> = (0..64).map(|i| ((i * 37 % 64) as f32 - 31.0) / 8.0).collect();
        for (bits, group) in [(4, 16), (4, 0), (8, 16), (8, 0)] {
            for half_scales in [false, true] {
                let mut values = original.clone();
                Grid::Integers { bits, group, half_scales }.apply(32, &mut values);
                let parts = if group == 0 { 32 } else { group };
                for (new, old) in values.chunks(parts).zip(original.chunks(parts)) {
                    let scale = scale(old, ((1 << (bits - 1)) - 1) as f32);
                    for (x, y) in new.iter().zip(old) {
                        assert!((x - y).abs() <= 0.52 * scale, "{bits} {group}: {y} to {x}");
                    }
                    let steps = new.iter().map(|x| x / scale);
                    let off = steps.map(|s| (s - s.round()).abs()).fold(0.0, f32::max);
                    assert!(off < 0.07, "{bits} {group}: {off} of a step");
                }
                assert_ne!(values, original);
            }
        }
    }

    #[test]
    fn eight_bit_floats_have_three_bits_of_mantissa() {
        let cases = [
            (1.0, 1.0),
            (1.06, 1.0),
            (1.07, 1.125),
            (1.0625, 1.0),
            (1.1875, 1.25),
            (-300.0, -288.0),
            (1e9, 448.0),
            (0.0, 0.0),
            (0.001, 0.001_953_125),
            (0.000_9, 0.0),
        ];
        for (x, want) in cases {
            assert_eq!(e4m3(x), want, "{x}");
        }
        assert!(e4m3(f32::NAN).is_nan());
        let mut rows = [1.0, 0.5, 1000.0, 500.1];
        Grid::Fp8(Fp8Scale::Row).apply(2, &mut rows);
        assert_eq!(rows[..2], [1.0, 0.5]);
        assert!((rows[2] - 1000.0).abs() < 1e-3 && (rows[3] - 500.0).abs() < 1e-3, "{rows:?}");
        let mut whole = [1.0, 0.501, 1000.0, 500.1];
        Grid::Fp8(Fp8Scale::Tensor).apply(2, &mut whole);
        assert_ne!(whole[1], 0.501);
    }

    #[test]
    fn nothing_becomes_a_number_that_is_none() {
        for grid in [Grid::integers(8, 0), Grid::integers(4, 2), Grid::Fp8(Fp8Scale::Row)] {
            let mut zeros = [0.0; 4];
            grid.apply(4, &mut zeros);
            assert_eq!(zeros, [0.0; 4], "{grid:?}");
            let mut broken = [1.0, f32::NAN, 0.5, 0.25];
            grid.apply(4, &mut broken);
            assert!(broken[1].is_nan() && broken[0].is_finite(), "{grid:?}: {broken:?}");
        }
        // A scale that f16 cannot hold.
        let mut tiny = [1e-9, -1e-9];
        Grid::Integers { bits: 8, group: 0, half_scales: true }.apply(2, &mut tiny);
        assert_eq!(tiny, [0.0, 0.0]);
    }
}
