//! Wraps the driver's side of the engine: a card, its kernels, memory, streams and graphs. All
//! `unsafe` of this path is in this module.
//!
//! Rust never refers to device memory: it is known by addresses, and only kernels and copies touch
//! it. So a launch cannot break Rust's rules as long as the driver reads as many bytes of each
//! argument as it was given, which [`Stream::run`] checks against the PTX. A kernel that gets a
//! wrong address damages the card's own data, or ends the context with a named error.

mod card;
mod plain;
mod stream;
mod transfer;

pub use card::{Card, cards};
pub(crate) use plain::args;
pub use plain::{
    Arg, AttentionShape, Entry, Plain, Pointer, Query, QueryTile, Rule, bytes_of, values_of,
};
pub use stream::{GRID_MAX, Graph, Launch, Stream};
pub use transfer::{Memory, Pinned};
