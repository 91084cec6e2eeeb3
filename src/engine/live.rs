//! Holds one running request: it makes the asks of its rows, and turns their answers into tokens,
//! text and the end of the output.

use super::backend::EnginePermit;
use super::draw::Draw;
use super::output::{Event, Fault, Finish, FinishReason, PromptRow, Step};
use super::request::Request;
use super::stats::{EndedRequest, Timeline};
use super::transcript::Transcript;
use crate::models::Model;
use crate::models::pass::{Ranked, RowAsk, Scored, Scores, Token};
use crate::models::text::Text;
use crate::proof::commit::{ChunkChain, RowData};
use std::time::Duration;
use tokio::sync::mpsc;

/// What a row says of its token, and what it contributes to the proof.
pub(super) struct ScoredRow {
    pub(super) scored: Scored,
    pub(super) proof: Option<RowData>,
}

/// A request with its channel and everything that outlives a step.
pub(super) struct Live {
    pub(super) request: Request,
    events: mpsc::Sender<Event>,
    place: EnginePermit,
    draw: Draw,
    transcript: Transcript,
    prompt_sum: u64,
    output_sum: u64,
    chain: Option<ChunkChain>,
    prompt_rows: Vec<PromptRow>,
    /// Position of the next row to report: rows before it were reported or not asked for.
    pub(super) next_row: usize,
    pub(super) cached_tokens: usize,
    pub(super) timeline: Timeline,
}

impl Live {
    pub(super) fn new(
        request: Request,
        text: &Text,
        events: mpsc::Sender<Event>,
        place: EnginePermit,
        submitted: Duration,
    ) -> Self {
        Self {
            draw: Draw::new(&request, text),
            transcript: Transcript::new(&request, text),
            next_row: if request.prompt_logprobs.is_some() { 0 } else { request.prompt.len() - 1 },
            prompt_sum: request.prompt.iter().map(|id| u64::from(*id)).sum(),
            output_sum: 0,
            chain: request.proof.as_ref().map(|p| ChunkChain::new(p.root)),
            prompt_rows: Vec::new(),
            cached_tokens: 0,
            timeline: Timeline::new(submitted, !request.is_warmup),
            events,
            place,
            request,
        }
    }

    /// Whether nobody listens any more.
    pub(super) fn is_abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// Sends an event after which others follow. The channel holds everything a request can
    /// produce, so it is never full; a receiver that is gone is noticed at the next step.
    pub(super) fn send(&self, event: Event) {
        let _ = self.events.try_send(event);
    }

    /// Gives its place back and sends the last event: whoever receives it may ask again at once.
    /// By then the request is counted and holds nothing of its engine.
    pub(super) fn close(self, last: Event) {
        let Self { events, place, .. } = self;
        drop(place);
        let _ = events.try_send(last);
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

    /// Tokens that were drawn.
    #[cfg(feature = "mistralrs")]
    pub(super) fn tokens(&self) -> usize {
        self.transcript.tokens()
    }

    /// Whether its draws wait for a grammar.
    pub(super) fn has_grammar(&self) -> bool {
        self.draw.has_grammar()
    }

    /// What is asked of its row at `position`, which is row `row` of the batch: a score of the
    /// known token, or a draw and what the hidden row contributes to the proof. The draw holds if
    /// `drafts` are the tokens that are drawn before it in the same step.
    ///
    /// # Errors
    /// When its grammar is too complex here.
    pub(super) fn ask(
        &self,
        row: usize,
        position: usize,
        drafts: &[u32],
    ) -> Result<RowAsk<'_>, Fault> {
        let request = &self.request;
        let is_drawn = self.target(position).is_none();
        let (token, count) = match self.target(position) {
            Some(token) => (Token::Known(token), request.prompt_logprobs.unwrap_or(0)),
            None => (Token::Drawn, request.top_logprobs),
        };
        let plain = Scores::new(token, &request.sampling);
        let scores = Scores {
            rules: if is_drawn { self.draw.rules(request, drafts)? } else { plain.rules },
            mode: if is_drawn { request.logprob_mode } else { plain.mode },
            // Chosen ids stand in place of an output's alternatives, not of a prompt's.
            top: if is_drawn && !request.logprob_ids.is_empty() { 0 } else { count },
            ids: if is_drawn { request.logprob_ids.clone() } else { plain.ids },
            ..plain
        };
        let proof = request.proof.as_ref().filter(|_| is_drawn);
        let prover = proof.map(|p| &p.prover);
        Ok(RowAsk { prover, scores: Some(scores), ..RowAsk::new(row, position) })
    }

    /// Records the row of a prompt token; sends all of them once the last is there.
    pub(super) fn push_prompt_row(&mut self, scored: Scored) {
        let Ranked { token, logprob, rank } = scored.token;
        let top = alternatives(scored);
        self.prompt_rows.push(PromptRow { token, logprob, rank, top });
        if self.prompt_rows.len() + 1 == self.request.prompt.len() {
            let rows = std::mem::take(&mut self.prompt_rows);
            self.send(Event::Prompt(rows));
        }
    }

    /// Records a drawn token: the step that is to be sent, which says whether it is the last.
    ///
    /// # Errors
    /// When the weight of its powv cannot be read, or its grammar does not know the token.
    pub(super) fn push_token(
        &mut self,
        model: &Model,
        ScoredRow { scored, proof }: ScoredRow,
    ) -> Result<Step, Fault> {
        let Ranked { token, logprob, rank } = scored.token;
        let top = alternatives(scored);
        let powv = model.parameters.powv(self.prompt_sum, self.output_sum);
        let powv = powv.map_err(|e| Fault::Weights(e.to_string()))?;
        let is_whole = self.draw.push(&self.request.sampling, token)?;
        self.output_sum += u64::from(token);
        let (text, reason) = self.transcript.push(&self.request, &model.text, token, is_whole);
        let ended = reason.is_some();
        let proof = self.chain.as_mut().zip(proof).and_then(|(chain, row)| {
            let full = chain.push(token, row);
            full.or_else(|| if ended { chain.close() } else { None })
        });
        let finish = reason.map(|reason| self.finish(reason));
        Ok(Step { token, text, logprob, rank, top, powv, proof, finish })
    }

    /// What statistics keep of it once it has ended.
    pub(super) fn ended(&self, reason: &FinishReason) -> EndedRequest {
        EndedRequest {
            timeline: self.timeline,
            prompt_tokens: self.request.prompt.len(),
            cached_tokens: self.cached_tokens,
            output_tokens: self.transcript.tokens(),
            by_length: *reason == FinishReason::Length,
        }
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

/// The tokens that were asked for by their ids, else the most probable ones.
fn alternatives(scored: Scored) -> Vec<Ranked> {
    if scored.ids.is_empty() { scored.top } else { scored.ids }
}
