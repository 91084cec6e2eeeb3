//! Applies the rules of one row, beyond its sampling parameters: penalties, bias, banned ids and a
//! grammar's mask.

use super::sampler::Sampling;
use llguidance::toktrie::SimpleVob;
use std::collections::HashMap;
use std::sync::Arc;

/// How often tokens were seen, for penalties.
#[derive(Clone, Default, Debug)]
pub struct Seen {
    counts: HashMap<u32, u32>, // by token: times generated; 0 for prompt tokens
}

impl Seen {
    /// The tokens of a prompt; empty when `sampling` does not penalise.
    pub fn new(sampling: &Sampling, prompt: &[u32]) -> Self {
        let counted: &[u32] = if sampling.has_penalties() { prompt } else { &[] };
        Self { counts: counted.iter().map(|id| (*id, 0)).collect() }
    }

    /// Counts a generated token.
    pub fn push(&mut self, sampling: &Sampling, id: u32) {
        if sampling.has_penalties() {
            *self.counts.entry(id).or_insert(0) += 1;
        }
    }
}

/// What holds for one row, besides its request's [`Sampling`].
#[derive(Clone, Default)]
pub struct RowRules {
    /// The tokens so far.
    pub seen: Arc<Seen>,
    /// Ids that may not be drawn.
    pub banned: Vec<u32>,
    /// The ids that a grammar allows; all where there is none.
    pub allowed: Option<SimpleVob>,
}

impl RowRules {
    /// Whether [`process`](Self::process) leaves a row as it is.
    pub fn keep_logits(&self, sampling: &Sampling) -> bool {
        self.banned.is_empty() && sampling.logit_bias.is_empty() && !sampling.has_penalties()
    }

    /// Applies bias, bans and penalties to a row of logits, in place.
    pub fn process(&self, row: &mut [f32], sampling: &Sampling) {
        for (id, bias) in &sampling.logit_bias {
            row[*id as usize] += bias;
        }
        for id in &self.banned {
            row[*id as usize] = f32::NEG_INFINITY;
        }
        if !sampling.has_penalties() {
            return;
        }
        for (id, count) in &self.seen.counts {
            let logit = &mut row[*id as usize];
            let r = sampling.repetition_penalty;
            *logit = if *logit > 0.0 { *logit / r } else { *logit * r };
            if *count > 0 {
                *logit -= sampling.frequency_penalty * *count as f32 + sampling.presence_penalty;
            }
        }
    }

    /// The row with everything that the grammar rules out at minus infinity; `None` when there is
    /// no grammar.
    pub fn restrict(&self, row: &[f32]) -> Option<Vec<f32>> {
        let allowed = self.allowed.as_ref()?;
        let mut kept = vec![f32::NEG_INFINITY; row.len()];
        for id in allowed.iter().map(|id| id as usize).filter(|id| *id < row.len()) {
            kept[id] = row[id];
        }
        Some(kept)
    }
}

#[cfg(test)]
mod tests {
    use super::super::sampler::Distribution;
    use super::*;
    use crate::ops::lanes::Isa;

    #[test]
    fn penalties_bias_and_bans_change_the_winner() {
        let x = [2.0_f32, 1.9, 1.0];
        let pick = |s: &Sampling, seen: &Seen, banned: &[u32]| {
            let mut row = x.to_vec();
            let (seen, banned) = (Arc::new(seen.clone()), banned.to_vec());
            RowRules { seen, banned, allowed: None }.process(&mut row, s);
            Distribution::new(Isa::best(), &row, s).draw(s, 0)
        };
        let plain = Sampling::greedy();
        assert_eq!(pick(&plain, &Seen::default(), &[]), 0);
        assert_eq!(pick(&plain, &Seen::default(), &[0]), 1);
        let biased = Sampling { logit_bias: vec![(2, 5.0)], ..plain.clone() };
        assert_eq!(pick(&biased, &Seen::default(), &[]), 2);
        let repetition = Sampling { repetition_penalty: 1.2, ..plain.clone() };
        assert_eq!(pick(&repetition, &Seen::new(&repetition, &[0]), &[]), 1);
        let presence = Sampling { presence_penalty: 0.2, ..plain };
        let mut seen = Seen::new(&presence, &[0]);
        assert_eq!(pick(&presence, &seen, &[]), 0, "a prompt token was not generated");
        seen.push(&presence, 0);
        assert_eq!(pick(&presence, &seen, &[]), 1);
    }
}
