//! Makes any round, for tests of properties.

use crate::store::record::{
    LikelyCheat, MeasuredValue, MinerResponse, Outcome, Round, Sampled, Statistics, Timing,
};
use proptest::prelude::*;
use serde_json::Value;

/// Any characters, NUL among them.
fn any_text() -> impl Strategy<Value = String> {
    let character = prop_oneof![9 => any::<char>(), 1 => Just('\0')];
    prop::collection::vec(character, 0..12).prop_map(|characters| characters.into_iter().collect())
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-1e300_f64..1e300).prop_map(Value::from),
        any_text().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((any_text(), inner), 0..4)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

fn any_response() -> impl Strategy<Value = MinerResponse> {
    let number = -1e300_f64..1e300;
    let numbers = [number.clone(), number.clone(), number.clone(), number.clone()];
    let measured = (any::<u32>(), any_text(), numbers.clone());
    let outcome = prop::sample::select(vec![
        Outcome::Verified,
        Outcome::Rejected,
        Outcome::Failed,
        Outcome::NotServed,
        Outcome::Unscored,
    ]);
    let sample =
        prop_oneof![number.prop_map(Sampled::Tps), Just(Sampled::Miss), Just(Sampled::Nothing)];
    let texts =
        (any_text(), any_text(), prop::option::of(any_text()), prop::option::of(any_text()));
    let statistics = measured.prop_map(|(rows, name, [margin, value, limit, beta])| Statistics {
        rows: Some(rows),
        margin: Some(margin),
        trimmed: Some(MeasuredValue { value, limit }),
        twin: None,
        likeliest: Some(LikelyCheat { name, beta }),
    });
    let statistics = prop_oneof![Just(Statistics::default()), statistics];
    let values = (prop::option::of(any_json()), prop::option::of(any_json()), statistics);
    (numbers, any::<u32>(), outcome, sample, texts, values).prop_map(
        |([first_token, all_tokens, total, tps], tokens, outcome, sample, texts, values)| {
            MinerResponse {
                uid: 0,
                hotkey: texts.0,
                coldkey: texts.1,
                timing: Timing { first_token, all_tokens, total, tps, tokens },
                outcome,
                cause: texts.2,
                error: texts.3,
                sample,
                capture: values.0,
                report: values.1,
                statistics: values.2,
            }
        },
    )
}

pub(super) fn any_round() -> impl Strategy<Value = Round> {
    let responses = prop::collection::btree_map(any::<u16>(), any_response(), 0..5);
    let numbers = (any::<u16>(), 0..=i64::MAX as u64, 0..=i64::MAX as u64, 0..=i64::MAX as u64);
    let texts = (any_text(), any_text(), any_text());
    (any::<u128>(), numbers, texts, any_json(), responses).prop_map(
        |(
            id,
            (netuid, block, started_ms, ended_ms),
            (model, endpoint, profile),
            request,
            found,
        )| {
            let responses =
                found.into_iter().map(|(uid, response)| MinerResponse { uid, ..response });
            Round {
                id: format!("{id:032x}"),
                netuid,
                block,
                started_ms,
                ended_ms,
                model,
                endpoint,
                request,
                profile,
                responses: responses.collect(),
            }
        },
    )
}
