//! Models of a validator that take turns in memory.

use crate::common;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;
use targon_engine::validator::run::resident::Resident;
use targon_engine::validator::run::residents::{Residents, Sized};
use targon_engine::verify::evidence::Calibrated;

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
