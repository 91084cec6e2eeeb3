//! What a validator remembers: rounds, verdicts, samples, weights and evidence, in SQLite or in
//! PostgreSQL by the same queries.
//!
//! [`Store`] is the database, [`record`] what goes in and comes out. What `save_round` and
//! `plan_weights` have returned is committed: on the disk with SQLite, as safe as the server makes
//! it with PostgreSQL. Nothing here judges or counts; a record that cannot be kept is refused, not
//! bent. `docs/database.md` describes the tables.

mod database;
mod error;
mod evidence;
mod export;
mod hotkeys;
mod lock;
mod place;
pub mod record;
mod retain;
mod rounds;
mod rows;
mod samples;
mod schema;
mod session;
#[cfg(test)]
mod tests;
mod verdicts;
mod weights;

pub use database::Store;
pub use error::{Cause, StoreError};
pub use export::{Cell, Export, Filter, What};
pub use retain::{Removed, Retention};
pub use weights::WeightsClaim;
