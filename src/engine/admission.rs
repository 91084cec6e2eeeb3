//! Defines what the scheduler is given: its bounds, new sequences, and why one is refused.

use super::slice::SequenceId;

/// Whose a sequence is: owners share an engine evenly. All who are not told apart are one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Debug)]
pub struct Owner(pub [u8; 32]);

/// Bounds of the scheduler.
#[derive(Clone, Copy, Debug)]
pub struct SchedulerLimits {
    /// Rows of a step that only prefills.
    pub step_tokens_max: usize,
    /// Rows of a step in which sequences decode: bounds how long a prefill delays them.
    pub mixed_tokens_max: usize,
    /// Sequences that run at once.
    pub sequences_max: usize,
    /// Sequences that may wait for a place among those that run.
    pub waiting_max: usize,
    /// Tokens of one sequence.
    pub context_max: usize,
    /// Drafts of one sequence in a step; 0 where none are made.
    pub drafts_max: usize,
}

impl SchedulerLimits {
    /// Rows of a step in which so many sequences decode. However many these are, prefills get what
    /// [`mixed_tokens_max`](Self::mixed_tokens_max) has beyond all sequences.
    pub fn mixed_budget(&self, decodes: usize) -> usize {
        let prefills = self.mixed_tokens_max.saturating_sub(self.sequences_max);
        self.mixed_tokens_max.min(self.step_tokens_max.max(decodes + prefills))
    }
}

/// A sequence as it is submitted.
#[derive(Clone, Debug)]
pub struct NewSequence {
    /// Its name, larger than all before.
    pub id: SequenceId,
    /// Whom its place counts for.
    pub owner: Owner,
    /// The prompt (and, for scoring, the output).
    pub tokens: Vec<u32>,
    /// Most tokens that may still be pushed.
    pub growth_max: usize,
    /// Sequences share cached prefixes only with those of the same salt.
    pub salt: u64,
    /// Whether cached prefixes may be read.
    pub reads_cache: bool,
    /// Whether its next tokens may be guessed.
    pub is_drafted: bool,
    /// It fills the prefix cache for others: what it finds there is not reused by a request.
    pub is_warmup: bool,
}

/// Why a sequence is not accepted.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// There is nothing to compute.
    #[error("the prompt is empty")]
    Empty,
    /// Longer than the model's context.
    #[error("this model's context is {limit} tokens, but {tokens} are asked for")]
    Context {
        /// Prompt and output together.
        tokens: usize,
        /// Tokens of the model's context.
        limit: usize,
    },
    /// Larger than the whole KV cache.
    #[error("the KV cache holds {limit} tokens, but {tokens} are asked for")]
    Memory {
        /// Prompt and output together.
        tokens: usize,
        /// What the cache holds.
        limit: usize,
    },
    /// As many sequences run and wait as the engine takes.
    #[error("{most} sequences run and wait already, the limit")]
    EngineFull {
        /// Sequences of all owners that may run and wait.
        most: usize,
    },
    /// As many sequences of one owner run and wait as it may have.
    #[error("{most} sequences of one key or hotkey run and wait already, the limit")]
    OwnerFull {
        /// Sequences of this owner that may run and wait.
        most: usize,
    },
    /// As many requests wait as may; a later try may be accepted.
    #[error("{waiting} requests are waiting already, the limit")]
    QueueFull {
        /// Requests that may wait.
        waiting: usize,
    },
}
