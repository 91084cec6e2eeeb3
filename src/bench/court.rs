//! Judging: every answer under every scheme, and what becomes of broken ones.

use super::attacks::Attack;
use super::malformed::{self, Variant};
use super::published;
use super::results::{Detector, Line, is_rejected};
use super::stats::Rate;
use super::trial::{Subject, Trial};
use crate::proof::Scheme;
use crate::verify::answer::Answer;
use crate::verify::proof::Asked;
use crate::verify::{Claim, Depth, Limits, Profile, Report, Verifier};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// A verifier that knows every question.
pub(super) struct Court(Verifier);

impl Court {
    /// With the model's true weights.
    pub(super) fn new(subject: &Subject, limits: Limits) -> Self {
        Self(Verifier {
            model: Arc::clone(&subject.model),
            identity: Arc::clone(&subject.identity),
            pool: subject.pool.clone(),
            limits,
            context_max: subject.engine.options().context_max,
        })
    }

    /// What answers are judged by.
    pub(super) fn limits(&self) -> &Limits {
        &self.0.limits
    }

    /// Verifies answers with their proofs.
    pub(super) fn proofs(&self, trials: &[Trial], scheme: Scheme, depth: Depth) -> Vec<Report> {
        trials.iter().map(|t| self.verify(t, &t.answer, Some(scheme), depth)).collect()
    }

    fn verify(
        &self,
        trial: &Trial,
        answer: &Answer,
        scheme: Option<Scheme>,
        depth: Depth,
    ) -> Report {
        let ask = &trial.ask;
        let asked = |scheme| Asked { scheme, nonce: Some(ask.nonce()), hotkey: ask.hotkey };
        let claim = Claim {
            request: &ask.request,
            seed: None,
            choice: 0,
            proof: scheme.map(asked),
            answer,
            end_is_implied: trial.end_is_implied,
        };
        let profile = if scheme.is_some() { Profile::Proof } else { Profile::Ranks };
        self.0.verify(&claim, profile, depth, ask.index as u64)
    }

    /// The lines of one scheme: hidden rows alone, and for `residue-v1` with margins as well.
    pub(super) fn lines(
        &self,
        (name, detector): (&str, Detector),
        scheme: Scheme,
        trials: &[Trial],
        reports: &[Report],
    ) -> Vec<Line> {
        let rows = Line::of_rows(name, detector, scheme, reports, self.limits());
        let mut lines = vec![rows];
        if scheme == Scheme::Residue {
            lines.push(Line::of_margins(name, detector, WITH_MARGIN, reports));
        }
        let bytes = bytes_per_token(trials);
        lines.iter_mut().for_each(|line| line.bytes_per_token = bytes);
        lines
    }

    /// The line of a check of every row.
    pub(super) fn slow_line(&self, attack: &Attack, trials: &[Trial], slow: &[Report]) -> Line {
        let line = Line::of_margins(attack.name, attack.detector, WITH_ALL_MARGINS, slow);
        Line { bytes_per_token: bytes_per_token(trials), ..line }
    }

    /// The subnet's rules on the same tokens, as published and with their holes mended.
    pub(super) fn rank_lines(&self, name: &str, detector: Detector, trials: &[Trial]) -> [Line; 2] {
        let reports: Vec<Report> =
            trials.iter().map(|t| self.verify(t, &t.answer, None, Depth::Slow)).collect();
        let mended = Line::new(name, detector, "targon-4.4, mended", &reports);
        let mut published = Line::bare(name, detector, "targon-4.4, published", mended.rejected);
        let judged = trials.iter().zip(&reports);
        let causes: Vec<&str> = judged.filter_map(|(t, r)| published::rejects(t, r)).collect();
        published.rejected = Rate::new(causes.len(), trials.len());
        for cause in causes {
            *published.reasons.entry(cause.to_owned()).or_insert(0) += 1;
        }
        [published, mended]
    }

    /// Every malformed variant of every answer: refused, or not.
    pub(super) fn malformed(&self, attack: &Attack, scheme: Scheme, trials: &[Trial]) -> Line {
        let (mut refused, mut of) = (0, 0);
        for trial in trials {
            for (name, variant) in malformed::variants() {
                of += 1;
                // A panic is what must not happen; here it counts as not refused.
                let outcome =
                    catch_unwind(AssertUnwindSafe(|| self.refuses(trial, scheme, &variant)));
                match outcome {
                    Ok(true) => refused += 1,
                    Ok(false) => tracing::warn!("{scheme}: {name} is not refused"),
                    Err(_) => tracing::warn!("{scheme}: {name} makes the verifier panic"),
                }
            }
        }
        let judge = if scheme == Scheme::Residue { WITH_MARGIN } else { scheme.name() };
        Line::bare(attack.name, attack.detector, judge, Rate::new(refused, of))
    }

    fn refuses(&self, trial: &Trial, scheme: Scheme, variant: &Variant) -> bool {
        match variant.apply(&trial.answer) {
            Ok(answer) => is_rejected(&self.verify(trial, &answer, Some(scheme), Depth::Fast)),
            Err(_) => true,
        }
    }
}

/// How lines with margins are judged.
pub(super) const WITH_MARGIN: &str = "residue-v1 + margin";
/// The same in a check of every row.
const WITH_ALL_MARGINS: &str = "residue-v1 + margin, all rows";

fn bytes_per_token(trials: &[Trial]) -> f64 {
    let bytes: usize = trials.iter().map(Trial::proof_bytes).sum();
    let tokens: usize = trials.iter().map(|t| t.answer.ids.len()).sum();
    bytes as f64 / tokens.max(1) as f64
}
