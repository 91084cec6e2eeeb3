//! Every family against Hugging Face transformers (scripts/golden.py says how the truth is made).
//!
//! Two comparisons: with the same roundings only the order of additions differs, so the match is
//! tight; against plain f32 the roundings show as well. A wrong window, cap, bias or rotation is
//! orders of magnitude above either limit.

use crate::common::golden;
use safetensors::SafeTensors;
use std::sync::Arc;
use targon_engine::models::checkpoint::Checkpoint;
use targon_engine::models::cpu::CpuPass;
use targon_engine::models::cpu::decoder::Decoder;
use targon_engine::models::pass::{Batch, Pass, RowAsk, blocks_of};
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;

/// Relative root-mean-square error with equal roundings. Measured: at most 1.9e-3 (an activation
/// next to a rounding boundary may fall to the other side).
const CANON_ERROR_MAX: f64 = 3e-3;
/// Against plain f32, in units of transformers' own change under the same roundings, which is
/// between 9e-4 (f16) and 3e-2 (a mixture whose routing flips). Measured: 1.00.
const PLAIN_RATIO_MAX: f64 = 1.2;

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let bytes = file.tensor(name).unwrap().data().to_vec();
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Root of the mean square of `a - b`, relative to `b`; NaN counts as infinite.
fn error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f64| x * x;
    let diff: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let norm: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    let error = (diff / norm).sqrt();
    if error.is_nan() { f64::INFINITY } else { error }
}

/// Hidden rows and logits of all tokens in one step.
fn run(decoder: &Arc<Decoder>, pool: &Pool, ids: &[u32]) -> (Vec<f32>, Vec<f32>) {
    let blocks = blocks_of(ids.len());
    let mut pass = CpuPass::new(decoder, pool, blocks).unwrap();
    let mut batch = Batch::default();
    batch.push(ids, 0, (0..blocks as u32).rev().collect());
    let ask = |row| RowAsk { hidden: true, logits: true, ..RowAsk::new(row, row) };
    let asks: Vec<RowAsk<'_>> = (0..ids.len()).map(ask).collect();
    let (mut hidden, mut logits) = (Vec::new(), Vec::new());
    for report in pass.step(&batch, &asks).unwrap() {
        let report = report.unwrap();
        hidden.extend(report.hidden.unwrap().iter().map(|bits| decoder.dtype.widen(*bits)));
        logits.extend(report.logits.unwrap());
    }
    (hidden, logits)
}

fn check(family: &str) {
    let dir = golden(family);
    let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
    let truth = SafeTensors::deserialize(&bytes).unwrap();
    let ids = truth.tensor("ids").unwrap().data().to_vec();
    let ids: Vec<u32> =
        ids.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
    let pool = Pool::new(2, Isa::best()).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let decoder = Arc::new(crate::common::decoder(&checkpoint, None, &pool).unwrap());
    let (hidden, logits) = run(&decoder, &pool, &ids);
    let canon = error(&logits, &floats(&truth, "canon_logits"));
    let plain = error(&logits, &floats(&truth, "logits"));
    let round = |x: &f32| decoder.dtype.widen(decoder.dtype.round(*x));
    let want: Vec<f32> = floats(&truth, "canon_hidden").iter().map(round).collect();
    let rows = error(&hidden, &want);
    println!("{family:12} logits {canon:.1e} (plain f32 {plain:.1e}), hidden rows {rows:.1e}");
    assert!(canon <= CANON_ERROR_MAX, "{family}: logits off by {canon:.1e}");
    let own = error(&floats(&truth, "canon_logits"), &floats(&truth, "logits"));
    assert!(plain <= PLAIN_RATIO_MAX * own, "{family}: logits off by {plain:.1e} from plain f32");
    assert!(rows <= CANON_ERROR_MAX, "{family}: hidden rows off by {rows:.1e}");
}

crate::common::golden_tests!(check);

#[test]
fn every_golden_directory_is_checked() {
    for entry in std::fs::read_dir(golden("")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let is_known = GOLDEN.contains(&name.as_str());
        assert!(is_known, "tests/data/golden/{name} has no test");
    }
}
