//! Checks that a row has the same bits however it is computed: at once, in chunks, token by token,
//! and beside other sequences. Measures how far rows of the two arithmetics are apart.

use super::asked::{is_same, prover, samplings};
use crate::bench::host::Say;
use crate::models::arithmetic::Arithmetic;
use crate::models::cuda::{CudaPass, CudaWeights};
use crate::models::pass::{Batch, Pass, RowAsk, RowResult, Scores, Token, blocks_of};
use crate::models::sampler::Sampling;
use crate::ops::pool::Pool;
use crate::proof::commit::RowProver;
use anyhow::{Context, ensure};
use std::ops::Range;
use std::sync::Arc;

/// Sequences that run beside each other.
const SEQUENCES: usize = 16;

/// Sequences of a model, and what is asked of their rows.
struct Subject<'a> {
    weights: &'a Arc<CudaWeights>,
    pool: &'a Pool,
    tokens: usize,
    ids: Vec<Vec<u32>>,
    samplings: [Sampling; 3],
    prover: RowProver,
}

/// Compares in both arithmetics, with sequences of `tokens` tokens.
///
/// # Errors
/// When bits differ that must be equal, or the card fails.
pub(super) fn compare(
    weights: &Arc<CudaWeights>,
    pool: &Pool,
    tokens: usize,
    say: Say<'_>,
) -> anyhow::Result<()> {
    let ids = |seed: usize| -> Vec<u32> {
        (0..tokens).map(|i| ((i * i * 31 + i * (7 + seed) + seed) % 250) as u32).collect()
    };
    let subject = Subject {
        weights,
        pool,
        tokens,
        ids: (0..SEQUENCES).map(ids).collect(),
        samplings: samplings(),
        prover: prover(weights.spec()),
    };
    let mut hidden = Vec::new();
    for arithmetic in [Arithmetic::Portable, Arithmetic::Tensor] {
        let alone = subject.alone(arithmetic)?;
        let count = subject.together(arithmetic, &alone)?;
        let dtype = weights.dtype();
        say(format!(
            "{arithmetic} in {dtype}: {count} of {count} rows are equal in chunks, token by token \
             and in batches of 1 to {SEQUENCES}"
        ));
        hidden.push(hidden_rows(&alone, subject.weights));
    }
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let apart = square(&mut hidden[0].iter().zip(&hidden[1]).map(|(p, t)| p - t));
    let error = (apart / square(&mut hidden[0].iter().copied())).sqrt();
    say(format!("hidden rows of tensor and portable are {error:.1e} apart (root mean square)"));
    Ok(())
}

fn hidden_rows(rows: &[Vec<RowResult>], weights: &CudaWeights) -> Vec<f64> {
    let reports = rows.iter().flatten().flatten();
    let bits = reports.flat_map(|report| report.hidden.iter().flatten());
    bits.map(|bits| f64::from(weights.dtype().widen(*bits))).collect()
}

impl Subject<'_> {
    fn pass(&self, arithmetic: Arithmetic, sequences: usize) -> anyhow::Result<CudaPass> {
        let blocks = sequences * blocks_of(self.tokens);
        Ok(CudaPass::new(self.weights, self.pool, blocks)?.computing(arithmetic))
    }

    fn ask(&self, row: usize, at: usize) -> RowAsk<'_> {
        let sampling = &self.samplings[at % 3];
        RowAsk {
            hidden: true,
            prover: Some(&self.prover),
            scores: Some(Scores { top: 5, ..Scores::new(Token::Drawn, sampling) }),
            ..RowAsk::new(row, at)
        }
    }

    /// Every row of every sequence, each sequence alone and at once.
    fn alone(&self, arithmetic: Arithmetic) -> anyhow::Result<Vec<Vec<RowResult>>> {
        let run = |ids: &Vec<u32>| {
            let asks: Vec<RowAsk<'_>> = (0..self.tokens).map(|at| self.ask(at, at)).collect();
            Ok(self.pass(arithmetic, 1)?.step(&Batch::of(ids, 0), &asks)?)
        };
        self.ids.iter().map(run).collect()
    }

    /// The same rows: a growing number of sequences, chunks of sizes that differ, then tokens.
    fn together(&self, arithmetic: Arithmetic, alone: &[Vec<RowResult>]) -> anyhow::Result<usize> {
        let mut pass = self.pass(arithmetic, SEQUENCES)?;
        let (mut at, mut compared) = ([0; SEQUENCES], 0);
        for turn in 0.. {
            let chunk = |sequence: usize| -> Range<usize> {
                let size = if turn < 3 { [70, 9, 1][(sequence + turn) % 3] } else { 1 };
                at[sequence]..self.tokens.min(at[sequence] + size)
            };
            let active = SEQUENCES.min([1, 4, SEQUENCES][turn.min(2)]);
            let chunks: Vec<(usize, Range<usize>)> =
                (0..active).map(|s| (s, chunk(s))).filter(|(_, rows)| !rows.is_empty()).collect();
            if chunks.is_empty() || turn > 3 * self.tokens {
                break;
            }
            compared += self
                .step(&mut pass, &chunks, alone)
                .with_context(|| format!("{arithmetic}: sequences and their rows {chunks:?}"))?;
            chunks.into_iter().for_each(|(sequence, rows)| at[sequence] = rows.end);
        }
        Ok(compared)
    }

    fn step(
        &self,
        pass: &mut CudaPass,
        chunks: &[(usize, Range<usize>)],
        alone: &[Vec<RowResult>],
    ) -> anyhow::Result<usize> {
        let (mut batch, mut asks, mut places) = (Batch::default(), Vec::new(), Vec::new());
        let per_sequence = blocks_of(self.tokens);
        for (sequence, rows) in chunks {
            let first = sequence * per_sequence;
            let blocks = (first..first + per_sequence).map(|block| block as u32).collect();
            let placed = batch.push(&self.ids[*sequence][rows.clone()], rows.start, blocks);
            for (row, at) in placed.zip(rows.clone()) {
                asks.push(self.ask(row, at));
                places.push((*sequence, at));
            }
        }
        let results = pass.step(&batch, &asks)?;
        for (got, (sequence, at)) in results.iter().zip(&places) {
            let want = &alone[*sequence][*at];
            ensure!(
                got.is_ok() && is_same(got, want),
                "row {at} of sequence {sequence} differs from the one that was computed alone:\n\
                 {got:?}\n{want:?}"
            );
        }
        Ok(results.len())
    }
}
