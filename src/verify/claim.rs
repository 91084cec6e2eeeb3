//! Defines a claim: an answer with the request that it says it answers, and the kind of check.

use super::answer::Answer;
use crate::chain::keys::Hotkey;
use crate::engine::request::Request;
use crate::proof::Scheme;
use crate::proof::codec::Hash;
use anyhow::anyhow;

/// Which rules apply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Profile {
    /// The weight value of every token (Targon 4.0 and 4.1).
    Powv,
    /// Ranks and log-probabilities (Targon 4.2 to 4.4, with its gaps closed).
    Ranks,
    /// Hidden-state proofs and the sampler's margins: `residue-v1`, `residue-v1-u4` or `toploc`, as
    /// the request asked.
    Proof,
}

impl std::str::FromStr for Profile {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        match text {
            "targon-4.1" => Ok(Self::Powv),
            "targon-4.4" => Ok(Self::Ranks),
            "proof" => Ok(Self::Proof),
            other => Err(anyhow!("must be targon-4.1, targon-4.4 or proof, got {other}")),
        }
    }
}

/// How much is computed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Depth {
    /// Proofs of all rows; logits of random rows, as many as [`FastRows`](super::FastRows) says,
    /// and the last.
    Fast,
    /// Everything at every row.
    Slow,
}

/// An answer with the request that it claims to answer.
#[derive(Clone, Debug)]
pub struct Claim<'a> {
    /// What was asked, as the engine reads it; its noise key is set by the verifier.
    pub request: &'a Request,
    /// The API's seed and the number of the choice, which the proof is bound to.
    pub seed: Option<i64>,
    /// Number of the choice within its request.
    pub choice: u32,
    /// The proof that was asked for.
    pub proof: Option<Challenge>,
    /// The answer that was received.
    pub answer: &'a Answer,
    /// Whether a final end token may be missing from the answer: some stacks do not send it.
    pub end_is_implied: bool,
}

/// The proof that a request asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Challenge {
    /// How hidden rows are committed to.
    pub scheme: Scheme,
    /// The verifier's own nonce; without one the prover chose it, and it binds nobody.
    pub nonce: Option<Hash>,
    /// Who must have signed; without one, any signature and none are both accepted.
    pub hotkey: Option<Hotkey>,
}
