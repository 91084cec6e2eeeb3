//! map comes later
pub mod clock;
pub mod engine;
pub mod models;
pub mod ops;
pub mod proof;
