//! Measures and predicts what users may expect. `cargo bench` runs what developers compare, one for
//! each file of `benches/`, and `targon-engine bench` runs the others.
//!
//! | module | measures |
//! |---|---|
//! | [`ops`] | kernels against the ceilings of this machine |
//! | [`canon`] | what the order of additions costs, and what partitions give |
//! | [`engine`] | prefill, decode, memory and load time of a model, then `serve`: what HTTP costs |
//! | `gpu` | an NVIDIA card: its bits against the CPU's, then its speed (feature `cuda`) |
//! | [`gate`] | what the signed door costs a request |
//! | [`proof`] | what proving costs a token |
//! | [`verify`] | what a check costs beside the passes of Targon's verifier |
//! | [`own`] | how many of this engine's own answers are equal when they are recomputed |
//! | [`attack`] | what each verification scheme catches |
//! | [`sweep`] | prefill, decode and checks over batch and depth, for `bench engine` |
//! | [`site`] | nothing: it says what a sweep runs on, a processor or a card |
//! | [`traffic`] | a server under load, for `bench serve` |
//! | [`conditions`] | whether the machine was fit to be measured |
//! | [`report`] | nothing: it holds what was measured, and writes it |
//! | [`compare`] | nothing: it ranks machines by their reports |
//! | [`arguments`] | nothing: it reads what `cargo bench` passes |
//! | [`plan`] | nothing: it predicts models on devices that are not here |
//!
//! Nothing here prints: figures are data ([`figures`]) or lines that the caller takes
//! ([`host::Say`]).

pub mod arguments;
pub mod attack;
pub mod canon;
#[cfg(feature = "cuda")]
mod card;
mod ceilings;
pub mod compare;
pub mod conditions;
mod energy;
pub mod engine;
pub mod figures;
pub mod gate;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod host;
mod load;
pub mod ops;
pub mod own;
pub mod plan;
pub mod prompts;
pub mod proof;
pub mod report;
mod rows;
mod runs;
mod serve;
pub mod site;
pub mod stats;
pub mod sweep;
pub mod traffic;
pub mod verify;
