//! The Bittensor chain: keys and addresses.

pub mod keys;
