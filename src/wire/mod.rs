//! Defines message formats that several programs speak: serde types and their rules, without I/O.

pub mod models;
pub mod openai;
pub mod python;
