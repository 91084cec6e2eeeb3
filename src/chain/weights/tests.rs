use super::*;
use proptest::collection::btree_map;
use proptest::prelude::*;
use serde_json::Value;

fn limits_of(case: &Value) -> WeightLimits {
    let number = |name: &str| case[name].as_u64().unwrap() as u16;
    WeightLimits {
        neurons: number("neurons"),
        min_allowed: number("min_allowed"),
        max_limit: number("max_limit"),
        own: case.get("own").and_then(Value::as_u64).map(|own| own as u16),
    }
}

fn raw_of(case: &Value) -> Vec<(u16, f64)> {
    let uids = case["uids"].as_array().unwrap().iter().map(|uid| uid.as_u64().unwrap() as u16);
    uids.zip(case["raw"].as_array().unwrap().iter().map(|raw| raw.as_f64().unwrap())).collect()
}

fn check_vectors(rule: VectorRule) {
    let vectors = crate::chain::tests::vectors("weight_vectors.json");
    let cases = vectors[rule.to_string()]["cases"].as_array().unwrap().clone();
    assert!(cases.len() > 60, "{}", cases.len());
    for case in &cases {
        let got = rule.vector(&raw_of(case), &limits_of(case));
        match case.get("want") {
            Some(want) => {
                let want: Vec<(u16, u16)> = serde_json::from_value(want.clone()).unwrap();
                assert_eq!(got.unwrap().values(), want, "{rule}: {}", case["name"]);
            }
            None => assert!(got.is_err(), "{rule}: {}: {got:?}", case["name"]),
        }
    }
}

#[test]
fn the_rule_of_targon_gives_what_bittensor_8_5_gives() {
    check_vectors(VectorRule::Targon44);
}

#[test]
fn the_rule_of_the_sdk_gives_what_bittensor_11_3_gives() {
    check_vectors(VectorRule::Sdk);
}

#[test]
fn what_is_no_weight_is_refused_with_its_uid() {
    let limits = WeightLimits { neurons: 8, min_allowed: 1, max_limit: WEIGHT_MAX, own: None };
    for rule in [VectorRule::Targon44, VectorRule::Sdk] {
        for value in [f64::NAN, f64::INFINITY, -0.1, 1e300] {
            let error = rule.vector(&[(2, 0.5), (5, value)], &limits).unwrap_err().to_string();
            assert!(error.contains("for uid 5"), "{error}");
        }
        let error = rule.vector(&[(2, 0.5), (2, 0.5)], &limits).unwrap_err();
        assert_eq!(error, VectorError::Order { before: 2, uid: 2 });
        assert_eq!(rule.vector(&[], &limits), Err(VectorError::Empty));
        let none = WeightLimits { neurons: 0, ..limits };
        assert_eq!(rule.vector(&[(0, 1.0)], &none), Err(VectorError::NoNeurons));
        assert_eq!(rule.to_string().parse(), Ok(rule));
    }
    let huge = [(0, 3e38), (1, 3e38)];
    assert_eq!(VectorRule::Targon44.vector(&huge, &limits), Err(VectorError::Sum));
    assert!(
        VectorRule::from_str("targon-6").unwrap_err().to_string().contains("targon-4.4 or sdk")
    );
}

#[test]
fn a_vector_is_as_the_chain_stores_it() {
    assert_eq!(Vector::new(vec![(1, 7), (3, 65_535)]).unwrap().uids(), [1, 3]);
    assert!(Vector::new(vec![]).is_err() && Vector::new(vec![(1, 65_535), (1, 2)]).is_err());
    let error = Vector::new(vec![(1, 0), (2, 65_535)]).unwrap_err().to_string();
    assert!(error.contains("got 0 for uid 1"), "{error}");
    assert!(Vector::new(vec![(1, 9)]).unwrap_err().to_string().contains("got 9 for uid 1"));
    assert_eq!(storage_index(4, 0), Ok(4));
    assert_eq!(storage_index(4, 2), Ok(8196));
    assert!(storage_index(4096, 0).is_err() && storage_index(4, 16).is_err());
}

/// The sum of u16 values has no rounding, each value has one of at most a half.
fn share_of_largest(vector: &Vector) -> f64 {
    let sum: u64 = vector.weights().into_iter().map(u64::from).sum();
    f64::from(WEIGHT_MAX) / sum as f64
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn vectors_are_scaled_ordered_and_within_the_limit(
        raw in btree_map(0_u16..300, prop_oneof![Just(0.0), 0.0..1.0_f64, 1e-30..1e30_f64], 1..300),
        min_allowed in 0_u16..300,
        max_limit in 1_u16..,
        is_targon: bool,
    ) {
        let raw: Vec<(u16, f64)> = raw.into_iter().collect();
        let limits = WeightLimits { neurons: 300, min_allowed, max_limit, own: None };
        let rule = if is_targon { VectorRule::Targon44 } else { VectorRule::Sdk };
        let Ok(vector) = rule.vector(&raw, &limits) else {
            // Only what the rule itself refuses: too few weights, or none.
            let above = raw.iter().filter(|(_, value)| *value > 0.0).count();
            prop_assert!(rule == VectorRule::Sdk || raw.iter().any(|(_, v)| *v > 1e29), "{above}");
            return Ok(());
        };
        // The type holds order, uniqueness, the largest value and that none is 0.
        prop_assert_eq!(Vector::new(vector.values().to_vec()), Ok(vector.clone()));
        prop_assert!(vector.values().iter().all(|(uid, _)| *uid < limits.neurons));
        if is_targon {
            prop_assert!(!raw.iter().any(|(_, value)| *value > 0.0) || !vector.values().is_empty());
        } else {
            prop_assert!(vector.values().len() >= usize::from(min_allowed));
        }
        let limit = f64::from(max_limit) / f64::from(WEIGHT_MAX);
        // Half a unit of rounding for each value, and the rules' own guards.
        let count = vector.values().len() as f64;
        let slack = 1.0 + count / f64::from(WEIGHT_MAX) + 1e-3;
        let even = 1.0 / count;
        prop_assert!(
            share_of_largest(&vector) <= limit.max(even) * slack || max_limit == WEIGHT_MAX,
            "{} of {} at most {}", share_of_largest(&vector), count, limit
        );
    }
}
