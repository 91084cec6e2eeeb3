//! Reductions of logits: `logprob.cu` against `ops/logits.rs`.

use super::{args, kernels};
use crate::common::Noise;
use std::ffi::c_void;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::logits::{LogSumExp, rank, top_k};

#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
struct Reduced {
    max: f32,
    sum: f32,
    target_logit: f32,
    target_rank: u32,
    stop_rank: u32,
}

/// Relative tolerance of the sum of exponentials: f32 in another order, and another exp.
const SUM_ERROR_MAX: f64 = 2e-5;

#[test]
fn logit_reductions_agree_with_rust() {
    let mut noise = Noise(4);
    for vocab in [1, 5, 255, 256, 257, 49_152] {
        for (temperature, k, seed) in [(1.0_f32, 20, 0), (0.7, 5, 1), (1.3, 0, 9)] {
            let rows = 3;
            let logits: Vec<f32> =
                (0..rows * vocab).map(|_| (noise.next() * 3000.0).round() * 0.01).collect();
            let targets = [(vocab / 2) as i32, -1, vocab as i32 - 1];
            let stops = [0_i32, vocab as i32 / 3];
            let mut results = [Reduced::default(); 3];
            let (mut ids, mut top) = (vec![0_u32; rows * k + 1], vec![0.0_f32; rows * k + 1]);
            let inverse = 1.0 / temperature;
            let (l_ptr, t_ptr, s_ptr) = (logits.as_ptr(), targets.as_ptr(), stops.as_ptr());
            let (r_ptr, i_ptr, top_ptr) =
                (results.as_mut_ptr(), ids.as_mut_ptr(), top.as_mut_ptr());
            let (v, n, k32) = (vocab as i32, 2_i32, k as i32);
            let args = args![l_ptr, t_ptr, s_ptr, r_ptr, i_ptr, top_ptr, v, n, k32, inverse];
            kernels().launch("reduce_logits", [rows as u32, 1, 1], 256, 256 * k * 8, seed, &args);
            for r in 0..rows {
                let (row, got) = (&logits[r * vocab..][..vocab], results[r]);
                let lse = LogSumExp::new(Isa::best(), row, temperature);
                assert_eq!(got.max, lse.max());
                let want = -lse.logprob(got.max);
                assert!((f64::from(got.sum).ln() - want).abs() <= SUM_ERROR_MAX, "{vocab} {got:?}");
                let target = u32::try_from(targets[r]).ok();
                assert_eq!(got.target_rank, target.map_or(0, |t| rank(row, t)));
                let best_stop = stops.iter().map(|s| rank(row, *s as u32)).min();
                assert_eq!(Some(got.stop_rank), best_stop);
                let want = top_k(Isa::best(), row, k);
                let pairs = ids[r * k..].iter().copied().zip(top[r * k..].iter().copied());
                assert_eq!(pairs.take(want.len()).collect::<Vec<_>>(), want, "{vocab} {k}");
            }
        }
    }
}

#[test]
fn a_nan_shows_in_the_sum() {
    let mut logits = vec![0.5_f32; 1000];
    logits[777] = f32::NAN;
    let (targets, stops, mut result) = ([-1_i32], [0_i32], Reduced::default());
    let (l_ptr, t_ptr, s_ptr) = (logits.as_ptr(), targets.as_ptr(), stops.as_ptr());
    let (r_ptr, nothing) = (&raw mut result, std::ptr::null::<u32>());
    let (v, n, k, inverse) = (1000_i32, 0_i32, 0_i32, 1.0_f32);
    let args = args![l_ptr, t_ptr, s_ptr, r_ptr, nothing, nothing, v, n, k, inverse];
    kernels().launch("reduce_logits", [1, 1, 1], 256, 0, 0, &args);
    assert!(result.sum.is_nan());
}
