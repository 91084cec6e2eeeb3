//! `bench engine` on a card: the report names the card, its own ceilings and energy, and what is to
//! be doubted of it.

use crate::common::{tiny_config, write_checkpoint};
use crate::engine::model_by;
use crate::failures::{alone, is_alone};
use crate::leave;
use std::path::Path;
use std::sync::Arc;
use targon_engine::bench::conditions::MarkKind;
use targon_engine::bench::report::facts::ModelFacts;
use targon_engine::bench::report::schema::{BenchReport, Phase, ReportKind};
use targon_engine::bench::site::Site;
use targon_engine::bench::sweep::{self, SweepSetup, SweepWatch};
use targon_engine::models::Identity;
use targon_engine::models::arithmetic::Arithmetic;
use targon_engine::models::device::Device;

/// Per cent of the time that others use the card, nanoseconds for which it was too hot, and whether
/// it counts its energy.
fn say(used: u32, hot: u64, energy: bool) {
    type Say = unsafe extern "C" fn(u32, u64, i32) -> i32;
    let library = unsafe { libloading::Library::new("libnvidia-ml.so.1") }.unwrap();
    unsafe { library.get::<Say>(b"fake_nvml_say").unwrap()(used, hot, energy.into()) };
    std::mem::forget(library);
}

/// A sweep of the tiny model on the first card; `during` is called before each run.
fn swept(arithmetic: Arithmetic, path: &Path, during: &dyn Fn()) -> anyhow::Result<BenchReport> {
    let doubts = Site::watch(Device::Cuda(0));
    let (model, pool) = model_by(arithmetic, Device::Cuda(0), path);
    let identity = Identity::of(&model, &pool)?;
    let site = Site::of(&model, &pool)?;
    let machine = site.machine();
    let facts =
        ModelFacts { name: "tiny".into(), weights_root: None, dtype: None, weights_bytes: None };
    let mut report = BenchReport::new(ReportKind::Engine, 0, machine, facts);
    report.marks.extend(doubts);
    let setup = SweepSetup {
        batches: vec![1, 2],
        depths: vec![40],
        tokens: 32,
        runs: 1,
        repeats_prompts: false,
        device: None,
    };
    let is_wanted = || {
        during();
        true
    };
    let mut watch = SweepWatch { is_wanted: &is_wanted, keep: &mut |_| Ok(()) };
    let model = Arc::into_inner(model).unwrap();
    sweep::run((model, identity), &site, &setup, &mut report, &mut watch)?;
    Ok(report)
}

#[test]
fn a_report_is_of_the_card_that_computed() {
    if !is_alone() {
        return alone("bench::a_report_is_of_the_card_that_computed", &[], &[]);
    }
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &tiny_config(), 3);
    // What is read for the ceiling is a share of what is free.
    leave(0, 128 << 20);
    say(0, 5, true);
    for arithmetic in [Arithmetic::Portable, Arithmetic::Tensor] {
        let report = swept(arithmetic, dir.path(), &|| ()).unwrap();
        let card = report.machine.card.as_ref().unwrap();
        assert_eq!((&*card.name, card.bus.as_deref()), ("stand-in H100", Some("0000:00:00.0")));
        let ceilings = report.ceilings.as_ref().unwrap();
        assert!(ceilings.read_bandwidth > 1e6 && ceilings.fma_peak > 1e6, "{ceilings:?}");
        let phases: Vec<Phase> = report.rows.iter().map(|row| row.phase).collect();
        assert_eq!(phases.len(), 6);
        for phase in [Phase::Prefill, Phase::Decode, Phase::Verify] {
            assert_eq!(phases.iter().filter(|p| **p == phase).count(), 2);
        }
        for row in &report.rows {
            // The card draws 100 watts, counted in millijoules: one at either end of a run.
            let watts = row.joules_per_token.unwrap() * row.speed.mean;
            let seconds = row.tokens as f64 / row.speed.mean;
            assert!((watts - 100.0).abs() < 10.0 + 2e-3 / seconds, "{row:?}");
        }
        let of_card = [MarkKind::Throttled, MarkKind::WarmCache];
        assert!(!report.marks.iter().any(|m| of_card.contains(&m.kind)), "{:?}", report.marks);
        assert!(!report.marks.iter().any(|m| m.what.contains("the card")), "{:?}", report.marks);
        assert!(!report.is_partial);
    }

    // Others use it, it gets too hot, and does not count its energy.
    say(37, 5, false);
    let report = swept(Arithmetic::Tensor, dir.path(), &|| say(37, 2_000_000_005, false)).unwrap();
    let says = |kind: MarkKind, what: &str| {
        report.marks.iter().any(|mark| mark.kind == kind && mark.what.contains(what))
    };
    assert!(says(MarkKind::Busy, "the card was used for 37 %"), "{:?}", report.marks);
    assert!(
        says(MarkKind::Throttled, "heat slowed the card down for 2.000 s"),
        "{:?}",
        report.marks
    );
    assert!(report.rows.iter().all(|row| row.joules_per_token.is_none()));

    // No room for what is asked.
    leave(0, 2 << 20);
    let refused = swept(Arithmetic::Tensor, dir.path(), &|| ()).unwrap_err().to_string();
    assert!(
        refused.contains("--batch 2 needs") && refused.contains("that the card has"),
        "{refused}"
    );
}
