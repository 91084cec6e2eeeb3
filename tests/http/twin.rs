//! Suspicion, the twin and the names of cheats, from a captured answer to its report.

use super::verify::{NONCE, answer, check, understood};
use crate::common::site::{chat, site};
use crate::common::{self, verifier};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use targon_engine::engine::request::Request;
use targon_engine::models::Model;
use targon_engine::models::departure::{Departure, RECIPES, Recipe};
use targon_engine::models::model::DeviceWeights;
use targon_engine::ops::dtype::Dtype;
use targon_engine::ops::rounding::Rounding;
use targon_engine::proof::Scheme;
use targon_engine::proof::codec::from_hex;
use targon_engine::verify::answer::Answer;
use targon_engine::verify::prefill::hidden_rows;
use targon_engine::verify::scrutiny::{Scrutiny, TwinPolicy, WantedScrutiny};
use targon_engine::verify::statistic::ByRows;
use targon_engine::verify::{
    Challenge, Claim, Depth, Limits, Profile, Reason, Report, Verdict, Verifier,
};

const TWIN: Departure =
    Departure { rounding: Rounding::Everywhere(Dtype::Bf16), cache: None, inputs: None };
/// Whatever is not equal bit for bit is suspicious, and nothing is rejected for its energy alone.
const NARROW: Limits = Limits {
    energy_u8: 1e9,
    energy_u4: 1e9,
    trimmed_u8: ByRows::all(1e-9),
    trimmed_u4: ByRows::all(1e-9),
    twin_u8: ByRows::all(1e-9),
    twin_u4: ByRows::all(1e-9),
    beta: 0.5,
    margin: 1.0,
    margin_mean: 1.0,
    ..Limits::NONE
};
const NAMING: Scrutiny = Scrutiny { twin: TwinPolicy::Suspicion, names: true, ..Scrutiny::NONE };

fn proved(scheme: Scheme, tokens: usize) -> Value {
    chat(json!({
        "max_tokens": tokens, "temperature": 0.8, "seed": 3, "ignore_eos": true,
        "return_token_ids": true, "proof": {"scheme": scheme.name(), "nonce": NONCE},
    }))
}

/// The same answer with the proof of a prover whose weights are `model`'s, by `departure`.
async fn proved_by(
    verifier: &Verifier,
    (model, departure): (&Model, Departure),
    (body, answer): (&Value, &Answer),
) -> Answer {
    let scheme: Scheme = body["proof"]["scheme"].as_str().unwrap().parse().unwrap();
    let request = understood(verifier, body).await;
    let decoder = Arc::clone(model.weights.cpu().unwrap());
    let pass = |blocks| Model::departing(&decoder, departure, (&verifier.pool, blocks));
    let rows = hidden_rows(pass, &request.prompt, &answer.ids).unwrap();
    let (seed, mut answer) = (body["seed"].as_i64(), answer.clone());
    common::spoof_rows(scheme, verifier, (&request, rows), seed, NONCE, &mut answer);
    answer
}

async fn report(verifier: &Verifier, body: &Value, answer: &Answer) -> Report {
    check(verifier, body, answer, Profile::Proof, Depth::Fast).await
}

#[tokio::test]
async fn a_cheat_is_named_and_an_honest_stack_is_not() {
    let site = site(common::options());
    let verifier = Verifier { limits: NARROW, scrutiny: NAMING, ..verifier(&site.served) };
    let own = &verifier.model;
    for scheme in [Scheme::Residue, Scheme::ResidueU4] {
        let body = proved(scheme, 70);
        let (_, response) = answer(&site, &body).await;
        let exact = report(&verifier, &body, &response).await;
        assert_eq!((exact.verdict, exact.twin.len()), (Verdict::Pass, 0), "nothing is suspicious");
        let theirs = proved_by(&verifier, (own, TWIN), (&body, &response)).await;
        let honest = report(&verifier, &body, &theirs).await;
        assert_eq!(honest.verdict, Verdict::Pass, "{scheme}: too far, and without a name");
        assert_eq!((honest.twin.len(), honest.named.len()), (70, RECIPES.len()));
        let statistic = verifier.limits.twin_statistic(scheme, &honest).unwrap();
        // It goes all the way, of which 0.4 are expected.
        assert!(statistic.is_over() && statistic.value < 0.6, "{scheme}: {statistic:?}");
        // Four bits of this small model hold too little of what a cache moves.
        let is_tried = |r: &&Recipe| match scheme {
            Scheme::Residue => r.name.contains("int8") || r.name == "W8A8",
            _ => r.name == "int8 per channel",
        };
        for recipe in RECIPES.iter().filter(is_tried) {
            let cheap = Model {
                weights: DeviceWeights::Cpu(own.coarse(recipe, &verifier.pool).unwrap()),
                ..common::tiny_model(3, &verifier.pool)
            };
            let by = (&cheap, recipe.departure);
            let theirs = proved_by(&verifier, by, (&body, &response)).await;
            let found = report(&verifier, &body, &theirs).await;
            let beta = |name: &str| found.named.iter().find(|n| n.name == name).unwrap().beta;
            let (name, own) = (recipe.name, beta(recipe.name));
            assert!((0.8..1.2).contains(&own), "{scheme} {name}: {:?}", found.named);
            let Verdict::Reject(why) = &found.verdict else { panic!("{name}: {found:?}") };
            assert!(why.reason == Reason::SketchEnergy && why.what.contains(", beta "), "{why}");
        }
    }
}

#[tokio::test]
async fn a_second_prefill_is_paid_when_it_was_asked_for() {
    let site = site(common::options());
    let body = proved(Scheme::Residue, 40);
    let (_, response) = answer(&site, &body).await;
    let wide = Limits { trimmed_u8: ByRows::all(1e9), ..NARROW };
    let base = verifier(&site.served);
    let theirs = proved_by(&base, (&base.model, TWIN), (&body, &response)).await;
    for (twin, limits, is_run) in [
        (TwinPolicy::Never, NARROW, false),
        (TwinPolicy::Suspicion, wide, false),
        (TwinPolicy::Suspicion, NARROW, true),
        (TwinPolicy::Share(0.999_999), wide, true),
        (TwinPolicy::Share(0.000_001), wide, false),
        (TwinPolicy::Always, wide, true),
    ] {
        let scrutiny = Scrutiny { twin, ..Scrutiny::NONE };
        let verifier = Verifier { limits, scrutiny, ..base.clone() };
        let found = report(&verifier, &body, &theirs).await;
        assert_eq!(!found.twin.is_empty(), is_run, "{twin:?}");
        assert_eq!((found.verdict, found.named.len()), (Verdict::Pass, 0), "{twin:?}");
        assert_eq!(found.energies.len(), 40, "{twin:?}");
    }
    // One token says nothing, in either way.
    let body = proved(Scheme::Residue, 1);
    let (_, response) = answer(&site, &body).await;
    let theirs = proved_by(&base, (&base.model, TWIN), (&body, &response)).await;
    let scrutiny = Scrutiny { twin: TwinPolicy::Always, ..NAMING };
    let verifier = Verifier { limits: NARROW, scrutiny, ..base };
    let found = report(&verifier, &body, &theirs).await;
    assert_eq!((found.verdict, found.twin.len(), found.energies.len()), (Verdict::Pass, 0, 1));
}

/// An answer to a request for residues.
fn claimed<'a>(request: &'a Request, body: &Value, answer: &'a Answer) -> Claim<'a> {
    let nonce = Some(from_hex(NONCE).unwrap());
    Claim {
        seed: body["seed"].as_i64(),
        proof: Some(Challenge { scheme: Scheme::Residue, nonce, hotkey: None }),
        ..Claim::new(request, answer)
    }
}

/// Two answers of a stack of 16 bits, of which the second look at the first one fails in the step
/// with this number, from 0 on.
async fn failing_at(scrutiny: Scrutiny, limits: Limits, step: usize) -> [Report; 2] {
    let site = site(common::options());
    let verifier = Verifier { limits, scrutiny, ..verifier(&site.served) };
    let body = proved(Scheme::Residue, 40);
    let (_, response) = answer(&site, &body).await;
    let theirs = proved_by(&verifier, (&verifier.model, TWIN), (&body, &response)).await;
    let request = understood(&verifier, &body).await;
    let claim = claimed(&request, &body, &theirs);
    // Each answer takes one step in the first look.
    let steps = AtomicUsize::new(0);
    let is_wanted = || steps.fetch_add(1, Ordering::SeqCst) != 2 + step;
    let verification = verifier.verify(Profile::Proof, 1).while_wanted(&is_wanted);
    verification.answers(&[claim.clone(), claim]).try_into().unwrap()
}

#[tokio::test]
async fn a_second_look_that_fails_leaves_one_answer_unscored_and_the_next_is_looked_at() {
    let [first, second] = failing_at(NAMING, NARROW, 0).await;
    let Verdict::Unscored(why) = &first.verdict else { panic!("{first:?}") };
    assert!(why.contains("cannot be computed again: nobody waits"), "{why}");
    assert!(first.twin.is_empty() && first.named.is_empty());
    assert_eq!((second.verdict, second.twin.len()), (Verdict::Pass, 40));
    assert_eq!(second.named.len(), RECIPES.len());
    // One that chance drew is not suspicious.
    let scrutiny = Scrutiny { twin: TwinPolicy::Always, ..Scrutiny::NONE };
    let wide = Limits { trimmed_u8: ByRows::all(1e9), ..NARROW };
    let [first, second] = failing_at(scrutiny, wide, 0).await;
    assert_eq!((first.verdict, first.twin.len()), (Verdict::Pass, 0));
    assert_eq!((second.verdict, second.twin.len()), (Verdict::Pass, 40));
}

/// Rows that are not equal bit for bit are too far, unless rounding explains them.
const OPEN: Limits = Limits { energy_u8: 1e-3, energy_rounding: 2.0, ..NARROW };

#[tokio::test]
async fn energies_that_rounding_explains_reject_nobody() {
    let site = site(common::options());
    let once = Verifier { limits: OPEN, ..verifier(&site.served) };
    let scrutiny = Scrutiny { twin: TwinPolicy::Suspicion, ..Scrutiny::NONE };
    let twice = Verifier { scrutiny, ..once.clone() };
    let own = &once.model;
    let body = proved(Scheme::Residue, 64);
    let (_, response) = answer(&site, &body).await;
    let honest = proved_by(&once, (own, TWIN), (&body, &response)).await;
    let found = report(&twice, &body, &honest).await;
    assert_eq!(found.verdict, Verdict::Pass, "{:?}", found.chunks);
    for chunk in &found.chunks {
        let (energy, rounding) = (chunk.energy.unwrap(), chunk.rounding.unwrap());
        assert!(energy > chunk.limit(1e-3) && energy < 2.0 * rounding, "{chunk:?}");
    }
    let is_far = |report: &Report, what: &str| match &report.verdict {
        Verdict::Reject(why) => why.reason == Reason::SketchEnergy && why.what.contains(what),
        _ => false,
    };
    // Controls: without the twin, without the rule, and where bits must be equal.
    let never = Verifier { limits: Limits { energy_rounding: 0.0, ..OPEN }, ..twice.clone() };
    let exact = Verifier { limits: Limits { exact: true, ..OPEN }, ..twice.clone() };
    for (verifier, what) in [(&once, "at most 0"), (&never, "at most 0"), (&exact, "bit for bit")] {
        let found = report(verifier, &body, &honest).await;
        assert!(is_far(&found, what) && found.twin.is_empty(), "{found:?}");
    }
    // A cheat is too far in these units as well.
    let recipe = RECIPES.iter().find(|r| r.name == "int8 per channel").unwrap();
    let weights = DeviceWeights::Cpu(own.coarse(recipe, &once.pool).unwrap());
    let cheap = Model { weights, ..common::tiny_model(3, &once.pool) };
    let theirs = proved_by(&once, (&cheap, recipe.departure), (&body, &response)).await;
    let found = report(&twice, &body, &theirs).await;
    assert!(is_far(&found, "; rounding alone gives it"), "{found:?}");
    // What is made up is so far that no second look is paid for.
    let mut shorter = understood(&once, &body).await;
    shorter.prompt.remove(0);
    let request = understood(&once, &body).await;
    let mut forged = response.clone();
    let seed = body["seed"].as_i64();
    common::spoof(&once, (&request, &shorter.prompt), seed, NONCE, &mut forged);
    let found = report(&twice, &body, &forged).await;
    assert!(is_far(&found, "at most 0") && found.twin.is_empty(), "{found:?}");
    // What else is wrong is said in its place, without a second look.
    let claim = claimed(&request, &body, &honest);
    let challenge = Challenge { scheme: Scheme::Residue, nonce: None, hotkey: None };
    let claim = Claim { proof: Some(challenge), ..claim };
    let found = twice.verify(Profile::Proof, 1).answer(&claim);
    let Verdict::Unscored(why) = &found.verdict else { panic!("{found:?}") };
    assert!(why.contains("`proof.nonce`") && found.twin.is_empty(), "{why}");
    // A second look that fails says nothing.
    let [first, second] = failing_at(scrutiny, OPEN, 0).await;
    let Verdict::Unscored(why) = &first.verdict else { panic!("{first:?}") };
    assert!(why.contains("cannot be computed again: nobody waits"), "{why}");
    assert_eq!(second.verdict, Verdict::Pass);
}

#[tokio::test]
async fn an_early_check_reads_to_the_end_where_rounding_may_explain_what_it_saw() {
    let site = site(common::options());
    let scrutiny = Scrutiny { stops_early: true, twin: TwinPolicy::Suspicion, ..Scrutiny::NONE };
    let base = Verifier { limits: OPEN, scrutiny, ..verifier(&site.served) };
    let body = proved(Scheme::Residue, 250);
    let (_, response) = answer(&site, &body).await;
    let theirs = proved_by(&base, (&base.model, TWIN), (&body, &response)).await;
    let request = understood(&base, &body).await;
    let claim = claimed(&request, &body, &theirs);
    let never = Scrutiny { twin: TwinPolicy::Never, ..scrutiny };
    let once = Verifier { scrutiny: never, ..base.clone() };
    let mut stopped = 0;
    for chance in 0..10 {
        let open = base.verify(Profile::Proof, chance).answer(&claim);
        assert_eq!((open.verdict, open.chunks.len()), (Verdict::Pass, 8), "{chance}");
        let far = once.verify(Profile::Proof, chance).answer(&claim);
        assert!(matches!(far.verdict, Verdict::Reject(_)), "{chance}");
        stopped += usize::from(far.chunks.len() < 8);
    }
    assert!(stopped > 0, "the control: what is decided is not read to the end");
}

#[tokio::test]
async fn a_cheat_that_cannot_be_tried_leaves_open_the_one_answer_that_may_have_its_name() {
    // Two twins, a look before the first recipe is packed, and the first answer by it.
    let [first, second] = failing_at(NAMING, NARROW, 3).await;
    let Verdict::Unscored(why) = &first.verdict else { panic!("{first:?}") };
    assert!(why.contains(&format!("{}: nobody waits", RECIPES[0].name)), "{why}");
    assert_eq!((first.twin.len(), first.named.len()), (40, RECIPES.len() - 1));
    assert_eq!((second.verdict, second.named.len()), (Verdict::Pass, RECIPES.len()));
}

#[tokio::test]
async fn a_distance_that_is_not_a_number_rejects_nobody() {
    let site = site(common::options());
    let base = verifier(&site.served);
    let body = proved(Scheme::Residue, 40);
    let (_, response) = answer(&site, &body).await;
    let theirs = proved_by(&base, (&base.model, TWIN), (&body, &response)).await;
    // A share that is no number makes every distance one that is none.
    let limits = Limits { shrink: f64::NAN, ..NARROW };
    let verifier = Verifier { limits, scrutiny: NAMING, ..base };
    let found = report(&verifier, &body, &theirs).await;
    assert_eq!(found.verdict, Verdict::Pass, "a number of ours that is none is no name");
    assert!(limits.twin_statistic(Scheme::Residue, &found).unwrap().value.is_nan());
}

#[tokio::test]
async fn an_early_check_stops_at_a_chunk_that_chance_draws_unless_it_is_open() {
    let site = site(common::options());
    let early = Scrutiny { stops_early: true, ..Scrutiny::NONE };
    let base = Verifier { scrutiny: early, ..verifier(&site.served) };
    let body = proved(Scheme::Residue, 250);
    let (_, response) = answer(&site, &body).await;
    let request = understood(&base, &body).await;
    let claim = claimed(&request, &body, &response);
    let chunks = |verifier: &Verifier, claim: &Claim<'_>, chance| {
        let report = verifier.verify(Profile::Proof, chance).answer(claim);
        assert_eq!(report.verdict, Verdict::Pass, "{chance}");
        assert!(report.rows.iter().all(|row| row.index < report.chunks.len() * 32));
        assert!(report.rows.iter().filter(|row| row.margin.is_some()).count() >= 32, "{chance}");
        report.chunks.len()
    };
    let mut seen = [0; 9];
    (0..80).for_each(|chance| seen[chunks(&base, &claim, chance)] += 1);
    assert!(seen[0] == 0 && seen[1..].iter().all(|count| *count > 0), "{seen:?}");
    let slow = base.verify(Profile::Proof, 3).depth(Depth::Slow).answer(&claim);
    assert_eq!((slow.chunks.len(), slow.rows.len()), (8, 250), "the control: all of it");
    // Rows that are far, but not too far, are read to the end.
    let theirs = proved_by(&base, (&base.model, TWIN), (&body, &response)).await;
    let open = Claim { answer: &theirs, ..claim.clone() };
    let narrow = Verifier { limits: NARROW, ..base.clone() };
    let wide = Verifier { limits: Limits { trimmed_u8: ByRows::all(1e9), ..NARROW }, ..base };
    assert!((0..10).all(|chance| chunks(&narrow, &open, chance) == 8));
    assert!((0..10).any(|chance| chunks(&wide, &open, chance) < 8));
    let report = narrow.verify(Profile::Proof, 1).answer(&open);
    let whole = Verifier { scrutiny: Scrutiny::NONE, ..narrow };
    let whole = whole.verify(Profile::Proof, 1).answer(&open);
    // In two parts or in one; a check that may end early looks at more rows.
    assert!(whole.rows.iter().all(|row| report.rows.contains(row)));
    assert_eq!(Report { rows: Vec::new(), ..report }, Report { rows: Vec::new(), ..whole });
}

#[test]
fn what_was_asked_for_is_read_or_refused() {
    let read = |text: &str| text.parse::<TwinPolicy>();
    assert_eq!(read("never"), Ok(TwinPolicy::Never));
    assert_eq!(read("suspicion"), Ok(TwinPolicy::Suspicion));
    assert_eq!(read("always"), Ok(TwinPolicy::Always));
    assert_eq!(read("0.05"), Ok(TwinPolicy::Share(0.05)));
    for wrong in ["", "0", "1", "nan", "-0.5", "sometimes", "inf"] {
        assert!(
            read(wrong).unwrap_err().to_string().contains("must be never, suspicion"),
            "{wrong}"
        );
    }
    let pool = targon_engine::ops::pool::Pool::new(1, targon_engine::ops::lanes::Isa::best());
    let model = common::tiny_model(3, &pool.unwrap());
    let asked = WantedScrutiny { twin: None, names: true, ..WantedScrutiny::NOTHING };
    assert_eq!(asked.on(&model), Ok(NAMING));
    let never = WantedScrutiny { names: true, ..WantedScrutiny::NOTHING };
    assert!(never.on(&model).unwrap_err().to_string().contains("`--name-cheats` needs the twin"));
}
