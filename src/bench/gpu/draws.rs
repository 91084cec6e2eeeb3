//! Compares the kernels that read logits and hidden rows with the CPU: sums, the largest logits,
//! draws, single tokens, sketches and hashes.

use super::runner::{KernelRunner, same, same_words, words};
use crate::models::cuda::launch::{Entry, Query, Rule, args};
use crate::models::sampler::{Distribution, Sampling};
use crate::ops::logits::{LogSumExp, rank, top_k};
use crate::ops::math::ln64;
use crate::proof::residue::{Calibration, ResidueBits, exact_hash, sketch};
use anyhow::ensure;

/// The largest logits that a truncated draw starts from.
const CANDIDATES: usize = 256;
/// Rows of each test.
const ROWS: usize = 6;

/// All of them for a vocabulary and rows of `hidden` values; results by kernel.
pub(super) fn compare(
    runner: &KernelRunner<'_>,
    vocab: usize,
    hidden: usize,
) -> anyhow::Result<Vec<(&'static str, usize)>> {
    // A few tokens hold most of the probability, as in a model's rows; there are ties.
    let noise = runner.noise(ROWS * vocab);
    let logit = |x: &f32| ((-(f64::from(*x).abs() + 1e-6).ln() * 250.0).round() * 0.01) as f32;
    let logits = Logits { runner, vocab, values: noise.iter().map(logit).collect() };
    let temperatures = [1.0, 0.7, 1.3, 0.6, 1.7, 1.0];
    let sums = logits.sums(&temperatures)?;
    Ok(vec![
        ("sum_exp", logits.compare_sums(&temperatures, &sums)?),
        ("largest", logits.compare_largest()?),
        ("draw", logits.compare_draws(&temperatures, &sums.1)?),
        ("look_up", logits.compare_tokens()?),
        ("sketch_rows", proofs(runner, hidden)?),
    ])
}

struct Logits<'a> {
    runner: &'a KernelRunner<'a>,
    vocab: usize,
    values: Vec<f32>, // (ROWS, vocab)
}

impl Logits<'_> {
    fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.values.chunks_exact(self.vocab)
    }

    /// Maxima and sums of exponentials.
    fn sums(&self, temperatures: &[f32; ROWS]) -> anyhow::Result<(Vec<f32>, Vec<f64>)> {
        let inverse = temperatures.map(|t| 1.0 / t);
        let (logits, inverse) = (self.runner.put(&self.values)?, self.runner.put(&inverse)?);
        let (maxima, sums) =
            (self.runner.put(&[0.0_f32; ROWS])?, self.runner.put(&[0.0_f64; ROWS])?);
        let args = args![&logits, &inverse, &maxima, &sums, self.vocab as i32];
        let shared = 4 * self.vocab.div_ceil(512);
        self.runner.launch("sum_exp", [ROWS, 1, 1], (256, shared), args)?;
        Ok((self.runner.get(&maxima, ROWS)?, self.runner.get(&sums, ROWS)?))
    }

    fn compare_sums(
        &self,
        temperatures: &[f32; ROWS],
        (maxima, sums): &(Vec<f32>, Vec<f64>),
    ) -> anyhow::Result<usize> {
        let isa = self.runner.pool.isa();
        let of_cpu: Vec<LogSumExp> =
            self.rows().zip(temperatures).map(|(row, t)| LogSumExp::new(isa, row, *t)).collect();
        let want: Vec<f32> = of_cpu.iter().map(LogSumExp::max).collect();
        let compared = same("sum_exp, maxima", maxima, &want)?;
        // The logarithm is all that the host adds.
        let bits = |x: f64| (x + 0.0).to_bits();
        let got: Vec<u64> = sums.iter().map(|sum| bits(0.0 - ln64(*sum))).collect();
        let want: Vec<u64> = of_cpu.iter().map(|sum| bits(sum.logprob(sum.max()))).collect();
        Ok(compared + same_words("sum_exp", &got, &want)?)
    }

    fn largest(&self) -> anyhow::Result<(Vec<u32>, Vec<f32>)> {
        let (runner, count) = (self.runner, ROWS * CANDIDATES);
        let logits = runner.put(&self.values)?;
        let (ids, top) = (runner.put(&vec![0_u32; count])?, runner.put(&vec![0.0_f32; count])?);
        let args = args![&logits, &ids, &top, self.vocab as i32, CANDIDATES as i32];
        runner.launch("largest", [ROWS, 1, 1], (256, 0), args)?;
        Ok((runner.get(&ids, count)?, runner.get(&top, count)?))
    }

    fn compare_largest(&self) -> anyhow::Result<usize> {
        let (ids, top) = self.largest()?;
        let mut compared = 0;
        for (row, (ids, top)) in self.rows().zip(ids.chunks(CANDIDATES).zip(top.chunks(CANDIDATES)))
        {
            let want = top_k(self.runner.pool.isa(), row, CANDIDATES);
            let (want_ids, want_top): (Vec<u32>, Vec<f32>) = want.into_iter().unzip();
            compared += same("largest", &top[..want_top.len()], &want_top)?;
            same_words("largest, tokens", &words(&ids[..want_ids.len()]), &words(&want_ids))?;
        }
        Ok(compared)
    }

    fn compare_draws(&self, temperatures: &[f32; ROWS], sums: &[f64]) -> anyhow::Result<usize> {
        let runner = self.runner;
        let (ids, top) = self.largest()?;
        let (logits, sums) = (runner.put(&self.values)?, runner.put(sums)?);
        let (ids, top) = (runner.put(&ids)?, runner.put(&top)?);
        let mut compared = 0;
        for (i, (top_k, top_p, min_p)) in
            [(0, 1.0, 0.0), (40, 1.0, 0.0), (0, 0.9, 0.0), (20, 0.95, 0.1)].into_iter().enumerate()
        {
            let rule = |row: usize| Rule {
                key: 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(row as u64 + 1),
                position: (1_000 * i + row) as u32,
                temperature: if row == 2 { 0.0 } else { temperatures[row] },
                top_k,
                top_p,
                min_p,
                unused: 0,
            };
            let rules: Vec<Rule> = (0..ROWS).map(rule).collect();
            let (on_card, tokens) = (runner.put(&rules)?, runner.put(&[0_u32; ROWS])?);
            let (vocab, count) = (self.vocab as i32, CANDIDATES as i32);
            let args = args![&logits, &on_card, &ids, &top, &sums, &tokens, vocab, count];
            runner.launch("draw", [ROWS, 1, 1], (256, 0), args)?;
            let tokens: Vec<u32> = runner.get(&tokens, ROWS)?;
            for ((row, rule), token) in self.rows().zip(&rules).zip(tokens) {
                let sampling = Sampling {
                    temperature: rule.temperature,
                    top_k: top_k as usize,
                    top_p,
                    min_p,
                    noise_key: rule.key,
                    ..Sampling::greedy()
                };
                let drawn = Distribution::new(runner.pool.isa(), row, &sampling);
                let want = drawn.draw(&sampling, rule.position);
                // A draw that needs more than the largest is the host's.
                let is_host = token == u32::MAX && top_p < 1.0;
                ensure!(token == want || is_host, "draw: token {token}, not {want}, by {rule:?}");
                compared += usize::from(!is_host);
            }
        }
        Ok(compared)
    }

    fn compare_tokens(&self) -> anyhow::Result<usize> {
        let (runner, last) = (self.runner, self.vocab as u32 - 1);
        let query = |row: usize| Query { row: row as u32, token: [0, last, u32::MAX][row % 3] };
        let drawn: Vec<u32> = (0..ROWS as u32).map(|row| row % last.max(1)).collect();
        let queries: Vec<Query> = (0..ROWS).map(query).collect();
        let (logits, on_card, tokens) =
            (runner.put(&self.values)?, runner.put(&queries)?, runner.put(&drawn)?);
        let (found, ranks) = (runner.put(&[0.0_f32; ROWS])?, runner.put(&[0_u32; ROWS])?);
        let args = args![&logits, &on_card, &tokens, &found, &ranks, self.vocab as i32];
        runner.launch("look_up", [ROWS, 1, 1], (256, 0), args)?;
        let (mut want, mut want_ranks) = (Vec::new(), Vec::new());
        for ((row, query), drawn) in self.rows().zip(&queries).zip(drawn) {
            let token = if query.token == u32::MAX { drawn } else { query.token };
            want.push(row[token as usize]);
            want_ranks.push(rank(row, token));
        }
        let ranks: Vec<u32> = runner.get(&ranks, ROWS)?;
        same_words("look_up, ranks", &words(&ranks), &words(&want_ranks))?;
        same("look_up", &runner.get(&found, ROWS)?, &want)
    }
}

/// Sketches and exact hashes of rows.
fn proofs(runner: &KernelRunner<'_>, channels: usize) -> anyhow::Result<usize> {
    let scaled = |size: f32| runner.noise(channels).into_iter().map(move |x| x * size);
    let calibration = Calibration {
        exponents: scaled(4.0).map(|x| x as i8).collect(),
        means: scaled(200.0).map(|x| x as i16).collect(),
        shift: 4,
    };
    let bits: Vec<u16> =
        runner.noise(ROWS * channels).iter().map(|x| runner.dtype.round(8.0 * x)).collect();
    let entry = |row: usize| Entry {
        sketch_key: 0x1234_5678_9abc_def0 + row as u64,
        exact_key: u64::MAX - row as u64,
        position: 1_000_000 * row as u32,
        slot: row as i32,
    };
    let table: Vec<Entry> = (0..ROWS).map(entry).collect();
    let (rows, entries) = (runner.put(&bits)?, runner.put(&table)?);
    let (exponents, means) = (runner.put(&calibration.exponents)?, runner.put(&calibration.means)?);
    let mut compared = 0;
    for (residue_bits, projections, shift) in [(ResidueBits::U8, 4, 4), (ResidueBits::U4, 8, 6)] {
        let (sketches, hashes) = (runner.put(&[0_u32; ROWS])?, runner.put(&[0_u64; ROWS])?);
        let args = args![
            &rows,
            &exponents,
            &means,
            &entries,
            &sketches,
            &hashes,
            channels as i32,
            shift,
            projections,
            runner.is_f16(),
        ];
        runner.launch("sketch_rows", [ROWS, 1, 1], (128, 0), args)?;
        let (mut want, mut want_hashes) = (Vec::new(), Vec::new());
        for (entry, row) in table.iter().zip(bits.chunks_exact(channels)) {
            let Entry { sketch_key, exact_key, position, .. } = *entry;
            let values = runner.widened(row);
            let sketch = sketch(&calibration, residue_bits, sketch_key, position, &values);
            want.push(u32::from_le_bytes(sketch));
            want_hashes.push(exact_hash(exact_key, position, row));
        }
        let got: Vec<u32> = runner.get(&sketches, ROWS)?;
        compared += same_words("sketch_rows", &words(&got), &words(&want))?;
        let got: Vec<u64> = runner.get(&hashes, ROWS)?;
        compared += same_words("sketch_rows, hashes", &got, &want_hashes)?;
    }
    Ok(compared)
}
