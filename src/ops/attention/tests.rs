use super::super::lanes::Isa;
use super::super::pool::Pool;
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

/// Attention over all `count` rows, in steps of the given sizes.
fn run(isa: Isa, dtype: Dtype, attention: Attention, qkv: &[f32], steps: &[usize]) -> Vec<u16> {
    let pool = Pool::new(2, isa).unwrap();
    let turn = pool.turn();
    let mut cache = KvCache::new(DIMS, dtype, 8).unwrap();
    let mut result = Vec::new();
    let mut start = 0;
    for step in steps {
        let segments = [Segment { rows: 0..*step, start, blocks: vec![3, 1, 6, 2] }];
        let qkv = &qkv[start * ROW_LEN..][..step * ROW_LEN];
        cache.store(&turn, 0, &segments, (qkv, ROW_LEN, K_AT));
        let mut out = Rounded::new(dtype, K_AT);
        cache.attend(&turn, 0, attention, &segments, (qkv, ROW_LEN), &mut out);
        (0..*step).for_each(|r| result.extend_from_slice(out.bits(r)));
        start += step;
    }
    result
}

/// Softmax attention in f64 over the rounded keys and values.
fn naive(dtype: Dtype, a: Attention, qkv: &[f32], row: usize, head: usize) -> Vec<f64> {
    let kv_head = head / (HEADS / DIMS.kv_heads);
    let stored = |at: usize| f64::from(dtype.widen(dtype.round(qkv[at])));
    let first = (row + 1).saturating_sub(a.window.unwrap_or(usize::MAX));
    let scores: Vec<f64> = (first..=row)
        .map(|j| {
            let dot: f64 = (0..DIMS.head_dim)
                .map(|d| {
                    let q = f64::from(qkv[row * ROW_LEN + head * DIMS.head_dim + d]);
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
                        // Half a unit of bf16 in the last place, and the f32 arithmetic.
                        assert!(diff.abs() <= 4e-3 * want.abs().max(0.5), "{row} {head} {d}");
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
            let reference = run(Isa::Scalar, dtype, attention, &qkv, &[count]);
            for isa in Isa::available() {
                for steps in [vec![count], vec![1; count], vec![33, 1, 31, 1, 34]] {
                    let got = run(isa, dtype, attention, &qkv, &steps);
                    assert!(got == reference, "{isa} {dtype} {attention:?} {steps:?}");
                }
            }
        }
    }
}
