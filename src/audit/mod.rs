//! Measures how far a server's answers, with log-probabilities and without proofs, are from weights
//! that are here. It serves people who buy tokens and never run a subnet.
//!
//! [`asking`] asks a server for answers, [`answer`] reads what it sent and finds its tokens,
//! [`score`] runs our model over them, [`evidence`] adds up what the differences say, [`seeds`]
//! finds whether the server honours a request's seed.

pub mod answer;
pub mod asking;
pub mod evidence;
pub mod score;
pub mod seeds;
