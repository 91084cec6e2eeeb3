//! `draw.cu`: sums, the largest logits and draws against `ops/logits.rs` and the sampler.

use super::{args, broken, kernels};
use crate::common::Noise;
use std::ffi::c_void;
use targon_engine::models::sampler::{Distribution, Sampling};
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::logits::{LogSumExp, rank, top_k};
use targon_engine::ops::math::ln64;

/// The largest logits that a truncated draw starts from.
const CANDIDATES: usize = 256;

/// A row's rule as the kernel takes it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Rule {
    key: u64,
    position: u32,
    temperature: f32,
    top_k: i32,
    top_p: f32,
    min_p: f32,
    unused: i32,
}

/// Maxima and sums of exponentials by row.
fn sums(logits: &[f32], vocab: usize, temperatures: &[f32], seed: u64) -> (Vec<f32>, Vec<f64>) {
    let rows = logits.len() / vocab;
    let inverse: Vec<f32> = temperatures.iter().map(|t| 1.0 / t).collect();
    let (mut maxima, mut sums) = (vec![0.0_f32; rows], vec![0.0_f64; rows]);
    let (l, i) = (logits.as_ptr(), inverse.as_ptr());
    let (m, s, v) = (maxima.as_mut_ptr(), sums.as_mut_ptr(), vocab as i32);
    let args = args![l, i, m, s, v];
    kernels().launch("sum_exp", [rows as u32, 1, 1], 256, vocab.div_ceil(512) * 4, seed, &args);
    (maxima, sums)
}

fn largest(logits: &[f32], vocab: usize, k: usize, seed: u64) -> (Vec<u32>, Vec<f32>) {
    let rows = logits.len() / vocab;
    let (mut ids, mut top) = (vec![7_u32; rows * k], vec![7.0_f32; rows * k]);
    let (l, i, t) = (logits.as_ptr(), ids.as_mut_ptr(), top.as_mut_ptr());
    let (v, k) = (vocab as i32, k as i32);
    let args = args![l, i, t, v, k];
    kernels().launch("largest", [rows as u32, 1, 1], 256, 0, seed, &args);
    (ids, top)
}

/// Rows of logits in steps of 0.01, so that there are ties.
fn rows(noise: &mut Noise, rows: usize, vocab: usize, spread: f32) -> Vec<f32> {
    (0..rows * vocab).map(|_| (noise.next() * spread * 100.0).round() * 0.01).collect()
}

/// Rows in which a few tokens hold most of the probability, as in a model's.
fn peaked_rows(noise: &mut Noise, rows: usize, vocab: usize, scale: f64) -> Vec<f32> {
    let logit = |u: f64| (-u.ln() * scale * 100.0).round() * 0.01;
    (0..rows * vocab)
        .map(|_| logit((noise.below(1 << 20) as f64 + 1.0) / f64::from(1 << 20)) as f32)
        .collect()
}

#[test]
fn sums_of_exponentials_equal_their_twin() {
    let mut noise = Noise(51);
    for vocab in [1, 15, 16, 17, 511, 512, 513, 1_040, 49_152] {
        let temperatures = [1.0_f32, 0.7, 1.3];
        let mut logits = rows(&mut noise, 3, vocab, 20.0);
        logits[vocab - 1] = f32::NEG_INFINITY;
        logits[0] = 1.5;
        let (maxima, sums) = sums(&logits, vocab, &temperatures, vocab as u64 % 3);
        for (r, row) in logits.chunks_exact(vocab).enumerate() {
            let lse = LogSumExp::new(Isa::best(), row, temperatures[r]);
            assert_eq!(maxima[r], lse.max(), "{vocab}");
            // The logarithm is all that the host adds.
            let want = lse.logprob(lse.max());
            assert_eq!((0.0 - ln64(sums[r])).to_bits(), (want + 0.0).to_bits(), "{vocab} row {r}");
        }
    }
}

#[test]
fn rows_that_are_no_numbers_show_in_the_sum() {
    for broken in [f32::NAN, f32::INFINITY] {
        for at in [0, 600, 999] {
            let mut logits = vec![0.5_f32; 1000];
            logits[at] = broken;
            assert!(!ln64(sums(&logits, 1000, &[1.0], 0).1[0]).is_finite(), "{broken} at {at}");
        }
    }
}

#[test]
fn the_largest_logits_equal_their_twin() {
    let mut noise = Noise(52);
    for (i, vocab) in [1, 200, 256, 257, 1_000, 49_152].into_iter().enumerate() {
        for k in [1, 20, CANDIDATES] {
            let mut logits = rows(&mut noise, 2, vocab, if i % 2 == 0 { 10.0 } else { 0.02 });
            logits[vocab..].fill(0.25);
            let (ids, top) = largest(&logits, vocab, k, i as u64);
            for (r, row) in logits.chunks_exact(vocab).enumerate() {
                let want = top_k(Isa::best(), row, k);
                let got = ids[r * k..].iter().copied().zip(top[r * k..].iter().copied());
                assert_eq!(got.take(want.len()).collect::<Vec<_>>(), want, "{vocab} {k} row {r}");
                assert!(ids[r * k..][want.len()..k].iter().all(|id| *id == u32::MAX));
            }
        }
    }
}

#[test]
fn logits_and_ranks_of_single_tokens_equal_their_twin() {
    let mut noise = Noise(56);
    for vocab in [1, 255, 257, 5_000] {
        let logits = rows(&mut noise, 3, vocab, 2.0);
        let last = vocab as u32 - 1;
        // Of each row a known token and the drawn one; in the last row none was drawn.
        let tokens = [last / 2, 0, u32::MAX];
        let queries = [[0, last], [0, u32::MAX], [1, 0], [1, u32::MAX], [2, last], [2, u32::MAX]];
        let (mut found, mut ranks) = ([7.0_f32; 6], [7_u32; 6]);
        let (l, q, t) = (logits.as_ptr(), queries.as_ptr(), tokens.as_ptr());
        let (f, r, v) = (found.as_mut_ptr(), ranks.as_mut_ptr(), vocab as i32);
        let args = args![l, q, t, f, r, v];
        kernels().launch("look_up", [6, 1, 1], 256, 0, vocab as u64 % 3, &args);
        for (i, [row, token]) in queries.into_iter().enumerate() {
            let token = if token == u32::MAX { tokens[row as usize] } else { token };
            let row = &logits[row as usize * vocab..][..vocab];
            match token {
                u32::MAX => assert_eq!(ranks[i], 0),
                token => {
                    assert_eq!((found[i], ranks[i]), (row[token as usize], rank(row, token)));
                }
            }
        }
    }
}

/// Tokens by row, and which the kernel left to the host.
fn drawn(logits: &[f32], vocab: usize, rules: &[Rule], seed: u64) -> Vec<u32> {
    let temperatures: Vec<f32> = rules.iter().map(|r| r.temperature.max(1e-3)).collect();
    let (_, sums) = sums(logits, vocab, &temperatures, 0);
    let (ids, top) = largest(logits, vocab, CANDIDATES, 0);
    let mut tokens = vec![0_u32; rules.len()];
    let (l, r, i, t) = (logits.as_ptr(), rules.as_ptr(), ids.as_ptr(), top.as_ptr());
    let (s, o, v, k) = (sums.as_ptr(), tokens.as_mut_ptr(), vocab as i32, CANDIDATES as i32);
    let args = args![l, r, i, t, s, o, v, k];
    kernels().launch("draw", [rules.len() as u32, 1, 1], 256, 0, seed, &args);
    tokens
}

#[test]
fn draws_equal_those_of_the_cpu() {
    let mut noise = Noise(53);
    let (mut left, mut count) = (0, 0);
    for vocab in [1, 6, 250, 1_000, 49_153] {
        let truncations = [
            (0, 1.0_f32, 0.0_f32),
            (40, 1.0, 0.0),
            (0, 0.9, 0.0),
            (0, 1.0, 0.05),
            (300, 0.8, 0.0),
            (20, 0.95, 0.1),
            (0, 0.999, 0.0),
        ];
        for (i, (top_k, top_p, min_p)) in truncations.into_iter().enumerate() {
            let count_rows = 6_usize;
            let logits = peaked_rows(&mut noise, count_rows, vocab, 2.5);
            let temperatures = [1.0, 0.0, 0.6, 1.7, 1.0, 1e-6];
            let rules: Vec<Rule> = (0..count_rows)
                .map(|r| Rule {
                    key: 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(r as u64 + 1),
                    position: 1_000 * i as u32 + r as u32,
                    temperature: temperatures[r],
                    top_k,
                    top_p,
                    min_p,
                    unused: 0,
                })
                .collect();
            let tokens = drawn(&logits, vocab, &rules, i as u64 % 3);
            for (r, row) in logits.chunks_exact(vocab).enumerate() {
                let sampling = Sampling {
                    temperature: rules[r].temperature,
                    top_k: top_k as usize,
                    top_p,
                    min_p,
                    noise_key: rules[r].key,
                    ..Sampling::greedy()
                };
                let drawn = Distribution::new(Isa::best(), row, &sampling);
                let want = drawn.draw(&sampling, rules[r].position);
                count += 1;
                match tokens[r] {
                    u32::MAX => left += 1,
                    token => assert_eq!(token, want, "{vocab} {top_k} {top_p} {min_p} row {r}"),
                }
            }
        }
    }
    assert!(left * 5 < count, "{left} of {count} rows were left to the host");
}

#[test]
fn a_draw_with_other_noise_is_noticed() {
    let mut noise = Noise(54);
    let logits = rows(&mut noise, 1, 5_000, 2.0);
    let rule = |key| Rule {
        key,
        position: 9,
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        unused: 0,
    };
    let tokens: Vec<u32> = (0..8).map(|key| drawn(&logits, 5_000, &[rule(key)], 0)[0]).collect();
    assert!(tokens.iter().any(|t| *t != tokens[0]), "{tokens:?}");
}

#[test]
fn a_sum_without_its_barrier_is_noticed() {
    let (vocab, scale) = (40_000_usize, 1.0_f32);
    let logits = rows(&mut Noise(55), 1, vocab, 20.0);
    let (_, want) = sums(&logits, vocab, &[1.0], 0);
    let (mut max, mut sum) = (0.0_f32, 0.0_f64);
    let (l, i, m, s) = (logits.as_ptr(), &raw const scale, &raw mut max, &raw mut sum);
    let v = vocab as i32;
    let args = args![l, i, m, s, v];
    let broken = broken("draw", "CONTROL_NO_BARRIER");
    broken.launch("sum_exp", [1, 1, 1], 256, vocab.div_ceil(512) * 4, 0, &args);
    assert_ne!(sum.to_bits(), want[0].to_bits());
}
