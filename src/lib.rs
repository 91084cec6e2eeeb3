//! map comes later
pub mod cli;
pub mod clock;
pub mod config;
pub mod engine;
pub mod models;
pub mod ops;
pub mod proof;
pub mod server;
pub mod wire;
