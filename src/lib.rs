//! map comes later
pub mod models;
pub mod ops;
