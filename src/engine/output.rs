//! Defines the events that a running request sends back: tokens, the end, and faults.

use super::stage::Stage;
use crate::models::grammar::GrammarError;
use crate::models::pass::{self, Ranked};
use crate::proof::codec::Hash;
use crate::proof::commit::ChunkProof;
use tokio::sync::mpsc;

/// One token of the output.
#[derive(Clone, PartialEq, Debug)]
pub struct Step {
    /// The id that was drawn.
    pub token: u32,
    /// Text that became visible with it; often, but not always, its own.
    pub text: String,
    /// Its natural log-probability, in the request's mode.
    pub logprob: f64,
    /// 1 + how many tokens are more probable.
    pub rank: u32,
    /// The most probable tokens, as many as were asked for.
    pub top: Vec<Ranked>,
    /// Targon's proof-of-weights value of this token.
    pub powv: i64,
    /// The proof of the chunk that this token closes, where proofs were asked for.
    pub proof: Option<ChunkProof>,
    /// Set on the last token.
    pub finish: Option<Finish>,
}

/// One token of the prompt, given those before it.
#[derive(Clone, PartialEq, Debug)]
pub struct PromptRow {
    /// The id that stands in the prompt.
    pub token: u32,
    /// Its natural log-probability.
    pub logprob: f64,
    /// 1 + how many tokens are more probable.
    pub rank: u32,
    /// The most probable tokens.
    pub top: Vec<Ranked>,
}

/// Why a generation ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FinishReason {
    /// An end token of the model.
    EndToken(u32),
    /// A stop id of the request.
    StopId(u32),
    /// A stop string of the request.
    StopString(String),
    /// The limit `max_tokens` was reached.
    Length,
}

/// The end of a generation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finish {
    /// Why the output ended.
    pub reason: FinishReason,
    /// Tokens of the prompt, those from the cache included.
    pub prompt_tokens: usize,
    /// Of those, found in the prefix cache.
    pub cached_tokens: usize,
    /// Generated tokens, a final end token included.
    pub completion_tokens: usize,
    /// End of the digest chain, where proofs were asked for.
    pub digest: Option<Hash>,
}

impl FinishReason {
    /// The tag in what a hotkey signs.
    pub fn tag(&self) -> u8 {
        match self {
            FinishReason::EndToken(_) => 1,
            FinishReason::StopId(_) => 2,
            FinishReason::StopString(_) => 3,
            FinishReason::Length => 4,
        }
    }
}

/// The engine's own failure; never the caller's fault.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    /// The model computed a NaN or an infinity.
    #[error("the model's logits at position {position} are not finite numbers")]
    NotFinite {
        /// Position of the row.
        position: usize,
    },
    /// What the output must look like could not be followed.
    #[error(transparent)]
    Grammar(#[from] GrammarError),
    /// Weights could not be read.
    #[error("weights cannot be read: {0}")]
    Weights(String),
    /// The device has no memory for a step, or refused it.
    #[error("the device could not compute a step: {0}")]
    Device(String),
    /// The device does not work any more.
    #[error("the device is lost: {0}")]
    Lost(String),
    /// The scheduler refused what was promised to fit.
    #[error("the engine could not take the request: {0}")]
    Refused(String),
    /// A panic: a mistake of ours.
    #[error("the engine failed while {0}")]
    Panicked(Stage),
    /// The engine's thread is gone.
    #[error("the engine has stopped")]
    Stopped,
}

impl From<pass::PassFault> for Fault {
    fn from(fault: pass::PassFault) -> Self {
        match fault {
            pass::PassFault::Weights(e) => Self::Weights(e.to_string()),
            pass::PassFault::Lost(e) => Self::Lost(e.to_string()),
            fault => Self::Device(fault.to_string()),
        }
    }
}

/// What arrives on a [`Generation`].
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    /// The prompt's rows, all at once, where they were asked for. The first token has no row.
    Prompt(Vec<PromptRow>),
    /// A token of the output; the next one may follow.
    Step(Step),
    /// The end of a request that generates nothing.
    Finish(Finish),
    /// The request failed; nothing follows.
    Fault(Fault),
}

/// An output that came to its end.
#[derive(Clone, PartialEq, Debug)]
pub struct Ended {
    /// Rows of the prompt, where asked for.
    pub rows: Option<Vec<PromptRow>>,
    /// The tokens of the output, in order.
    pub steps: Vec<Step>,
    /// Why it ended, and the end of its proof.
    pub finish: Finish,
}

impl Ended {
    /// The texts of all tokens, one after the other.
    pub fn text(&self) -> String {
        self.steps.iter().map(|step| step.text.as_str()).collect()
    }
}

/// A running request. Dropping it cancels the request within one step.
pub struct Generation {
    pub(super) events: mpsc::Receiver<Event>,
}

impl Generation {
    /// The next event; `None` once the request has ended and everything was received.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// Like [`next`](Self::next) from a thread that may block.
    pub fn next_blocking(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }

    /// The whole output; an error where it breaks off without an end.
    ///
    /// # Errors
    /// When the engine failed.
    pub async fn collect(mut self) -> Result<Ended, Fault> {
        let mut so_far = Collected::default();
        while let Some(event) = self.next().await {
            if let Some(finish) = so_far.take(event)? {
                return Ok(so_far.ended(finish));
            }
        }
        Err(Fault::Stopped)
    }

    /// Like [`collect`](Self::collect) from a thread that may block.
    ///
    /// # Errors
    /// When the engine failed.
    pub fn collect_blocking(mut self) -> Result<Ended, Fault> {
        let mut so_far = Collected::default();
        while let Some(event) = self.next_blocking() {
            if let Some(finish) = so_far.take(event)? {
                return Ok(so_far.ended(finish));
            }
        }
        Err(Fault::Stopped)
    }
}

/// What has come of an output.
#[derive(Default)]
struct Collected {
    rows: Option<Vec<PromptRow>>,
    steps: Vec<Step>,
}

impl Collected {
    /// Adds an event; returns the end, if it is one.
    fn take(&mut self, event: Event) -> Result<Option<Finish>, Fault> {
        match event {
            Event::Prompt(rows) => self.rows = Some(rows),
            Event::Step(step) => {
                let finish = step.finish.clone();
                self.steps.push(step);
                return Ok(finish);
            }
            Event::Finish(finish) => return Ok(Some(finish)),
            Event::Fault(fault) => return Err(fault),
        }
        Ok(None)
    }

    fn ended(self, finish: Finish) -> Ended {
        Ended { rows: self.rows, steps: self.steps, finish }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn step(text: &str, finish: Option<Finish>) -> Event {
        let text = text.to_owned();
        let (token, logprob, rank, top, powv, proof) = (1, -0.5, 1, Vec::new(), 0, None);
        Event::Step(Step { token, text, logprob, rank, top, powv, proof, finish })
    }

    fn collected(events: Vec<Event>) -> Result<String, Fault> {
        let generation = || {
            let (sender, receiver) = mpsc::channel(events.len());
            events.iter().for_each(|event| sender.try_send(event.clone()).unwrap());
            Generation { events: receiver }
        };
        let ended = generation().collect().now_or_never().unwrap();
        assert_eq!(ended, generation().collect_blocking());
        ended.map(|ended| ended.text())
    }

    #[test]
    fn an_output_that_breaks_off_is_no_whole_one() {
        let finish = Finish {
            reason: FinishReason::Length,
            prompt_tokens: 1,
            cached_tokens: 0,
            completion_tokens: 2,
            digest: None,
        };
        assert_eq!(collected(vec![step("a", None)]), Err(Fault::Stopped));
        let whole = vec![step("a", None), step("b", Some(finish.clone()))];
        assert_eq!(collected(whole), Ok("ab".into()));
        assert_eq!(collected(vec![Event::Finish(finish)]), Ok(String::new()));
        let lost = Fault::Lost("gone".into());
        assert_eq!(collected(vec![step("a", None), Event::Fault(lost.clone())]), Err(lost));
    }
}
