//! Puts load on a server that speaks OpenAI's API, ours or another's, for `bench serve`.
//!
//! [`heard`] is what is known of one answer, [`drive`] sends requests at drawn times, [`tally`]
//! makes a level of a report out of them. How a request is sent is the caller's
//! ([`heard::Transport`]).

pub mod drive;
pub mod heard;
pub mod tally;
