//! A second computation of an answer's rows, in the arithmetic of an honest stack of 16 bits: how
//! far may an honest row be from ours, and in which direction would a cheat have moved it?
//!
//! The twin ([`Rounding::Everywhere`]) says for every row how much rounding moves it: by a factor
//! of ten more in one than in the next. So distances are measured in its units ([`scores`]), which
//! shows cheats that move rows no further than honest rounding moves others. A [`Recipe`] is a
//! third computation, by a cheat that is known: [`beta`] is how much of what it moves is found in
//! the proof, one where the prover does just that and about zero where it is honest.
//!
//! Each costs a prefill. Whether the twin is run is [`When`]'s to say; recipes are run only where
//! the twin says that an answer is too far, and name what it was. Without a name no answer is
//! rejected for this: a prompt unlike all that limits were measured on can be far by itself.

use super::check::Verifier;
use super::limits::Limits;
use super::prefill::{IsWanted, hidden_rows_while};
use super::report::{Named, Report};
use super::statistic::{ROWS, Statistic};
use super::{Reason, Rejection, Stop, Verdict};
use crate::models::Model;
use crate::models::cpu::decoder::Decoder;
use crate::models::departure::{Departure, RECIPES};
use crate::models::device::Device;
use crate::ops::dtype::Dtype;
use crate::ops::rounding::Rounding;
use crate::proof::Scheme;
use crate::proof::apart::Apart;
use crate::proof::commit::RowProver;
use crate::proof::philox::philox;
use crate::proof::residue::Sketch;
use std::str::FromStr;
use std::sync::Arc;

/// Least square that a row is measured in, in steps of a residue: where the twin rounds to the same
/// row, what a residue drops (a twelfth) is not a distance.
const SQUARE_MIN: f64 = 1.0;
/// A delta so near half of a residue's range may wrap to the other side, and says nothing.
const DELTA_MAX: f64 = 0.375;

/// When an answer is worth a second prefill.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub enum When {
    /// Never.
    Never,
    /// Where the first one finds it suspicious.
    #[default]
    Suspicion,
    /// There, and in a random share of all others.
    Share(f64),
    /// Always.
    Always,
}

/// Why answers cannot be looked at as closely as was asked for.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AskedError {
    /// Not one of the words, and no share.
    #[error("must be never, suspicion, always, or a share between 0 and 1, got {0}")]
    When(String),
    /// Only the processor computes otherwise than by the canon.
    #[error("`--twin` and `--name-cheats` need weights on the processor, these are on {0}")]
    Device(Device),
    /// Recipes are run after the twin.
    #[error("`--name-cheats` needs the twin, and `--twin` says never")]
    Never,
}

impl FromStr for When {
    type Err = AskedError;

    fn from_str(text: &str) -> Result<Self, AskedError> {
        match (text, text.parse::<f64>()) {
            ("never", _) => Ok(Self::Never),
            ("suspicion", _) => Ok(Self::Suspicion),
            ("always", _) => Ok(Self::Always),
            (_, Ok(share)) if share > 0.0 && share < 1.0 => Ok(Self::Share(share)),
            _ => Err(AskedError::When(text.to_owned())),
        }
    }
}

/// How closely answers are looked at.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Scrutiny {
    /// When the twin is run.
    pub twin: When,
    /// Whether recipes are run where the twin says that an answer is too far. Each needs memory for
    /// the weights once more.
    pub names: bool,
}

/// What a caller asks for, before it is known where the weights are.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct WantedScrutiny {
    /// When the twin is run; [`When::default`] where absent, if it can be run at all.
    pub twin: Option<When>,
    /// As in [`Scrutiny`].
    pub names: bool,
}

impl WantedScrutiny {
    /// One prefill, whatever it shows.
    pub const NOTHING: Self = Self { twin: Some(When::Never), names: false };

    /// What is done with `model`.
    ///
    /// # Errors
    /// When it was asked for by name and cannot be done.
    pub fn on(self, model: &Model) -> Result<Scrutiny, AskedError> {
        let Self { twin, names } = self;
        let is_asked = names || twin.is_some_and(|twin| twin != When::Never);
        if model.weights.cpu().is_none() {
            let device = model.weights.device();
            return match is_asked {
                true => Err(AskedError::Device(device)),
                false => Ok(Scrutiny::NONE),
            };
        }
        let twin = twin.unwrap_or_default();
        match names && twin == When::Never {
            true => Err(AskedError::Never),
            false => Ok(Scrutiny { twin, names }),
        }
    }
}

impl Scrutiny {
    /// None: one prefill, whatever it shows.
    pub const NONE: Self = Self { twin: When::Never, names: false };

    /// Whether what was found asks for a second prefill; `chance` is the verifier's.
    pub(super) fn wants(
        &self,
        report: &Report,
        scheme: Scheme,
        limits: &Limits,
        chance: u64,
    ) -> bool {
        let is_open = match &report.verdict {
            Verdict::Pass => true,
            // What it was may still be said.
            Verdict::Reject(why) => self.names && why.reason == Reason::SketchEnergy,
            Verdict::Unscored(_) => false,
        };
        let is_measurable = report.energies.len() >= ROWS[0] && limits.twin(scheme).is_some();
        let is_over = || report.statistic(scheme, limits).is_some_and(|s| s.is_over());
        let drawn = || f64::from(philox(chance, [0, 3, 0, 0])[0]) / 2.0_f64.powi(32);
        let is_due = match self.twin {
            When::Never => false,
            When::Suspicion => is_over(),
            When::Share(share) => drawn() < share || is_over(),
            When::Always => true,
        };
        is_open && is_measurable && is_due
    }
}

/// An answer that is looked at again, with our own rows.
pub(super) struct Suspect {
    /// The proof's scheme.
    pub(super) scheme: Scheme,
    /// The keys of its sketches.
    pub(super) prover: RowProver,
    /// Sketches of its rows, in order; none in chunks that are equal bit for bit.
    pub(super) sketches: Vec<Option<Sketch>>,
    /// Our rows.
    pub(super) rows: Vec<Vec<u16>>,
    /// The tokens that it answers to.
    pub(super) prompt: Vec<u32>,
    /// Its own.
    pub(super) output: Vec<u32>,
}

impl Suspect {
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
    /// the twin went. Rows of which the twin is no number have none.
    fn scores(&self, twin: &[Option<Apart>], share: f64) -> Vec<f64> {
        let score = |(_, apart, sketch): (usize, &Apart, &Sketch)| {
            let squares = apart.residuals(sketch, share).map(|r| r * r);
            let count = apart.deltas().len() as f64;
            squares.sum::<f64>() / count / apart.square().max(SQUARE_MIN)
        };
        self.counted(twin).map(score).collect()
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

/// Looks at answers again; what is found goes into their reports. What cannot be computed is a
/// fault of ours, and leaves a report as it was.
pub(super) fn look(
    verifier: &Verifier,
    is_wanted: &IsWanted<'_>,
    suspects: &[(usize, Suspect)],
    reports: &mut [Report],
) {
    let faulty = |stop: Stop| match stop {
        Stop::Fault(why) => why,
        Stop::Rejected(why) => why.to_string(),
    };
    if let Err(stop) = try_look(verifier, is_wanted, suspects, reports) {
        tracing::warn!("suspicious answers cannot be computed again: {}", faulty(stop));
    }
}

fn try_look(
    verifier: &Verifier,
    is_wanted: &IsWanted<'_>,
    suspects: &[(usize, Suspect)],
    reports: &mut [Report],
) -> Result<(), Stop> {
    let Verifier { model, pool, limits, scrutiny, .. } = verifier;
    let rerun = |decoder: &Arc<Decoder>, departure: Departure, suspect: &Suspect| {
        let pass = |blocks| Model::departing(decoder, departure, (pool, blocks));
        let rows = hidden_rows_while(is_wanted, pass, &suspect.prompt, &suspect.output)?;
        Ok::<_, Stop>(suspect.beside(&rows, model.dtype))
    };
    let own = model.weights.cpu().ok_or_else(|| {
        Stop::Fault(format!("the weights are on {}, not the processor", model.weights.device()))
    })?;
    let stepwise =
        Departure { rounding: Rounding::Everywhere(model.dtype), ..Departure::default() };
    let mut named: Vec<(usize, &Suspect, Vec<Option<Apart>>)> = Vec::new();
    for (place, suspect) in suspects {
        let twin = rerun(own, stepwise, suspect)?;
        let report = &mut reports[*place];
        report.twin = suspect.scores(&twin, limits.shrink);
        let is_over = report.twin_statistic(suspect.scheme, limits).is_some_and(|s| s.is_over());
        if scrutiny.names && is_over {
            named.push((*place, suspect, twin));
        }
    }
    for recipe in RECIPES.iter().filter(|_| !named.is_empty()) {
        let fault = |e| Stop::Fault(format!("{}: {e}", recipe.name));
        let decoder = model.coarse(recipe, pool).map_err(fault)?;
        for (place, suspect, twin) in &named {
            let moved = rerun(&decoder, recipe.departure, suspect)?;
            let beta = suspect.beta(twin, &moved);
            reports[*place].named.extend(beta.map(|beta| Named { name: recipe.name, beta }));
        }
    }
    for (place, suspect, _) in named {
        conclude(&mut reports[place], suspect.scheme, limits);
    }
    Ok(())
}

/// Rejects what is too far and has a name.
fn conclude(report: &mut Report, scheme: Scheme, limits: &Limits) {
    report.named.sort_by(|a, b| b.beta.total_cmp(&a.beta));
    let Some(statistic) = report.twin_statistic(scheme, limits) else { return };
    let Some(named) = report.named.first().filter(|named| named.beta >= limits.beta) else {
        return;
    };
    let Statistic { value, rows, limit } = statistic;
    if report.verdict == Verdict::Pass {
        let what = format!(
            "{rows} rows are {value:.2} times as far as rounding moves them, at most {limit:.2}: \
             {}, beta {:.2}",
            named.name, named.beta
        );
        report.verdict = Verdict::Reject(Rejection::new(Reason::SketchEnergy, what));
    }
}
