//! Puts load on a server that speaks OpenAI's API, ours or another's, for `bench serve`.
//!
//! [`levels`] goes through the levels of a load. [`questions`] makes the requests, [`drive`] sends
//! them at drawn times, [`heard`] is what is known of one answer, [`tally`] makes a level of a
//! report out of them, and [`vllm`] writes that level for others' tools. [`server`] is asked,
//! behind [`heard::Transport`].

pub mod drive;
pub mod heard;
pub mod levels;
pub mod questions;
pub mod server;
pub mod tally;
pub mod vllm;
