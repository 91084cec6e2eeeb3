//! Defines a claim: an answer with the request that it says it answers, and the kind of check.

use super::answer::Answer;
use crate::chain::keys::Hotkey;
use crate::engine::request::Request;
use crate::proof::Scheme;
use crate::proof::codec::Hash;
use std::str::FromStr;

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

/// A name that no rules have.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("must be targon-4.1, targon-4.4 or proof, got {0}")]
pub struct ProfileError(String);

impl Profile {
    const ALL: [Self; 3] = [Self::Powv, Self::Ranks, Self::Proof];

    /// The name on the command line and in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Powv => "targon-4.1",
            Self::Ranks => "targon-4.4",
            Self::Proof => "proof",
        }
    }
}

impl FromStr for Profile {
    type Err = ProfileError;

    fn from_str(text: &str) -> Result<Self, ProfileError> {
        let named = Self::ALL.into_iter().find(|profile| profile.name() == text);
        named.ok_or_else(|| ProfileError(text.to_owned()))
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
    /// Whether the request names no limit: its server's context is one, which is not known here.
    pub limit_is_free: bool,
}

impl<'a> Claim<'a> {
    /// The only choice of a request without a seed or a proof, whose answer says how it ends.
    pub fn new(request: &'a Request, answer: &'a Answer) -> Self {
        Self {
            request,
            seed: None,
            choice: 0,
            proof: None,
            answer,
            end_is_implied: false,
            limit_is_free: false,
        }
    }
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
