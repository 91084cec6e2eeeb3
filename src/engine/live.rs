//! One running request: from rows of logits to tokens, text and an end.

use super::core::Place;
use super::draw::Draw;
use super::output::{Event, Fault, Finish, FinishReason, PromptRow, Step, TopLogprob};
use super::request::{LogprobMode, Request};
use super::sampler::sample;
use super::stats::Timeline;
use super::transcript::Transcript;
use crate::models::Model;
use crate::ops::lanes::Isa;
use crate::ops::logits::{LogSumExp, rank, top_k};
use crate::proof::commit::{Chain, RowData};
use std::time::Duration;
use tokio::sync::mpsc;

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
    _place: Place,
    draw: Draw,
    transcript: Transcript,
    prompt_sum: u64,
    output_sum: u64,
    chain: Option<Chain>,
    prompt_rows: Vec<PromptRow>,
    /// Position of the next row to report: rows before it were reported or not asked for.
    pub(super) next_row: usize,
    pub(super) cached_tokens: usize,
    pub(super) timeline: Timeline,
}

impl Live {
    pub(super) fn new(
        request: Request,
        model: &Model,
        events: mpsc::Sender<Event>,
        place: Place,
        submitted: Duration,
    ) -> Self {
        Self {
            draw: Draw::new(&request, model),
            transcript: Transcript::new(&request, model),
            next_row: if request.prompt_logprobs.is_some() { 0 } else { request.prompt.len() - 1 },
            prompt_sum: request.prompt.iter().map(|id| u64::from(*id)).sum(),
            output_sum: 0,
            chain: request.proof.as_ref().map(|p| Chain::new(p.root)),
            prompt_rows: Vec::new(),
            cached_tokens: 0,
            timeline: Timeline::new(submitted),
            events,
            _place: place,
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
        let rules = self.draw.rules(&self.request)?;
        let draw = |row: &[f32]| match rules.restrict(row) {
            Some(restricted) => sample(isa, &restricted, sampling, position as u32),
            None => sample(isa, row, sampling, position as u32),
        };
        Ok(match self.request.logprob_mode {
            LogprobMode::Raw if !self.draw.keeps_logits(sampling, &rules) => {
                let mut processed = row.to_vec();
                self.draw.process(&mut processed, sampling, &rules);
                self.report(isa, row, &raw, draw(&processed), count)
            }
            LogprobMode::Raw => self.report(isa, row, &raw, draw(row), count),
            LogprobMode::Scaled => {
                self.draw.process(row, sampling, &rules);
                let scaled = LogSumExp::new(isa, row, sampling.logprob_temperature());
                self.report(isa, row, &scaled, draw(row), count)
            }
        })
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
        self.transcript.tokens()
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
        let is_whole = self.draw.push(&self.request.sampling, token)?;
        self.output_sum += u64::from(token);
        let (text, reason) = self.transcript.push(&self.request, model, token, is_whole);
        let ended = reason.is_some();
        let proof = self.chain.as_mut().zip(proof).and_then(|(chain, row)| {
            let full = chain.push(token, row);
            full.or_else(|| if ended { chain.close() } else { None })
        });
        let finish = reason.clone().map(|reason| self.finish(reason));
        self.send(Event::Step(Step { token, text, logprob, rank, top, powv, proof, finish }));
        Ok(reason)
    }

    pub(super) fn finish(&self, reason: FinishReason) -> Finish {
        Finish {
            reason,
            prompt_tokens: self.request.prompt.len(),
            cached_tokens: self.cached_tokens,
            completion_tokens: self.transcript.tokens(),
            digest: self.chain.as_ref().map(|c| *c.digest()),
        }
    }
}
