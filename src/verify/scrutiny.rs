//! Decides how closely answers are looked at: how many rows are scored, when rows are computed a
//! second time (`twin.rs`), whether known cheats are tried, and whether a check may stop early.

use super::limits::Limits;
use super::places::FastRows;
use super::report::Report;
use super::statistic::ROWS;
use super::{Reason, Verdict};
use crate::models::Model;
use crate::models::device::Device;
use crate::ops::philox::philox;
use crate::proof::Scheme;
use std::str::FromStr;

/// When an answer is worth a second prefill.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub enum TwinPolicy {
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
pub enum ScrutinyError {
    /// Not one of the words, and no share.
    #[error("must be never, suspicion, always, or a share between 0 and 1, got {0}")]
    Policy(String),
    /// Only the processor computes otherwise than by the canon.
    #[error("`--twin` and `--name-cheats` need weights on the processor, these are on {0}")]
    Device(Device),
    /// Recipes are run after the twin.
    #[error("`--name-cheats` needs the twin, and `--twin` says never")]
    Never,
}

impl FromStr for TwinPolicy {
    type Err = ScrutinyError;

    fn from_str(text: &str) -> Result<Self, ScrutinyError> {
        match (text, text.parse::<f64>()) {
            ("never", _) => Ok(Self::Never),
            ("suspicion", _) => Ok(Self::Suspicion),
            ("always", _) => Ok(Self::Always),
            (_, Ok(share)) if share > 0.0 && share < 1.0 => Ok(Self::Share(share)),
            _ => Err(ScrutinyError::Policy(text.to_owned())),
        }
    }
}

/// How closely answers are looked at.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Scrutiny {
    /// When the twin is run.
    pub twin: TwinPolicy,
    /// Whether a fast check of a proof stops after a random number of chunks, which the verifier
    /// draws after the answer, unless these leave it open what the answer is. What stands later is
    /// then not seen, its end included.
    pub stops_early: bool,
    /// Whether recipes are run where the twin says that an answer is too far. Each needs memory for
    /// the weights once more.
    pub names: bool,
    /// How many rows a fast check of a proof scores.
    pub rows: FastRows,
}

/// What a caller asks for, before it is known where the weights are.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct WantedScrutiny {
    /// When the twin is run; `None` is [`TwinPolicy::default`], if it can be run at all.
    pub twin: Option<TwinPolicy>,
    /// As in [`Scrutiny`].
    pub stops_early: bool,
    /// As in [`Scrutiny`].
    pub names: bool,
    /// As in [`Scrutiny`].
    pub rows: FastRows,
}

impl WantedScrutiny {
    /// One prefill, whatever it shows.
    pub const NOTHING: Self = Self {
        twin: Some(TwinPolicy::Never),
        stops_early: false,
        names: false,
        rows: FastRows::DEFAULT,
    };

    /// What is done with `model`.
    ///
    /// # Errors
    /// When it was asked for by name and cannot be done.
    pub fn on(self, model: &Model) -> Result<Scrutiny, ScrutinyError> {
        let Self { twin, stops_early, names, rows } = self;
        let is_asked = names || twin.is_some_and(|twin| twin != TwinPolicy::Never);
        if model.weights.cpu().is_none() {
            let device = model.weights.device();
            return match is_asked {
                true => Err(ScrutinyError::Device(device)),
                false => Ok(Scrutiny { stops_early, rows, ..Scrutiny::NONE }),
            };
        }
        let twin = twin.unwrap_or_default();
        match names && twin == TwinPolicy::Never {
            true => Err(ScrutinyError::Never),
            false => Ok(Scrutiny { twin, stops_early, names, rows }),
        }
    }
}

impl Scrutiny {
    /// None: one prefill, whatever it shows.
    pub const NONE: Self =
        Self { twin: TwinPolicy::Never, stops_early: false, names: false, rows: FastRows::DEFAULT };

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
        let is_over = || limits.statistic(scheme, report).is_some_and(|s| s.is_over());
        let drawn = || f64::from(philox(chance, [0, 3, 0, 0])[0]) / 2.0_f64.powi(32);
        let is_due = match self.twin {
            TwinPolicy::Never => false,
            TwinPolicy::Suspicion => is_over(),
            TwinPolicy::Share(share) => drawn() < share || is_over(),
            TwinPolicy::Always => true,
        };
        is_open && is_measurable && is_due
    }
}
