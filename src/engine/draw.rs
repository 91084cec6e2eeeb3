//! What may be drawn at each step of an output: penalties, bias, bans and grammar, as they follow
//! from the tokens so far. The engine draws by it; a verifier replays it.

use super::request::Request;
use super::sampler::{Sampling, Seen, process};
use crate::models::Model;
use crate::models::grammar::{Grammar, GrammarError};
use llguidance::toktrie::SimpleVob;
use parking_lot::Mutex;

/// The state of one output between two draws.
pub struct Draw {
    seen: Seen,
    end_ids: Vec<u32>,
    generated: usize,
    grammar: Option<Mutex<Grammar>>, // locked by the row that is reduced, then by the owner
}

/// What holds for one row.
pub struct Rules {
    allowed: Option<SimpleVob>,
    banned: Vec<u32>,
}

impl Draw {
    /// Before the first token of a request.
    pub fn new(request: &Request, model: &Model) -> Self {
        Self {
            seen: Seen::new(&request.sampling, &request.prompt),
            end_ids: request.end_ids(model),
            generated: 0,
            grammar: request.grammar.clone().map(Mutex::new),
        }
    }

    /// What holds for the next row.
    ///
    /// # Errors
    /// When the grammar is too complex here.
    pub fn rules(&self, request: &Request) -> Result<Rules, GrammarError> {
        let allowed = self.grammar.as_ref().map(|g| g.lock().allowed()).transpose()?;
        let banned = self.banned_ids(request, allowed.as_ref());
        Ok(Rules { allowed, banned })
    }

    /// Ids that may not be drawn yet: those that would end the output before `min_tokens`, unless
    /// its grammar leaves nothing else.
    fn banned_ids(&self, request: &Request, allowed: Option<&SimpleVob>) -> Vec<u32> {
        if self.generated >= request.min_tokens {
            return Vec::new();
        }
        let banned = [self.end_ids.as_slice(), &request.stop.ids].concat();
        match allowed {
            Some(allowed) if allowed.iter().all(|id| banned.contains(&id)) => Vec::new(),
            _ => banned,
        }
    }

    /// Whether [`process`](Self::process) leaves a row as it is.
    pub fn keeps_logits(&self, sampling: &Sampling, rules: &Rules) -> bool {
        rules.banned.is_empty() && sampling.logit_bias.is_empty() && !sampling.has_penalties()
    }

    /// Applies bias, bans and penalties to a row of logits, in place.
    pub fn process(&self, row: &mut [f32], sampling: &Sampling, rules: &Rules) {
        process(row, sampling, &self.seen, &rules.banned);
    }

    /// Moves on by a token; true when the grammar ended with it.
    ///
    /// # Errors
    /// When the grammar does not allow it.
    pub fn push(&mut self, sampling: &Sampling, token: u32) -> Result<bool, GrammarError> {
        let is_whole = match &mut self.grammar {
            Some(grammar) => grammar.get_mut().push(token)?,
            None => false,
        };
        self.generated += 1;
        self.seen.push(sampling, token);
        Ok(is_whole)
    }
}

impl Rules {
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
