//! Defines the limits that separate honest answers from others.

use super::places::FAST_ROWS;
use super::report::{ChunkEvidence, Report};
use super::statistic::{ByRows, ROWS, Statistic};
use crate::files::KeyError;
use crate::models::margin::MARGIN_CLIP;
use crate::proof::residue::ResidueBits;
use crate::proof::{CHUNK_ROWS, Scheme};
use serde::{Deserialize, Serialize};

/// Margins that the limit of their mean was measured on: those of a fast check of a long answer,
/// which looks at its last row and others.
const MARGINS: usize = FAST_ROWS + 1;

/// Limits of energies are not scaled down further: some of an energy is what residues drop.
const FACTOR_MIN: f64 = 1.0 / 64.0;

/// Limits between honest and not. The defaults spare an honest miner that computes in bf16 with
/// another library (`docs/verification.md` has the measurement); classes of miners with smaller
/// errors deserve limits of their own. A miner on this engine has energy zero and draws what we
/// draw, which [`exact`](Self::exact) demands.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Mean energy of a single whole chunk of `residue-v1`, which nothing honest comes near. Of
    /// fewer rows it may be more ([`ChunkEvidence::limit`]).
    pub energy_u8: f64,
    /// The same of `residue-v1-u4`.
    pub energy_u4: f64,
    /// Where a chunk has more, it may have so many times the energy that rounding alone gives its
    /// rows (`twin.rs`), as long as made-up rows would have more still. Zero where that was not
    /// measured: it is never more then.
    #[serde(default)]
    pub energy_rounding: f64,
    /// Trimmed mean of the energies of an answer's rows, of `residue-v1`: more is suspicious.
    pub trimmed_u8: ByRows,
    /// The same of `residue-v1-u4`.
    pub trimmed_u4: ByRows,
    /// The same in units of what rounding moves a row by (`twin.rs`).
    pub twin_u8: ByRows,
    /// The same of `residue-v1-u4`.
    pub twin_u4: ByRows,
    /// How much of the way that the twin goes an honest row goes with it, on average.
    pub shrink: f64,
    /// A known cheat is named from so much of it on.
    pub beta: f64,
    /// The margin of a single token, in logits.
    pub margin: f64,
    /// The mean margin of the tokens that were checked, each clipped at [`MARGIN_CLIP`].
    pub margin_mean: f64,
    /// Mean agreement of log-probabilities, 1 is perfect (Targon's rule).
    pub agreement: f64,
    /// Demands that hidden rows are equal bit for bit: the miner runs this engine.
    pub exact: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            energy_u8: 660.0,
            energy_u4: 18.5,
            energy_rounding: 5.0,
            trimmed_u8: ByRows([1230.0, 290.0, 225.0, 190.0, 125.0]),
            trimmed_u4: ByRows([26.5, 15.5, 12.2, 10.8, 7.7]),
            twin_u8: ByRows([3.6, 1.45, 1.4, 1.3, 1.15]),
            twin_u4: ByRows([2.65, 1.5, 1.5, 1.3, 1.2]),
            shrink: 0.4,
            beta: 0.25,
            margin: 0.5,
            margin_mean: 0.02,
            agreement: 0.75,
            exact: false,
        }
    }
}

impl Limits {
    /// Limits that no answer exceeds: for measuring.
    pub const NONE: Self = Self {
        energy_u8: f64::INFINITY,
        energy_u4: f64::INFINITY,
        energy_rounding: 0.0,
        trimmed_u8: ByRows::all(f64::INFINITY),
        trimmed_u4: ByRows::all(f64::INFINITY),
        twin_u8: ByRows::all(f64::INFINITY),
        twin_u4: ByRows::all(f64::INFINITY),
        shrink: 0.4,
        beta: f64::INFINITY,
        margin: f64::INFINITY,
        margin_mean: f64::INFINITY,
        agreement: 0.0,
        exact: false,
    };

    /// The same for a model whose rows are moved by rounding with so many times the energy of those
    /// that the limits were measured on.
    ///
    /// An honest row is wild now and then, in models that rounding moves little too, and then as
    /// far away as one that is made up. So below one, where few rows count and none is left out,
    /// there is room for one of those in the place of what rounding is less. A limit of four bits
    /// is not above what it was: nearly all of the way to made-up rows is used up there.
    pub fn scaled(self, factor: f64) -> Self {
        let factor = factor.max(FACTOR_MIN);
        let wild = |bits: ResidueBits, rows: usize| {
            (1.0 - factor).max(0.0) * bits.forged_energy() / rows as f64
        };
        let wide = |limit: f64, wild: f64, most: f64| (limit * factor + wild).min(most);
        // A step of four bits is four of eight, and what a residue drops is a twelfth.
        let narrow = |limit: f64, of_eight: f64, wild: f64| {
            limit.min(of_eight * factor / 16.0 + 0.25 + wild)
        };
        let (eight, four) = (ResidueBits::U8, ResidueBits::U4);
        // From 32 rows on a statistic leaves out three of them at either end.
        let among = |place: usize, bits| if place == 0 { wild(bits, ROWS[0]) } else { 0.0 };
        let trimmed_u8 = |place: usize| {
            wide(self.trimmed_u8.0[place], among(place, eight), eight.forged_energy())
        };
        let trimmed_u4 = |place: usize| {
            narrow(self.trimmed_u4.0[place], self.trimmed_u8.0[place], among(place, four))
        };
        let (chunk, least) = (CHUNK_ROWS, eight.forged_least(CHUNK_ROWS));
        Self {
            energy_u8: wide(self.energy_u8, wild(eight, chunk), least),
            energy_u4: narrow(self.energy_u4, self.energy_u8, wild(four, chunk)),
            trimmed_u8: ByRows(std::array::from_fn(trimmed_u8)),
            trimmed_u4: ByRows(std::array::from_fn(trimmed_u4)),
            ..self
        }
    }

    /// The largest energy of a chunk of `scheme`; TOPLOC has none.
    pub fn energy(&self, scheme: Scheme) -> Option<f64> {
        match scheme {
            Scheme::Residue => Some(self.energy_u8),
            Scheme::ResidueU4 => Some(self.energy_u4),
            Scheme::Toploc => None,
        }
    }

    /// The largest mean of so many margins. Of few, one that is honest is much of the mean: they
    /// may have the sum that those of a fast check of a long answer have.
    pub fn margin_mean_max(&self, margins: usize) -> f64 {
        self.margin_mean * (MARGINS as f64 / margins.max(1) as f64).max(1.0)
    }

    /// The largest energy of this chunk of `scheme`; TOPLOC has none.
    pub fn chunk_energy(&self, scheme: Scheme, chunk: &ChunkEvidence) -> Option<f64> {
        let usual = chunk.limit(self.energy(scheme)?);
        match chunk.rounding {
            Some(energy) if energy.is_finite() => {
                Some(self.explained(scheme, chunk, energy).max(usual))
            }
            _ => Some(usual),
        }
    }

    /// The largest energy of a chunk that rounding explains, given what rounding alone gives it.
    fn explained(&self, scheme: Scheme, chunk: &ChunkEvidence, rounding: f64) -> f64 {
        let made_up = ResidueBits::of(scheme).map_or(0.0, |bits| bits.forged_least(chunk.rows));
        (self.energy_rounding * rounding).min(made_up)
    }

    /// Whether chunks that are too far from ours might all be explained by rounding: only the twin
    /// can tell.
    pub fn is_open(&self, scheme: Scheme, chunks: &[ChunkEvidence]) -> bool {
        let is_open = |chunk: &ChunkEvidence| {
            let most = self.explained(scheme, chunk, f64::MAX);
            chunk.energy.is_some_and(|energy| energy <= most)
        };
        let mut far = chunks.iter().filter(|chunk| self.is_over(scheme, chunk)).peekable();
        !self.exact && self.energy_rounding > 0.0 && far.peek().is_some() && far.all(is_open)
    }

    /// The largest statistic of an answer in `scheme`; TOPLOC has none.
    pub fn trimmed(&self, scheme: Scheme) -> Option<ByRows> {
        match scheme {
            Scheme::Residue => Some(self.trimmed_u8),
            Scheme::ResidueU4 => Some(self.trimmed_u4),
            Scheme::Toploc => None,
        }
    }

    /// The largest statistic in the twin's units.
    pub fn twin(&self, scheme: Scheme) -> Option<ByRows> {
        match scheme {
            Scheme::Residue => Some(self.twin_u8),
            Scheme::ResidueU4 => Some(self.twin_u4),
            Scheme::Toploc => None,
        }
    }

    /// What the rows of an answer say together, where there are enough of them.
    pub fn statistic(&self, scheme: Scheme, report: &Report) -> Option<Statistic> {
        Statistic::of(&report.energies, &self.trimmed(scheme)?)
    }

    /// The same in the twin's units, where it was run.
    pub fn twin_statistic(&self, scheme: Scheme, report: &Report) -> Option<Statistic> {
        Statistic::of(&report.twin, &self.twin(scheme)?)
    }

    /// The first one in units of its limit; nothing where all rows are equal bit for bit.
    pub fn share(&self, scheme: Scheme, report: &Report) -> Option<f64> {
        let is_exact = !report.chunks.is_empty() && report.chunks.iter().all(|c| c.is_exact);
        match self.statistic(scheme, report) {
            None => (is_exact && self.trimmed(scheme).is_some()).then_some(0.0),
            Some(statistic) => Some(statistic.share()),
        }
    }

    /// The largest margin of a single token: zero where bits must be equal.
    pub fn margin_max(&self) -> f64 {
        if self.exact { 0.0 } else { self.margin }
    }

    /// Whether a chunk of `scheme` is too far from ours.
    pub fn is_over(&self, scheme: Scheme, chunk: &ChunkEvidence) -> bool {
        let is_far = match self.chunk_energy(scheme, chunk) {
            Some(limit) => chunk.energy.is_none_or(|e| e.is_nan() || e > limit),
            None => chunk.distance.is_none_or(|d| !d.passes_published()),
        };
        !chunk.is_exact && (self.exact || is_far)
    }

    /// Refuses numbers that nothing could be held against.
    pub(super) fn check(&self) -> Result<(), KeyError> {
        let by_rows = [
            ("limits.trimmed_u8", self.trimmed_u8),
            ("limits.trimmed_u4", self.trimmed_u4),
            ("limits.twin_u8", self.twin_u8),
            ("limits.twin_u4", self.twin_u4),
        ];
        let by_rows =
            by_rows.into_iter().flat_map(|(key, of)| of.0.map(|value| (key, value, None)));
        let single = [
            ("limits.energy_u8", self.energy_u8, None),
            ("limits.energy_u4", self.energy_u4, None),
            ("limits.shrink", self.shrink, Some(1.0)),
            ("limits.beta", self.beta, Some(1.0)),
            ("limits.margin", self.margin, Some(MARGIN_CLIP)),
            ("limits.margin_mean", self.margin_mean, Some(MARGIN_CLIP)),
            ("limits.agreement", self.agreement, Some(1.0)),
        ];
        if !(0.0..=f64::MAX).contains(&self.energy_rounding) {
            let rule = format!("must be a number of at least 0, got {}", self.energy_rounding);
            return Err(KeyError::new("limits.energy_rounding", rule));
        }
        for (key, value, most) in single.into_iter().chain(by_rows) {
            if !(value > 0.0 && value <= most.unwrap_or(f64::MAX)) {
                let rule = match most {
                    Some(most) => format!("must lie above 0 and be at most {most}"),
                    None => "must be a number above 0".to_owned(),
                };
                return Err(KeyError::new(key, format!("{rule}, got {value}")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_over(scheme: Scheme, rows: usize, energy: f64) -> bool {
        let evidence =
            ChunkEvidence { index: 0, rows, energy: Some(energy), ..ChunkEvidence::default() };
        Limits::default().is_over(scheme, &evidence)
    }

    #[test]
    fn few_margins_may_have_the_sum_of_a_fast_checks() {
        let limits = Limits::default();
        for (margins, most) in [(1, 0.66), (3, 0.22), (32, 0.020625), (33, 0.02), (400, 0.02)] {
            assert!((limits.margin_mean_max(margins) - most).abs() < 1e-12, "{margins}");
        }
    }

    #[test]
    fn an_energy_that_is_no_number_is_over_the_limit() {
        for energy in [f64::NAN, f64::INFINITY] {
            assert!(is_over(Scheme::Residue, 32, energy), "{energy}");
        }
        assert!(!is_over(Scheme::Residue, 32, 1.0), "the control");
    }

    #[test]
    fn rounding_explains_energies_that_made_up_rows_do_not_have() {
        let limits = Limits { energy_u8: 600.0, energy_rounding: 4.0, ..Limits::default() };
        let chunk = |energy: f64, rounding| {
            let energy = Some(energy);
            ChunkEvidence { rows: 32, energy, rounding, ..ChunkEvidence::default() }
        };
        let is_over = |limits: &Limits, energy, rounding| {
            limits.is_over(Scheme::Residue, &chunk(energy, rounding))
        };
        let made_up = ResidueBits::U8.forged_least(32);
        assert!((3000.0..3500.0).contains(&made_up), "{made_up}");
        for (energy, rounding, want) in [
            (1600.0, Some(401.0), false),
            (1610.0, Some(401.0), true),
            (601.0, None, true),
            (601.0, Some(10.0), true),
            (599.0, Some(10.0), false),
            (made_up + 1.0, Some(1e9), true),
            (made_up - 1.0, Some(1e9), false),
            (601.0, Some(f64::NAN), true),
            (601.0, Some(f64::INFINITY), true),
        ] {
            assert_eq!(is_over(&limits, energy, rounding), want, "{energy} {rounding:?}");
        }
        let never = Limits { energy_rounding: 0.0, ..limits };
        assert!(is_over(&never, 601.0, Some(401.0)), "the control");
        // Four bits hold too little: what they explain is less than what is usual.
        let four = |energy| Limits::default().is_over(Scheme::ResidueU4, &chunk(energy, Some(1e9)));
        assert!(four(18.6) && !four(18.4));

        let is_open = |limits: &Limits, energies: &[f64]| {
            let chunks: Vec<_> = energies.iter().map(|energy| chunk(*energy, None)).collect();
            limits.is_open(Scheme::Residue, &chunks)
        };
        assert!(is_open(&limits, &[10.0, 700.0, 3000.0]));
        assert!(!is_open(&limits, &[10.0, 700.0, 3500.0]), "what is made up is no question");
        assert!(!is_open(&limits, &[10.0, 500.0]) && !is_open(&never, &[700.0]));
        assert!(!is_open(&limits, &[700.0, f64::NAN]));
        assert!(!is_open(&Limits { exact: true, ..limits }, &[700.0]));
    }

    #[test]
    fn limits_of_energies_follow_the_rounding_of_the_model() {
        let limits = Limits::default();
        let [half, same, tenfold] = [0.5, 1.0, 10.0].map(|factor| limits.scaled(factor));
        assert_eq!(same, limits);
        let made_up = ResidueBits::U8.forged_energy();
        assert_eq!((half.energy_u8, half.trimmed_u8.0[2]), (330.0 + made_up / 64.0, 112.5));
        assert_eq!(half.trimmed_u8.0[0], 615.0 + made_up / 16.0);
        // One row that is made up, among honest ones, is no reason for a rejection.
        let quiet = limits.scaled(0.1);
        let chunk = |wild: f64| ChunkEvidence {
            rows: 32,
            energy: Some((31.0 * 10.0 + wild * made_up) / 32.0),
            ..ChunkEvidence::default()
        };
        assert!(!quiet.is_over(Scheme::Residue, &chunk(1.0)));
        assert!(quiet.is_over(Scheme::Residue, &chunk(2.0)), "two are");
        // Rows that are made up must stay above them.
        assert_eq!(tenfold.energy_u8, ResidueBits::U8.forged_least(32));
        assert_eq!(tenfold.trimmed_u8.0[0], ResidueBits::U8.forged_energy());
        assert_eq!(tenfold.trimmed_u8.0[4], 1250.0);
        // Four bits have little room below them: half of 660 is 20.6 in their steps.
        assert_eq!((half.energy_u4, tenfold.energy_u4), (18.5, 18.5));
        let four = ResidueBits::U4.forged_energy();
        assert_eq!(limits.scaled(0.25).energy_u4, 660.0 / 64.0 + 0.25 + 0.75 * four / 32.0);
        assert_eq!((half.trimmed_u4.0[4], tenfold.trimmed_u4.0[4]), (125.0 / 32.0 + 0.25, 7.7));
        // What is in units of rounding, of logits or of shares is what it was.
        let others = |l: Limits| Limits {
            energy_u8: 0.0,
            energy_u4: 0.0,
            trimmed_u8: ByRows::all(0.0),
            trimmed_u4: ByRows::all(0.0),
            ..l
        };
        assert_eq!(others(half), others(limits));
        // A model whose twin has its rows has limits as well.
        assert_eq!(limits.scaled(0.0), limits.scaled(FACTOR_MIN));
        assert_eq!(limits.scaled(0.0).check(), Ok(()));
    }

    #[test]
    fn few_rows_may_have_more_energy_than_a_whole_chunk() {
        // Honest bf16 rows: of 68608 alone 1 in 10000 is above 2721, of 8576 means of 8 above 1109.
        for (rows, honest, far) in [(1, 2721.0, 3800.0), (8, 1109.0, 1330.0), (32, 564.0, 661.0)] {
            assert!(!is_over(Scheme::Residue, rows, honest), "{rows} rows");
            assert!(is_over(Scheme::Residue, rows, far), "the control: {rows} rows");
        }
        // What is made up has 5461 on average, and is seen in four rows.
        assert!(is_over(Scheme::Residue, 4, 5461.0 - 2.5 * 1222.0));
        assert!(!is_over(Scheme::ResidueU4, 32, 18.3) && is_over(Scheme::ResidueU4, 32, 21.5));
        // In fewer rows four bits do not tell it from honest ones.
        assert!(!is_over(Scheme::ResidueU4, 16, 21.5));
        assert!(is_over(Scheme::Residue, 0, f64::INFINITY), "no rows are as one");
    }
}
