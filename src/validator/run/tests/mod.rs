//! Tests the driver against a world that a test has in its hands.

mod epochs;
mod fake;
mod rounds;
