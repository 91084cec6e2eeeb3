//! Makes the requests that measurements send to an engine. Their prompts are unique, so that no
//! cache shortens them.

use crate::engine::Engine;
use crate::engine::output::{Ended, FinishReason};
use crate::engine::request::Request;
use crate::intake::proof::Prover;
use crate::models::departure::Departure;
use crate::models::{Identity, Model};
use crate::ops::philox::philox;
use crate::ops::rounding::Rounding;
use crate::proof::Scheme;
use crate::proof::codec::Hash;
use crate::verify::answer::Answer;
use crate::verify::{Verifier, prefill};
use anyhow::{Context, anyhow};

/// Runs of one measurement.
pub(super) const REPEATS: usize = 6;

/// A greedy request of `prompt` tokens that no cache knows, for exactly `output` tokens.
pub(super) fn request(prompt: usize, output: usize, seed: u32) -> Request {
    let ids = (0..prompt as u32).map(|i| 100 + (i * 7919 + seed * 104_729) % 40_000).collect();
    let mut request = Request::greedy(ids, output);
    request.stop.ignore_eos = true;
    request
}

/// The same of random tokens of a vocabulary: another prompt for every seed.
pub(super) fn request_of(vocab: usize, prompt: usize, output: usize, seed: u64) -> Request {
    let word = |i: u32| philox(seed, [i, 0, 0, 0x6c6f_6164])[0];
    let id = |i: u32| ((u64::from(word(i)) * vocab as u64) >> 32) as u32;
    let mut request = Request::greedy((0..prompt as u32).map(id).collect(), output);
    request.stop.ignore_eos = true;
    request
}

/// This engine's answer to `request`, with its proof.
pub(super) fn proved(
    engine: &Engine,
    identity: &Identity,
    request: &Request,
    nonce: Hash,
) -> anyhow::Result<Answer> {
    let prover = Prover { scheme: Scheme::Residue, nonce, signer: None };
    let mut drawn = request.clone();
    let head = prover.bind(&mut drawn, identity, None, 0);
    let Ended { steps, finish, .. } = engine.submit(drawn)?.collect_blocking()?;
    let end = head.end(finish.digest, finish.completion_tokens, &finish.reason);
    // Without weight values: looking them up is not what is measured.
    Ok(Answer { powv: Vec::new(), ..Answer::of_steps(&steps, Some(end)) })
}

/// The same answer as a stack of 16 bits proves it: its rows are those that the verifier's twin
/// computes.
///
/// # Errors
/// When the weights are not on the processor, or a row cannot be computed.
pub(super) fn proved_by_a_stack(
    verifier: &Verifier,
    (request, nonce): (&Request, Hash),
    answer: &Answer,
) -> anyhow::Result<Answer> {
    let Verifier { model, identity, pool, .. } = verifier;
    let decoder = model.weights.cpu().context("the weights are not on the processor")?;
    let rounding = Rounding::Everywhere(model.dtype);
    let departure = Departure { rounding, ..Departure::default() };
    let pass = |blocks| Model::departing(decoder, departure, (pool, blocks));
    let rows = prefill::hidden_rows(pass, &request.prompt, &answer.ids);
    let rows = rows.map_err(|stop| anyhow!("{stop:?}"))?;
    let prover = Prover { scheme: Scheme::Residue, nonce, signer: None };
    let head = prover.head(&request.terms(None, 0), identity);
    let chunks = head.chunks(identity, request.prompt.len(), (&answer.ids, &rows));
    let digest = chunks.last().map(|chunk| chunk.digest);
    let end = head.end(digest, answer.ids.len(), &FinishReason::Length);
    Ok(Answer { chunks, end: Some(end), ..answer.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_lie_in_the_vocabulary_and_differ() {
        let prompts: Vec<_> = (0..100).map(|seed| request_of(261, 40, 1, seed).prompt).collect();
        assert!(prompts.iter().flatten().all(|id| *id < 261));
        for (i, prompt) in prompts.iter().enumerate() {
            assert!(prompts[..i].iter().all(|other| other[..32] != prompt[..32]), "{i}");
        }
    }
}
