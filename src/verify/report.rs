//! Holds what was found of an answer: the verdict, and the evidence of its rows and of the chunks
//! of its proof.

use super::verdict::Verdict;
use crate::proof::{CHUNK_ROWS, toploc};

/// What verification found of one answer.
#[derive(Clone, PartialEq, Debug)]
pub struct Report {
    /// Whether the answer passes, and why not.
    pub verdict: Verdict,
    /// Rows whose logits were computed, ascending.
    pub rows: Vec<RowEvidence>,
    /// The canon of the proof, where it is none that our device computes in: its rows were then
    /// compared by their energies, not bit for bit.
    pub other_canon: Option<String>,
    /// Chunks of the proof.
    pub chunks: Vec<ChunkEvidence>,
    /// Energies of the rows of chunks that are not equal bit for bit, in order (residue schemes).
    pub energies: Vec<f64>,
    /// The same rows in units of what rounding moves them by, where the twin was run
    /// (`twin.rs`).
    pub twin: Vec<f64>,
    /// How much of the way that the twin goes is found in the rows.
    pub twin_share: Option<f64>,
    /// Known cheats with how much of each is found in the rows, the likeliest first, where they
    /// were tried.
    pub named: Vec<Named>,
}

/// A known cheat.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Named {
    /// Name of its recipe.
    pub name: &'static str,
    /// How much of what it would change is found: about 1 where the cheat was done, 0 elsewhere.
    pub beta: f64,
}

impl Report {
    /// A verdict that needed no rows.
    pub fn bare(verdict: Verdict) -> Self {
        Self {
            verdict,
            rows: Vec::new(),
            other_canon: None,
            chunks: Vec::new(),
            energies: Vec::new(),
            twin: Vec::new(),
            twin_share: None,
            named: Vec::new(),
        }
    }
}

/// What the model says about one token of the output.
#[derive(Clone, PartialEq, Debug)]
pub struct RowEvidence {
    /// Number of the token.
    pub index: usize,
    /// Id of the token that was sent.
    pub token: u32,
    /// 1 + how many tokens are more probable.
    pub rank: u32,
    /// Its log-probability in the request's mode.
    pub logprob: f64,
    /// The log-probability that was reported for it.
    pub reported: Option<f64>,
    /// The best rank of a token that would end the output.
    pub end_rank: Option<u32>,
    /// How far the token is from winning the draw, in logits, clipped at
    /// [`MARGIN_CLIP`](crate::models::margin::MARGIN_CLIP); zero when it wins, also where it does
    /// only with another stack's edge of a truncation. `None` where the noise is not known.
    pub margin: Option<f64>,
    /// Whether the token is the one that this engine would have drawn, where the noise is known.
    pub is_drawn: Option<bool>,
    /// How far the reported alternatives are from the most probable tokens, the worst of them;
    /// `None` where none were reported.
    pub top_error: Option<f64>,
}

/// What one chunk of a proof shows.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct ChunkEvidence {
    /// Number of the chunk in the proof, from 0.
    pub index: usize,
    /// How many rows it has: fewer than others where it is the last.
    pub rows: usize,
    /// Whether all rows are ours bit for bit.
    pub is_exact: bool,
    /// Mean energy of its rows (residue schemes).
    pub energy: Option<f64>,
    /// Mean energy that rounding alone gives these rows, where the twin was run (`twin.rs`).
    pub rounding: Option<f64>,
    /// Distance from our rows (TOPLOC).
    pub distance: Option<toploc::Distance>,
}

impl ChunkEvidence {
    /// The limit on its mean energy, given that of a whole chunk: honest rows differ by a factor of
    /// ten, so the mean of few of them spreads wider, by the root of how many there are less.
    pub fn limit(&self, whole: f64) -> f64 {
        whole * (CHUNK_ROWS as f64 / self.rows.max(1) as f64).sqrt()
    }
}
