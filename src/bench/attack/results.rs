//! Holds what the attack bench found as plain data, as it is printed, stored and drawn.

use crate::bench::stats::{Rate, Stopping, quantile};
use crate::proof::{CHUNK_ROWS, Scheme};
use crate::verify::evidence::{Calibrated, Evidence, Observed};
use crate::verify::statistic::{ByRows, Statistic};
use crate::verify::{Limits, Report, Verdict, proof};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

/// Chunks of the longest answers that are looked at one by one.
pub const CHUNKS: usize = 8;

/// What a run of the attacks measured, as it is written to `attack.json`.
#[derive(Clone, Serialize, Debug)]
pub struct Results {
    /// Name of the model under attack.
    pub model: String,
    /// The limits that every line was checked by.
    pub limits: String,
    /// Attacked prompts, and tokens of each of their answers.
    pub attacked: (usize, usize),
    /// Prompts of honest answers, none of them attacked, and tokens of each answer.
    pub honest: (usize, usize),
    /// One for each attack and way to check.
    pub lines: Vec<Line>,
    /// Evidence that grows with tokens.
    pub tokens: Vec<Tokens>,
    /// Each goal, and what was measured for it.
    pub goals: Vec<GoalOutcome>,
}

/// What should show an attack.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Debug)]
#[serde(rename_all = "snake_case")]
pub enum Detector {
    /// Nothing: the answer is honest.
    Nothing,
    /// Hidden rows that differ somewhat.
    Energy,
    /// Tokens that the sampler would not have drawn.
    Margin,
    /// Rules about roots, chains, ends and encodings, or residues that are mere noise.
    Binding,
}

/// How one kind of answers fared under one way to check.
#[derive(Clone, Serialize, Debug)]
pub struct Line {
    /// The attack's name; `honest` stands for no attack.
    pub name: String,
    /// What should show it.
    pub detector: Detector,
    /// How it was checked.
    pub check: String,
    /// Bytes of the proof.
    pub bytes_per_token: f64,
    /// Answers that were rejected: wrongly (the false-positive rate) where they are honest.
    pub rejected: Rate,
    /// Answers that could not be checked; they count as not rejected.
    pub unscored: usize,
    /// The reasons of rejections.
    pub reasons: BTreeMap<String, usize>,
    /// Answers not rejected by their first 1 to 8 chunks alone: the false-negative rate.
    pub missed: Option<Vec<Rate>>,
    /// Chunks needed: median and 95th percentile of answers; `None` where all are not enough.
    pub chunks_needed: Option<[Option<usize>; 2]>,
    /// Median and extremes of what is held against the limit: the energy of a chunk, or the
    /// statistic of an answer.
    pub energy: Option<[f64; 3]>,
    /// The energies of every answer's chunks, rounded: what other limits would have caught.
    pub energies: Vec<Vec<f64>>,
    /// Chunks that are equal bit for bit.
    pub exact: Option<Rate>,
    /// Mean margin of the tokens that were looked at.
    pub margin: Option<f64>,
}

/// How many tokens one attack on the sampler survives.
#[derive(Clone, Serialize, Debug)]
pub struct Tokens {
    /// The name of the attack in the list of attacks.
    pub name: String,
    /// Tokens that are not the ones that the verifier draws.
    pub mismatch: Rate,
    /// Mean margin, each clipped at one.
    pub margin: f64,
    /// Until one margin is above the limit.
    pub single: Stopping,
    /// Until the evidence of whole answers is an alarm, as `verify --evidence` weighs it
    /// ([`crate::verify::evidence`]).
    pub sequential: Stopping,
    /// Until either does.
    pub either: Stopping,
    /// Until the first token that is not the one drawn: enough against a miner on this engine.
    pub exact: Stopping,
}

/// A goal and what became of it.
#[derive(Clone, Serialize, Debug)]
pub struct GoalOutcome {
    /// What had to be reached, in words.
    pub goal: String,
    /// What was measured.
    pub measured: String,
    /// Whether that is enough.
    pub is_met: bool,
}

/// The shares that are rejected and the goals, for a terminal without tables.
impl fmt::Display for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Line { name, check, rejected, .. } in &self.lines {
            let rejected = format!("{}/{}", rejected.count, rejected.of);
            writeln!(f, "{name:36} {check:32} {rejected:>9}")?;
        }
        for (place, GoalOutcome { goal, measured, is_met }) in self.goals.iter().enumerate() {
            let end = if place > 0 { "\n" } else { "" };
            write!(f, "{end}{:7} {goal}: {measured}", if *is_met { "met" } else { "missed" })?;
        }
        Ok(())
    }
}

impl Line {
    /// A line with the verdicts alone.
    pub(super) fn new(name: &str, detector: Detector, check: &str, reports: &[Report]) -> Self {
        let mut reasons = BTreeMap::new();
        for report in reports {
            if let Verdict::Reject(rejection) = &report.verdict {
                *reasons.entry(rejection.reason.name().to_owned()).or_insert(0) += 1;
            }
        }
        let is_unscored = |r: &&Report| matches!(r.verdict, Verdict::Unscored(_));
        let unscored = reports.iter().filter(is_unscored).count();
        let rejected = Rate::of(reports, is_rejected);
        Self { unscored, reasons, ..Self::bare(name, detector, check, rejected) }
    }

    /// A line of which only one number is known.
    pub(super) fn bare(name: &str, detector: Detector, check: &str, rejected: Rate) -> Self {
        Self {
            name: name.into(),
            detector,
            check: check.into(),
            bytes_per_token: 0.0,
            rejected,
            unscored: 0,
            reasons: BTreeMap::new(),
            missed: None,
            chunks_needed: None,
            energy: None,
            energies: Vec::new(),
            exact: None,
            margin: None,
        }
    }

    /// Checked by hidden rows alone, chunk by chunk.
    pub(super) fn of_rows(
        name: &str,
        detector: Detector,
        scheme: Scheme,
        reports: &[Report],
        limits: &Limits,
    ) -> Self {
        let fails = |r: &Report, n| fails_by(r, n, scheme, limits);
        let missed = (1..=CHUNKS).map(|n| Rate::of(reports, |r| !fails(r, n))).collect();
        let needed = |r: &Report| (1..=CHUNKS).find(|n| fails(r, *n)).unwrap_or(usize::MAX);
        let mut needed: Vec<usize> = reports.iter().map(needed).collect();
        needed.sort_unstable();
        let at = |q| quantile(&needed, q).filter(|n| *n < usize::MAX);
        let chunks = || reports.iter().flat_map(|r| &r.chunks);
        let exact = Rate::new(chunks().filter(|c| c.is_exact).count(), chunks().count());
        let rejected = Rate::of(reports, |r| fails(r, usize::MAX));
        Self {
            missed: (detector != Detector::Nothing).then_some(missed),
            chunks_needed: (detector != Detector::Nothing).then(|| [at(0.5), at(0.95)]),
            energy: median_and_extremes(chunks().filter_map(|c| c.energy).collect()),
            energies: reports.iter().map(energies_of).collect(),
            exact: (exact.of > 0).then_some(exact),
            rejected,
            reasons: BTreeMap::new(),
            ..Self::new(name, detector, scheme.name(), reports)
        }
    }

    /// Checked by what all rows say together, which rejects nobody by itself. Answers that were
    /// rejected before it was computed do not count.
    pub(super) fn of_statistic(
        (name, check): (&str, &str),
        detector: Detector,
        reports: &[Report],
        (values, limits): (fn(&Report) -> &[f64], &ByRows),
    ) -> Self {
        let is_known = |r: &&Report| !(values(r).is_empty() && is_rejected(r));
        let reports: Vec<&Report> = reports.iter().filter(is_known).collect();
        let is_over = |report: &Report, count: usize| {
            let values = values(report);
            let first = &values[..values.len().min(count.saturating_mul(CHUNK_ROWS))];
            Statistic::of(first, limits).is_some_and(|statistic| statistic.is_over())
        };
        let missed = (1..=CHUNKS).map(|n| Rate::of(&reports, |r| !is_over(r, n))).collect();
        let suspected = Rate::of(&reports, |r| is_over(r, usize::MAX));
        let statistic = |r: &&Report| Statistic::of(values(r), limits).map(|s| s.value);
        Self {
            energy: median_and_extremes(reports.iter().filter_map(statistic).collect()),
            missed: (detector != Detector::Nothing && !reports.is_empty()).then_some(missed),
            ..Self::bare(name, detector, check, suspected)
        }
    }

    /// Checked by hidden rows and margins.
    pub(super) fn of_margins(
        name: &str,
        detector: Detector,
        check: &str,
        reports: &[Report],
    ) -> Self {
        let margins: Vec<f64> =
            reports.iter().flat_map(|r| &r.rows).filter_map(|r| r.margin).collect();
        let mean = margins.iter().sum::<f64>() / margins.len().max(1) as f64;
        Self {
            margin: (!margins.is_empty()).then_some(mean),
            ..Self::new(name, detector, check, reports)
        }
    }
}

/// The median, the least and the largest; nothing of nothing.
fn median_and_extremes(mut values: Vec<f64>) -> Option<[f64; 3]> {
    values.sort_by(f64::total_cmp);
    let at = |q| quantile(&values, q);
    Some([at(0.5)?, at(0.0)?, at(1.0)?])
}

fn energies_of(report: &Report) -> Vec<f64> {
    report.chunks.iter().filter_map(|c| c.energy).map(|e| (e * 10.0).round() / 10.0).collect()
}

pub(super) fn is_rejected(report: &Report) -> bool {
    matches!(report.verdict, Verdict::Reject(_))
}

/// Whether the first `count` chunks speak against an answer. One that was rejected before its rows
/// were looked at was so from the start.
fn fails_by(report: &Report, count: usize, scheme: Scheme, limits: &Limits) -> bool {
    let chunks = &report.chunks[..count.min(report.chunks.len())];
    match chunks.is_empty() {
        true => is_rejected(report),
        false => proof::check(chunks, scheme, limits).is_err(),
    }
}

impl Tokens {
    /// From the reports of checks of every row of answers proved in `scheme`.
    pub(super) fn new(
        name: &str,
        reports: &[Report],
        scheme: Scheme,
        limits: &Limits,
        rates: &Calibrated,
    ) -> Self {
        let margins = |r: &Report| r.rows.iter().filter_map(|r| r.margin).collect::<Vec<f64>>();
        let answers: Vec<Vec<f64>> = reports.iter().map(margins).collect();
        let lengths: Vec<usize> = answers.iter().map(Vec::len).collect();
        let all: Vec<f64> = answers.concat();
        let drawn: Vec<bool> =
            reports.iter().flat_map(|r| &r.rows).filter_map(|r| r.is_drawn).collect();
        let observed = |(place, report): (usize, &Report)| {
            Observed::of(report, Some(scheme), limits).thinned(place as u64)
        };
        let observed: Vec<Observed> = reports.iter().enumerate().map(observed).collect();
        // Evidence is weighed once an answer is whole.
        let sequential = || {
            let (mut evidence, observed, lengths) = (Evidence::default(), &observed, &lengths);
            move |answer: usize| {
                evidence.add(rates, &observed[answer]);
                evidence.alarm().map(|_| lengths[answer])
            }
        };
        let over = |margin: &f64| *margin > limits.margin;
        let single = |answer: usize| answers[answer].iter().position(over).map(|at| at + 1);
        let exact = |answer: usize| {
            let mut drawn = reports[answer].rows.iter().filter_map(|r| r.is_drawn);
            drawn.position(|is_drawn| !is_drawn).map(|at| at + 1)
        };
        Self {
            name: name.into(),
            mismatch: Rate::of(&drawn, |is_drawn| !is_drawn),
            margin: all.iter().sum::<f64>() / all.len().max(1) as f64,
            single: Stopping::new(&lengths, || single),
            sequential: Stopping::new(&lengths, sequential),
            either: Stopping::new(&lengths, || {
                let mut weighs = sequential();
                move |answer| {
                    let whole = weighs(answer);
                    single(answer).or(whole)
                }
            }),
            exact: Stopping::new(&lengths, || exact),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::ChunkEvidence;
    use crate::verify::RowEvidence;
    use crate::verify::{Reason, Rejection};

    fn report(verdict: Verdict, energies: &[f64]) -> Report {
        let chunk = |(index, energy): (usize, &f64)| ChunkEvidence {
            index,
            rows: CHUNK_ROWS,
            is_exact: *energy == 0.0,
            energy: Some(*energy),
            ..ChunkEvidence::default()
        };
        let chunks = energies.iter().enumerate().map(chunk).collect();
        Report { chunks, ..Report::bare(verdict) }
    }

    #[test]
    fn chunks_are_counted_from_the_first() {
        let reject = || Verdict::Reject(Rejection::new(Reason::SketchEnergy, "far"));
        let (far, near) = (1e4, 0.0);
        let reports = [
            report(reject(), &[far, near]),
            report(reject(), &[near, near, far]),
            report(reject(), &[]),
            report(Verdict::Pass, &[near; 8]),
            report(Verdict::Unscored("broken".into()), &[]),
        ];
        let limits = Limits::default();
        let line = Line::of_rows("x", Detector::Energy, Scheme::Residue, &reports, &limits);
        let missed: Vec<usize> = line.missed.unwrap().iter().map(|r| r.count).collect();
        assert_eq!(missed, [3, 3, 2, 2, 2, 2, 2, 2]);
        assert_eq!((line.rejected.count, line.rejected.of), (3, 5));
        assert_eq!(line.chunks_needed, Some([Some(3), None]));
        assert_eq!(line.energy, Some([0.0, 0.0, 1e4]));
        assert_eq!(line.exact.map(|r| (r.count, r.of)), Some((11, 13)));
        let line = Line::new("x", Detector::Energy, "all", &reports);
        assert_eq!((line.unscored, line.reasons["SKETCH_ENERGY"]), (1, 3));
    }

    #[test]
    fn a_statistic_is_that_of_an_answer() {
        let values = |value: f64, rows: usize| Report {
            energies: vec![value; rows],
            ..Report::bare(Verdict::Pass)
        };
        let rejected = || {
            let rejection = Rejection::new(Reason::SketchEnergy, "far");
            Report::bare(Verdict::Reject(rejection))
        };
        let reports = [values(3.0, 256), values(2.0, 128), values(9.0, 7), rejected()];
        let by_rows = ByRows([5.0, 5.0, 5.0, 5.0, 1.0]);
        let of = |r: &[Report]| {
            Line::of_statistic(("x", "y"), Detector::Energy, r, (|r| &r.energies, &by_rows))
        };
        let line = of(&reports);
        assert_eq!(line.energy, Some([3.0, 2.0, 3.0]), "seven rows have none");
        assert_eq!((line.rejected.count, line.rejected.of), (1, 3));
        let missed: Vec<usize> = line.missed.unwrap().iter().map(|r| r.count).collect();
        assert_eq!(missed, [3, 3, 3, 3, 3, 3, 3, 2], "the limit of 256 rows is less");
        assert_eq!(of(&[]).energy, None);
        let line = of(&[rejected()]);
        assert_eq!((line.rejected.of, line.missed), (0, None), "none was computed");
        // Equal bits have no distance, and count as near.
        assert_eq!(of(&[values(0.0, 0)]).rejected.of, 1);
    }

    #[test]
    fn evidence_is_that_of_the_verifier() {
        let row = |(index, margin): (usize, &f64)| RowEvidence {
            index,
            token: 0,
            rank: 1,
            logprob: -0.5,
            reported: None,
            end_rank: None,
            margin: Some(*margin),
            is_drawn: Some(*margin == 0.0),
            top_error: None,
        };
        let report = |margins: &[f64]| Report {
            rows: margins.iter().enumerate().map(row).collect(),
            ..Report::bare(Verdict::Pass)
        };
        let tokens = |margins: &[f64]| {
            let reports = vec![report(margins); 20];
            let (limits, rates) = (Limits::default(), Calibrated::default());
            Tokens::new("x", &reports, Scheme::Residue, &limits, &rates)
        };
        // No margin is over the limit, so only whole answers show it: each adds at most a quarter
        // of an alarm, so that the fifth is the first that can raise one.
        let cheat = tokens(&[0.4; 16]);
        assert_eq!((cheat.single.median, cheat.exact.median), (None, Some(1)));
        assert_eq!(cheat.sequential.median, Some(5 * 16));
        assert_eq!(cheat.either.p95, cheat.sequential.p95);
        let honest = tokens(&[0.0; 16]);
        assert_eq!((honest.sequential.median, honest.exact.median), (None, None));
        let bold = tokens(&[0.0, 0.0, 0.9, 0.0]);
        assert_eq!((bold.single.median, bold.either.median), (Some(3), Some(3)));
    }
}
