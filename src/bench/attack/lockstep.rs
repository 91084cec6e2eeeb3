//! Decoding outside the engine, for cheats that it refuses to be: a cache of fewer bits, a prompt
//! that is not the one that was asked, tokens that a draft proposed. Sequences advance together,
//! one row each at a time; a cheat claims the positions that an honest answer would have.

use super::trial::{Ask, Rows, Subject, Trial};
use crate::engine::sampler::{Sampling, sample};
use crate::models::decoder::{Decoder, Scratch};
use crate::ops::attention::{BLOCK_TOKENS, KvCache, Segment};
use crate::ops::dtype::Rounded;
use crate::ops::lanes::Isa;
use crate::ops::logits::LogSumExp;
use crate::ops::pool::Turn;
use crate::verify::answer::Answer;

/// Sequences that advance together.
const BATCH: usize = 16;
/// Typical acceptance with the defaults of its authors (Cai et al., Medusa, 2024): a proposed token
/// stays where the model gives it a probability of `min(EPSILON, DELTA * exp(-entropy))` or more.
const EPSILON: f64 = 0.09;
const DELTA: f64 = 0.3;

/// In what the decoding is not honest.
#[derive(Clone, Copy, Default)]
pub(super) struct Way<'a> {
    /// Proposes tokens; one that is not typical is drawn as it should be.
    pub(super) draft: Option<&'a Decoder>,
    /// What becomes of each head of a key or value before later positions see it.
    pub(super) cache: Option<fn(&mut [f32])>,
}

/// One answer to be made.
pub(super) struct Job<'a> {
    /// What was asked.
    pub(super) ask: &'a Ask,
    /// What is answered.
    pub(super) prompt: Vec<u32>,
}

/// What has been drawn for a job.
#[derive(Default)]
struct Drawn {
    answer: Answer,
    rows: Rows,
}

/// Decodes all jobs; returns the answers and the rows that their tokens were drawn from.
pub(super) fn run(
    subject: &Subject,
    way: Way<'_>,
    jobs: &[Job<'_>],
) -> Result<(Vec<Trial>, Vec<Rows>), String> {
    let mut all = (Vec::new(), Vec::new());
    for batch in jobs.chunks(BATCH) {
        for (job, drawn) in batch.iter().zip(decode(subject, way, batch)?) {
            let Drawn { mut answer, rows } = drawn;
            answer.text = Some(subject.spell(&job.ask.request, &answer.ids));
            all.0.push(Trial::new(job.ask, answer));
            all.1.push(rows);
        }
    }
    Ok(all)
}

fn decode(subject: &Subject, way: Way<'_>, jobs: &[Job<'_>]) -> Result<Vec<Drawn>, String> {
    let lengths = jobs.iter().map(|j| j.prompt.len() + j.ask.request.max_tokens);
    let length = lengths.max().unwrap_or(0);
    let mut truth = Track::new(&subject.model.decoder, jobs.len(), length)?;
    let mut draft = way.draft.map(|d| Track::new(d, jobs.len(), length)).transpose()?;
    let mut drawn: Vec<Drawn> = jobs.iter().map(|_| Drawn::default()).collect();
    for position in 0..length {
        let fed = fed(jobs, &drawn, position);
        if fed.is_empty() {
            break;
        }
        let is_drawn = |row: &usize| position + 1 >= jobs[fed[*row].0].prompt.len();
        let rows: Vec<usize> = (0..fed.len()).filter(is_drawn).collect();
        let turn = subject.pool.turn();
        let hidden = truth.step(&turn, position, &fed, &rows)?;
        if let Some(change) = way.cache {
            truth.rewrite(position, &fed, change);
        }
        if let Some(draft) = &mut draft {
            draft.step(&turn, position, &fed, &rows)?;
        }
        for (place, row) in rows.iter().enumerate() {
            let sequence = fed[*row].0;
            let logits = truth.logits(place);
            let proposal = draft.as_ref().map(|d| d.logits(place));
            let token = jobs[sequence].draw(turn.isa(), position, logits, proposal);
            let logprob = LogSumExp::new(turn.isa(), logits, 1.0).logprob(logits[token as usize]);
            let Drawn { answer, rows } = &mut drawn[sequence];
            answer.ids.push(token);
            answer.logprobs.push(Some(logprob));
            rows.push(hidden.bits(place).to_vec());
        }
    }
    Ok(drawn)
}

/// The sequences that are not done, each with its token at `position`.
fn fed(jobs: &[Job<'_>], drawn: &[Drawn], position: usize) -> Vec<(usize, u32)> {
    let token = |(sequence, job): (usize, &Job<'_>)| {
        let ids = &drawn[sequence].answer.ids;
        if ids.len() == job.ask.request.max_tokens {
            return None;
        }
        let token = match position.checked_sub(job.prompt.len()) {
            None => job.prompt[position],
            Some(place) => ids[place],
        };
        Some((sequence, token))
    };
    jobs.iter().enumerate().filter_map(token).collect()
}

impl Job<'_> {
    /// The token after `position` of what is really computed.
    fn draw(&self, isa: Isa, position: usize, logits: &[f32], proposal: Option<&[f32]>) -> u32 {
        let request = &self.ask.request;
        let claimed = (position + request.prompt.len() - self.prompt.len()) as u32;
        let own = sample(isa, logits, &request.sampling, claimed);
        let Some(proposal) = proposal else { return own };
        let proposed = sample(isa, proposal, &request.sampling, claimed);
        if is_typical(logits, &request.sampling, proposed) { proposed } else { own }
    }
}

fn is_typical(logits: &[f32], sampling: &Sampling, token: u32) -> bool {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let scaled = |x: f32| f64::from(x - max) / f64::from(sampling.temperature);
    let (mut sum, mut moment) = (0.0, 0.0);
    for x in logits {
        let weight = scaled(*x).exp();
        sum += weight;
        moment += weight * scaled(*x);
    }
    let entropy = sum.ln() - moment / sum;
    let probability = scaled(logits[token as usize]).exp() / sum;
    probability >= EPSILON.min(DELTA * (-entropy).exp())
}

/// A decoder with the caches of some sequences.
struct Track<'a> {
    decoder: &'a Decoder,
    cache: KvCache,
    scratch: Scratch,
    logits: Vec<f32>,
    blocks: usize, // of one sequence
}

impl<'a> Track<'a> {
    fn new(decoder: &'a Decoder, sequences: usize, length: usize) -> Result<Self, String> {
        let blocks = length.div_ceil(BLOCK_TOKENS);
        let cache = KvCache::new(decoder.spec.kv_dims(), decoder.dtype, sequences * blocks);
        let cache = cache.map_err(|e| format!("no memory for the KV cache: {e}"))?;
        Ok(Self { decoder, cache, scratch: Scratch::new(decoder), logits: Vec::new(), blocks })
    }

    /// Computes the row of each fed token; returns those of `rows` and keeps their logits.
    fn step(
        &mut self,
        turn: &Turn<'_>,
        position: usize,
        fed: &[(usize, u32)],
        rows: &[usize],
    ) -> Result<Rounded, String> {
        let ids: Vec<u32> = fed.iter().map(|(_, token)| *token).collect();
        let segment = |(row, (sequence, _)): (usize, &(usize, u32))| {
            let first = sequence * self.blocks;
            let blocks = first..=first + position / BLOCK_TOKENS;
            let blocks = blocks.map(|block| block as u32).collect();
            Segment { rows: row..row + 1, start: position, blocks }
        };
        let segments: Vec<Segment> = fed.iter().enumerate().map(segment).collect();
        let done = self.decoder.forward(turn, &mut self.cache, &ids, &segments, &mut self.scratch);
        done.map_err(|e| e.to_string())?;
        let hidden = self.decoder.final_rows(turn, rows, &self.scratch);
        self.logits.clear();
        if !rows.is_empty() {
            self.decoder.logits(turn, &hidden, &mut self.logits);
        }
        Ok(hidden)
    }

    fn logits(&self, place: usize) -> &[f32] {
        let vocab = self.decoder.spec.vocab;
        &self.logits[place * vocab..][..vocab]
    }

    fn rewrite(&mut self, position: usize, fed: &[(usize, u32)], change: fn(&mut [f32])) {
        for (sequence, _) in fed {
            let block = sequence * self.blocks + position / BLOCK_TOKENS;
            self.cache.rewrite(block as u32, position % BLOCK_TOKENS, change);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::attention::{Attention, KvDims};
    use crate::ops::dtype::Dtype;
    use crate::ops::pool::Pool;

    #[test]
    fn what_is_typical_depends_on_how_sure_the_model_is() {
        let sampling = Sampling { temperature: 1.0, ..Sampling::greedy() };
        // Probabilities 0.88, 0.12 and next to nothing: entropy 0.37, so 0.09 is asked for.
        let sure = [2.0, 0.0, -20.0];
        assert!(is_typical(&sure, &sampling, 0) && is_typical(&sure, &sampling, 1));
        assert!(!is_typical(&sure, &sampling, 2));
        // Of 100 equal tokens each is typical; of one twelfth their weight none is.
        let mut flat = vec![0.0; 100];
        assert!(is_typical(&flat, &sampling, 7));
        flat[7] = -2.5;
        assert!(!is_typical(&flat, &sampling, 7));
    }

    #[test]
    fn a_rewritten_position_is_what_is_attended_to() {
        let pool = Pool::new(1, Isa::best()).unwrap();
        let turn = pool.turn();
        let dims = KvDims { layers: 1, kv_heads: 2, head_dim: 16 };
        let (rows, row_len, k_at) = (40, 6 * 16, 2 * 16);
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 25.0;
        let qkv: Vec<f32> = (0..rows * row_len).map(value).collect();
        let attention = Attention { heads: 2, scale: 0.25, softcap: None, window: None };
        let attend = |change: Option<fn(&mut [f32])>| {
            let mut cache = KvCache::new(dims, Dtype::Bf16, 2).unwrap();
            let blocks: [u32; 2] = [1, 0];
            let segment = [Segment { rows: 0..rows, start: 0, blocks: blocks.to_vec() }];
            cache.store(&turn, 0, &segment, (&qkv, row_len, k_at));
            for position in 0..rows {
                if let Some(change) = change {
                    let block = blocks[position / BLOCK_TOKENS];
                    cache.rewrite(block, position % BLOCK_TOKENS, change);
                }
            }
            let mut out = Rounded::new(Dtype::Bf16, 2 * 16);
            cache.attend(&turn, 0, attention, &segment, (&qkv, row_len), &mut out);
            out.bits(rows - 1).to_vec()
        };
        let plain = attend(None);
        assert_eq!(attend(Some(|_| {})), plain);
        assert_ne!(attend(Some(super::super::tamper::int8_head)), plain);
        let ones = attend(Some(|head| head.fill(1.0)));
        assert!(ones.iter().all(|bits| *bits == Dtype::Bf16.round(1.0)), "{ones:?}");
    }
}
