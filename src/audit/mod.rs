//! `audit`: how far answers of a server, with log-probabilities and no proofs, are from weights
//! that are here.
//!
//! [`answer`] reads what a server sent and finds its tokens, [`score`] runs our model over them,
//! [`evidence`] adds up what the differences say. How a server is asked is the caller's.

pub mod answer;
pub mod evidence;
pub mod score;
