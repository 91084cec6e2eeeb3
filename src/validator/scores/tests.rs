//! The arithmetic of scores: golden numbers of the protocol, and what must hold for any samples.

use super::emission::{ChainLimits, Spare};
use super::explanation::{Decision, StoredExplanation};
use super::gate::{HotkeyState, REOPEN};
use super::rules::{ScoringProfile, ScoringRules, WINDOW_TARGON_442};
use super::series::{MissReason, Organic, mean_with_misses, safe_mean, sigmoid};
use super::*;
use crate::verify::evidence::{ALARM, Calibrated, Evidence, Observed, Sums};
use proptest::prelude::*;

const MODEL: &str = "a/model";

/// Seats by hotkey `key-UID`, all serving [`MODEL`].
fn seats(count: u16) -> BTreeMap<u16, Seat> {
    let seat =
        |uid| Seat { hotkey: format!("key-{uid}"), models: vec![MODEL.into()], ..Seat::default() };
    (0..count).map(|uid| (uid, seat(uid))).collect()
}

fn sample(uid: u16, model: &str, block: usize, tps: Option<f64>) -> Sample {
    Sample {
        round: format!("{block:032x}"),
        uid,
        hotkey: format!("key-{uid}"),
        model: model.into(),
        block: block as u64,
        tps,
    }
}

/// Samples of uid after uid, oldest first.
fn history(miners: &[Vec<Option<f64>>]) -> Vec<Sample> {
    let of = |(uid, list): (usize, &Vec<Option<f64>>)| {
        let one = |(block, tps): (usize, &Option<f64>)| sample(uid as u16, MODEL, block, *tps);
        list.iter().enumerate().map(one).collect::<Vec<_>>()
    };
    miners.iter().enumerate().flat_map(of).collect()
}

fn decide_over(
    profile: ScoringProfile,
    seats: &BTreeMap<u16, Seat>,
    samples: &[Sample],
) -> Decision {
    let models = [MODEL.to_owned()];
    let limits = ChainLimits::NONE;
    let input = Input { seats, models: &models, samples, findings: &[], limits };
    decide(&ScoringRules::of(profile), &input)
}

/// What these miners get, uid 0 first.
fn decide_for(profile: ScoringProfile, miners: &[Vec<Option<f64>>]) -> Decision {
    decide_over(profile, &seats(miners.len() as u16), &history(miners))
}

fn close(a: f64, b: f64) {
    assert!((a - b).abs() <= 5e-5, "{a} is not {b}");
}

#[test]
fn the_protocols_numbers_come_out() {
    for (share, value) in [(0.0, 0.0067), (0.5, 0.5), (0.8, 0.9526), (1.0, 0.9933)] {
        close(sigmoid(share), value);
    }
    close(safe_mean(&[Some(10.0), Some(20.0), None, Some(30.0)]).score(), 18.4828);
    close(safe_mean(&[Some(50.0); 15]).score(), 49.6654);
    for nothing in [&[][..], &[None; 4], &[Some(f64::NAN)], &[Some(f64::INFINITY)]] {
        assert_eq!(safe_mean(nothing).score(), 0.0, "{nothing:?}");
    }
    // Ours: a miss is no tokens a second, so 60 / 4 instead of 60 / 3.
    close(mean_with_misses(&[Some(10.0), Some(20.0), None, Some(30.0)]).score(), 0.75 * 18.4828);
    close(mean_with_misses(&[Some(50.0); 15]).score(), 49.6654);
    assert_eq!(mean_with_misses(&[]).score(), 0.0);
}

#[test]
fn targon_gives_the_worst_nothing_and_the_best_everything() {
    let answers = |tps| vec![Some(tps); 3];
    let decision =
        decide_for(ScoringProfile::Targon44, &[answers(10.0), answers(20.0), answers(30.0)]);
    assert_eq!(decision.values, [(1, 32_768), (2, 65_535)]);
    let ours = decide_for(ScoringProfile::Default, &[answers(10.0), answers(20.0), answers(30.0)]);
    assert_eq!(ours.values, [(0, 21_845), (1, 43_690), (2, 65_535)]);
    // Where somebody earned nothing both agree.
    let miners = [vec![None], answers(20.0), answers(30.0)];
    let [ours, targon] =
        [ScoringProfile::Default, ScoringProfile::Targon44].map(|p| decide_for(p, &miners));
    assert_eq!(ours.values, [(1, 43_690), (2, 65_535)]);
    assert_eq!(ours.values, targon.values);
}

#[test]
fn no_weights_have_a_reason() {
    let none = |profile, miners: &[Vec<Option<f64>>]| {
        let decision = decide_for(profile, miners);
        assert!(decision.values.is_empty());
        assert!(decision.miners.iter().all(|m| m.weight == 0 && m.normalised == 0.0));
        decision.none.unwrap()
    };
    for profile in [ScoringProfile::Default, ScoringProfile::Targon44] {
        assert_eq!(none(profile, &[]), NoWeights::Empty.to_string());
        assert_eq!(none(profile, &[vec![], vec![None]]), NoWeights::AllZero.to_string());
    }
    let equal = [vec![Some(9.0); 2], vec![Some(9.0); 2]];
    assert_eq!(none(ScoringProfile::Targon44, &equal), NoWeights::AllEqual.to_string());
    let ours = decide_for(ScoringProfile::Default, &equal);
    assert_eq!((ours.values.as_slice(), &ours.none), (&[(0, 65_535), (1, 65_535)][..], &None));
    let one = decide_for(ScoringProfile::Default, &[vec![Some(3.0)]]);
    assert_eq!(one.values, [(0, 65_535)]);
}

#[test]
fn samples_leave_with_the_window_and_with_the_hotkey() {
    let mut list = vec![None; 40];
    list.extend([Some(10.0); WINDOW_TARGON_442]);
    let decision = decide_for(ScoringProfile::Default, &[list.clone()]);
    let series = &decision.miners[0].models[0];
    assert_eq!((series.older, series.answers, series.misses), (40, 30, 0));
    let targon = decide_for(ScoringProfile::Targon44, &[list.clone()]);
    assert_eq!(targon.miners[0].models[0].points.len(), 15);
    // Another hotkey takes the place over.
    let mut taken = seats(1);
    taken.get_mut(&0).unwrap().hotkey = "new".into();
    let ours = decide_over(ScoringProfile::Default, &taken, &history(&[list.clone()]));
    assert_eq!(ours.none.as_deref(), Some(NoWeights::AllZero.to_string().as_str()));
    assert_eq!((ours.miners[0].sum, ours.miners[0].models[0].of_others), (0.0, 70));
    let targon = decide_over(ScoringProfile::Targon44, &taken, &history(&[list]));
    assert!(targon.miners[0].sum > 0.0, "version 4.4 passes samples on to the next hotkey");
}

#[test]
fn a_model_counts_once_and_only_where_it_is_served_and_asked_for() {
    let mut seats = seats(2);
    let models = vec![MODEL.into(), "b".into(), MODEL.into(), "b".into(), MODEL.into()];
    seats.get_mut(&0).unwrap().models = models;
    let samples = [
        sample(0, MODEL, 1, Some(50.0)),
        sample(0, "b", 2, Some(70.0)),
        sample(1, MODEL, 3, Some(50.0)),
        sample(1, "c", 4, Some(50.0)),
    ];
    let asked = [MODEL.to_owned(), "c".to_owned(), MODEL.to_owned()];
    let input = Input {
        seats: &seats,
        models: &asked,
        samples: &samples,
        findings: &[],
        limits: ChainLimits::NONE,
    };
    let decision = decide(&ScoringRules::of(ScoringProfile::Default), &input);
    assert_eq!(decision.values, [(0, 65_535), (1, 65_535)]);
    let why = |uid: usize, model| {
        let found = decision.miners[uid].models.iter().find(|s| s.model == model);
        found.unwrap().left_out.clone()
    };
    assert_eq!(why(0, MODEL), None);
    assert_eq!(why(0, "b").unwrap(), "this validator does not ask for it");
    assert_eq!(why(1, "c").unwrap(), "the miner does not say that it serves it");
}

#[test]
fn requests_of_users_count_as_a_series_of_their_own() {
    let mut seats = seats(2);
    let organics = [Organic::Tps(100.0), Organic::Failed, Organic::Unscored, Organic::Rejected];
    seats.get_mut(&0).unwrap().organics = Some(organics.to_vec());
    let samples = history(&[vec![Some(10.0)], vec![Some(10.0)]]);
    let ours = decide_over(ScoringProfile::Default, &seats, &samples);
    let series = ours.miners[0].organics.clone().unwrap();
    assert_eq!((series.answers, series.misses), (1, 2));
    close(series.score, 100.0 / 3.0 * sigmoid(1.0 / 3.0));
    assert!(ours.miners[0].sum > ours.miners[1].sum);
    // Targon: (100 - 500) / 2, which one failure makes worse than no request at all.
    let targon = decide_over(ScoringProfile::Targon44, &seats, &samples);
    close(targon.miners[0].organics.clone().unwrap().score, -200.0 * sigmoid(1.0));
    assert_eq!(targon.none.as_deref(), Some(NoWeights::AllZero.to_string().as_str()));
    seats.get_mut(&0).unwrap().organics = Some(vec![Organic::Empty, Organic::Tps(300.0)]);
    let targon = decide_over(ScoringProfile::Targon44, &seats, &samples);
    close(targon.miners[0].organics.clone().unwrap().score, 100.0 * sigmoid(1.0));
}

/// Answers as the mildest cheat gives them, until the alarm; then honest ones.
#[test]
fn an_alarm_ends_pay_until_later_answers_speak_against_it() {
    let rates = Calibrated::default();
    let cheat = Observed { margins: vec![0.1; 4], energies: vec![2.0; 4], twin: None };
    let honest = Observed { margins: vec![0.0; 32], energies: vec![0.3; 4], twin: None };
    let (mut state, mut answers) = (HotkeyState::default(), 0);
    let mut step = |state: HotkeyState, observed: &Observed| {
        answers += 1;
        let mut evidence = state.evidence;
        evidence.add(&rates, observed);
        state.after(evidence, &format!("round-{answers}"), answers)
    };
    while state.shut_by.is_none() {
        state = step(state, &cheat);
    }
    let alarm = state.shut_by.clone().unwrap();
    assert!(alarm.block > 4, "one answer never decides");
    assert_eq!(alarm.round, format!("round-{}", alarm.block));
    let paid = |state: &HotkeyState, profile| {
        let mut seats = seats(2);
        seats.get_mut(&0).unwrap().state = state.clone();
        let samples = history(&[vec![Some(80.0)], vec![Some(40.0)]]);
        let decision = decide_over(profile, &seats, &samples);
        (decision.miners[0].weight, decision.miners[0].sum > 0.0)
    };
    assert_eq!(paid(&state, ScoringProfile::Default), (0, true));
    assert_eq!(paid(&state, ScoringProfile::Targon44), (65_535, true), "4.4 knows no evidence");
    // Below the alarm, but not yet below half of it: still shut.
    let mut was_between = false;
    while state.shut_by.is_some() {
        let Sums { margin, energy, joint } = state.evidence.sums;
        let largest = margin.max(energy).max(joint);
        was_between |= largest < ALARM && largest > REOPEN;
        assert_eq!(state.shut_by.as_ref().unwrap(), &alarm, "the first alarm is kept");
        assert_eq!(paid(&state, ScoringProfile::Default), (0, true));
        state = step(state, &honest);
    }
    assert!(was_between);
    assert_eq!(paid(&state, ScoringProfile::Default), (65_535, true));
    // Sums from elsewhere, without the gate: an alarm counts at once.
    let sums = Sums { margin: ALARM, energy: 0.0, joint: 0.0 };
    let evidence = Evidence { answers: 9, alarms: 1, sums };
    assert_eq!(paid(&HotkeyState { evidence, shut_by: None }, ScoringProfile::Default), (0, true));
}

#[test]
fn an_explanation_leads_to_the_round_and_comes_back_from_json() {
    let samples = history(&[vec![Some(10.0), None, None], vec![Some(10.0)]]);
    let findings = [MissReason {
        round: samples[1].round.clone(),
        uid: 0,
        cause: Some("UNLIKELY_TOKEN".into()),
        error: Some("token 17 has rank 90".into()),
    }];
    let (seats, models) = (seats(3), [MODEL.to_owned()]);
    let limits = ChainLimits::NONE;
    let input =
        Input { seats: &seats, models: &models, samples: &samples, findings: &findings, limits };
    let decision = decide(&ScoringRules::of(ScoringProfile::Default), &input);
    let stored = StoredExplanation::read(&decision.explanation().unwrap()).unwrap();
    let miner = &stored.miners[&0];
    assert_eq!(miner, &decision.miners[0]);
    let points = &miner.models[0].points;
    assert_eq!((points[1].tps, points[1].round.as_str()), (None, samples[1].round.as_str()));
    assert_eq!(points[1].error.as_deref(), Some("token 17 has rank 90"));
    assert_eq!(points[2].cause, None);
    assert_eq!(stored.miners.keys().copied().collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(stored.miners[&2].weight, 0);
}

#[test]
fn the_chain_gets_enough_uids_and_no_share_above_its_limit() {
    let raw = [(0, 0.0), (1, 1.0), (2, 0.0), (3, 0.5)];
    let at_least = |min_allowed| ChainLimits { min_allowed, max_weight: u16::MAX };
    let ours = |raw: &[(u16, f64)], limits| {
        let fine = raw.iter().rev().map(|(uid, _)| *uid).collect();
        emission::ours(raw, Spare { fine, shut: Vec::new() }, limits).unwrap()
    };
    let targon = |raw: &[(u16, f64)], limits| emission::targon(raw, limits).unwrap();
    assert_eq!(ours(&raw, at_least(2)), [(1, 65_535), (3, 32_768)]);
    assert_eq!(ours(&raw, at_least(3)), [(1, 65_535), (2, 1), (3, 32_768)]);
    assert_eq!(ours(&raw, at_least(9)), [(0, 1), (1, 65_535), (2, 1), (3, 32_768)]);
    // 1e-5 for all: 65,535e-5 rounds to 1.
    assert_eq!(targon(&raw, at_least(3)), [(0, 1), (1, 65_535), (2, 1), (3, 32_768)]);
    assert_eq!(targon(&raw, at_least(9)), [0, 1, 2, 3].map(|uid| (uid, 65_535)));
    let capped = ChainLimits { min_allowed: 0, max_weight: 6_554 };
    let raw: Vec<(u16, f64)> = (0..20).map(|uid| (uid, 0.8_f64.powi(uid.into()))).collect();
    for values in [ours(&raw, capped), targon(&raw, capped)] {
        let sum: f64 = values.iter().map(|(_, w)| f64::from(*w)).sum();
        let largest = f64::from(values[0].1) / sum;
        assert!((largest - 0.1).abs() < 1e-3, "{largest}");
        assert!(values.windows(2).all(|pair| pair[0].1 >= pair[1].1), "{values:?}");
        assert!(values[19].1 < values[18].1, "{values:?}");
    }
    // Where there are two uids alone they cannot have a tenth each; no vector can.
    assert_eq!(ours(&raw[..2], capped), [(0, 65_535), (1, 65_535)]);
}

#[test]
fn few_that_are_paid_leave_the_rest_to_others_where_the_chain_has_a_largest_share() {
    let capped = ChainLimits { min_allowed: 0, max_weight: 6_554 };
    let raw = |uids: u16| (0..uids).map(|uid| (uid, if uid < 3 { 1.0 } else { 0.0 })).collect();
    for (uids, shut, named) in [(256_u16, 6, 250_usize), (12, 2, 10), (12, 3, 12)] {
        let raw: Vec<(u16, f64)> = raw(uids);
        let spare = Spare { fine: (0..uids - shut).collect(), shut: (uids - shut..uids).collect() };
        let values = emission::ours(&raw, spare, capped).unwrap();
        assert_eq!(values.len(), named, "{uids} {shut}");
        let sum: u64 = values.iter().map(|(_, value)| u64::from(*value)).sum();
        assert!(values[..3].iter().all(|(_, value)| *value == u16::MAX));
        assert!(u64::from(u16::MAX) * 65_535 <= 6_554 * sum, "{uids}: {values:?}");
        // No more than the chain demands.
        let less = sum - (values.len() - 3) as u64;
        assert!(u64::from(u16::MAX) * 65_535 > 6_554 * less, "{uids}: {values:?}");
    }
}

#[test]
fn a_miner_behind_an_alarm_is_the_last_to_be_named() {
    let mut seats = seats(4);
    let sums = Sums { margin: ALARM, ..Sums::default() };
    let evidence = Evidence { answers: 9, alarms: 1, sums };
    seats.get_mut(&0).unwrap().state = HotkeyState { evidence, shut_by: None };
    let samples = history(&[vec![Some(50.0)], vec![], vec![], vec![Some(50.0)]]);
    let models = [MODEL.to_owned()];
    let named = |min_allowed| {
        let limits = ChainLimits { min_allowed, max_weight: u16::MAX };
        let input =
            Input { seats: &seats, models: &models, samples: &samples, findings: &[], limits };
        decide(&ScoringRules::of(ScoringProfile::Default), &input).values
    };
    assert_eq!(named(1), [(3, 65_535)]);
    assert_eq!(named(3), [(1, 1), (2, 1), (3, 65_535)]);
    assert_eq!(named(4), [(0, 1), (1, 1), (2, 1), (3, 65_535)]);
}

fn answers() -> impl Strategy<Value = Vec<Option<f64>>> {
    proptest::collection::vec(proptest::option::weighted(0.8, 0.5..500.0_f64), 0..45)
}

/// As broken as a sample can be in memory.
fn anything() -> impl Strategy<Value = Vec<Option<f64>>> {
    proptest::collection::vec(proptest::option::of(any::<f64>()), 0..20)
}

fn score(list: &[Option<f64>]) -> f64 {
    decide_for(ScoringProfile::Default, &[list.to_vec()]).miners[0].score
}

proptest! {
    #[test]
    fn nothing_is_nan_or_infinite(
        miners in proptest::collection::vec(anything(), 0..5),
        organics in anything(),
        limits in (0..8_u16, 1..=u16::MAX),
    ) {
        let mut seats = seats(miners.len() as u16);
        if let Some(seat) = seats.get_mut(&0) {
            let one = |tps: &Option<f64>| tps.map_or(Organic::Failed, Organic::Tps);
            seat.organics = Some(organics.iter().map(one).collect());
        }
        let limits = ChainLimits { min_allowed: limits.0, max_weight: limits.1 };
        let (samples, models) = (history(&miners), [MODEL.to_owned()]);
        let input =
            Input { seats: &seats, models: &models, samples: &samples, findings: &[], limits };
        for profile in [ScoringProfile::Default, ScoringProfile::Targon44] {
            let decision = decide(&ScoringRules::of(profile), &input);
            prop_assert_eq!(decision.values.is_empty(), decision.none.is_some());
            for miner in &decision.miners {
                let series = miner.models.iter().chain(&miner.organics);
                let numbers = series.flat_map(|s| [s.mean, s.consistency, s.score]);
                let all = [miner.sum, miner.score, miner.normalised];
                prop_assert!(numbers.chain(all).all(f64::is_finite), "{miner:?}");
                prop_assert!((0.0..=1.0).contains(&miner.normalised));
            }
            if decision.none.is_none() {
                let best = decision.values.iter().map(|(_, w)| *w).max();
                prop_assert_eq!(best, Some(u16::MAX));
            }
            prop_assert!(StoredExplanation::read(&decision.explanation().unwrap()).is_ok());
        }
    }

    #[test]
    fn order_does_not_matter_within_the_window(
        (list, shuffled) in answers().prop_flat_map(|list| {
            let newest = list[list.len().saturating_sub(WINDOW_TARGON_442)..].to_vec();
            (Just(list), Just(newest).prop_shuffle())
        }),
    ) {
        prop_assert_eq!(score(&list), score(&shuffled));
    }

    #[test]
    fn one_more_miss_never_raises_a_score(list in answers()) {
        let with_miss = [list.as_slice(), &[None]].concat();
        prop_assert!(score(&with_miss) <= score(&list), "{list:?}");
    }

    #[test]
    fn honest_ranks_above_a_miner_that_misses(tps in 0.5..500.0_f64, place in 0..30_usize) {
        let mut missed = vec![Some(tps); 30];
        missed[place] = None;
        let decision = decide_for(ScoringProfile::Default, &[vec![Some(tps); 30], missed]);
        prop_assert_eq!(decision.values[0], (0, 65_535));
        prop_assert!(decision.values[1].1 < 65_535 - 1000, "{:?}", decision.values);
    }

    #[test]
    fn only_ratios_of_speeds_matter(
        miners in proptest::collection::vec(answers(), 1..5),
        scale in 0.01..100.0_f64,
    ) {
        let scaled = miners.iter().map(|m| m.iter().map(|t| t.map(|t| t * scale)).collect());
        let scaled: Vec<Vec<Option<f64>>> = scaled.collect();
        for profile in [ScoringProfile::Default, ScoringProfile::Targon44] {
            let [a, b] = [&miners, &scaled].map(|m| decide_for(profile, m));
            prop_assert_eq!(&a.none, &b.none);
            for (a, b) in a.miners.iter().zip(&b.miners) {
                prop_assert!(a.weight.abs_diff(b.weight) <= 1, "{} {}", a.weight, b.weight);
            }
        }
    }

    #[test]
    fn uids_are_only_names(
        (miners, order) in proptest::collection::vec(answers(), 1..6).prop_flat_map(|miners| {
            let order = Just((0..miners.len()).collect::<Vec<_>>()).prop_shuffle();
            (Just(miners), order)
        }),
    ) {
        let moved: Vec<Vec<Option<f64>>> = order.iter().map(|from| miners[*from].clone()).collect();
        let [straight, moved] = [&miners, &moved].map(|m| decide_for(ScoringProfile::Default, m));
        for (to, from) in order.iter().enumerate() {
            prop_assert_eq!(moved.miners[to].weight, straight.miners[*from].weight);
            prop_assert_eq!(moved.miners[to].score, straight.miners[*from].score);
        }
    }
}

/// The control of `one_more_miss_never_raises_a_score`: in Targon's mean it does.
#[test]
fn in_targons_mean_a_miss_can_raise_a_score() {
    let mut list = vec![Some(1.0)];
    list.extend([Some(100.0); 14]);
    let with_miss = [&list[1..], &[None]].concat();
    assert!(safe_mean(&with_miss).score() > safe_mean(&list).score());
    assert!(mean_with_misses(&with_miss).score() < mean_with_misses(&list).score());
}

#[test]
fn names_and_windows_are_checked() {
    for profile in [ScoringProfile::Default, ScoringProfile::Targon44] {
        let name = profile.to_string();
        assert_eq!(name.parse::<ScoringProfile>().unwrap(), profile);
        assert_eq!(serde_json::to_value(profile).unwrap(), name);
    }
    let refused = "Targon".parse::<ScoringProfile>().unwrap_err().to_string();
    assert_eq!(refused, "a scoring profile is `default` or `targon-4.4`, got `Targon`");
    let rules = ScoringRules::of(ScoringProfile::Targon44);
    assert_eq!(rules.with_window(30).unwrap().window, 30);
    let refused = rules.with_window(0).unwrap_err().to_string();
    assert!(refused.contains("1 to 1000 samples, got 0"), "{refused}");
    assert!(rules.with_window(1001).is_err());
}

#[test]
fn who_has_earned_nothing_has_a_plain_zero() {
    for miner in
        decide_for(ScoringProfile::Default, &[vec![None, None], Vec::new(), vec![Some(9.0)]]).miners
    {
        let numbers = [miner.sum, miner.score, miner.normalised];
        assert!(numbers.iter().all(|n| n.is_sign_positive()), "{miner:?}");
    }
}
