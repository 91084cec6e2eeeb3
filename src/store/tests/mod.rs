//! Runs the same tests on SQLite, and on PostgreSQL where `TARGON_TEST_POSTGRES` names a server:
//! each in a database of its own.

mod any;
mod contents;
mod files;
mod places;
mod rounds;
mod servers;
mod sites;
mod versions;
mod weights;
