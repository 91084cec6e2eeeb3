//! Calibrations are computed, cached, and never taken from strangers; caches may be damaged.

use crate::common;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use targon_engine::models::{Identity, Model};
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::proof::codec::to_hex;
use targon_engine::proof::commit::calibration_hash;
use targon_engine::verify::rounding_energy;

/// What loading a model with its identity may take, whatever lies in the cache.
const BUDGET: Duration = Duration::from_secs(30);

struct Place {
    dir: tempfile::TempDir,
    pool: Pool,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        common::write_checkpoint(&dir.path().join("m"), &common::tiny_config(), 3);
        Self { dir, pool: Pool::new(2, Isa::best()).unwrap() }
    }

    fn model(&self) -> Model {
        Model::load(&self.dir.path().join("m"), None, &self.pool, |_, _| {}).unwrap()
    }

    fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    fn identity(&self, model: &Model) -> Result<Identity, String> {
        let started = Instant::now();
        let identity = Identity::cached_in(&self.cache(), model, &self.pool);
        assert!(started.elapsed() < BUDGET, "it took {:?}", started.elapsed());
        identity.map_err(|e| e.to_string())
    }

    /// The one file of calibrations.
    fn cached(&self) -> PathBuf {
        let mut files = std::fs::read_dir(self.cache().join("calibration")).unwrap();
        let file = files.next().unwrap().unwrap().path();
        assert!(files.next().is_none(), "no temporary file is left");
        file
    }
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A calibration under which every sketch is zero, so that any rows have the right one.
fn flat(stored: &Value) -> Value {
    let mut flat = stored.clone();
    for exponent in flat["exponents"].as_array_mut().unwrap() {
        *exponent = json!(-100);
    }
    for mean in flat["means"].as_array_mut().unwrap() {
        *mean = json!(0);
    }
    flat
}

#[test]
fn a_calibration_that_came_with_a_model_is_refused_by_name() {
    let place = Place::new();
    let model = place.model();
    let honest = place.identity(&model).unwrap();
    let stored = read(&place.cached());
    let beside = place.dir.path().join("m/targon-calibration.json");
    // As today's program stores it, and as the one before did.
    for keys in [&[][..], &["inputs"]] {
        let mut forged = flat(&stored);
        keys.iter().for_each(|key| drop(forged.as_object_mut().unwrap().remove(*key)));
        std::fs::write(&beside, forged.to_string()).unwrap();
        for cache in ["warm", "cold"] {
            if cache == "cold" {
                std::fs::remove_dir_all(place.cache()).unwrap();
            }
            let why = place.identity(&model).unwrap_err();
            let hash = to_hex(&calibration_hash(&honest.calibration));
            for want in [&beside.display().to_string(), &hash, "remove the file"] {
                assert!(why.contains(want), "{cache}: {want}: {why}");
            }
        }
    }
    // The right one does no harm, and neither does what is none of this model.
    std::fs::write(&beside, stored.to_string()).unwrap();
    assert_eq!(place.identity(&model).unwrap().model_hash, honest.model_hash);
    let mut other = flat(&stored);
    other["weights_root"] = json!("00".repeat(32));
    for harmless in [other.to_string(), "{".into(), String::new(), "9".repeat(2 << 20)] {
        std::fs::write(&beside, harmless).unwrap();
        assert_eq!(place.identity(&model).unwrap().model_hash, honest.model_hash);
    }
}

#[test]
fn a_calibration_that_was_put_into_the_cache_is_computed_again() {
    let place = Place::new();
    let model = place.model();
    let honest = place.identity(&model).unwrap();
    let fresh = Identity::compute(&model, &place.pool).unwrap();
    assert_eq!(honest.model_hash, fresh.model_hash);
    let file = place.cached();
    let whole = read(&file);
    let mut shifted = whole.clone();
    shifted["shift"] = json!(20);
    for forged in [flat(&whole), shifted] {
        std::fs::write(&file, forged.to_string()).unwrap();
        assert_eq!(place.identity(&model).unwrap().model_hash, honest.model_hash);
        assert_eq!(read(&place.cached()), whole, "it is written again");
    }
    // Without what was remembered, the file alone is not believed.
    std::fs::remove_file(place.cache().join("roots.json")).unwrap();
    std::fs::write(&file, flat(&whole).to_string()).unwrap();
    assert_eq!(place.identity(&model).unwrap().model_hash, honest.model_hash);
    assert_eq!(read(&place.cached()), whole);
}

#[test]
fn a_damaged_cache_is_none() {
    let place = Place::new();
    let model = place.model();
    let honest = place.identity(&model).unwrap();
    for file in [place.cached(), place.cache().join("roots.json")] {
        let whole = std::fs::read(&file).unwrap();
        let half = whole[..whole.len() / 2].to_vec();
        let mut flipped = whole.clone();
        let digit = whole.iter().rposition(u8::is_ascii_digit).unwrap();
        flipped[digit] ^= 1;
        let long = [b"[0", ",0".repeat(1 << 20).as_bytes(), b"]"].concat();
        let nested = "[".repeat(1 << 19).into_bytes();
        for damaged in [Vec::new(), half, flipped, long, nested, b"null".to_vec()] {
            std::fs::write(&file, damaged).unwrap();
            assert_eq!(place.identity(&model).unwrap().model_hash, honest.model_hash);
            assert_eq!(std::fs::read(&file).unwrap(), whole, "{}", file.display());
        }
        // What can be neither read nor replaced costs only time.
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir_all(file.join("in the way")).unwrap();
        assert_eq!(place.identity(&model).unwrap().model_hash, honest.model_hash);
        std::fs::remove_dir_all(&file).unwrap();
        assert_eq!(place.identity(&model).unwrap().model_hash, honest.model_hash);
        assert_eq!(std::fs::read(&file).unwrap(), whole);
    }
}

#[test]
fn the_cache_knows_tokenizers_and_configurations_apart() {
    let place = Place::new();
    let before = place.identity(&place.model()).unwrap();
    let dir = place.dir.path().join("m");
    let change = |file: &str, key: &str, value: Value| {
        let mut json = read(&dir.join(file));
        *json.pointer_mut(key).unwrap() = value;
        std::fs::write(dir.join(file), json.to_string()).unwrap();
        let model = place.model();
        let cached = place.identity(&model).unwrap();
        let fresh = Identity::compute(&model, &place.pool).unwrap();
        assert_eq!(cached.weights_root, before.weights_root, "the weights are the same");
        assert_eq!(cached.model_hash, fresh.model_hash, "{file} {key}");
        cached.model_hash
    };
    // Another meaning of two bytes of the text, then another rotation.
    let mut vocab = read(&dir.join("tokenizer.json"))["model"]["vocab"].clone();
    let (a, e) = (vocab["a"].clone(), vocab["e"].clone());
    (vocab["a"], vocab["e"]) = (e, a);
    let swapped = change("tokenizer.json", "/model/vocab", vocab);
    let turned = change("config.json", "/rms_norm_eps", json!(0.1));
    assert!(swapped != before.model_hash && turned != swapped && turned != before.model_hash);
}

#[test]
fn weights_that_keep_their_time_and_size_are_seen_to_have_changed() {
    let place = Place::new();
    let before = place.identity(&place.model()).unwrap();
    let file = place.dir.path().join("m/model.safetensors");
    let time = std::fs::metadata(&file).unwrap().modified().unwrap();
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    std::fs::File::options().write(true).open(&file).unwrap().set_modified(time).unwrap();
    assert_eq!(std::fs::metadata(&file).unwrap().modified().unwrap(), time);
    assert_ne!(place.identity(&place.model()).unwrap().weights_root, before.weights_root);
}

#[test]
fn a_models_rounding_is_the_same_on_every_instruction_set_and_another_models_is_another() {
    let dir = tempfile::tempdir().unwrap();
    let [one, other] = [3, 4].map(|seed| {
        let dir = dir.path().join(seed.to_string());
        common::write_checkpoint(&dir, &common::tiny_config(), seed);
        dir
    });
    let energy = |dir: &Path, isa| {
        let pool = Pool::new(2, isa).unwrap();
        let model = Model::load(dir, None, &pool, |_, _| {}).unwrap();
        let identity = Identity::compute(&model, &pool).unwrap();
        rounding_energy::compute(&model, &identity, &pool).unwrap().unwrap()
    };
    let scalar = energy(&one, Isa::SCALAR);
    assert!(scalar > 0.0, "{scalar}");
    for isa in Isa::available() {
        assert_eq!(energy(&one, isa).to_bits(), scalar.to_bits(), "{isa}");
    }
    assert_ne!(energy(&other, Isa::SCALAR), scalar);
}
