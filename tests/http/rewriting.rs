//! Passages that a validator's own engine rewrites: what it writes is what a server would answer.

use crate::common;
use crate::common::site::{CHAT, COMPLETION, Site, post, site};
use targon_engine::chance::Chance;
use targon_engine::engine::Options;
use targon_engine::models::Model;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::validator::prompt::dataset::Passages;
use targon_engine::validator::prompt::{Draft, read_query};
use targon_engine::validator::run::resident::Resident;
use targon_engine::validator::run::rewriting::{Rewriting, query};
use targon_engine::verify::evidence::Calibrated;

const DATE: &str = "2026-01-31";
const MODEL: &str = "tiny";

/// Room for a passage, of which a tokenizer over bytes makes many tokens.
fn roomy() -> Options {
    Options { context_max: 2048, blocks: 256, ..common::options() }
}

fn resident(site: &Site) -> Resident {
    let engine = Some(site.engine.clone());
    Resident { verifier: common::verifier(&site.served), rates: Calibrated::default(), engine }
}

fn draft(key: u64) -> Draft {
    let mut chance = Chance::seeded(key);
    Draft::draw(&Passages::Ours, DATE, &mut chance)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_is_what_the_engine_answers_to_the_request_for_it() {
    let site = site(roomy());
    let resident = resident(&site);
    let mut written = 0;
    for key in 0..12 {
        let (draft, mut chance) = (draft(key), Chance::seeded(key));
        let mut same = chance.clone();
        let body = draft.rewriting(MODEL, &mut same);
        let (_, answer) = post(&site.app, CHAT, body).await;
        let expected = read_query(answer["choices"][0]["message"]["content"].as_str().unwrap());
        let asked = (MODEL, &draft);
        let query = query(Rewriting::Always, &resident, asked, &mut chance).await;
        match expected {
            Ok(text) => assert_eq!(query.as_ref().unwrap().as_ref(), Some(&text), "key {key}"),
            Err(why) => {
                let said = query.as_ref().unwrap_err().to_string();
                assert_eq!(said, format!("the passage is not rewritten: {why}"));
            }
        }
        written += usize::from(matches!(&query, Ok(Some(_))));
    }
    // Random weights write letters now and then.
    assert!(written > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_rewritten_is_named_or_taken_as_it_is() {
    let whole = site(roomy());
    let (whole, draft) = (resident(&whole), draft(1));
    let silent = Resident { engine: None, ..whole.clone() };
    let ask = async |how, resident: &Resident, draft: &Draft| {
        query(how, resident, (MODEL, draft), &mut Chance::seeded(1)).await
    };
    // Nobody is asked where nothing is to be rewritten.
    assert_eq!(ask(Rewriting::Never, &silent, &draft).await.unwrap(), None);
    assert_eq!(ask(Rewriting::OrPassage, &silent, &draft).await.unwrap(), None);
    let why = ask(Rewriting::Always, &silent, &draft).await.unwrap_err().to_string();
    assert!(why.ends_with("not rewritten: no engine runs beside the verifier"), "{why}");
    // A passage that is longer than the context, of control characters, of nothing.
    let with = |passage: &str| Draft { passage: passage.into(), ..draft.clone() };
    let long = with(&"long ".repeat(5_000));
    assert_eq!(ask(Rewriting::OrPassage, &whole, &long).await.unwrap(), None);
    let why = ask(Rewriting::Always, &whole, &long).await.unwrap_err().to_string();
    assert!(why.contains("2048"), "{why}");
    for passage in ["", "\0\u{7}\u{1b}[2J", "<|end|>", "{{ 1 }}{% raw %}"] {
        let query = ask(Rewriting::OrPassage, &whole, &with(passage)).await;
        assert!(query.is_ok(), "{passage:?}: {query:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_without_a_template_goes_on_with_a_text() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = common::tiny_config();
    config["max_position_embeddings"] = 2048.into();
    common::write_checkpoint(directory.path(), &config, 3);
    std::fs::remove_file(directory.path().join("tokenizer_config.json")).unwrap();
    let pool = Pool::new(2, Isa::best()).unwrap();
    let model = Model::load(directory.path(), None, &pool, |_, _| {}).unwrap();
    assert!(model.text.chat.is_none());
    let served = common::served(model, roomy());
    let site = Site { engine: served.engine.clone(), served, ..site(roomy()) };
    let resident = resident(&site);
    let draft = draft(2);
    let mut same = Chance::seeded(2);
    let mut body = draft.rewriting(MODEL, &mut same);
    let words = |place: usize| body["messages"][place]["content"].as_str().unwrap().to_owned();
    let text = format!("{}\n\n{}\n\nSearch query:", words(0), words(1));
    body.as_object_mut().unwrap().remove("messages");
    body["prompt"] = text.into();
    let app = served_app(&site);
    let (_, answer) = post(&app, COMPLETION, body).await;
    let expected = read_query(answer["choices"][0]["text"].as_str().unwrap());
    let asked = (MODEL, &draft);
    let query = query(Rewriting::Always, &resident, asked, &mut Chance::seeded(2)).await;
    match expected {
        Ok(text) => assert_eq!(query.unwrap(), Some(text)),
        Err(why) => {
            let said = query.unwrap_err().to_string();
            assert_eq!(said, format!("the passage is not rewritten: {why}"));
        }
    }
}

/// A server over the model of a site.
fn served_app(site: &Site) -> axum::Router {
    use targon_engine::clock::Clock;
    use targon_engine::intake::translate::Defaults;
    use targon_engine::server::registry::{ModelState, Registry};
    use targon_engine::server::{router, state::ServerState};
    let registry = Registry::default();
    registry.announce([MODEL.to_owned()]);
    registry.set(MODEL, None, ModelState::Ready(Box::new(site.served.clone())));
    router(ServerState::new(registry, Defaults::default(), Clock::system()))
}
