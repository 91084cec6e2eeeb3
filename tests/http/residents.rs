//! Models of a validator that take turns in memory.

use crate::common;
use parking_lot::Mutex;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use targon_engine::config::models_toml::{self, ModelConfig};
use targon_engine::lifecycle::residents::{LimitsFiles, Needs, NoModel, ResidentRules, residents};
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::validator::run::resident::Resident;
use targon_engine::validator::run::residents::{Residents, Sized};
use targon_engine::verify::evidence::Calibrated;
use targon_engine::verify::scrutiny::WantedScrutiny;

fn resident() -> Resident {
    let verifier = common::verifier(&common::tiny_served(3, common::options()));
    Resident { verifier, rates: Calibrated::default(), engine: None }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_leaves_once_no_round_needs_it_and_the_next_comes_then() {
    let loaded = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&loaded);
    let one = resident();
    let load = move |name: &str| {
        seen.lock().push(name.to_owned());
        if name == "broken" { Err(anyhow::anyhow!("its file is cut")) } else { Ok(one.clone()) }
    };
    let sized = |name: &str| Sized { name: name.into(), bytes: 6 };
    let residents = Residents::new(vec![sized("a"), sized("b")], 10, Arc::new(load.clone()));
    assert!(!residents.is_roomy());
    let listed = ["a".to_owned(), "b".to_owned(), "not here".to_owned()];
    residents.rotate(&listed).await.unwrap();
    let here = |r: &Residents| r.here().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    assert_eq!(here(&residents), ["a"]);
    let hold = residents.hold("a");
    let residents = Arc::new(residents);
    let own = Arc::clone(&residents);
    let rotating = tokio::spawn(async move { own.rotate(&listed).await });
    tokio::time::sleep(Duration::from_millis(500)).await;
    // It is offered no more, but a round that has asked for it is checked with it.
    assert!(here(&residents).is_empty() && residents.get("a").is_some());
    assert_eq!(*loaded.lock(), ["a"]);
    drop(hold);
    rotating.await.unwrap().unwrap();
    assert_eq!(here(&residents), ["b"]);
    assert!(residents.get("a").is_none());
    let listed = ["b".to_owned()];
    residents.rotate(&listed).await.unwrap();
    assert_eq!((here(&residents), loaded.lock().len()), (vec!["b".to_owned()], 2));
    // One that cannot be loaded keeps no other out.
    let broken = Residents::new(vec![sized("broken"), sized("c")], 100, Arc::new(load));
    let error = broken.rotate(&["c".to_owned(), "broken".to_owned()]).await.unwrap_err();
    assert_eq!(error.to_string(), "broken cannot be loaded: its file is cut");
    assert_eq!(here(&broken), ["c"]);
}

/// Of a tiny model, and of one whose files are not there.
fn models(dir: &Path) -> Vec<ModelConfig> {
    common::write_checkpoint(&dir.join("m"), &common::tiny_config(), 3);
    let entry =
        |name: &str, path: &str| format!("[[model]]\nname = \"{name}\"\npath = \"{path}\"\n");
    let text = entry("tiny", "m") + &entry("gone", "nowhere");
    models_toml::parse(&dir.join("models.toml"), &text, &[]).unwrap().models
}

async fn prepared(dir: &Path, needs: Needs) -> Result<Residents, NoModel> {
    let limits = Arc::new(LimitsFiles::read(&[]).unwrap());
    let rules = ResidentRules { limits, exact: true, scrutiny: WantedScrutiny::NOTHING };
    residents(models(dir), needs, (Pool::new(2, Isa::best()).unwrap(), rules), &common::Quiet).await
}

#[tokio::test(flavor = "multi_thread")]
async fn models_that_fit_are_planned_then_loaded_by_the_rules() {
    let dir = tempfile::tempdir().unwrap();
    let needs = |tokens| Needs { checks: 2, tokens, budget: 1 << 40 };
    let residents = prepared(dir.path(), needs(Some(40))).await.unwrap();
    // The other one is left out; the log says why.
    assert_eq!((residents.names(), residents.is_roomy()), (vec!["tiny".to_owned()], true));
    assert!(residents.here().is_empty());
    residents.rotate(&residents.names()).await.unwrap();
    let tiny = residents.get("tiny").unwrap();
    assert_eq!(tiny.verifier.context_max, 40);
    assert!(tiny.verifier.limits.exact && tiny.engine.is_some());
    let whole = prepared(dir.path(), needs(None)).await.unwrap();
    whole.rotate(&whole.names()).await.unwrap();
    assert!(whole.get("tiny").unwrap().verifier.context_max > 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_that_holds_no_model_is_refused_for_each_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let needs = Needs { checks: 2, tokens: Some(40), budget: 1000 };
    let error = prepared(dir.path(), needs).await.err().unwrap().to_string();
    let (tiny, gone) = error.split_once("; gone cannot be verified: ").unwrap();
    assert!(tiny.starts_with("tiny cannot be verified: needs "), "{error}");
    assert!(tiny.contains("with 3 contexts of 40 tokens, but only 1000 B may be"), "{error}");
    assert!(gone.contains("nowhere"), "{error}");
}
