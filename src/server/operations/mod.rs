//! What operators look at: health, readiness, models ([`status`]), counters ([`counters`]), and how
//! they are read ([`metrics`]).

pub mod counters;
pub mod metrics;
pub mod status;
