//! This is targon-engine: one embedded LLM engine and the programs around it.
//!
//! # Bird's-eye view
//!
//! [`models`] turns a checkpoint into a forward pass over the kernels of [`ops`]; [`engine`] runs
//! many requests through it at once; [`server`] speaks HTTP. `ARCHITECTURE.md` follows one request
//! through all of them.
//!
//! # Ranks
//!
//! A module uses only what ranks lower; equals never import each other, and files of a module do
//! not use each other in circles (`tests/tidy.rs`).
//!
//! | rank | modules | role |
//! |---|---|---|
//! | 10 | `main` [`cli`] | parse, wire, print |
//! | 9 | [`lifecycle`] | models of a file: loaded, followed, watched |
//! | 8 | [`config`] [`doctor`] | files, flags and environment into options; examination |
//! | 7 | [`miner`] [`verifier`] [`mod@bench`] [`audit`] | what they run |
//! | 7 | [`overview`] | a running validator, shown to its operators |
//! | 6 | [`server`] [`validator`] | a surface over a running engine; rounds, scores and weights |
//! | 5 | [`verify`] [`store`] | verification; records |
//! | 4 | [`reply`] | responses as a server writes them |
//! | 3 | [`intake`] | requests as a server reads them |
//! | 2 | [`engine`] | scheduling, KV blocks, requests to tokens and text |
//! | 1 | [`models`] | checkpoints, tokenizers, weights to rows and what they say |
//! | 1 | [`chain`] | keys, wallets, the metagraph, extrinsics |
//! | 1 | [`chance`] | draws from random bits |
//! | 1 | [`update`] | new versions of this program |
//! | 0 | [`proof`] [`wire`] [`clock`] [`endpoint`] [`entropy`] [`files`] [`tls`] | leaves |
//! | – | [`ops`], a package of its own | arithmetic, compiled optimised in every profile |
//!
//! # Invariants
//!
//! - A row's bits depend on the tokens before it and the weights, and on nothing else
//!   (`tests/engine/canon.rs`).
//! - Every queue, body, buffer and wait has a named limit.
//! - A peer's bytes can at worst be refused; an engine fault is never the peer's fault.

pub mod audit;
pub mod bench;
pub mod chain;
pub mod chance;
pub mod cli;
pub mod clock;
pub mod config;
pub mod doctor;
pub mod endpoint;
pub mod engine;
pub mod entropy;
pub mod files;
pub mod intake;
pub mod lifecycle;
pub mod miner;
pub mod models;
pub use targon_ops as ops;
pub mod overview;
pub mod proof;
pub mod reply;
pub mod server;
pub mod store;
pub mod tls;
pub mod update;
pub mod validator;
pub mod verifier;
pub mod verify;
pub mod wire;
