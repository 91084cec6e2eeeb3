//! The attack bench's changed weights: nothing but the matrices of layers changes, in every dense
//! family.

use crate::common::{decoder, golden};
use std::sync::Arc;
use targon_engine::bench::attack::tamper::{Tamper, tampered};
use targon_engine::models::checkpoint::Checkpoint;
use targon_engine::models::cpu::{CpuPass, decoder::Decoder};
use targon_engine::ops::dtype::Dtype;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::verify::prefill::hidden_rows;

fn hidden(decoder: &Arc<Decoder>, pool: &Pool) -> Vec<Vec<u16>> {
    let pass = |blocks| Ok(Box::new(CpuPass::new(decoder, pool, blocks).unwrap()) as Box<_>);
    hidden_rows(pass, &[7, 20, 3, 9, 8], &[5, 6, 7]).unwrap()
}

fn check(family: &str) {
    let pool = Pool::new(1, Isa::best()).unwrap();
    let checkpoint = Checkpoint::open(&golden(family)).unwrap();
    let rows_of = |tamper| {
        let scratch = tempfile::tempdir().unwrap();
        tampered(&checkpoint, &pool, tamper, scratch.path())
            .map(|model| hidden(&Arc::new(model), &pool))
    };
    if checkpoint.spec().unwrap().feed_forward.experts.is_some() {
        let refusal = rows_of(Tamper::Fp8).unwrap_err().to_string();
        assert_eq!(
            refusal,
            format!("weights of a mixture of experts ({family}) are not changed here")
        );
        return;
    }
    let own = Arc::new(decoder(&checkpoint, Some(Dtype::Bf16), &pool).unwrap());
    let honest = hidden(&own, &pool);
    // No layer has this number, so everything is copied as it is.
    assert_eq!(rows_of(Tamper::SkippedLayer(usize::MAX)).unwrap(), honest);
    assert_ne!(rows_of(Tamper::SkippedLayer(0)).unwrap(), honest);
    assert_ne!(rows_of(Tamper::Integers { bits: 4, group: 0 }).unwrap(), honest);
}

crate::common::golden_tests!(check);
