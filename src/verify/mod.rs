//! Verifies answers: does this output follow from these weights, this prompt and these rules?
//!
//! One prefill over prompt and output gives everything ([`prefill`]): hidden rows for proofs,
//! logits for ranks, log-probabilities and the sampler's margins. [`Verifier::verify`] first checks
//! what needs no model ([`structure`]), then the proof's binding ([`proof`]), then rows ([`rows`]),
//! and ends in a [`Verdict`]. What the peer sent can at worst be rejected; trouble of ours is
//! [`Verdict::Unscored`].
//!
//! What a client received is a whole response: [`capture`] reads the request ([`question`]), lets
//! the server's own writer write the answer again ([`mirror`]) and compares every field
//! (`compare`).
//!
//! Where the [`limits`] come from is in [`calibrate`]; what many answers of one miner say together
//! is in [`evidence`].

pub mod answer;
pub mod bounds;
pub mod calibrate;
pub mod capture;
pub mod captures;
mod check;
mod claim;
pub mod classes;
mod compare;
pub mod evidence;
pub mod evidence_file;
pub mod file;
pub mod limits;
pub mod limits_file;
mod logprobs;
pub mod mirror;
pub mod places;
pub mod prefill;
pub mod proof;
pub mod question;
mod report;
pub mod rounding_energy;
pub mod rows;
pub mod scrutiny;
pub mod statistic;
pub mod structure;
pub mod targon;
mod twin;
mod verdict;

pub use check::{Verification, Verifier};
pub use claim::{Challenge, Claim, Depth, Profile, ProfileError};
pub use limits::Limits;
pub use places::{FAST_ROWS, FastRows, FastRowsError};
pub use report::{ChunkEvidence, Named, Report, RowEvidence};
pub use verdict::{Reason, Rejection, Stop, Verdict};
