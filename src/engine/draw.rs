//! Determines what may be drawn at each step of an output: penalties, bias, bans and grammar, as
//! they follow from the tokens so far. The engine draws by it; a verifier replays it.

use super::request::Request;
use crate::models::grammar::{Grammar, GrammarError};
use crate::models::rules::{RowRules, Seen};
use crate::models::sampler::Sampling;
use crate::models::text::Text;
use llguidance::toktrie::SimpleVob;
use parking_lot::Mutex;
use std::sync::Arc;

/// The state of one output between two draws.
pub struct Draw {
    seen: Arc<Seen>,
    end_ids: Vec<u32>,
    generated: usize,
    grammar: Option<Mutex<Grammar>>, // locked by who asks for its mask, then by the owner
}

impl Draw {
    /// Before the first token of a request.
    pub fn new(request: &Request, text: &Text) -> Self {
        Self {
            seen: Arc::new(Seen::new(&request.sampling, &request.prompt)),
            end_ids: request.end_ids(text),
            generated: 0,
            grammar: request.grammar.clone().map(Mutex::new),
        }
    }

    /// Whether there is a grammar, whose mask takes a while to compute.
    pub fn has_grammar(&self) -> bool {
        self.grammar.is_some()
    }

    /// What holds for the next row after `drafts`, which are not drawn yet.
    ///
    /// # Errors
    /// When the grammar is too complex here.
    ///
    /// # Panics
    /// When there are drafts and a grammar: those do not go together.
    pub fn rules(&self, request: &Request, drafts: &[u32]) -> Result<RowRules, GrammarError> {
        assert!(drafts.is_empty() || self.grammar.is_none(), "drafts under a grammar");
        let allowed = self.grammar.as_ref().map(|g| g.lock().allowed()).transpose()?;
        let banned = self.banned_ids(request, drafts.len(), allowed.as_ref());
        let mut seen = Arc::clone(&self.seen);
        if request.sampling.has_penalties() {
            drafts.iter().for_each(|id| Arc::make_mut(&mut seen).push(&request.sampling, *id));
        }
        Ok(RowRules { seen, banned, allowed })
    }

    /// Ids that may not be drawn yet: those that would end the output before `min_tokens`, unless
    /// its grammar leaves nothing else.
    fn banned_ids(
        &self,
        request: &Request,
        drafts: usize,
        allowed: Option<&SimpleVob>,
    ) -> Vec<u32> {
        if self.generated + drafts >= request.min_tokens {
            return Vec::new();
        }
        let banned = [self.end_ids.as_slice(), &request.stop.ids].concat();
        match allowed {
            Some(allowed) if allowed.iter().all(|id| banned.contains(&id)) => Vec::new(),
            _ => banned,
        }
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
        if sampling.has_penalties() {
            Arc::make_mut(&mut self.seen).push(sampling, token);
        }
        Ok(is_whole)
    }
}
