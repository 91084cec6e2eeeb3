//! Loads models: checkpoints, tokenizers, chat templates, and weights to hidden rows to logits.
//!
//! [`Model::load`] opens a checkpoint, turns its configuration into a [`spec::Spec`], packs the
//! weights for a device, and keeps the files open. Its [`text::Text`] is all that requests and
//! responses need. A family is data
//! ([`config::families`]) for the one decoder of a device; [`pass`] is how everybody runs
//! it, [`cpu`] is the pass on the CPU. Nothing here knows about requests or scheduling.

pub mod arithmetic;
pub mod cache;
pub mod calibration;
pub mod chat;
pub mod checkpoint;
pub mod coded;
pub mod config;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod departure;
pub mod device;
pub mod error;
pub mod family;
pub mod gguf;
mod gguf_tokenizer;
pub mod grammar;
pub mod grid;
pub mod header;
pub mod hosted;
pub mod hub;
pub mod identity;
pub mod margin;
pub mod model;
pub mod panics;
pub mod parameter_counts;
pub mod parameters;
pub mod pass;
pub mod quantised;
pub mod remembered;
pub mod root;
pub mod rows;
pub mod rules;
pub mod sampler;
pub mod source;
pub mod spec;
pub mod tapped;
pub mod tensor;
pub mod text;
pub mod tokenizer;
mod tokenizer_config;
pub mod weight_file;

pub use identity::Identity;
pub use model::Model;
