//! Defines a checked answer with all that `verify` shows of it. The text and the HTML page are made
//! of the same values.

use super::printable::printable;
use crate::models::text::Text;
use crate::proof::CHUNK_ROWS;
use crate::verify::capture::CheckedChoice;
use crate::verify::evidence::{ALARM, Evidence, Sums};
use crate::verify::statistic::Statistic;
use crate::verify::{ChunkEvidence, Limits, Profile, Verdict};
use serde_json::{Value, json};

/// Known cheats that are shown of an answer.
const NAMED_MAX: usize = 3;

/// What many answers of one miner say, with this one.
pub(super) struct Tally {
    pub(super) miner: String,
    pub(super) evidence: Evidence,
    /// What this answer added.
    pub(super) gain: Sums,
}

/// A checked answer with all there is to say of it.
pub(super) struct CheckedAnswer<'a> {
    pub(super) place: &'a str,
    pub(super) checked: &'a CheckedChoice,
    pub(super) tally: Option<&'a Tally>,
    pub(super) model: &'a Text,
    pub(super) limits: &'a Limits,
}

impl CheckedAnswer<'_> {
    pub(super) fn tokens(&self) -> usize {
        self.checked.answer.as_ref().map_or(0, |a| a.ids.len())
    }

    /// Which rules checked, and what of the proof is equal.
    pub(super) fn rules(&self) -> String {
        let chunks = &self.checked.report.chunks;
        let exact = chunks.iter().filter(|c| c.is_exact).count();
        match self.checked.profile {
            rules @ (Profile::Powv | Profile::Ranks) => rules.name().to_owned(),
            Profile::Proof => match &self.checked.report.other_canon {
                Some(canon) => format!(
                    "{} chunks of {}, whose rows were compared by energy and not bit for bit, \
                     because this device computes none of that canon",
                    chunks.len(),
                    printable(canon)
                ),
                None => format!("{exact} of {} chunks equal bit for bit", chunks.len()),
            },
        }
    }

    /// The chunk that a token belongs to.
    pub(super) fn chunk(&self, index: usize) -> Option<&ChunkEvidence> {
        self.checked.report.chunks.get(index / CHUNK_ROWS)
    }

    /// Whether a chunk is too far from ours.
    pub(super) fn is_far(&self, chunk: &ChunkEvidence) -> bool {
        self.checked.scheme.is_some_and(|scheme| self.limits.is_over(scheme, chunk))
    }

    /// What the rows say together.
    pub(super) fn statistic(&self) -> Option<Statistic> {
        self.limits.statistic(self.checked.scheme?, &self.checked.report)
    }

    /// The same in units of what rounding moves them by.
    pub(super) fn twin(&self) -> Option<Statistic> {
        self.limits.twin_statistic(self.checked.scheme?, &self.checked.report)
    }

    /// How near the rows are to ours, in lines.
    pub(super) fn closeness(&self) -> Vec<String> {
        let describe = |what: &str, statistic: Statistic| {
            let Statistic { value, rows, limit } = statistic;
            let mark = if statistic.is_over() { ": suspicious" } else { "" };
            format!("{what} of {rows} rows {value:.2}, usual up to {limit:.2}{mark}")
        };
        let energy = self.statistic().map(|s| describe("energy", s));
        let twin = self.twin().map(|s| describe("distance in units of rounding", s));
        let named = &self.checked.report.named;
        let likeliest = named.iter().take(NAMED_MAX);
        let likeliest = likeliest.map(|n| format!("{}, beta {:.2}", n.name, n.beta));
        let likeliest = likeliest.collect::<Vec<_>>().join("; ");
        let names = (!named.is_empty()).then(|| format!("likeliest: {likeliest}"));
        [energy, self.explained(), twin, names].into_iter().flatten().collect()
    }

    /// The chunks that are further than usual because rounding moves their rows that far.
    fn explained(&self) -> Option<String> {
        let usual = self.limits.energy(self.checked.scheme?)?;
        let is_explained = |c: &&ChunkEvidence| {
            !c.is_exact && c.energy.is_some_and(|e| e > c.limit(usual)) && !self.is_far(c)
        };
        let mut explained = self.checked.report.chunks.iter().filter(is_explained);
        let ChunkEvidence { index, energy, rounding, .. } = explained.next()?;
        let others = match explained.count() {
            0 => String::new(),
            count => format!("; so it is in {count} more"),
        };
        let (energy, rounding) = (number(*energy), number(*rounding));
        Some(format!(
            "chunk {index} has energy {energy}: rounding alone gives it {rounding}{others}"
        ))
    }

    /// Whether a token is too far from being drawn.
    pub(super) fn is_unlikely(&self, margin: Option<f64>) -> bool {
        margin.is_some_and(|m| m > self.limits.margin_max())
    }

    /// Energy of a token's chunk, in words.
    pub(super) fn energy(&self, index: usize) -> String {
        match self.chunk(index) {
            Some(c) if c.is_exact => "exact".to_owned(),
            Some(c) => number(c.energy),
            None => number(None),
        }
    }
}

impl Tally {
    /// One line for people.
    pub(super) fn describe(&self) -> String {
        let Self { miner, evidence: Evidence { answers, sums, .. }, .. } = self;
        let Sums { margin, energy, joint } = sums;
        let alarm = match self.evidence.alarm() {
            Some(test) => format!(" ALARM by {test}"),
            None => String::new(),
        };
        format!(
            "evidence on {miner} after {answers} answers: margin {margin:.1}, energy {energy:.1}, \
             joint {joint:.1} of {ALARM:.1}{alarm}"
        )
    }

    pub(super) fn json(&self) -> Value {
        let Self { miner, evidence, gain } = self;
        json!({
            "miner": miner, "answers": evidence.answers, "alarms": evidence.alarms,
            "sums": evidence.sums, "gain": gain, "threshold": ALARM,
            "alarm": evidence.alarm().map(|test| test.to_string()),
        })
    }
}

pub(super) fn number(value: Option<f64>) -> String {
    value.map_or("-".into(), |v| format!("{v:.4}"))
}

/// Name and words of a verdict other than a pass.
pub(super) fn reason(verdict: &Verdict) -> Option<(&'static str, String)> {
    match verdict {
        Verdict::Reject(r) => Some((r.reason.name(), r.what.clone())),
        Verdict::Unscored(why) => Some(("UNSCORED", why.clone())),
        Verdict::Pass => None,
    }
}
