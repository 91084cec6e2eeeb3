//! What measurements ask an engine for.

use crate::engine::request::Request;

/// Runs of one measurement.
pub(super) const REPEATS: usize = 6;

/// A greedy request of `prompt` tokens that no cache knows, for exactly `output` tokens.
pub(super) fn request(prompt: usize, output: usize, seed: u32) -> Request {
    let ids = (0..prompt as u32).map(|i| 100 + (i * 7919 + seed * 104_729) % 40_000).collect();
    let mut request = Request::greedy(ids, output);
    request.stop.ignore_eos = true;
    request
}
