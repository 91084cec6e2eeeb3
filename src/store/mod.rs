//! Stores the records of a validator: rounds, verdicts, samples, weights and evidence, in SQLite or
//! in PostgreSQL by the same queries.
//!
//! [`Store`] is the database, [`record`] has the data. When `save_round` or `plan_weights` has
//! returned, the data is committed: it is on the disk with SQLite, and as safe as the server makes
//! it with PostgreSQL. The store neither verifies nor scores. It refuses a record that it cannot
//! store, and never changes one. `docs/database.md` describes the tables.

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
