//! Measures how far another computation of a row lies from ours, as sketches see it.
//!
//! A sketch drops all but a residue of each projection. Who has the whole row knows the projections
//! themselves, and who computes the row a second time in another arithmetic knows in which
//! direction that moves them and how far: what a residue should be held against.

use super::residue::{Calibration, ResidueBits, Sketch, project};

/// One row and another computation of it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Apart {
    bits: ResidueBits,
    own: [f64; 8],
    delta: [f64; 8],
    square: f64,
}

impl Apart {
    /// Of the row at absolute position `position`, `own` and `other` being its exact f32 values;
    /// nothing where one of them is NaN, because then it cannot be said how far that is.
    ///
    /// # Panics
    /// When a row has another number of channels than the calibration.
    pub fn new(
        (calibration, bits): (&Calibration, ResidueBits),
        (key, position): (u64, u32),
        own: &[f32],
        other: &[f32],
    ) -> Option<Self> {
        if own.iter().chain(other).any(|x| !x.is_finite()) {
            return None;
        }
        let project = |row| project(calibration, bits, key, position, row);
        let (ours, theirs) = (project(own), project(other));
        let step = 0.5_f64.powi(bits.shift(calibration.shift) as i32);
        let whiten = |c: usize, x: f32| f64::from(calibration.whiten(c, x));
        let channels = own.iter().zip(other).enumerate();
        let square: f64 = channels.map(|(c, (a, b))| (whiten(c, *b) - whiten(c, *a)).powi(2)).sum();
        Some(Self {
            bits,
            own: ours.map(|sum| f64::from(sum) * step),
            delta: std::array::from_fn(|j| (f64::from(theirs[j]) - f64::from(ours[j])) * step),
            square: square * step * step,
        })
    }

    /// The square that a projection of the difference has on average over signs, in steps of a
    /// residue: all channels' squares together.
    pub fn square(&self) -> f64 {
        self.square
    }

    /// What the other computation adds to each projection, in steps of a residue.
    pub fn deltas(&self) -> &[f64] {
        &self.delta[..self.bits.projections()]
    }

    /// Values that a residue takes.
    pub fn modulus(&self) -> f64 {
        f64::from(self.bits.modulus())
    }

    /// How far each residue of a sketch is from ours with `share` of what the other computation
    /// adds: the shortest way around, in steps.
    pub fn residuals(&self, sketch: &Sketch, share: f64) -> impl Iterator<Item = f64> {
        let (modulus, sketch) = (self.modulus(), *sketch);
        let (bits, own, delta) = (self.bits, self.own, self.delta);
        (0..bits.projections()).map(move |j| {
            let apart = f64::from(bits.residue(&sketch, j)) - own[j] - share * delta[j];
            apart - modulus * (apart / modulus).round()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::residue::{row_energy, sketch};
    use super::*;

    const KEY: (u64, u32) = (77, 5);

    fn noise(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..count).map(|_| (0..12).map(|_| next()).sum()).collect()
    }

    fn moved(row: &[f32], by: f32, seed: u32) -> Vec<f32> {
        row.iter().zip(noise(row.len(), seed)).map(|(x, n)| x + by * n).collect()
    }

    #[test]
    fn a_row_that_moved_as_the_other_did_leaves_nothing() {
        let data = noise(96 * 200, 1);
        let calibration = Calibration::from_rows(&data, 96, 0.02);
        let own = &data[..96];
        let other = moved(own, 0.02, 9);
        for bits in [ResidueBits::U8, ResidueBits::U4] {
            let apart = Apart::new((&calibration, bits), KEY, own, &other).unwrap();
            let theirs = sketch(&calibration, bits, KEY.0, KEY.1, &other);
            let square = |share| apart.residuals(&theirs, share).map(|r| r * r).sum::<f64>();
            // Only what a residue drops is left, at most half a step each.
            assert!(square(1.0) <= 0.25 * bits.projections() as f64, "{bits:?}");
            assert!(square(0.0) > 8.0 * square(1.0), "the control: {bits:?}");
            let ours = sketch(&calibration, bits, KEY.0, KEY.1, own);
            let energy = row_energy(bits, &ours, &theirs) * bits.projections() as f64;
            assert!((square(0.0).sqrt() - energy.sqrt()).abs() < 3.0, "{bits:?}");
            assert_eq!(apart.deltas().len(), bits.projections());
        }
    }

    #[test]
    fn the_square_is_what_a_projection_has_on_average() {
        let data = noise(256 * 50, 2);
        let calibration = Calibration::from_rows(&data, 256, 0.02);
        let (own, other) = (&data[..256], moved(&data[..256], 0.02, 3));
        let at = |position: u32| {
            let set = (&calibration, ResidueBits::U8);
            Apart::new(set, (1, position), own, &other).unwrap()
        };
        let deltas: Vec<f64> = (0..500).flat_map(|p| at(p).deltas().to_vec()).collect();
        let mean = deltas.iter().map(|d| d * d).sum::<f64>() / deltas.len() as f64;
        assert!((mean / at(0).square() - 1.0).abs() < 0.1, "{mean} {}", at(0).square());
    }

    #[test]
    fn what_is_no_number_has_no_distance() {
        let data = noise(64 * 20, 4);
        let calibration = Calibration::from_rows(&data, 64, 0.02);
        let set = (&calibration, ResidueBits::U8);
        let own = &data[..64];
        for bad in [f32::NAN, f32::INFINITY] {
            let mut other = own.to_vec();
            other[7] = bad;
            assert_eq!(Apart::new(set, KEY, own, &other), None);
            assert_eq!(Apart::new(set, KEY, &other, own), None);
        }
        let same = Apart::new(set, KEY, own, own).unwrap();
        assert_eq!((same.square(), same.deltas()), (0.0, &[0.0; 4][..]));
    }
}
