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
            pass::PassFault::Memory(what) | pass::PassFault::Device(what) => Self::Device(what),
            pass::PassFault::Lost(what) => Self::Lost(what),
        }
    }
}

/// What arrives on a [`Generation`].
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    /// The prompt's rows, all at once, where they were asked for. The first token has no row.
    Prompt(Vec<PromptRow>),
    /// A token.
    Step(Step),
    /// The end of a request that generates nothing.
    Finish(Finish),
    /// The request failed.
    Fault(Fault),
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

    /// All tokens and the end, from a thread that may block.
    ///
    /// # Errors
    /// When the engine failed.
    pub fn collect_blocking(mut self) -> Result<(Vec<Step>, Option<Finish>), Fault> {
        let mut steps: Vec<Step> = Vec::new();
        let mut finish = None;
        while let Some(event) = self.next_blocking() {
            match event {
                Event::Step(step) => {
                    finish = step.finish.clone().or(finish);
                    steps.push(step);
                }
                Event::Finish(end) => finish = Some(end),
                Event::Fault(fault) => return Err(fault),
                Event::Prompt(_) => {}
            }
        }
        Ok((steps, finish))
    }
}
