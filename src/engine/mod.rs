//! x
pub mod blocks;
pub mod request;
pub mod sampler;
pub mod scheduler;
pub mod stop;
