//! Computes the residue sketch: a few bits of random projections of a hidden row, and an exact hash
//! of it.
//!
//! Channels are whitened with integers ([`Calibration`]), projected on signs drawn from the key of
//! the request and the row's position, and of each projection only the residue is sent: a verifier
//! who has nearly the same row knows the rest, and everybody else sees uniform noise. All
//! arithmetic after the first rounding is integer, so the order of additions does not matter and
//! CPU and GPU agree bit for bit.

use super::Scheme;
use crate::ops::philox::philox;

/// Bytes of a row's sketch, of either number of bits.
pub const SKETCH_BYTES: usize = 4;
/// Third and fourth counter word of the sign noise: which half of the projections, and the domain.
const DOMAIN: u32 = 0x7369_676e;
/// Multiplies the position in the exact hash.
const POSITION_STEP: u64 = 0x9e37_79b9_7f4a_7c15;
/// Largest magnitude of a whitened channel.
const CHANNEL_MAX: f32 = 32_767.0;

/// How many projections, of how many bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ResidueBits {
    /// Four of eight bits.
    U8,
    /// Eight of four bits.
    U4,
}

impl ResidueBits {
    /// Those of a scheme; TOPLOC has none.
    pub fn of(scheme: Scheme) -> Option<Self> {
        match scheme {
            Scheme::Residue => Some(Self::U8),
            Scheme::ResidueU4 => Some(Self::U4),
            Scheme::Toploc => None,
        }
    }

    /// Projections of a row.
    pub fn projections(self) -> usize {
        match self {
            ResidueBits::U8 => 4,
            ResidueBits::U4 => 8,
        }
    }

    /// Values that a residue takes.
    pub(super) fn modulus(self) -> i32 {
        match self {
            ResidueBits::U8 => 256,
            ResidueBits::U4 => 16,
        }
    }

    /// Residue `j`; those of four bits lie two in a byte, the even one in its lower half.
    pub(super) fn residue(self, sketch: &Sketch, j: usize) -> u8 {
        match self {
            ResidueBits::U8 => sketch[j],
            ResidueBits::U4 => sketch[j / 2] >> (4 * (j % 2)) & 15,
        }
    }

    /// Bits below the residue, given the shift of eight bits: four bits hold a quarter
    /// of the honest noise.
    pub fn shift(self, base: u8) -> u32 {
        match self {
            ResidueBits::U8 => u32::from(base),
            ResidueBits::U4 => u32::from(base) + 2,
        }
    }

    /// Mean energy of two unrelated sketches: that of a uniform difference.
    pub fn forged_energy(self) -> f64 {
        f64::from(self.modulus()).powi(2) / 12.0 + 1.0 / 6.0
    }

    /// Mean energy that `rows` unrelated sketches stay above but in about one case of a million:
    /// five standard deviations below [`forged_energy`](Self::forged_energy), the square of a
    /// uniform difference having a relative variance of 4/5.
    pub fn forged_least(self, rows: usize) -> f64 {
        let residues = (rows.max(1) * self.projections()) as f64;
        self.forged_energy() * (1.0 - 5.0 * (0.8 / residues).sqrt()).max(0.0)
    }
}

/// Whitening of one model: per channel a power of two and a mean, and the width of a residue step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Calibration {
    /// Channel c is multiplied by `2^(exponents[c] + 8)`: about 256 over its standard deviation.
    pub exponents: Vec<i8>,
    /// Subtracted afterwards.
    pub means: Vec<i16>,
    /// Bits of a projection below its residue.
    pub shift: u8,
}

/// `round(log2(sqrt(x)))` from the exponent of x alone, so that every platform agrees.
fn log2_of_root(x: f64) -> i32 {
    let exponent = ((x.to_bits() >> 52) & 0x7ff) as i32 - 1023;
    (exponent + 1).div_euclid(2)
}

/// What a calibration must satisfy.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CalibrationError {
    /// Lists of different lengths, or none.
    #[error("needs as many means as exponents, at least one; got {exponents} and {means}")]
    Lengths {
        /// How many exponents it has.
        exponents: usize,
        /// How many means it has.
        means: usize,
    },
    /// More channels than sums can hold.
    #[error("supports at most 65536 channels, got {0}")]
    Channels(usize),
    /// A shift that leaves nothing.
    #[error("the shift must be at most 20, got {0}")]
    Shift(u8),
    /// An exponent near the ends of f32.
    #[error("exponents must lie in -100..=100, got {0}")]
    Exponent(i8),
}

impl Calibration {
    /// Checks the bounds that the integer arithmetic relies on.
    ///
    /// # Errors
    /// The rule and the fact.
    pub fn validate(&self) -> Result<(), CalibrationError> {
        let (exponents, means) = (self.exponents.len(), self.means.len());
        if exponents != means || exponents == 0 {
            return Err(CalibrationError::Lengths { exponents, means });
        }
        if exponents > 65_536 {
            return Err(CalibrationError::Channels(exponents));
        }
        if self.shift > 20 {
            return Err(CalibrationError::Shift(self.shift));
        }
        match self.exponents.iter().find(|e| !(-100..=100).contains(*e)) {
            Some(e) => Err(CalibrationError::Exponent(*e)),
            None => Ok(()),
        }
    }

    /// From calibration rows (flattened, `channels` values each). `honest_error` is the relative
    /// error (root mean square of whitened differences) that honest implementations show; the
    /// shift makes it about six steps of a residue.
    pub fn from_rows(rows: &[f32], channels: usize, honest_error: f64) -> Self {
        let count = (rows.len() / channels) as f64;
        let mut exponents = Vec::with_capacity(channels);
        let mut means = Vec::with_capacity(channels);
        for c in 0..channels {
            let column = || rows.iter().skip(c).step_by(channels).map(|x| f64::from(*x));
            let mean = column().sum::<f64>() / count;
            let variance = column().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
            let exponent = if variance > 0.0 { -log2_of_root(variance) } else { 0 };
            let exponent = exponent.clamp(-100, 100);
            exponents.push(exponent as i8);
            let scaled = mean * f64::from_bits(((1023 + exponent + 8) as u64) << 52);
            means.push(scaled.round().clamp(-32_767.0, 32_767.0) as i16);
        }
        let spread = honest_error * 256.0 / 6.0;
        let shift = log2_of_root(spread * spread * channels as f64).clamp(0, 20) as u8;
        Self { exponents, means, shift }
    }

    /// Channels of a row.
    pub fn channels(&self) -> usize {
        self.exponents.len()
    }

    /// The whitened integer of channel `c`; NaN and infinities become zero.
    #[inline(always)]
    pub(super) fn whiten(&self, c: usize, x: f32) -> i32 {
        let scale = f32::from_bits(((127 + 8 + i32::from(self.exponents[c])) as u32) << 23);
        let scaled = x * scale;
        let bounded = if scaled.is_finite() { scaled.clamp(-65_535.0, 65_535.0) } else { 0.0 };
        let centred = bounded.round_ties_even() - f32::from(self.means[c]);
        centred.clamp(-CHANNEL_MAX, CHANNEL_MAX) as i32
    }
}

/// The sketch of one row: residues in order, two of four bits to a byte (the first one low).
pub type Sketch = [u8; SKETCH_BYTES];

/// Sketches the row at absolute position `position`; `values` are its exact f32 values.
///
/// # Panics
/// When the row has another number of channels than the calibration.
pub fn sketch(
    calibration: &Calibration,
    bits: ResidueBits,
    key: u64,
    position: u32,
    values: &[f32],
) -> Sketch {
    pack(bits, calibration.shift, &project(calibration, bits, key, position, values))
}

/// Projections of a whitened row, before anything is dropped of them.
pub(super) fn project(
    calibration: &Calibration,
    bits: ResidueBits,
    key: u64,
    position: u32,
    values: &[f32],
) -> [i32; 8] {
    assert_eq!(values.len(), calibration.channels());
    let mut sums = [0_i32; 8];
    let halves = bits.projections() / 4;
    for (block, channels) in values.chunks(32).enumerate() {
        let mut whitened = [0_i32; 32];
        for (i, x) in channels.iter().enumerate() {
            whitened[i] = calibration.whiten(block * 32 + i, *x);
        }
        for half in 0..halves {
            let words = philox(key, [position, block as u32, half as u32, DOMAIN]);
            for (j, word) in words.into_iter().enumerate() {
                sums[half * 4 + j] += signed_sum(&whitened, word);
            }
        }
    }
    sums
}

/// `sum of +q where the bit is set, -q where it is not`.
#[inline(always)]
fn signed_sum(whitened: &[i32; 32], signs: u32) -> i32 {
    let mut sum = 0;
    for (i, q) in whitened.iter().enumerate() {
        let mask = ((signs >> i) & 1) as i32 - 1; // 0 where set, -1 where not
        sum += (q ^ mask) - mask;
    }
    sum
}

fn pack(bits: ResidueBits, shift: u8, sums: &[i32; 8]) -> Sketch {
    let shift = bits.shift(shift);
    let half = if shift == 0 { 0 } else { 1 << (shift - 1) };
    let residue = |sum: i32| (((sum + half) >> shift) & (bits.modulus() - 1)) as u8;
    match bits {
        ResidueBits::U8 => std::array::from_fn(|i| residue(sums[i])),
        ResidueBits::U4 => {
            std::array::from_fn(|i| residue(sums[2 * i]) | residue(sums[2 * i + 1]) << 4)
        }
    }
}

/// Energy of the difference of two sketches of one row: the mean squared wrapped difference.
pub fn row_energy(bits: ResidueBits, a: &Sketch, b: &Sketch) -> f64 {
    let modulus = bits.modulus();
    let square = |x: u8, y: u8| {
        let d = (i32::from(x) - i32::from(y)).rem_euclid(modulus);
        let wrapped = if d > modulus / 2 { d - modulus } else { d };
        f64::from(wrapped * wrapped)
    };
    let pairs = a.iter().zip(b);
    let total: f64 = match bits {
        ResidueBits::U8 => pairs.map(|(x, y)| square(*x, *y)).sum(),
        ResidueBits::U4 => {
            pairs.map(|(x, y)| square(x & 15, y & 15) + square(x >> 4, y >> 4)).sum()
        }
    };
    total / bits.projections() as f64
}

/// Exact hash of a row's 16-bit patterns: a sum, so any order of channels gives it.
pub fn exact_hash(key: u64, position: u32, bits: &[u16]) -> u64 {
    let base = key.wrapping_add(u64::from(position).wrapping_mul(POSITION_STEP));
    bits.iter().enumerate().fold(0_u64, |sum, (c, bits)| {
        let word = (c as u64) << 16 | u64::from(*bits);
        sum.wrapping_add(mix(base.wrapping_add(word)))
    })
}

/// The finaliser of MurmurHash3 (64 bits).
#[inline(always)]
fn mix(mut x: u64) -> u64 {
    x ^= x >> 33;
    x = x.wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^= x >> 33;
    x = x.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Uniform values from a linear congruential generator.
    fn noise(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(state >> 8) / f64::from(1 << 24) - 0.5
        };
        // Twelve uniform values make a good normal one.
        (0..count).map(|_| (0..12).map(|_| next()).sum::<f64>() as f32).collect()
    }

    fn rows(count: usize, channels: usize, seed: u32) -> Vec<f32> {
        let mut rows = noise(count * channels, seed);
        for row in rows.chunks_exact_mut(channels) {
            row[3] = row[3] * 40.0 + 100.0; // a massive channel
            row[5] *= 0.01;
        }
        rows
    }

    fn perturbed(row: &[f32], calibration: &Calibration, relative: f32, seed: u32) -> Vec<f32> {
        let noise = noise(row.len(), seed);
        let sigma = |c: usize| (-f32::from(calibration.exponents[c])).exp2();
        row.iter().enumerate().map(|(c, x)| x + relative * sigma(c) * noise[c]).collect()
    }

    #[test]
    fn whitening_gives_every_channel_the_same_spread() {
        let (channels, data) = (64, rows(400, 64, 1));
        let calibration = Calibration::from_rows(&data, channels, 0.02);
        calibration.validate().unwrap();
        for c in 0..channels {
            let q: Vec<f64> = data
                .iter()
                .skip(c)
                .step_by(channels)
                .map(|x| f64::from(calibration.whiten(c, *x)))
                .collect();
            let mean = q.iter().sum::<f64>() / q.len() as f64;
            let sigma = (q.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / q.len() as f64).sqrt();
            assert!(mean.abs() < 2.0 && (170.0..370.0).contains(&sigma), "{c}: {mean} {sigma}");
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(calibration.whiten(0, bad), -i32::from(calibration.means[0]));
        }
        assert_eq!(calibration.whiten(5, 1e30), 32_767);
    }

    #[test]
    fn energy_tells_honest_noise_from_forgery() {
        let channels = 576;
        let data = rows(300, channels, 2);
        let calibration = Calibration::from_rows(&data, channels, 0.02);
        assert_eq!(calibration.shift, 4);
        for (bits, honest_max) in [(ResidueBits::U8, 70.0), (ResidueBits::U4, 6.0)] {
            let (mut honest, mut forged) = (0.0, 0.0);
            let rows = 200;
            for (r, row) in data.chunks_exact(channels).take(rows).enumerate() {
                let of = |row: &[f32]| sketch(&calibration, bits, 77, r as u32, row);
                let near = perturbed(row, &calibration, 0.02, r as u32 + 9);
                honest += row_energy(bits, &of(row), &of(&near));
                forged += row_energy(bits, &of(row), &of(&data[..channels]));
            }
            let (honest, forged) = (honest / rows as f64, forged / rows as f64);
            assert!(honest < honest_max && honest > 1.0, "{bits:?} honest {honest}");
            let expected = bits.forged_energy();
            assert!((forged / expected - 1.0).abs() < 0.15, "{bits:?} {forged} {expected}");
        }
    }

    #[test]
    fn chunks_of_made_up_rows_are_hardly_ever_nearer() {
        const CHUNKS: u32 = 20_000;
        for (bits, rows) in [
            (ResidueBits::U8, 8),
            (ResidueBits::U8, 32),
            (ResidueBits::U4, 8),
            (ResidueBits::U4, 32),
        ] {
            let random = |chunk, row| philox(5, [chunk, row, 0, 0])[0].to_le_bytes();
            let energy = |chunk| {
                let energies = (0..rows).map(|row| row_energy(bits, &random(chunk, row), &[0; 4]));
                energies.sum::<f64>() / f64::from(rows)
            };
            let least = (0..CHUNKS).map(energy).fold(f64::INFINITY, f64::min);
            let (bound, mean) = (bits.forged_least(rows as usize), bits.forged_energy());
            assert!(least > bound, "{bits:?} {rows} rows: {least} {bound}");
            let nearer = mean - 0.6 * (mean - bound);
            assert!(least < nearer, "the control: they spread: {least} {nearer}");
        }
    }

    #[test]
    fn sketches_depend_on_key_position_and_row() {
        let data = rows(2, 96, 3);
        let calibration = Calibration::from_rows(&data, 96, 0.02);
        let base = sketch(&calibration, ResidueBits::U8, 1, 5, &data[..96]);
        assert_eq!(base, sketch(&calibration, ResidueBits::U8, 1, 5, &data[..96]));
        assert_ne!(base, sketch(&calibration, ResidueBits::U8, 2, 5, &data[..96]));
        assert_ne!(base, sketch(&calibration, ResidueBits::U8, 1, 6, &data[..96]));
        assert_ne!(base, sketch(&calibration, ResidueBits::U8, 1, 5, &data[96..]));
    }

    #[test]
    fn the_logarithm_of_a_root_is_rounded_exactly() {
        for i in 1..4_000 {
            let x = f64::from(i) * 0.0137;
            assert_eq!(log2_of_root(x), x.sqrt().log2().round() as i32, "{x}");
        }
        assert_eq!((log2_of_root(0.49), log2_of_root(0.51), log2_of_root(1e-9)), (-1, 0, -15));
    }

    #[test]
    fn signs_follow_the_definition() {
        let mut q = [0; 32];
        q[0] = 5;
        q[31] = -7;
        assert_eq!(signed_sum(&q, 0x8000_0001), -2);
        assert_eq!(signed_sum(&q, 0), 2);
        assert_eq!(signed_sum(&q, 1), 12);
    }

    #[test]
    fn the_exact_hash_sees_every_bit() {
        let bits: Vec<u16> = (0..100).map(|i| i * 31).collect();
        let base = exact_hash(9, 4, &bits);
        for c in [0, 50, 99] {
            let mut other = bits.clone();
            other[c] ^= 1;
            assert_ne!(base, exact_hash(9, 4, &other));
        }
        assert_ne!(base, exact_hash(9, 5, &bits));
        let mut swapped = bits.clone();
        swapped.swap(1, 2);
        assert_ne!(base, exact_hash(9, 4, &swapped));
    }

    #[test]
    fn calibrations_outside_their_bounds_are_refused() {
        let good = Calibration { exponents: vec![0; 4], means: vec![0; 4], shift: 4 };
        assert_eq!(good.validate(), Ok(()));
        let refused = |c: Calibration| c.validate().unwrap_err().to_string();
        assert!(refused(Calibration { means: vec![], ..good.clone() }).contains("got 4 and 0"));
        assert!(refused(Calibration { shift: 21, ..good.clone() }).contains("at most 20"));
        assert!(refused(Calibration { exponents: vec![0, 0, 0, 101], ..good }).contains("got 101"));
    }
}
