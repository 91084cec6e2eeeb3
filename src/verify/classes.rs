//! Finds the class a miner belongs to: the narrowest limits that all of its first answers keep.
//!
//! A class is a file of limits ([`super::limits_file`]): miners of one stack on one kind of
//! hardware. A cheat that errs no more than the honest members of a wide class passes as one of
//! them, so wide classes are given only to those that no narrower one fits; and whoever fits none
//! is no honest member of any.

use super::calibrate::HonestSample;
use super::limits::Limits;
use super::limits_file::LimitsFile;
use super::rows::check_margins;
use super::statistic::Statistic;
use super::{Report, Stop};
use std::cmp::Ordering;

/// How a class fits a miner.
#[derive(Clone, PartialEq, Debug)]
pub struct ClassFit<'a> {
    /// The limits file of the class.
    pub file: &'a LimitsFile,
    /// Number of the first answer, from 1 on, that breaks a limit of it, and which.
    pub broken: Option<(usize, String)>,
    /// At most this share of honest members has such an answer among as many: the upper 95 % bounds
    /// of one answer, of all rules together, times their number.
    pub missed: f64,
}

/// How each class fits a miner with these answers, the narrowest class first.
pub fn fits<'a>(files: &'a [LimitsFile], answers: &[HonestSample]) -> Vec<ClassFit<'a>> {
    let mut fits: Vec<ClassFit<'a>> = files
        .iter()
        .map(|file| {
            let mut numbered = (1..).zip(answers);
            let broken = numbered.find_map(|(n, answer)| Some((n, broken(answer, &file.limits)?)));
            let missed = (held_out(file) * answers.len() as f64).min(1.0);
            ClassFit { file, broken, missed }
        })
        .collect();
    fits.sort_by(|a, b| {
        let [a, b] = [a, b].map(|fit| width(&fit.file.limits));
        a.partial_cmp(&b).unwrap_or(Ordering::Equal)
    });
    fits
}

/// The bound of one answer: what rejects and what is only suspicious, as far as it was measured.
fn held_out(LimitsFile { held_out, .. }: &LimitsFile) -> f64 {
    let rules = [held_out.rejected, held_out.trimmed, held_out.twin];
    rules.iter().filter(|share| share.of > 0).map(|share| share.upper95).sum()
}

/// The class of the narrowest limits that nothing breaks.
pub fn narrowest<'f, 'a>(fits: &'f [ClassFit<'a>]) -> Option<&'f ClassFit<'a>> {
    fits.iter().find(|fit| fit.broken.is_none())
}

/// What makes limits wide, the most important first.
fn width(limits: &Limits) -> [f64; 4] {
    let [.., longest] = limits.trimmed_u8.0;
    let exact = if limits.exact { 0.0 } else { 1.0 };
    [exact, longest, limits.energy_u8, limits.margin]
}

/// The first limit that an answer breaks.
fn broken(answer: &HonestSample, limits: &Limits) -> Option<String> {
    let HonestSample { scheme, report, .. } = answer;
    let Report { chunks, rows, .. } = report;
    if let Some(chunk) = chunks.iter().find(|chunk| limits.is_over(*scheme, chunk)) {
        let (index, energy) = (chunk.index, chunk.energy.unwrap_or_default());
        return Some(match limits.chunk_energy(*scheme, chunk) {
            Some(limit) if !limits.exact => {
                format!("chunk {index} has energy {energy:.1}, at most {limit:.1}")
            }
            _ => format!("chunk {index} is not equal bit for bit"),
        });
    }
    let over = |what: &str, statistic: Option<Statistic>| {
        let Statistic { value, rows, limit } = statistic.filter(Statistic::is_over)?;
        Some(format!("{what} of {rows} rows is {value:.2}, at most {limit:.2}"))
    };
    over("the trimmed mean", limits.statistic(*scheme, report))
        .or_else(|| over("the twin's number", limits.twin_statistic(*scheme, report)))
        .or_else(|| match check_margins(rows, limits) {
            Ok(()) => None,
            Err(Stop::Rejected(rejection)) => Some(rejection.what),
            Err(Stop::Fault(why)) => Some(why),
        })
}
