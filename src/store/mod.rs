//! What a validator remembers: rounds, verdicts, scores and weights.

pub mod record;
