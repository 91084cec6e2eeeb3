use super::super::dtype::Dtype;
use super::super::lanes::{Isa, LANES, Lanes, Scalar};
use super::super::math;
use super::super::pool::Pool;
use super::super::product::BLOCK_K;
use super::*;

const HEADS: usize = 6;
const DIMS: KvDims = KvDims { layers: 1, kv_heads: 2, head_dim: 48 };
const ROW_LEN: usize = (HEADS + 2 * DIMS.kv_heads) * DIMS.head_dim;
const K_AT: usize = HEADS * DIMS.head_dim;

fn rows(count: usize) -> Vec<f32> {
    let mut state = 5_u32;
    (0..count * ROW_LEN)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state as f32 / u32::MAX as f32 - 0.5) * 4.0
        })
        .collect()
}

/// What the rows of `segment` attend to in a cache that holds all of its positions.
fn attended(
    cache: &KvCache,
    turn: &Turn<'_>,
    attention: Attention,
    segment: Segment,
    qkv: &[f32],
) -> Vec<u16> {
    let rows = segment.rows.clone();
    let mut out = Rounded::new(cache.dtype(), K_AT);
    cache.attend(turn, 0, attention, &[segment], (qkv, ROW_LEN), &mut out);
    rows.flat_map(|row| out.bits(row).to_vec()).collect()
}

/// Attention over all `count` rows, in steps of the given sizes.
fn run(isa: Isa, dtype: Dtype, attention: Attention, qkv: &[f32], steps: &[usize]) -> Vec<u16> {
    let pool = Pool::new(2, isa).unwrap();
    let turn = pool.turn();
    let mut cache = KvCache::new(DIMS, dtype, 8).unwrap();
    let mut result = Vec::new();
    let mut start = 0;
    for step in steps {
        let segment = Segment { rows: 0..*step, start, blocks: vec![3, 1, 6, 2] };
        let qkv = &qkv[start * ROW_LEN..][..step * ROW_LEN];
        cache.store(&turn, 0, std::slice::from_ref(&segment), (qkv, ROW_LEN, K_AT));
        result.extend(attended(&cache, &turn, attention, segment, qkv));
        start += step;
    }
    result
}

/// Softmax attention in f64 over the rounded queries, keys and values.
fn naive(dtype: Dtype, a: Attention, qkv: &[f32], row: usize, head: usize) -> Vec<f64> {
    let kv_head = head / (HEADS / DIMS.kv_heads);
    let stored = |at: usize| f64::from(dtype.widen(dtype.round(qkv[at])));
    let first = (row + 1).saturating_sub(a.window.unwrap_or(usize::MAX));
    let scores: Vec<f64> = (first..=row)
        .map(|j| {
            let dot: f64 = (0..DIMS.head_dim)
                .map(|d| {
                    let q = stored(row * ROW_LEN + head * DIMS.head_dim + d);
                    q * stored(j * ROW_LEN + K_AT + kv_head * DIMS.head_dim + d)
                })
                .sum();
            let score = dot * f64::from(a.scale);
            a.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
        })
        .collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    let v_at = K_AT + (DIMS.kv_heads + kv_head) * DIMS.head_dim;
    (0..DIMS.head_dim)
        .map(|d| {
            scores
                .iter()
                .zip(first..)
                .map(|(s, j)| (s - max).exp() / total * stored(j * ROW_LEN + v_at + d))
                .sum()
        })
        .collect()
}

fn variants() -> Vec<Attention> {
    let plain = Attention { heads: HEADS, scale: 0.2, softcap: None, window: None };
    vec![
        plain,
        Attention { window: Some(33), ..plain },
        Attention { softcap: Some(5.0), window: Some(7), ..plain },
    ]
}

#[test]
fn results_match_plain_softmax_attention() {
    let count = 75;
    let qkv = rows(count);
    for dtype in [Dtype::Bf16, Dtype::F16] {
        for attention in variants() {
            let got = run(Isa::best(), dtype, attention, &qkv, &[count]);
            for row in 0..count {
                for head in 0..HEADS {
                    let want = naive(dtype, attention, &qkv, row, head);
                    for (d, want) in want.iter().enumerate() {
                        let got = got[row * K_AT + head * DIMS.head_dim + d];
                        let diff = f64::from(dtype.widen(got)) - want;
                        // The result's own rounding, and that of the weights: each moves the mean
                        // by at most 2^-9 of values up to 2, above and below the line.
                        assert!(diff.abs() <= 4e-3 * want.abs().max(2.0), "{row} {head} {d}");
                    }
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_chunks_instruction_set_or_threads() {
    let count = 100;
    let qkv = rows(count);
    for dtype in [Dtype::Bf16, Dtype::F16] {
        for attention in variants() {
            let reference = run(Isa::SCALAR, dtype, attention, &qkv, &[count]);
            for isa in Isa::available() {
                for steps in [vec![count], vec![1; count], vec![33, 1, 31, 1, 34]] {
                    let got = run(isa, dtype, attention, &qkv, &steps);
                    assert!(got == reference, "{isa} {dtype} {attention:?} {steps:?}");
                }
            }
        }
    }
}

/// What of the canon a control arm changes.
#[derive(Clone, Copy)]
struct Rules {
    partition: usize,
    rounds_weights: bool,
    rounds_queries: bool,
}

const CANON: Rules =
    Rules { partition: PARTITION_TOKENS, rounds_weights: true, rounds_queries: true };

/// Two chains over each block of 32.
fn product(pairs: impl Iterator<Item = (f32, f32)>) -> f32 {
    let (mut sum, mut chains) = (0.0, [0.0_f32; 2]);
    let mut count = 0;
    for (k, (a, b)) in pairs.enumerate() {
        chains[k % 2] = a.mul_add(b, chains[k % 2]);
        count = k + 1;
        if count.is_multiple_of(BLOCK_K) {
            sum += chains[0] + chains[1];
            chains = [0.0; 2];
        }
    }
    if count.is_multiple_of(BLOCK_K) { sum } else { sum + (chains[0] + chains[1]) }
}

fn exp(x: f32) -> f32 {
    math::exp(Scalar::splat(x)).to_array()[0]
}

/// Attention of one query by the text of the module, one number at a time.
fn canon(
    dtype: Dtype,
    a: Attention,
    rules: Rules,
    qkv: &[f32],
    (row, head): (usize, usize),
) -> Vec<u16> {
    let round = |x: f32| dtype.widen(dtype.round(x));
    let (dim, kv_head) = (DIMS.head_dim, head / (HEADS / DIMS.kv_heads));
    let stored = |j: usize, at: usize| round(qkv[j * ROW_LEN + K_AT + at]);
    let query = |d: usize| {
        let q = qkv[row * ROW_LEN + head * dim + d];
        if rules.rounds_queries { round(q) } else { q }
    };
    let seen = (row + 1).saturating_sub(a.window.unwrap_or(usize::MAX))..row + 1;
    let (mut max, mut sum, mut out) = (f32::NEG_INFINITY, 0.0_f32, vec![0.0_f32; dim]);
    for partition in seen.start / rules.partition..=row / rules.partition {
        let (mut m, mut s, mut o) = (f32::NEG_INFINITY, 0.0_f32, vec![0.0_f32; dim]);
        let own = partition * rules.partition..(partition + 1) * rules.partition;
        for base in own.step_by(BLOCK_TOKENS) {
            let positions: Vec<usize> = (base..base + BLOCK_TOKENS).collect();
            if !positions.iter().any(|j| seen.contains(j)) {
                continue;
            }
            let score = |j: &usize| {
                let dot = product((0..dim).map(|d| (stored(*j, kv_head * dim + d), query(d))));
                let capped =
                    |cap: f32| math::tanh(Scalar::splat(dot * a.scale / cap)).to_array()[0] * cap;
                a.softcap.map_or(dot * a.scale, capped)
            };
            let scores = positions.iter().map(|j| match seen.contains(j) {
                true => score(j),
                false => f32::NEG_INFINITY,
            });
            let scores: Vec<f32> = scores.collect();
            let new = scores.iter().copied().fold(m, f32::max);
            let weigh = |x: &f32| exp(x - new);
            let weights: Vec<f32> = match rules.rounds_weights {
                true => scores.iter().map(weigh).map(round).collect(),
                false => scores.iter().map(weigh).collect(),
            };
            let factor = exp(m - new);
            let lanes: Vec<f32> = (0..LANES).map(|i| weights[i] + weights[i + LANES]).collect();
            // SAFETY: there are 16 lanes.
            s = s.mul_add(factor, unsafe { Scalar::load(lanes.as_ptr()) }.sum());
            for (d, o) in o.iter_mut().enumerate() {
                let at = (DIMS.kv_heads + kv_head) * dim + d;
                // Nothing was stored behind the row.
                let value = |j: usize| if j > row { 0.0 } else { stored(j, at) };
                let values = positions.iter().zip(&weights).map(|(j, w)| (*w, value(*j)));
                *o = o.mul_add(factor, product(values));
            }
            m = new;
        }
        let new = max.max(m);
        let (f, g) = (exp(max - new), exp(m - new));
        (max, sum) = (new, sum.mul_add(f, s * g));
        out.iter_mut().zip(o).for_each(|(out, o)| *out = out.mul_add(f, o * g));
    }
    out.iter().map(|o| dtype.round(o / sum)).collect()
}

/// The results of `rows`, with the keys and values of all before them in the cache.
fn attend(
    (isa, threads): (Isa, usize),
    dtype: Dtype,
    attention: Attention,
    qkv: &[f32],
    rows: Range<usize>,
) -> Vec<u16> {
    let pool = Pool::new(threads, isa).unwrap();
    let turn = pool.turn();
    let count = rows.end.div_ceil(BLOCK_TOKENS);
    let blocks: Vec<u32> = (0..count as u32).rev().collect();
    let mut cache = KvCache::new(DIMS, dtype, count).unwrap();
    let all = [Segment { rows: 0..rows.end, start: 0, blocks: blocks.clone() }];
    cache.store(&turn, 0, &all, (qkv, ROW_LEN, K_AT));
    let segment = Segment { rows: 0..rows.len(), start: rows.start, blocks };
    let own = &qkv[rows.start * ROW_LEN..rows.end * ROW_LEN];
    attended(&cache, &turn, attention, segment, own)
}

fn long_variants() -> Vec<Attention> {
    let long = variants().into_iter();
    long.chain([Attention { window: Some(700), ..variants()[0] }]).collect()
}

/// By the text of the module, for `rows`.
fn canon_rows(
    dtype: Dtype,
    a: Attention,
    rules: Rules,
    qkv: &[f32],
    rows: Range<usize>,
) -> Vec<u16> {
    let queries = rows.flat_map(|r| (0..HEADS).map(move |h| (r, h)));
    queries.flat_map(|at| canon(dtype, a, rules, qkv, at)).collect()
}

#[test]
fn long_contexts_follow_the_canon_word_for_word() {
    // Within the second partition, over its end, and within the third.
    let ranges = [600..603, 1022..1026, 1099..1100];
    let qkv = rows(1100);
    for dtype in [Dtype::Bf16, Dtype::F16] {
        for a in long_variants() {
            for rows in ranges.clone() {
                let want = canon_rows(dtype, a, CANON, &qkv, rows.clone());
                for isa in Isa::available() {
                    // One thread walks the partitions, three share them.
                    for threads in [1, 3] {
                        let got = attend((isa, threads), dtype, a, &qkv, rows.clone());
                        assert!(got == want, "{isa} {threads} {dtype} {a:?} {rows:?}");
                    }
                }
            }
        }
    }
}

/// The control of the test above: its data tells rules apart.
#[test]
fn other_rules_give_other_bits() {
    let (qkv, a) = (rows(1100), variants()[0]);
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let want = canon_rows(dtype, a, CANON, &qkv, 1090..1096);
        for (name, rules) in [
            ("partitions of 256", Rules { partition: 256, ..CANON }),
            ("partitions of 1024", Rules { partition: 1024, ..CANON }),
            ("weights as they are", Rules { rounds_weights: false, ..CANON }),
            ("queries as they are", Rules { rounds_queries: false, ..CANON }),
        ] {
            let got = canon_rows(dtype, a, rules, &qkv, 1090..1096);
            assert!(got != want, "{name}, {dtype}");
        }
    }
}

#[test]
fn a_long_context_is_split_only_where_threads_would_idle() {
    let segment = |rows, start| Segment { rows, start, blocks: vec![] };
    let (a, kv_heads) = (variants()[0], DIMS.kv_heads);
    let splits = |segments: &[Segment], threads| {
        let plan = Plan::new(segments, a, kv_heads, threads);
        plan.splits.iter().filter(|s| s.is_some()).count()
    };
    assert_eq!(splits(&[segment(0..1, 8000)], 2), 1);
    assert_eq!(splits(&[segment(0..1, 8000)], 1), 0, "one thread");
    assert_eq!(splits(&[segment(0..1, 511)], 2), 0, "one partition");
    assert_eq!(splits(&[segment(0..512, 8000)], 2), 0, "many rows");
    let many: Vec<Segment> = (0..16).map(|i| segment(i..i + 1, 8000)).collect();
    assert_eq!(splits(&many, 2), 0, "many sequences");
    assert_eq!(splits(&many, 64), 16);
}
