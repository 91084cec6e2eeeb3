//! Message formats that several programs speak: serde types and their rules, no I/O.

pub mod openai;
pub mod python;
