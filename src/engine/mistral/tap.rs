//! Follows one sequence on mistral.rs, step by step: it reads the row that the derived head gives,
//! answers as every device does, and leaves the sampler one token.
//!
//! A sequence ends by its channel: the step after which nobody listens to it is its last. That is
//! how ours end that are complete, and those whose caller has left.

use super::state::{Held, Shared};
use crate::engine::asks::row;
use crate::engine::guard::{Stage, Watch};
use crate::engine::live::{Live, ScoredRow};
use crate::engine::output::{Event, Fault, Step};
use crate::engine::stats::StepRows;
use crate::models::rows::{HiddenRow, answer};
use candle_core::{Result as CandleResult, Tensor};
use mistralrs::{CustomLogitsProcessor, Response};
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// What is left where there is no token: whatever it is, nobody reads it.
const NO_TOKEN: usize = 0;

/// The processor of one sequence's logits. Dropped with the sequence.
pub(super) struct Tap {
    shared: Arc<Shared>,
    held: Held,
    running: Mutex<Option<Running>>,
}

/// A sequence that has not ended.
struct Running {
    live: Live,
    responses: mpsc::Receiver<Response>,
    /// When its last row was computed, or when it began.
    last_at: Duration,
}

/// What a step led to.
enum Next {
    Token(u32),
    /// The last one, which is not sent yet.
    End(Box<Step>),
    /// Nobody listens.
    Abandoned,
}

impl Tap {
    pub(super) fn new(
        shared: Arc<Shared>,
        held: Held,
        live: Live,
        responses: mpsc::Receiver<Response>,
    ) -> Self {
        let running = Running { live, responses, last_at: shared.clock.elapsed() };
        Self { shared, held, running: Mutex::new(Some(running)) }
    }

    /// The token after `context`; `None` once the sequence has ended.
    fn step(&self, values: Vec<f32>, context: &[u32]) -> Option<u32> {
        let mut running = self.running.lock();
        let outcome = match running.as_mut() {
            None => return None,
            Some(running) => self.next(running, values, context),
        };
        if let Ok(Next::Token(token)) = outcome {
            return Some(token);
        }
        let ended = running.take();
        drop(running);
        let Running { live, responses, .. } = ended?;
        // Its channel closes here, so that this step is its last.
        drop(responses);
        self.shared.ended(self.held, false);
        match outcome {
            Ok(Next::End(step)) => live.close(Event::Step(*step)),
            Ok(_) => {}
            Err(fault) => {
                self.shared.stats.record_fault();
                live.close(Event::Fault(fault));
            }
        }
        None
    }

    /// Draws the next token; sends it where others follow.
    fn next(
        &self,
        running: &mut Running,
        mut values: Vec<f32>,
        context: &[u32],
    ) -> Result<Next, Fault> {
        let Shared { model, tapped, stats, clock, .. } = &*self.shared;
        while running.responses.try_recv().is_ok() {}
        if running.live.is_abandoned() {
            stats.record_abort();
            return Ok(Next::Abandoned);
        }
        let expected = tapped.vocab + tapped.channels;
        if values.len() != expected {
            let what = format!("mistral.rs gave {} logits, not {expected}", values.len());
            return Err(Fault::Device(what));
        }
        let position = context.len().saturating_sub(1);
        let is_first = running.live.tokens() == 0;
        let guard = Watch::default();
        let row = guard.guard(Stage::Reduce, || self.read(&running.live, &mut values, position))?;
        let now = clock.elapsed();
        let rows = match is_first {
            true => StepRows { all: context.len(), decoded: 0 },
            false => StepRows { all: 1, decoded: 1 },
        };
        self.shared.record_step(rows, running.last_at, now);
        running.last_at = now;
        guard.guard(Stage::Record, || {
            let live = &mut running.live;
            stats.record_token(&mut live.timeline, now);
            let step = live.push_token(model, row)?;
            if let Some(finish) = &step.finish {
                stats.record_end(&live.ended(&finish.reason), now);
                return Ok(Next::End(Box::new(step)));
            }
            let token = step.token;
            live.send(Event::Step(step));
            Ok(Next::Token(token))
        })
    }

    /// What is asked of the row at `position`, which `values` hold after the logits.
    fn read(&self, live: &Live, values: &mut [f32], position: usize) -> Result<ScoredRow, Fault> {
        let dtype = self.shared.model.dtype;
        let (logits, hidden) = values.split_at_mut(self.shared.tapped.vocab);
        let bits: Vec<u16> = hidden.iter().map(|x| dtype.round(*x)).collect();
        let rounded: Vec<f32> = bits.iter().map(|bits| dtype.widen(*bits)).collect();
        let hidden = HiddenRow { bits: &bits, values: &rounded };
        let ask = live.ask(0, position, &[])?;
        row(position, Some(answer(self.shared.isa, &ask, hidden, Some(logits))))
    }
}

impl CustomLogitsProcessor for Tap {
    fn apply(&self, logits: &Tensor, context: &[u32]) -> CandleResult<Tensor> {
        let count = logits.elem_count();
        let token = self.step(logits.to_vec1()?, context).map_or(NO_TOKEN, |id| id as usize);
        let mut left = vec![f32::NEG_INFINITY; count];
        if let Some(logit) = left.get_mut(token) {
            *logit = 0.0;
        }
        Tensor::from_vec(left, count, logits.device())
    }
}

impl Drop for Tap {
    /// mistral.rs drops a sequence with its sampler: one that has not ended by then has failed.
    fn drop(&mut self) {
        let Some(Running { live, mut responses, .. }) = self.running.get_mut().take() else {
            return;
        };
        let mut why = "mistral.rs dropped the request".to_owned();
        while let Ok(response) = responses.try_recv() {
            match response {
                Response::InternalError(e) | Response::ValidationError(e) => why = e.to_string(),
                Response::ModelError(e, _) | Response::CompletionModelError(e, _) => why = e,
                _ => {}
            }
        }
        tracing::error!("a sequence failed in mistral.rs: {why}");
        self.shared.stats.record_fault();
        self.shared.ended(self.held, true);
        live.close(Event::Fault(Fault::Device(why)));
    }
}
