//! Decodes outside the engine, for attacks that the engine does not allow: a cache with fewer bits,
//! a prompt other than the requested one, tokens proposed by a draft model. All sequences advance
//! by one row at a time. An attack claims the positions that an honest answer would have.

use super::trial::{AttackRequest, AttackedAnswer, Rows, Subject};
use crate::models::Model;
use crate::models::cpu::CpuPass;
use crate::models::pass::{
    Batch, Pass, PassFault, Ranked, RowAsk, RowReport, Scores, Token, blocks_of,
};
use crate::models::sampler::Sampling;
use crate::ops::attention::{BLOCK_TOKENS, KvCache};
use crate::ops::lanes::Isa;
use crate::ops::logits::LogSumExp;
use crate::verify::answer::Answer;
use anyhow::Context;

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
    pub(super) draft: Option<&'a Model>,
    /// What becomes of each head of a key or value before later positions see it.
    pub(super) cache: Option<fn(&mut [f32])>,
}

/// One answer to be made.
pub(super) struct AnswerJob<'a> {
    /// The request, as the attacker received it.
    pub(super) ask: &'a AttackRequest,
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
    jobs: &[AnswerJob<'_>],
) -> anyhow::Result<(Vec<AttackedAnswer>, Vec<Rows>)> {
    let mut all = (Vec::new(), Vec::new());
    for batch in jobs.chunks(BATCH) {
        for (job, drawn) in batch.iter().zip(decode(subject, way, batch)?) {
            let Drawn { mut answer, rows } = drawn;
            answer.text = Some(subject.spell(&job.ask.request, &answer.ids));
            all.0.push(AttackedAnswer::new(job.ask, answer));
            all.1.push(rows);
        }
    }
    Ok(all)
}

fn decode(subject: &Subject, way: Way<'_>, jobs: &[AnswerJob<'_>]) -> anyhow::Result<Vec<Drawn>> {
    let lengths = jobs.iter().map(|j| j.prompt.len() + j.ask.request.max_tokens);
    let length = lengths.max().unwrap_or(0);
    let blocks = blocks_of(length); // of one sequence
    let decoder = subject.model.weights.cpu().context("the weights must be the processor's")?;
    let truth = CpuPass::new(decoder, &subject.pool, jobs.len() * blocks);
    let mut truth = truth.map_err(PassFault::Cache)?;
    let draft = way.draft.map(|model| model.pass(&subject.pool, jobs.len() * blocks));
    let mut draft = draft.transpose()?;
    let mut drawn: Vec<Drawn> = jobs.iter().map(|_| Drawn::default()).collect();
    for position in 0..length {
        let fed = fed(jobs, &drawn, position);
        if fed.is_empty() {
            break;
        }
        let is_drawn = |row: &usize| position + 1 >= jobs[fed[*row].0].prompt.len();
        let rows: Vec<usize> = (0..fed.len()).filter(is_drawn).collect();
        let asks: Vec<RowAsk<'_>> =
            rows.iter().map(|row| jobs[fed[*row].0].ask_row(*row, position)).collect();
        let batch = batch(position, &fed, blocks);
        let proposed = match &mut draft {
            Some(draft) => Some(step(draft.as_mut(), &batch, &asks)?),
            None => None,
        };
        let own = step(&mut truth, &batch, &asks_beside(asks, proposed.as_deref()))?;
        if let Some(change) = way.cache {
            for (sequence, _) in &fed {
                let block = sequence * blocks + position / BLOCK_TOKENS;
                rewrite(truth.cache_mut(), block as u32, position % BLOCK_TOKENS, change);
            }
        }
        for (place, (row, report)) in rows.iter().zip(own).enumerate() {
            let sequence = fed[*row].0;
            let proposal = proposed.as_ref().map(|reports| token(&reports[place]));
            drawn[sequence].push(&jobs[sequence].ask.request.sampling, report, proposal);
        }
    }
    Ok(drawn)
}

/// One row of each fed sequence; sequences lie one after the other in the cache.
fn batch(position: usize, fed: &[(usize, u32)], blocks: usize) -> Batch {
    let mut batch = Batch::default();
    for (sequence, token) in fed {
        let first = sequence * blocks;
        let table = first..=first + position / BLOCK_TOKENS;
        batch.push(&[*token], position, table.map(|block| block as u32).collect());
    }
    batch
}

fn step(pass: &mut dyn Pass, batch: &Batch, asks: &[RowAsk<'_>]) -> anyhow::Result<Vec<RowReport>> {
    let results = pass.step(batch, asks)?;
    Ok(results.into_iter().collect::<Result<_, _>>()?)
}

/// The same of the true model, with what is needed to check what was proposed.
fn asks_beside<'a>(asks: Vec<RowAsk<'a>>, proposed: Option<&[RowReport]>) -> Vec<RowAsk<'a>> {
    let beside = |(place, mut ask): (usize, RowAsk<'a>)| {
        ask.hidden = true;
        if let Some(reports) = proposed {
            ask.logits = true;
            ask.scores.iter_mut().for_each(|scores| scores.ids = vec![token(&reports[place])]);
        }
        ask
    };
    asks.into_iter().enumerate().map(beside).collect()
}

/// The token that was drawn.
fn token(report: &RowReport) -> u32 {
    report.scores.as_ref().map_or(0, |scored| scored.token.token)
}

/// The sequences that are not done, each with its token at `position`.
fn fed(jobs: &[AnswerJob<'_>], drawn: &[Drawn], position: usize) -> Vec<(usize, u32)> {
    let token = |(sequence, job): (usize, &AnswerJob<'_>)| {
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

impl AnswerJob<'_> {
    /// What is asked of row `row`, after which a token is drawn: as if the prompt were the one that
    /// was asked.
    fn ask_row(&self, row: usize, position: usize) -> RowAsk<'_> {
        let request = &self.ask.request;
        let claimed = position + request.prompt.len() - self.prompt.len();
        let scores = Scores::new(Token::Drawn, &request.sampling);
        RowAsk { scores: Some(scores), ..RowAsk::new(row, claimed) }
    }
}

impl Drawn {
    /// Takes the token of a row: the one that was proposed, where it is typical.
    fn push(&mut self, sampling: &Sampling, report: RowReport, proposal: Option<u32>) {
        let Some(scored) = report.scores else { return };
        let proposed = proposal.filter(|token| {
            report.logits.as_ref().is_some_and(|logits| is_typical(logits, sampling, *token))
        });
        let of_proposal = proposed.and_then(|_| scored.ids.first().copied());
        let Ranked { token, logprob, .. } = of_proposal.unwrap_or(scored.token);
        self.answer.ids.push(token);
        self.answer.logprobs.push(Some(logprob));
        self.rows.extend(report.hidden);
    }
}

fn is_typical(logits: &[f32], sampling: &Sampling, token: u32) -> bool {
    let sum = LogSumExp::new(Isa::best(), logits, sampling.temperature);
    let entropy = sum.moments(logits).entropy;
    let probability = sum.logprob(logits[token as usize]).exp();
    probability >= EPSILON.min(DELTA * (-entropy).exp())
}

/// Passes every key and value head stored at `slot` of `block` through `change`, as a coarser cache
/// would.
fn rewrite(cache: &mut KvCache, block: u32, slot: usize, change: fn(&mut [f32])) {
    let (dims, dtype, layout) = (cache.dims(), cache.dtype(), cache.layout());
    let mut head = vec![0.0; dims.head_dim];
    let mut pass = |stored: &mut [u16], at: &dyn Fn(usize) -> usize| {
        head.iter_mut().enumerate().for_each(|(d, x)| *x = dtype.widen(stored[at(d)]));
        change(&mut head);
        head.iter().enumerate().for_each(|(d, x)| stored[at(d)] = dtype.round(*x));
    };
    for layer in 0..dims.layers {
        for kv_head in 0..dims.kv_heads {
            let (keys, values) = cache.block_mut(layer, block, kv_head);
            pass(keys, &|d| layout.key(slot, d));
            pass(values, &|d| layout.value(slot, d));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::attention::{Attention, KvDims, Segment};
    use crate::ops::dtype::Dtype;
    use crate::ops::pool::Pool;
    use crate::ops::rounded::Rounded;

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
                    rewrite(&mut cache, block, position % BLOCK_TOKENS, change);
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
