use super::*;
use crate::proof::codec::{from_hex, to_hex};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use proptest::prelude::*;
use serde_json::Value;

fn data(name: &str) -> Vec<u8> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    std::fs::read(path).unwrap()
}

fn hex_words(text: &str) -> Vec<u16> {
    let digits = text.as_bytes().chunks_exact(4);
    digits.map(|d| u16::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
}

#[test]
fn published_vectors_come_out_byte_for_byte() {
    let json: Value = serde_json::from_slice(&data("toploc_vectors.json")).unwrap();
    let mut checked = 0;
    for vector in json["vectors"].as_array().unwrap() {
        let name = vector["name"].as_str().unwrap();
        let Some(hex) = vector["bf16_hex"].as_str() else { continue };
        let (activations, k) = (hex_words(hex), vector["k"].as_u64().unwrap() as usize);
        let proof = Proof::build(&activations, k).unwrap();
        assert_eq!(STANDARD.encode(proof.to_bytes()), vector["proof_b64"], "{name}");
        assert_eq!(Proof::from_bytes(&proof.to_bytes(), k).unwrap(), proof);
        let same = proof.distance(&activations);
        assert_eq!((same.exponent_mismatches, same.mantissa_mean), (0, 0.0), "{name}");
        let jittered = proof.distance(&hex_words(vector["jitter_1.01_bf16_hex"].as_str().unwrap()));
        let want = vector["python_verify_result"].as_array().unwrap();
        assert_eq!(jittered.exponent_mismatches as u64, want[0].as_u64().unwrap(), "{name}");
        assert_eq!(jittered.mantissa_mean, want[1].as_f64().unwrap(), "{name}");
        checked += 1;
    }
    assert_eq!(checked, 5);
}

#[test]
fn polynomials_through_given_points() {
    for (x, y, modulus, coefficients) in [
        (vec![1, 2, 3], vec![4, 5, 6], 65_497, vec![3, 1, 0]),
        (vec![1, 3, 5, 2], vec![1, 5, 4, 1], 65_497, vec![49_133, 40_920, 49_130, 57_309]),
        (
            vec![0, 65_497, 5, 131_000],
            vec![16_256, 49_024, 16_300, 49_100],
            65_496,
            vec![16_256, 13_787, 6_076, 12_905],
        ),
        (vec![70_000], vec![0xbf80], 65_497, vec![49_024]),
        (vec![1, 2], vec![65_500, 65_535], 65_497, vec![65_465, 35]),
    ] {
        let proof = Proof::through(&x, &y);
        assert_eq!(proof, Proof { modulus, coefficients });
    }
}

#[test]
fn the_golden_chunk_of_the_library() {
    let json: Value = serde_json::from_slice(&data("toploc_vectors.json")).unwrap();
    let bytes = data("toploc_golden_seed69.bf16le");
    let activations: Vec<u16> =
        bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    let vectors = json["vectors"].as_array().unwrap();
    let golden = vectors.iter().find(|v| v["name"] == "primerl_seed69_k128").unwrap();
    let proof = Proof::build(&activations, TOP_K).unwrap();
    assert_eq!(to_hex(&proof.to_bytes()), golden["proof_hex_lowest_index_tiebreak"]);
    // The library's CPU path breaks one tie the other way; the proofs accept each other.
    let theirs: [u8; 258] = from_hex(golden["proof_hex"].as_str().unwrap()).unwrap();
    let theirs = Proof::from_bytes(&theirs, TOP_K).unwrap();
    let distance = theirs.distance(&activations);
    assert_eq!((distance.exponent_mismatches, distance.mantissa_mean), (1, 0.0));
    assert!(distance.passes_published());
}

#[test]
fn malformed_proofs_are_refused_by_name() {
    let good = Proof::build(&[1, 2, 3, 4, 5], 3).unwrap().to_bytes();
    let error = |bytes: &[u8]| Proof::from_bytes(bytes, 3).unwrap_err().to_string();
    assert_eq!(error(&good[..7]), "a TOPLOC proof of 3 points has 8 bytes, got 7");
    assert_eq!(error(&[0; 8]), "the modulus must lie in 3..=65497, got 0");
    let mut wide = good.clone();
    wide[0] = 0xff;
    wide[1] = 0xff;
    assert_eq!(error(&wide), "the modulus must lie in 3..=65497, got 65535");
    let mut outside = good;
    outside[2..4].copy_from_slice(&[0xff, 0xff]);
    assert_eq!(error(&outside), "coefficient 0 is 65535, outside GF(65497)");
    assert_eq!(Proof::build(&[1, 2], 3), None);
}

proptest! {
    #[test]
    fn any_bytes_are_refused_or_evaluated(
        bytes in proptest::collection::vec(any::<u8>(), 0..40),
        activations in proptest::collection::vec(any::<u16>(), 0..60),
    ) {
        if let Ok(proof) = Proof::from_bytes(&bytes, 8) {
            prop_assert_eq!(proof.to_bytes(), bytes);
            prop_assert!(proof.distance(&activations).exponent_mismatches <= 8);
        }
    }

    #[test]
    fn a_proof_matches_its_own_activations(
        activations in proptest::collection::vec(0..0x7f80_u16, 8..400),
    ) {
        let distance = Proof::build(&activations, 8).unwrap().distance(&activations);
        prop_assert_eq!(distance, Distance {
            exponent_mismatches: 0, mantissa_mean: 0.0, mantissa_median: 0.0,
        });
    }
}
