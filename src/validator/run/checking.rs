//! Verifies one answer, adds it to the evidence about its miner, and decides weights from all
//! records.

use super::ports::{AnswerToCheck, Decided};
use super::resident::Resident;
use super::subnet::Subnet;
use crate::entropy::Entropy;
use crate::proof::Scheme;
use crate::store::Store;
use crate::store::record::{LikelyCheat, MeasuredValue, Sample, Statistics};
use crate::validator::round::{AnswerReport, AnswerVerdict};
use crate::validator::scores::emission::ChainLimits;
use crate::validator::scores::gate::HotkeyState;
use crate::validator::scores::rules::{ScoringProfile, ScoringRules};
use crate::validator::scores::series::{MissReason, Organic};
use crate::validator::scores::{self, Input, Seat};
use crate::verify::answer::Answer;
use crate::verify::capture::{Capture, CheckedChoice};
use crate::verify::evidence::{ALARM, Calibrated, Observed, Sums};
use crate::verify::question::{Question, QuestionError};
use crate::verify::statistic::Statistic;
use crate::verify::{Depth, Limits, Profile, Report, RowEvidence, Verdict, Verifier};
use anyhow::{Context, anyhow};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Blocks after which a sample does not count any more, about three days: whoever could make every
/// later answer unscored would else be paid for old ones for ever. A window of 30 rounds about one
/// of 20 models is 14 hours. Targon 4.4 has no such limit.
const SAMPLE_AGE_MAX: u64 = 21_600;
/// How old an answer may be that is verified here, by its own word: rounds take minutes.
const ANSWER_AGE_MAX: Duration = Duration::from_secs(24 * 3600);
/// Rows of a report that are kept.
const ROWS_MAX: usize = 64;
/// A miner with a sum of evidence above this is looked at closely.
const SOFT_ALARM: f64 = ALARM / 2.0;

fn unscored(why: impl ToString) -> AnswerReport {
    AnswerReport::bare(AnswerVerdict::Unscored(why.to_string()))
}

/// Checks an answer, and adds it to what is known of its miner.
pub(super) async fn verify(
    resident: &Resident,
    (store, entropy): (&Store, &Entropy),
    (rules, now_ms): (Option<Profile>, u64),
    case: AnswerToCheck,
) -> AnswerReport {
    let Resident { verifier, rates, .. } = resident;
    let hotkey = case.member.hotkey.to_string();
    let sums = match hotkey_state(store, &hotkey, &case.model).await {
        Ok(known) => known.evidence.sums,
        Err(e) => {
            tracing::warn!(hotkey, "the evidence cannot be read, so it does not choose rows: {e}");
            Sums::default()
        }
    };
    let is_suspect = [sums.margin, sums.energy, sums.joint].iter().any(|sum| *sum > SOFT_ALARM);
    let depth = if case.is_slow || is_suspect { Depth::Slow } else { Depth::Fast };
    let asked = (case.model.as_str(), Some(hotkey.as_str()));
    // Drawn after the answer, so the miner cannot know it.
    let chance = entropy.word();
    let first = match check(verifier, asked, (&case.capture, now_ms), (rules, depth, chance)).await
    {
        Ok(checked) => checked,
        Err(why) => return unscored(why),
    };
    let limits = &verifier.limits;
    let observed = Observed::of(&first.report, first.scheme, limits).thinned(entropy.word());
    let known = add(store, rates, &case, &observed).await;
    let mut report = report(&first.report, depth);
    report["seconds"] = first.seconds.into();
    report["evidence"] = known.map_or(Value::Null, |known| json!(known.evidence));
    let statistics = statistics(&first.report, first.scheme, limits);
    let tokens = tokens(first.answer.as_ref());
    let verdict = verdict(first.report.verdict);
    AnswerReport { verdict, report: Some(report), statistics, tokens }
}

/// Checks an answer without changing evidence, because the answer comes from a hub. Returns its
/// verified tokens as well.
pub(super) async fn verify_alone(
    resident: &Resident,
    (rules, chance): (Option<Profile>, u64),
    model: &str,
    (capture, now_ms): (&Value, u64),
) -> AnswerReport {
    let how = (rules, Depth::Fast, chance);
    match check(&resident.verifier, (model, None), (capture, now_ms), how).await {
        Ok(checked) => {
            let tokens = tokens(checked.answer.as_ref());
            AnswerReport { tokens, ..AnswerReport::bare(verdict(checked.report.verdict)) }
        }
        Err(why) => unscored(why),
    }
}

/// Why an answer could not be checked, which is not the miner's fault.
#[derive(Debug, thiserror::Error)]
enum Unchecked {
    #[error("the capture cannot be read: {0}")]
    Capture(#[from] serde_json::Error),
    #[error("the request cannot be read: {0}")]
    Request(#[from] QuestionError),
    #[error("the verification broke: {0}")]
    Broken(#[from] tokio::task::JoinError),
    #[error("the request asks for no answer")]
    Nothing,
}

/// Checks the first choice of a capture, on a thread that may block; `hotkey` must have signed it.
/// `chance` decides which rows are looked at. The thread soon ends where nobody waits for it any
/// more: the memory that it has is another check's then.
async fn check(
    verifier: &Verifier,
    (model, hotkey): (&str, Option<&str>),
    (capture, now_ms): (&Value, u64),
    (rules, depth, chance): (Option<Profile>, Depth, u64),
) -> Result<CheckedChoice, Unchecked> {
    let capture = Capture::deserialize(capture)?;
    let asked_ms = capture.asked_ms(now_ms, ANSWER_AGE_MAX);
    let question = Question::read(verifier, model, &capture.request, hotkey, asked_ms).await?;
    let (own, unwanted) = (verifier.clone(), CancellationToken::new());
    let _guard = unwanted.clone().drop_guard();
    let work = move || {
        let is_wanted = || !unwanted.is_cancelled();
        let check = own.verify(rules, chance).depth(depth).while_wanted(&is_wanted);
        check.capture(question, &capture)
    };
    let checked = tokio::task::spawn_blocking(work).await?;
    checked.into_iter().next().ok_or(Unchecked::Nothing)
}

/// Tokens of an answer that are named by ids.
fn tokens(answer: Option<&Answer>) -> u32 {
    u32::try_from(answer.map_or(0, |answer| answer.ids.len())).unwrap_or(u32::MAX)
}

fn verdict(verdict: Verdict) -> AnswerVerdict {
    match verdict {
        Verdict::Pass => AnswerVerdict::Pass,
        Verdict::Reject(r) => {
            AnswerVerdict::Reject { cause: r.reason.name().to_owned(), what: r.what }
        }
        Verdict::Unscored(why) => AnswerVerdict::Unscored(why),
    }
}

/// The evidence about a miner; empty for an unknown one.
async fn hotkey_state(store: &Store, hotkey: &str, model: &str) -> anyhow::Result<HotkeyState> {
    match store.evidence(hotkey, model).await? {
        Some(known) => Ok(serde_json::from_value(known)?),
        None => Ok(HotkeyState::default()),
    }
}

/// Adds an answer to the evidence as it stands now: checks of one miner may end at the same time,
/// and each of them counts. What is known afterwards; nothing where it cannot be read or stored.
async fn add(
    store: &Store,
    rates: &Calibrated,
    case: &AnswerToCheck,
    observed: &Observed,
) -> Option<HotkeyState> {
    let hotkey = case.member.hotkey.to_string();
    let known = match observed.is_empty() {
        true => hotkey_state(store, &hotkey, &case.model).await,
        false => store_sum(store, rates, case, observed).await,
    };
    known.map_err(|e| tracing::warn!(hotkey, "the answer adds no evidence: {e}")).ok()
}

async fn store_sum(
    store: &Store,
    rates: &Calibrated,
    case: &AnswerToCheck,
    observed: &Observed,
) -> anyhow::Result<HotkeyState> {
    let change = |known: Option<Value>| {
        let known = known.map(serde_json::from_value::<HotkeyState>).transpose();
        let state = known.context("its state cannot be read")?;
        let state = state.unwrap_or_default();
        let mut evidence = state.evidence;
        evidence.add(rates, observed);
        let state = state.after(evidence, &case.round, case.block);
        serde_json::to_value(state).context("its state cannot be written")
    };
    let hotkey = case.member.hotkey.to_string();
    let stored = store.change_evidence(&hotkey, &case.model, change).await?;
    Ok(serde_json::from_value(stored)?)
}

/// What was found, for the record.
fn report(report: &Report, depth: Depth) -> Value {
    let rows = kept_rows(&report.rows).into_iter().map(|row| {
        json!({
            "index": row.index, "token": row.token, "rank": row.rank, "logprob": row.logprob,
            "reported": row.reported, "margin": row.margin,
        })
    });
    json!({
        "depth": if depth == Depth::Slow { "slow" } else { "fast" },
        "rows_scored": report.rows.len(),
        "rows": rows.collect::<Vec<_>>(),
        "chunks": report.chunks.len(),
        "exact_chunks": report.chunks.iter().filter(|chunk| chunk.is_exact).count(),
        "energies": report.chunks.iter().map(|chunk| chunk.energy).collect::<Vec<_>>(),
    })
}

/// What was measured, for the record, without values that are not numbers.
fn statistics(report: &Report, scheme: Option<Scheme>, limits: &Limits) -> Statistics {
    let measured = |statistic: Statistic| {
        let Statistic { value, limit, .. } = statistic;
        (value.is_finite() && limit.is_finite()).then_some(MeasuredValue { value, limit })
    };
    let margins: Vec<f64> = report.rows.iter().filter_map(|row| row.margin).collect();
    let mean = margins.iter().sum::<f64>() / margins.len() as f64;
    let trimmed = scheme.and_then(|scheme| limits.statistic(scheme, report));
    let twin = scheme.and_then(|scheme| limits.twin_statistic(scheme, report));
    let likeliest = report.named.first().filter(|named| named.beta.is_finite());
    Statistics {
        rows: u32::try_from(report.rows.len()).ok(),
        margin: mean.is_finite().then_some(mean),
        trimmed: trimmed.and_then(measured),
        twin: twin.and_then(measured),
        likeliest: likeliest
            .map(|named| LikelyCheat { name: named.name.to_owned(), beta: named.beta }),
    }
}

/// Those that say most: with the largest margins, in order.
fn kept_rows(rows: &[RowEvidence]) -> Vec<&RowEvidence> {
    let mut kept: Vec<&RowEvidence> = rows.iter().collect();
    let margin = |row: &RowEvidence| row.margin.unwrap_or_default();
    kept.sort_by(|a, b| margin(b).total_cmp(&margin(a)));
    kept.truncate(ROWS_MAX);
    kept.sort_by_key(|row| row.index);
    kept
}

/// Decides weights from the records of a subnet's members.
pub(super) async fn decide(
    store: &Store,
    (rules, away_max): (&ScoringRules, u64),
    subnet: &Subnet,
    models: &[String],
    organics: impl Fn(u16, &str) -> Option<Vec<Organic>>,
) -> anyhow::Result<Decided> {
    let metagraph = &subnet.metagraph;
    let (netuid, block) = (metagraph.netuid, metagraph.block);
    let keys = metagraph.neurons().iter().map(|n| (n.uid, n.hotkey.to_string()));
    let hotkeys: BTreeMap<u16, String> = keys.collect();
    store.save_hotkeys(netuid, block, &hotkeys).await?;
    let (last, since) = (rules.window as u32, block.saturating_sub(away_max));
    let mut samples = store.samples(netuid, last, since).await?;
    if rules.profile == ScoringProfile::Default {
        samples.retain(|sample| sample.block.saturating_add(SAMPLE_AGE_MAX) >= block);
    }
    let findings = findings(store, netuid, &samples, last).await?;
    let mut seats = BTreeMap::new();
    for (uid, hotkey) in hotkeys {
        let listed = subnet.models.get(&uid).into_iter().flatten().cloned().collect();
        let state = worst(store, &hotkey, models).await?;
        seats.insert(uid, Seat { models: listed, organics: organics(uid, &hotkey), hotkey, state });
    }
    let asked = metagraph.hyperparameters;
    let limits =
        ChainLimits { min_allowed: asked.min_allowed_weights, max_weight: asked.max_weights_limit };
    let input = Input { seats: &seats, models, samples: &samples, findings: &findings, limits };
    let decision = scores::decide(rules, &input);
    let explanation = decision.explanation()?;
    Ok(Decided { values: decision.values, none: decision.none, explanation })
}

/// Why samples are misses, for the explanation.
async fn findings(
    store: &Store,
    netuid: u16,
    samples: &[Sample],
    last: u32,
) -> anyhow::Result<Vec<MissReason>> {
    let missed: BTreeSet<u16> = samples.iter().filter(|s| s.tps.is_none()).map(|s| s.uid).collect();
    let mut findings = Vec::new();
    for uid in missed {
        findings.extend(store.causes(netuid, uid, last).await?.into_iter().map(MissReason::of));
    }
    Ok(findings)
}

/// What is known of a hotkey with the model of `models` that it does worst with: one with an alarm
/// before all others, then the largest sum. Other models do not count: no later answer could lower
/// their sums, and the miner would never be paid again.
async fn worst(store: &Store, hotkey: &str, models: &[String]) -> anyhow::Result<HotkeyState> {
    let mut worst = HotkeyState::default();
    let weight = |state: &HotkeyState| {
        let Sums { margin, energy, joint } = state.evidence.sums;
        let largest = margin.max(energy).max(joint);
        (state.shut_by.is_some(), state.evidence.alarm().is_some(), largest)
    };
    for model in models {
        let Some(known) = store.evidence(hotkey, model).await? else { continue };
        let known: HotkeyState = serde_json::from_value(known)
            .map_err(|e| anyhow!("the evidence about {hotkey} with {model} cannot be read: {e}"))?;
        if weight(&known) >= weight(&worst) {
            worst = known;
        }
    }
    Ok(worst)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::keys::Hotkey;
    use crate::validator::eligible::Member;
    use crate::verify::evidence::Evidence;
    use std::sync::Arc;

    fn case(number: u64) -> AnswerToCheck {
        let key = Hotkey([7; 32]);
        AnswerToCheck {
            model: "m".into(),
            member: Member {
                uid: 3,
                hotkey: key,
                coldkey: key,
                address: ([127, 0, 0, 1], 1).into(),
            },
            round: format!("round-{number}"),
            block: number,
            capture: Arc::new(Value::Null),
            is_slow: false,
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn answers_that_pass_add_up_until_the_gate_shuts() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("v.sqlite");
        let store = Store::open(place.to_str().unwrap(), &Entropy::seeded(1)).await.unwrap();
        let hotkey = case(0).member.hotkey.to_string();
        // One token of 33 is 0.4 logits from being drawn: below the limits of a token, 0.5, and of
        // the mean, 0.02.
        let mut margins = vec![0.0; 33];
        margins[5] = 0.4;
        let mild = Observed { margins, energies: vec![0.0], twin: None };
        for answer in 1..=9 {
            add(&store, &Calibrated::default(), &case(answer), &mild).await.unwrap();
            let known = worst(&store, &hotkey, &["m".into()]).await.unwrap();
            let sums = known.evidence.sums;
            assert_eq!(known.evidence.answers, answer);
            if let Some(alarm) = known.shut_by {
                assert_eq!((alarm.test.as_str(), alarm.block), ("margin", answer));
                assert!(answer > 4 && sums.margin >= ALARM, "one answer never decides: {sums:?}");
                return;
            }
        }
        panic!("nine such answers do not shut the gate");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn checks_that_end_at_once_all_count() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("v.sqlite");
        let store = Store::open(place.to_str().unwrap(), &Entropy::seeded(1)).await.unwrap();
        let mut margins = vec![0.0; 33];
        margins[5] = 0.4;
        let mild = Observed { margins, energies: vec![0.0], twin: None };
        let (rates, cases) = (Calibrated::default(), (1..=9).map(case).collect::<Vec<_>>());
        let adding = cases.iter().map(|case| add(&store, &rates, case, &mild));
        futures_util::future::join_all(adding).await;
        let hotkey = case(0).member.hotkey.to_string();
        let known = hotkey_state(&store, &hotkey, "m").await.unwrap();
        assert_eq!(known.evidence.answers, 9);
        assert!(known.shut_by.is_some(), "{known:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_alarm_counts_before_larger_sums_while_its_model_is_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("v.sqlite");
        let store = Store::open(place.to_str().unwrap(), &Entropy::seeded(1)).await.unwrap();
        let known = |margin: f64, joint: f64| {
            let sums = Sums { margin, energy: 0.0, joint };
            HotkeyState { evidence: Evidence { sums, ..Evidence::default() }, shut_by: None }
        };
        let shut = known(ALARM, ALARM).after(known(ALARM, ALARM).evidence, "round", 7);
        let shut = HotkeyState { evidence: known(8.0, 8.0).evidence, ..shut };
        assert!(shut.shut_by.is_some());
        let save = async |hotkey: &str, model: &str, state: &HotkeyState| {
            let state = serde_json::to_value(state).unwrap();
            store.change_evidence(hotkey, model, |_| anyhow::Ok(state)).await.unwrap();
        };
        let models = ["m", "n"].map(String::from);
        save("a", "n", &shut).await;
        save("a", "m", &known(0.0, 13.0)).await;
        assert_eq!(worst(&store, "a", &models).await.unwrap(), shut);
        assert_eq!(worst(&store, "a", &models[..1]).await.unwrap(), known(0.0, 13.0));
        // A margin alone can be the alarm where the joint sum elsewhere is larger.
        save("b", "m", &known(ALARM, 1.0)).await;
        save("b", "n", &known(0.0, 13.0)).await;
        assert_eq!(worst(&store, "b", &models).await.unwrap(), known(ALARM, 1.0));
        assert_eq!(worst(&store, "c", &models).await.unwrap(), HotkeyState::default());
    }

    #[test]
    fn rows_with_the_largest_margins_are_kept_and_numbers_that_are_none_are_not() {
        let row = |index: usize| RowEvidence {
            index,
            token: 1,
            rank: 1,
            logprob: -0.5,
            reported: None,
            end_rank: None,
            margin: Some(if index % 3 == 2 { index as f64 / 1000.0 } else { 0.0 }),
            is_drawn: None,
            top_error: None,
        };
        let rows: Vec<RowEvidence> = (0..300).map(row).collect();
        let kept: Vec<usize> = kept_rows(&rows).iter().map(|row| row.index).collect();
        assert_eq!(kept.len(), ROWS_MAX);
        assert_eq!(kept.first(), Some(&110), "64 of the hundred with a margin: {kept:?}");
        assert!(kept.is_sorted() && kept.iter().all(|index| index % 3 == 2));
        let report = Report { rows, energies: vec![f64::NAN; 40], ..Report::bare(Verdict::Pass) };
        let limits = Limits::default();
        let of = |report: &Report| statistics(report, Some(Scheme::Residue), &limits);
        let Statistics { rows, margin, trimmed, twin, likeliest } = of(&report);
        assert_eq!((rows, trimmed, twin, likeliest), (Some(300), None, None, None));
        assert!((margin.unwrap() - 15.05 / 300.0).abs() < 1e-9, "{margin:?}");
        let measured = of(&Report { energies: vec![90.0; 40], ..report });
        assert_eq!(measured.trimmed, Some(MeasuredValue { value: 90.0, limit: 290.0 }));
        assert_eq!(of(&Report::bare(Verdict::Pass)).margin, None);
    }
}
