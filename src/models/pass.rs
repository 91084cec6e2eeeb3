//! Defines the interface between callers that need rows of a model and the device that computes
//! them.
//!
//! A [`Pass`] owns its KV cache, its buffers and its logits. It takes a [`Batch`], which says what
//! is computed, and a [`RowAsk`] for every row whose result is needed. Both are plain data, and so
//! are the results. Logits stay on the device, unless a caller asks for the row itself.
//! [`rows`](super::rows) defines what a device answers. If a device has no kernel for an ask (see
//! [`Scores::is_plain`]), it may copy that row to the host and call the definition.

use super::error::{DeviceError, LoadError};
use super::hosted::HostedRows;
use super::margin::Margin;
use super::rules::RowRules;
use super::sampler::Sampling;
use crate::ops::attention::BLOCK_TOKENS;
pub use crate::ops::attention::Segment;
use crate::proof::commit::{RowData, RowProver};
use std::io;
use std::ops::Range;

/// Computes rows of one model, step by step.
pub trait Pass: Send {
    /// Runs the layers over `batch`, keeps its keys and values, and answers `asks` in their order.
    /// A row's answer depends on the tokens before it, the weights and the ask alone.
    ///
    /// # Errors
    /// When the step could not be computed: what it would have written must not be read.
    fn step(&mut self, batch: &Batch, asks: &[RowAsk<'_>]) -> Result<Vec<RowResult>, PassFault>;

    /// Rows whose logits came to the host since the pass was made.
    fn hosted(&self) -> HostedRows {
        HostedRows::default()
    }
}

/// The rows of one step.
#[derive(Clone, Default, Debug)]
pub struct Batch {
    /// The token of each row.
    pub ids: Vec<u32>,
    /// The rows of each sequence; together they cover all, in ascending order.
    pub segments: Vec<Segment>,
}

impl Batch {
    /// Rows of one sequence that has the whole cache: block i holds its positions from 32 i on.
    pub fn of(ids: &[u32], start: usize) -> Self {
        let mut batch = Self::default();
        let blocks = (0..blocks_of(start + ids.len()) as u32).collect();
        batch.push(ids, start, blocks);
        batch
    }

    /// Appends the rows of a sequence, whose first is at position `start`; `blocks` is its block
    /// table. Returns the rows.
    pub fn push(&mut self, ids: &[u32], start: usize, blocks: Vec<u32>) -> Range<usize> {
        let rows = self.ids.len()..self.ids.len() + ids.len();
        self.ids.extend_from_slice(ids);
        self.segments.push(Segment { rows: rows.clone(), start, blocks });
        rows
    }
}

/// KV blocks that hold so many positions of one sequence.
pub fn blocks_of(positions: usize) -> usize {
    positions.div_ceil(BLOCK_TOKENS)
}

/// Rows of logits that a device computes at once, where it has `bytes` bytes for them.
pub(super) fn logit_rows_max(vocab: usize, bytes: usize) -> usize {
    (bytes / (4 * vocab)).max(1)
}

/// What is to be known of one row.
#[derive(Clone, Default)]
pub struct RowAsk<'a> {
    /// The row of the batch.
    pub row: usize,
    /// The position that noise and proofs are keyed by: the row's own, in an honest answer.
    pub position: u32,
    /// Computes what the row contributes to a proof: its keys for the sketch and the exact hash.
    pub prover: Option<&'a RowProver>,
    /// The final-norm row itself.
    pub hidden: bool,
    /// Its logits as the head computed them. For tests and tools, a few rows a step.
    pub logits: bool,
    /// What is read off its logits.
    pub scores: Option<Scores<'a>>,
}

/// What is read off one row of logits.
#[derive(Clone)]
pub struct Scores<'a> {
    /// The token that is reported on.
    pub token: Token,
    /// Temperature, truncation, noise key, bias and penalties.
    pub sampling: &'a Sampling,
    /// What may be drawn, besides.
    pub rules: RowRules,
    /// The distribution that log-probabilities, ranks and alternatives describe.
    pub mode: LogprobMode,
    /// So many of the most probable tokens.
    pub top: usize,
    /// The tokens that are computed.
    pub ids: Vec<u32>,
    /// Tokens that may be meant by an alternative.
    pub near: Option<Near>,
    /// The best rank of these in the model's own distribution.
    pub ends: &'a [u32],
}

/// The token of a row that is reported on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Token {
    /// A token that the pass draws by the row's settings.
    Drawn,
    /// A token that the caller knows: of a prompt, or of an answer to verify.
    Known(u32),
    /// One that is known, with its margin: how far it is from being drawn.
    Measured(u32),
}

/// Which distribution log-probabilities describe.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LogprobMode {
    /// The model's own: softmax of the raw logits.
    #[default]
    Raw,
    /// After penalties and temperature, before truncation: what Targon's verifiers compare.
    Scaled,
}

/// Log-probabilities without ranks: of single tokens, and of all that are probable enough.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Near {
    /// The tokens that are computed.
    pub ids: Vec<u32>,
    /// All tokens that are at most so many nats less probable than the last of the most probable.
    pub reach: Option<f32>,
}

/// A token with its log-probability and its rank.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Ranked {
    /// The token whose score this is.
    pub token: u32,
    /// Its natural log-probability, in the mode that was asked for.
    pub logprob: f64,
    /// 1 + how many tokens are more probable.
    pub rank: u32,
}

/// What was asked of one row, or why it cannot be known.
pub type RowResult = Result<RowReport, RowFault>;

/// What is known of one row: the parts that were asked for.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct RowReport {
    /// What it contributes to a proof.
    pub proof: Option<RowData>,
    /// The final-norm row, as 16-bit patterns of the model's type.
    pub hidden: Option<Vec<u16>>,
    /// Its logits, as many as the vocabulary has tokens.
    pub logits: Option<Vec<f32>>,
    /// What was read off its logits.
    pub scores: Option<Scored>,
}

/// What was read off one row of logits.
#[derive(Clone, PartialEq, Debug)]
pub struct Scored {
    /// The token that was drawn or known.
    pub token: Ranked,
    /// The most probable tokens, most probable first.
    pub top: Vec<Ranked>,
    /// The tokens of `ids`, in their order.
    pub ids: Vec<Ranked>,
    /// The tokens of `near` with their log-probabilities, ascending, each once.
    pub near: Vec<(u32, f64)>,
    /// The best rank of the `ends`.
    pub end_rank: Option<u32>,
    /// The margin, where the token is checked.
    pub margin: Option<Margin>,
}

/// Why a pass cannot be made, or a step failed; never the caller's fault.
#[derive(Debug, thiserror::Error)]
pub enum PassFault {
    /// Weights could not be read.
    #[error(transparent)]
    Weights(#[from] LoadError),
    /// The processor's memory has no room for the KV cache.
    #[error("no memory for the KV cache: {0}")]
    Cache(#[source] io::Error),
    /// The device has no memory for this step; a smaller one may fit.
    #[error(transparent)]
    Memory(DeviceError),
    /// The device refused this step; the next may succeed.
    #[error(transparent)]
    Device(DeviceError),
    /// The device does not work any more, for any step.
    #[error(transparent)]
    Lost(DeviceError),
    /// The processor computes in the portable arithmetic only.
    #[error("tensor arithmetic needs an NVIDIA card")]
    NeedsCard,
    /// No pass of this program can run them.
    #[error("the weights of this model are with another engine")]
    Elsewhere,
}

/// Why one row has no answer; the others of its step have theirs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RowFault {
    /// The model computed a NaN or an infinity.
    #[error("logits are not finite numbers")]
    NotFinite,
    /// A panic: a mistake of ours.
    #[error("reading the row failed")]
    Panicked,
}

impl<'a> RowAsk<'a> {
    /// Nothing yet of the row, which is at `position` of its sequence.
    pub fn new(row: usize, position: usize) -> Self {
        Self { row, position: position as u32, ..Self::default() }
    }

    /// Whether the head's product is needed.
    pub fn needs_logits(&self) -> bool {
        self.logits || self.scores.is_some()
    }
}

impl<'a> Scores<'a> {
    /// Of a token in the model's own distribution: nothing but its log-probability and rank.
    pub fn new(token: Token, sampling: &'a Sampling) -> Self {
        Self {
            token,
            sampling,
            rules: RowRules::default(),
            mode: LogprobMode::Raw,
            top: 0,
            ids: Vec::new(),
            near: None,
            ends: &[],
        }
    }

    /// Whether logits count as they are: no bias, bans, penalties or grammar, no open search.
    pub fn is_plain(&self) -> bool {
        let is_open = self.near.as_ref().is_some_and(|near| near.reach.is_some());
        self.rules.keep_logits(self.sampling) && self.rules.allowed.is_none() && !is_open
    }
}

impl LogprobMode {
    /// The name in requests, responses and flags.
    pub fn name(self) -> &'static str {
        match self {
            LogprobMode::Raw => "raw",
            LogprobMode::Scaled => "scaled",
        }
    }
}
