//! Writes responses as a server does: tokens become the JSON of either endpoint.
//!
//! [`whole`] writes a response at once, [`frames`] the same as a stream of chunks; both write each
//! choice by a [`Formatter`](format::Formatter). What is written depends on the request, the model
//! and the tokens only, so that a verifier can write it again and compare. There is no HTTP here.

pub mod format;
pub mod frames;
pub mod head;
pub mod whole;
