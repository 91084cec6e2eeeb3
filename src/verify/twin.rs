//! Computes an answer's rows a second time, in the arithmetic of an honest stack of 16 bits: how
//! far may an honest row be from ours, and in which direction would a cheat have moved it?
//!
//! The twin ([`Rounding::Everywhere`]) says for every row how much rounding moves it: by a factor
//! of ten more in one than in the next. So distances are measured in its units, which shows cheats
//! that move rows no further than honest rounding moves others. A chunk that is too far by the
//! usual limit is rejected only where it is so in these units too
//! ([`Limits::chunk_energy`](super::Limits::chunk_energy)). A [recipe](RECIPES) is a third
//! computation, by a cheat that is known; `beta` is how much of what it moves is found in the
//! proof, one where the prover does just that and about zero where it is honest.
//!
//! Each costs a prefill. Whether the twin is run is said by [`super::scrutiny`]; recipes are run
//! only where the twin says that an answer is too far, and name what it was. Without a name no
//! answer is rejected for this: a prompt unlike all that limits were measured on can be far by
//! itself. What cannot be computed is a fault of ours: a suspicious answer is unscored then, and
//! the answers beside it are looked at all the same.

use super::limits::Limits;
use super::prefill::{IsWanted, UNWANTED, hidden_rows_while};
use super::report::{Named, Report};
use super::statistic::Statistic;
use super::{ChunkEvidence, Reason, Rejection, Stop, Verdict, proof};
use crate::models::Model;
use crate::models::cpu::decoder::Decoder;
use crate::models::departure::{Departure, RECIPES};
use crate::ops::dtype::Dtype;
use crate::ops::pool::Pool;
use crate::ops::rounding::Rounding;
use crate::proof::apart::Apart;
use crate::proof::commit::RowProver;
use crate::proof::residue::{ResidueBits, Sketch};
use crate::proof::{CHUNK_ROWS, Scheme};
use std::sync::Arc;

/// Least square that a row is measured in, in steps of a residue: where the twin rounds to the same
/// row, what a residue drops (a twelfth) is not a distance.
pub(super) const SQUARE_MIN: f64 = 1.0;
/// A delta so near half of a residue's range may wrap to the other side, and says nothing.
const DELTA_MAX: f64 = 0.375;

/// What a second look at an answer needs: its proof, and our own rows.
pub(super) struct Recheck {
    /// Whether it was rejected for energies that rounding might explain, and for nothing else.
    pub(super) is_open: bool,
    /// The scheme that the answer was proved by.
    pub(super) scheme: Scheme,
    /// The keys of its sketches.
    pub(super) prover: RowProver,
    /// Sketches of its rows, in order; none in chunks that are equal bit for bit.
    pub(super) sketches: Vec<Option<Sketch>>,
    /// The final-norm rows that we computed, as bits.
    pub(super) rows: Vec<Vec<u16>>,
    /// The tokens that it answers to.
    pub(super) prompt: Vec<u32>,
    /// The tokens of the answer, as ids.
    pub(super) output: Vec<u32>,
}

impl Recheck {
    /// Another computation of its rows beside ours.
    fn beside(&self, other: &[Vec<u16>], dtype: Dtype) -> Vec<Option<Apart>> {
        let Some((profile, keys, calibration)) = self.prover.residue() else { return Vec::new() };
        let first = self.prompt.len() - 1;
        let widen = |bits: &Vec<u16>| bits.iter().map(|b| dtype.widen(*b)).collect::<Vec<f32>>();
        let apart = |(place, (own, other)): (usize, (&Vec<u16>, &Vec<u16>))| {
            let key = (keys.sketch, (first + place) as u32);
            Apart::new((calibration, profile), key, &widen(own), &widen(other))
        };
        self.rows.iter().zip(other).enumerate().map(apart).collect()
    }

    /// Rows that count, with another computation of each.
    fn counted<'a>(
        &'a self,
        apart: &'a [Option<Apart>],
    ) -> impl Iterator<Item = (usize, &'a Apart, &'a Sketch)> {
        let rows = apart.iter().zip(&self.sketches).enumerate();
        rows.filter_map(|(place, (apart, sketch))| Some((place, apart.as_ref()?, sketch.as_ref()?)))
    }

    /// Distance of each row in units of what rounding moves it by, after `share` of the way that
    /// the twin went. Rows whose twin is NaN have none.
    fn scores(&self, twin: &[Option<Apart>], share: f64) -> Vec<f64> {
        let score = |(_, apart, sketch): (usize, &Apart, &Sketch)| {
            let squares = apart.residuals(sketch, share).map(|r| r * r);
            let count = apart.deltas().len() as f64;
            squares.sum::<f64>() / count / apart.square().max(SQUARE_MIN)
        };
        self.counted(twin).map(score).collect()
    }

    /// The energy that the twin has in each chunk of `chunks`, where all of its rows have one. No
    /// row has more than a made-up one, as on the wire, so that a wild one excuses no others.
    fn weigh(&self, twin: &[Option<Apart>], chunks: &mut [ChunkEvidence]) {
        let most = ResidueBits::of(self.scheme).map_or(f64::INFINITY, ResidueBits::forged_energy);
        for (chunk, twin) in chunks.iter_mut().zip(twin.chunks(CHUNK_ROWS)) {
            let squares = twin.iter().map(|apart| Some(apart.as_ref()?.square()));
            chunk.rounding = mean_capped(squares, most);
        }
    }

    /// How much of what a recipe moves is found in the proof; nothing where it moves nothing.
    fn beta(&self, twin: &[Option<Apart>], recipe: &[Option<Apart>]) -> Option<f64> {
        let (mut found, mut moved) = (0.0, 0.0);
        for (place, apart, sketch) in self.counted(recipe) {
            let Some(noise) = twin.get(place).and_then(Option::as_ref) else { continue };
            let weight = 1.0 / (noise.square().max(SQUARE_MIN) + apart.square() / 4.0);
            let near = DELTA_MAX * apart.modulus();
            for (delta, residual) in apart.deltas().iter().zip(apart.residuals(sketch, 0.0)) {
                if delta.abs() < near {
                    found += weight * residual * delta;
                    moved += weight * delta * delta;
                }
            }
        }
        (moved > 0.0).then(|| found / moved)
    }
}

/// The mean of numbers, of which none counts for more than `most`; nothing where one is missing.
fn mean_capped(values: impl ExactSizeIterator<Item = Option<f64>>, most: f64) -> Option<f64> {
    let count = values.len() as f64;
    let sum: Option<f64> = values.map(|value| Some(value?.min(most))).sum();
    sum.map(|sum| sum / count)
}

/// Looks at answers again.
pub(super) struct Look<'a> {
    pub(super) model: &'a Model,
    pub(super) pool: &'a Pool,
    pub(super) limits: &'a Limits,
    /// Whether known cheats are tried.
    pub(super) names: bool,
    pub(super) is_wanted: &'a IsWanted<'a>,
}

/// An answer that the twin finds too far.
struct Far<'a> {
    /// Its place among the reports.
    place: usize,
    recheck: &'a Recheck,
    twin: Vec<Option<Apart>>,
    /// Why a cheat that might be its name could not be tried.
    untried: Option<String>,
}

impl Look<'_> {
    /// Puts what is found into the reports, each at the place of its recheck. What cannot be
    /// computed of one says nothing about the others.
    pub(super) fn at(&self, rechecks: &[(usize, Recheck)], reports: &mut [Report]) {
        let mut far = Vec::new();
        for (place, recheck) in rechecks {
            let report = &mut reports[*place];
            match self.measure(recheck, report) {
                Ok(twin) => {
                    if recheck.is_open {
                        self.decide(report, recheck);
                    }
                    if self.names && self.is_far(recheck, report) {
                        far.push(Far { place: *place, recheck, twin, untried: None });
                    }
                }
                Err(stop) if recheck.is_open => report.verdict = unscored(&stop),
                Err(stop) => self.leave_open(report, recheck, &stop),
            }
        }
        self.name(&mut far, reports);
    }

    fn is_far(&self, recheck: &Recheck, report: &Report) -> bool {
        self.limits.twin_statistic(recheck.scheme, report).is_some_and(|s| s.is_over())
    }

    /// Rejects an answer for its energies only where rounding does not explain them.
    fn decide(&self, report: &mut Report, recheck: &Recheck) {
        let Self { limits, .. } = self;
        let is_far = |chunk: &&ChunkEvidence| limits.is_over(recheck.scheme, chunk);
        report.verdict = match report.chunks.iter().filter(is_far).find(|c| c.rounding.is_none()) {
            Some(chunk) => {
                let what =
                    format!("rows of chunk {} that 16 bits round are not finite", chunk.index);
                unscored(&Stop::Fault(what))
            }
            None => match proof::check(&report.chunks, recheck.scheme, limits) {
                Ok(()) => Verdict::Pass,
                Err(stop) => stop.into(),
            },
        };
    }

    /// The second look failed: nothing is said of an answer that the first one found suspicious.
    /// One that was drawn by chance stays as it was.
    fn leave_open(&self, report: &mut Report, recheck: &Recheck, stop: &Stop) {
        tracing::warn!("a suspicious answer cannot be computed again: {}", because(stop));
        let is_over = self.limits.statistic(recheck.scheme, report).is_some_and(|s| s.is_over());
        if report.verdict == Verdict::Pass && is_over {
            report.verdict = unscored(stop);
        }
    }

    /// Another computation of a recheck's rows, beside ours.
    fn rerun(
        &self,
        decoder: &Arc<Decoder>,
        departure: Departure,
        recheck: &Recheck,
    ) -> Result<Vec<Option<Apart>>, Stop> {
        let pass = |blocks| Model::departing(decoder, departure, (self.pool, blocks));
        let rows = hidden_rows_while(self.is_wanted, pass, &recheck.prompt, &recheck.output)?;
        Ok(recheck.beside(&rows, self.model.dtype))
    }

    /// Runs the twin of one answer.
    fn measure(&self, recheck: &Recheck, report: &mut Report) -> Result<Vec<Option<Apart>>, Stop> {
        let Self { model, limits, .. } = self;
        let own = model.weights.cpu().ok_or_else(|| {
            let device = model.weights.device();
            Stop::Fault(format!("the weights are on {device}, not on the processor"))
        })?;
        let rounding = Rounding::Everywhere(model.dtype);
        let stepwise = Departure { rounding, ..Departure::default() };
        let twin = self.rerun(own, stepwise, recheck)?;
        report.twin = recheck.scores(&twin, limits.shrink);
        report.twin_share = recheck.beta(&twin, &twin);
        recheck.weigh(&twin, &mut report.chunks);
        Ok(twin)
    }

    /// Tries every recipe on all that are too far, and concludes.
    fn name(&self, far: &mut [Far<'_>], reports: &mut [Report]) {
        if far.is_empty() {
            return;
        }
        for recipe in &RECIPES {
            // Packing weights takes seconds.
            let decoder = match (self.is_wanted)() {
                true => self.model.coarse(recipe, self.pool).map_err(|e| e.to_string()),
                false => Err(UNWANTED.to_owned()),
            };
            for Far { place, recheck, twin, untried } in &mut *far {
                let moved = decoder.as_ref().map_err(|why| Stop::Fault(why.clone()));
                let moved = moved.and_then(|d| self.rerun(d, recipe.departure, recheck));
                match moved {
                    Ok(moved) => {
                        let beta = recheck.beta(twin, &moved);
                        let named = beta.map(|beta| Named { name: recipe.name, beta });
                        reports[*place].named.extend(named);
                    }
                    Err(stop) => *untried = Some(format!("{}: {}", recipe.name, because(&stop))),
                }
            }
        }
        for Far { place, recheck, untried, .. } in far {
            let report = &mut reports[*place];
            conclude(report, recheck.scheme, self.limits);
            if let Some(why) = untried.take() {
                self.leave_open(report, recheck, &Stop::Fault(why));
            }
        }
    }
}

fn because(stop: &Stop) -> String {
    match stop {
        Stop::Fault(why) => why.clone(),
        Stop::Rejected(rejection) => rejection.to_string(),
    }
}

/// The verdict on a suspicious answer whose second look failed.
fn unscored(stop: &Stop) -> Verdict {
    let why = because(stop);
    Verdict::Unscored(format!("it is suspicious, and cannot be computed again: {why}"))
}

/// Rejects what is too far and has a name.
fn conclude(report: &mut Report, scheme: Scheme, limits: &Limits) {
    report.named.sort_by(|a, b| b.beta.total_cmp(&a.beta));
    let Some(statistic) = limits.twin_statistic(scheme, report) else { return };
    let Some(named) = report.named.first().filter(|named| named.beta >= limits.beta) else {
        return;
    };
    let Statistic { value, rows, limit } = statistic;
    // NaN says nothing.
    if report.verdict == Verdict::Pass && value > limit {
        let what = format!(
            "{rows} rows are {value:.2} times as far as rounding moves them, at most {limit:.2}: \
             {}, beta {:.2}",
            named.name, named.beta
        );
        report.verdict = Verdict::Reject(Rejection::new(Reason::SketchEnergy, what));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proof::residue::{Calibration, sketch};

    const CHANNELS: usize = 96;

    fn row(place: usize) -> Vec<u16> {
        let value = |c: usize| ((place * 31 + c * 17 + c * c) % 23) as f32 - 11.0;
        (0..CHANNELS).map(|c| Dtype::Bf16.round(value(c))).collect()
    }

    fn widen(bits: &[u16]) -> Vec<f32> {
        bits.iter().map(|b| Dtype::Bf16.widen(*b)).collect()
    }

    /// An answer of this engine with three rows.
    fn recheck() -> Recheck {
        let rows: Vec<Vec<u16>> = (0..3).map(row).collect();
        let known: Vec<f32> = (0..200).flat_map(|place| widen(&row(place))).collect();
        let calibration = Arc::new(Calibration::from_rows(&known, CHANNELS, 0.02));
        let prover = RowProver::new(Scheme::Residue, &[7; 32], calibration);
        let (profile, keys, calibration) = prover.residue().unwrap();
        let sketched = |(place, bits): (usize, &Vec<u16>)| {
            Some(sketch(calibration, profile, keys.sketch, place as u32, &widen(bits)))
        };
        let sketches = rows.iter().enumerate().map(sketched).collect();
        let (prompt, output) = (vec![1], vec![2, 3, 4]);
        let (is_open, scheme) = (false, Scheme::Residue);
        Recheck { is_open, scheme, prover, sketches, rows, prompt, output }
    }

    #[test]
    fn one_wild_row_excuses_no_others() {
        let most = ResidueBits::U8.forged_energy();
        let rows = |wild: Option<f64>| [vec![Some(10.0); 31], vec![wild]].concat().into_iter();
        let mean = mean_capped(rows(Some(1e5)), most).unwrap();
        assert!((mean - (310.0 + most) / 32.0).abs() < 1e-9 && mean < 200.0, "{mean}");
        assert_eq!(mean_capped(rows(Some(10.0)), most), Some(10.0));
        assert_eq!(mean_capped(rows(None), most), None);
    }

    #[test]
    fn a_twin_that_rounds_nothing_away_divides_by_no_zero() {
        let recheck = recheck();
        let twin = recheck.beside(&recheck.rows, Dtype::Bf16);
        assert!(twin.iter().all(|apart| apart.unwrap().square() == 0.0));
        let scores = recheck.scores(&twin, 0.4);
        // An honest residue drops half a step at most.
        assert!(scores.len() == 3 && scores.iter().all(|x| (0.0..=0.25).contains(x)), "{scores:?}");
        assert_eq!(recheck.beta(&twin, &twin), None, "what moves nothing is no cheat's name");
        let far: Vec<Vec<u16>> = (7..10).map(row).collect();
        let moved = recheck.beside(&far, Dtype::Bf16);
        assert!(recheck.beta(&twin, &moved).unwrap().abs() < 0.1, "the control: it can be one");
    }

    #[test]
    fn rows_of_which_a_twin_overflows_count_for_nothing() {
        let recheck = recheck();
        let mut rows = recheck.rows.clone();
        rows[1][5] = Dtype::Bf16.round(f32::INFINITY);
        let twin = recheck.beside(&rows, Dtype::Bf16);
        assert_eq!(recheck.scores(&twin, 0.4).len(), 2);
        rows.iter_mut().for_each(|row| row[0] = Dtype::Bf16.round(f32::NAN));
        let twin = recheck.beside(&rows, Dtype::Bf16);
        assert_eq!((recheck.scores(&twin, 0.4), recheck.beta(&twin, &twin)), (vec![], None));
    }
}
