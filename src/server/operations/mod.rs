//! Has the routes for operators: health, readiness and models ([`status`]), counters
//! ([`counters`]), and the text format of metrics ([`metrics`]).

pub mod counters;
pub mod metrics;
pub mod status;
