//! One running request: from rows of logits to tokens, text and an end.

use super::output::{Event, Fault, Finish, FinishReason, PromptRow, Step, TopLogprob};
use super::request::{LogprobMode, Request};
use super::sampler::{Seen, process, sample};
use super::stats::Timeline;
use super::stop::{Scan, StopStrings};
use crate::models::Model;
use crate::models::grammar::Grammar;
use crate::models::tokenizer::Detokenizer;
use crate::ops::lanes::Isa;
use crate::ops::logits::{LogSumExp, rank, top_k};
use crate::proof::commit::{Chain, RowData};
use llguidance::toktrie::SimpleVob;
use parking_lot::Mutex;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

/// What one row of logits led to.
pub(super) struct Row {
    pub(super) token: u32,
    pub(super) logprob: f64,
    pub(super) rank: u32,
    pub(super) top: Vec<TopLogprob>,
    pub(super) proof: Option<RowData>,
}

/// A final-norm row: its 16-bit patterns and their exact values.
#[derive(Clone, Copy)]
pub(super) struct HiddenRow<'a> {
    pub(super) bits: &'a [u16],
    pub(super) values: &'a [f32],
}

/// A request with its channel and everything that outlives a step.
pub(super) struct Live {
    pub(super) request: Request,
    events: mpsc::Sender<Event>,
    _permit: OwnedSemaphorePermit,
    seen: Seen,
    detokenizer: Detokenizer,
    stop: StopStrings,
    end_ids: Vec<u32>,
    output: Vec<u32>,
    prompt_sum: u64,
    output_sum: u64,
    chain: Option<Chain>,
    grammar: Option<Mutex<Grammar>>, // locked by the row that is reduced, then by the owner
    prompt_rows: Vec<PromptRow>,
    /// Position of the next row to report: rows before it were reported or not asked for.
    pub(super) next_row: usize,
    pub(super) cached_tokens: usize,
    pub(super) timeline: Timeline,
}

impl Live {
    pub(super) fn new(
        mut request: Request,
        model: &Model,
        events: mpsc::Sender<Event>,
        permit: OwnedSemaphorePermit,
        submitted: Duration,
    ) -> Self {
        let stop = StopStrings::new(request.stop.strings.clone(), request.stop.include_in_output);
        let end_ids = if request.stop.ignore_eos { Vec::new() } else { model.stop_ids.clone() };
        Self {
            seen: Seen::new(&request.sampling, &request.prompt),
            detokenizer: Detokenizer::new(&model.tokenizer, request.skip_special_tokens),
            next_row: if request.prompt_logprobs.is_some() { 0 } else { request.prompt.len() - 1 },
            stop,
            end_ids,
            output: Vec::new(),
            prompt_sum: request.prompt.iter().map(|id| u64::from(*id)).sum(),
            output_sum: 0,
            chain: request.proof.as_ref().map(|p| Chain::new(p.root)),
            grammar: request.grammar.take().map(Mutex::new),
            prompt_rows: Vec::new(),
            cached_tokens: 0,
            timeline: Timeline::new(submitted),
            events,
            _permit: permit,
            request,
        }
    }

    /// Whether nobody listens any more.
    pub(super) fn is_abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// Sends an event. The channel holds everything a request can produce, so it is never full;
    /// a receiver that is gone is noticed at the next step.
    pub(super) fn send(&self, event: Event) {
        let _ = self.events.try_send(event);
    }

    /// The known token after the row at `position`, if it is one of the prompt's.
    pub(super) fn target(&self, position: usize) -> Option<u32> {
        self.request.prompt.get(position + 1).copied()
    }

    /// Whether the row at `position` has anything to report.
    pub(super) fn wants_row(&self, position: usize) -> bool {
        position >= self.next_row
            && (self.target(position).is_some() || self.request.max_tokens > 0)
    }

    /// Reduces one row of logits: scores the known token, or draws one and computes what its hidden
    /// row contributes to the proof. May change `row`.
    pub(super) fn reduce(
        &self,
        isa: Isa,
        row: &mut [f32],
        hidden: HiddenRow<'_>,
        position: usize,
    ) -> Result<Row, Fault> {
        match self.target(position) {
            Some(token) => {
                let lse = LogSumExp::new(isa, row, 1.0);
                if !lse.is_finite() {
                    return Err(Fault::NotFinite { position });
                }
                let count = self.request.prompt_logprobs.unwrap_or(0);
                Ok(self.report(isa, row, &lse, token, count))
            }
            None => {
                let mut drawn = self.draw(isa, row, position)?;
                drawn.proof = self
                    .request
                    .proof
                    .as_ref()
                    .map(|p| p.prover.prove(position as u32, hidden.bits, hidden.values));
                Ok(drawn)
            }
        }
    }

    fn draw(&self, isa: Isa, row: &mut [f32], position: usize) -> Result<Row, Fault> {
        let (sampling, count) = (&self.request.sampling, self.request.top_logprobs);
        let raw = LogSumExp::new(isa, row, 1.0);
        if !raw.is_finite() {
            return Err(Fault::NotFinite { position });
        }
        let allowed = self.grammar.as_ref().map(|g| g.lock().allowed()).transpose()?;
        let banned = self.banned_ids(allowed.as_ref());
        let draw = |row: &[f32]| match &allowed {
            Some(allowed) => sample(isa, &restricted(row, allowed), sampling, position as u32),
            None => sample(isa, row, sampling, position as u32),
        };
        Ok(match self.request.logprob_mode {
            LogprobMode::Raw if self.changes_logits(&banned) => {
                let mut processed = row.to_vec();
                process(&mut processed, sampling, &self.seen, &banned);
                self.report(isa, row, &raw, draw(&processed), count)
            }
            LogprobMode::Raw => self.report(isa, row, &raw, draw(row), count),
            LogprobMode::Scaled => {
                process(row, sampling, &self.seen, &banned);
                let scaled = LogSumExp::new(isa, row, sampling.logprob_temperature());
                self.report(isa, row, &scaled, draw(row), count)
            }
        })
    }

    fn changes_logits(&self, banned: &[u32]) -> bool {
        let sampling = &self.request.sampling;
        !banned.is_empty() || !sampling.logit_bias.is_empty() || sampling.has_penalties()
    }

    /// Ids that may not be drawn yet: those that would end the output before `min_tokens`, unless
    /// its grammar leaves nothing else.
    fn banned_ids(&self, allowed: Option<&SimpleVob>) -> Vec<u32> {
        if self.output.len() >= self.request.min_tokens {
            return Vec::new();
        }
        let banned = [self.end_ids.as_slice(), &self.request.stop.ids].concat();
        match allowed {
            Some(allowed) if allowed.iter().all(|id| banned.contains(&id)) => Vec::new(),
            _ => banned,
        }
    }

    fn report(&self, isa: Isa, row: &[f32], lse: &LogSumExp, token: u32, count: usize) -> Row {
        let entry = |id: u32, rank: u32| TopLogprob {
            token: id,
            logprob: lse.logprob(row[id as usize]),
            rank,
        };
        let top = match self.request.logprob_ids.as_slice() {
            [] => {
                let sorted = top_k(isa, row, count);
                let above = |logit: f32| sorted.partition_point(|(_, other)| *other > logit) as u32;
                sorted.iter().map(|(id, logit)| entry(*id, 1 + above(*logit))).collect()
            }
            ids => ids.iter().map(|id| entry(*id, rank(row, *id))).collect(),
        };
        let logprob = lse.logprob(row[token as usize]);
        Row { token, logprob, rank: rank(row, token), top, proof: None }
    }

    /// Records the row of a prompt token; sends all of them once the last is there.
    pub(super) fn push_prompt_row(&mut self, row: Row) {
        let Row { token, logprob, rank, top, .. } = row;
        self.prompt_rows.push(PromptRow { token, logprob, rank, top });
        if self.prompt_rows.len() + 1 == self.request.prompt.len() {
            let rows = std::mem::take(&mut self.prompt_rows);
            self.send(Event::Prompt(rows));
        }
    }

    /// Tokens generated so far.
    pub(super) fn output_tokens(&self) -> usize {
        self.output.len()
    }

    /// Records a drawn token and sends it; the reason when it ended the request.
    ///
    /// # Errors
    /// When the weight of its powv cannot be read, or its grammar does not know the token.
    pub(super) fn push_token(
        &mut self,
        model: &Model,
        row: Row,
    ) -> Result<Option<FinishReason>, Fault> {
        let Row { token, logprob, rank, top, proof } = row;
        let powv = model.parameters.powv(self.prompt_sum, self.output_sum);
        let powv = powv.map_err(|e| Fault::Weights(e.to_string()))?;
        let is_whole = match &mut self.grammar {
            Some(grammar) => grammar.get_mut().push(token)?,
            None => false,
        };
        self.output.push(token);
        self.output_sum += u64::from(token);
        self.seen.push(&self.request.sampling, token);
        let (text, reason) = self.advance(model, token, is_whole);
        let ended = reason.is_some();
        let proof = self.chain.as_mut().zip(proof).and_then(|(chain, row)| {
            let full = chain.push(token, row);
            full.or_else(|| if ended { chain.close() } else { None })
        });
        let finish = reason.clone().map(|reason| self.finish(reason));
        self.send(Event::Step(Step { token, text, logprob, rank, top, powv, proof, finish }));
        Ok(reason)
    }

    /// The visible text that `token` adds, and the reason if it ends the output; `is_whole` says
    /// that its grammar ended with it.
    fn advance(
        &mut self,
        model: &Model,
        token: u32,
        is_whole: bool,
    ) -> (String, Option<FinishReason>) {
        let may_end = self.output.len() >= self.request.min_tokens;
        let stop_id = match token {
            id if is_whole => Some(FinishReason::EndToken(id)),
            id if may_end && self.end_ids.contains(&id) => Some(FinishReason::EndToken(id)),
            id if may_end && self.request.stop.ids.contains(&id) => Some(FinishReason::StopId(id)),
            _ => None,
        };
        if let Some(reason) = stop_id {
            // The token that ends the output is not part of its text, unless that was asked for.
            let mut text = self.stop.finish();
            if self.request.stop.include_in_output {
                text.push_str(&self.detokenizer.push(&model.tokenizer, token));
            }
            text.push_str(&self.detokenizer.finish());
            return (text, Some(reason));
        }
        let piece = self.detokenizer.push(&model.tokenizer, token);
        let mut text = match if may_end { self.stop.push(&piece) } else { Scan::Show(piece) } {
            Scan::Show(text) => text,
            Scan::Stop { text, matched } => return (text, Some(FinishReason::StopString(matched))),
        };
        if self.output.len() == self.request.max_tokens {
            text.push_str(&self.stop.finish());
            text.push_str(&self.detokenizer.finish());
            return (text, Some(FinishReason::Length));
        }
        (text, None)
    }

    pub(super) fn finish(&self, reason: FinishReason) -> Finish {
        Finish {
            reason,
            prompt_tokens: self.request.prompt.len(),
            cached_tokens: self.cached_tokens,
            completion_tokens: self.output.len(),
            digest: self.chain.as_ref().map(|c| *c.digest()),
        }
    }
}

/// The row with everything that is not allowed ruled out.
fn restricted(row: &[f32], allowed: &SimpleVob) -> Vec<f32> {
    let mut kept = vec![f32::NEG_INFINITY; row.len()];
    for id in allowed.iter().map(|id| id as usize).filter(|id| *id < row.len()) {
        kept[id] = row[id];
    }
    kept
}
