//! Safetensors whose matrices are quantised: the values of other libraries, whole models, and what
//! is refused.

use crate::common::quantised::{Tensors, config, gptq, is_matrix, plain, read, write};
use safetensors::Dtype as StoredDtype;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use targon_engine::models::checkpoint::Checkpoint;
use targon_engine::models::identity::Identity;
use targon_engine::models::tapped;
use targon_engine::models::tensor::{Runs, Tensor};
use targon_engine::models::{Model, cpu::CpuPass};
use targon_engine::ops::dtype::Dtype;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::verify::prefill::hidden_rows;

fn rows(tensor: &Tensor, dtype: Dtype) -> Vec<u16> {
    let mut bits = vec![0; tensor.rows() * tensor.cols()];
    let runs = Runs::new(tensor, 1).unwrap();
    for (row, out) in bits.chunks_exact_mut(tensor.cols()).enumerate() {
        runs.read_row(row, dtype, out).unwrap();
    }
    bits
}

#[test]
fn matrices_have_the_values_that_the_libraries_give_them_that_packed_them() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/quantised");
    let mut schemes = Vec::new();
    for entry in std::fs::read_dir(data).unwrap() {
        let path = entry.unwrap().path();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let expected = checkpoint.tensor("expected").unwrap();
        let dtype = if expected.stored.name() == "F16" { Dtype::F16 } else { Dtype::Bf16 };
        let matrix = checkpoint.tensor("m.weight").unwrap();
        assert_eq!((&matrix.shape, matrix.cols()), (&expected.shape, 64), "{path:?}");
        let want = rows(&expected, dtype);
        assert_eq!(rows(&matrix, dtype), want, "{path:?}");
        let (mut row, mut differ) = (vec![0; 64], 0);
        for (r, want) in want.chunks_exact(64).enumerate() {
            matrix.read_row(r, dtype, &mut row).unwrap();
            assert_eq!(row, want, "{path:?}: row {r} alone");
            for (c, want) in want.iter().enumerate() {
                let element = matrix.element(r, c).unwrap();
                assert_eq!(dtype.round(element), *want, "{path:?}: {r}, {c} alone");
                differ += usize::from(matrix.element(r, c ^ 1).unwrap() != element);
            }
        }
        assert!(differ > 700, "the control, {path:?}: neighbours differ");
        assert!(matrix.element(matrix.rows(), 0).is_err() && matrix.element(0, 64).is_err());
        let names: Vec<_> = checkpoint.tensors().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["expected", "m.weight"], "{path:?}: nothing is left over");
        schemes.push(checkpoint.scheme().unwrap().to_owned());
    }
    schemes.sort();
    let want = [
        "awq-int4-g32",
        "compressed-fp8",
        "compressed-int4-g32",
        "compressed-int4-g32",
        "compressed-int8",
        "compressed-int8",
        "compressed-int8-g32",
        "fp8",
        "fp8-16x32",
        "gptq-int2-g24",
        "gptq-int4-g32",
        "gptq-int8-g32",
        "gptq-v2-int4-g32",
    ];
    assert_eq!(schemes, want);
}

fn pool() -> Pool {
    Pool::new(2, Isa::best()).unwrap()
}

fn load(dir: &Path) -> Model {
    Model::load(dir, None, &pool(), |_, _| {}).unwrap()
}

fn hidden(model: &Model) -> Vec<Vec<u16>> {
    let decoder = model.weights.cpu().unwrap();
    let pass = |blocks| {
        let pass = CpuPass::new(decoder, &pool(), blocks).unwrap();
        Ok(Box::new(pass) as Box<_>)
    };
    hidden_rows(pass, &[7, 200, 3, 259, 8], &[5, 6, 7]).unwrap()
}

#[test]
fn a_quantised_model_computes_what_its_values_do_and_is_another_one() {
    let dirs: [tempfile::TempDir; 3] = std::array::from_fn(|_| tempfile::tempdir().unwrap());
    plain(dirs[0].path());
    gptq(dirs[1].path());
    gptq(dirs[2].path());
    let mut other = json!({"quant_method": "gptq", "bits": 4, "group_size": 32});
    other["checkpoint_format"] = json!("gptq_v2");
    config(dirs[2].path(), &other);
    let [plain, coded, shifted] = dirs.each_ref().map(|dir| load(dir.path()));
    assert_eq!((coded.dtype, coded.checkpoint.scheme()), (Dtype::Bf16, Some("gptq-int4-g32")));
    assert_eq!(hidden(&coded), hidden(&plain));
    assert_ne!(hidden(&shifted), hidden(&plain), "the control: zeros that are one less");
    for sum in 0..400 {
        let powv = |model: &Model| model.parameters.powv(sum * 7, sum * 13).unwrap();
        assert_eq!(powv(&coded), powv(&plain), "{sum}");
    }
    let identity = |model: &Model| Identity::compute(model, &pool()).unwrap();
    let (first, second) = (identity(&plain), identity(&coded));
    assert_ne!(first.weights_root, second.weights_root);
    assert_eq!(
        (first.type_name(), second.type_name()),
        ("bf16".into(), "bf16+gptq-int4-g32".into())
    );
    assert_eq!(first.calibration, second.calibration, "the rows are the same");
    assert_eq!(second.quantised("isq-q8_0").type_name(), "bf16+gptq-int4-g32+isq-q8_0");
}

#[test]
fn what_is_remembered_of_a_model_is_of_one_reading_of_its_files() {
    let (dir, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    gptq(dir.path());
    let of = |model: &Model| Identity::cached_in(cache.path(), model, &pool()).unwrap();
    let first = of(&load(dir.path()));
    let mut other = json!({"quant_method": "gptq", "bits": 4, "group_size": 32});
    other["checkpoint_format"] = json!("gptq_v2");
    config(dir.path(), &other);
    let model = load(dir.path());
    let second = of(&model);
    assert_eq!(first.weights_root, second.weights_root, "the files are the same");
    assert_ne!(first.calibration, second.calibration);
    assert_eq!(second.calibration, Identity::compute(&model, &pool()).unwrap().calibration);
    assert_ne!(first.model_hash, second.model_hash);
}

#[test]
fn a_derived_checkpoint_holds_values_and_no_codes() {
    let (dir, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut tensors = gptq(dir.path());
    // What no model computes with may be of any type.
    let unused = (StoredDtype::I64, vec![2], vec![7; 16]);
    tensors.insert("model.position_ids".into(), unused);
    write(dir.path(), &tensors);
    let model = load(dir.path());
    let (spec, dtype) = (&model.spec, model.dtype);
    let derived = tapped::derive(cache.path(), &model.checkpoint, (spec, dtype), &[5; 32]).unwrap();
    let other = Checkpoint::open(&derived.directory).unwrap();
    assert_eq!((other.scheme(), &other.config["quantization_config"]), (None, &Value::Null));
    assert!(model.checkpoint.has("model.position_ids") && !other.has("model.position_ids"));
    let names: Vec<String> = model.checkpoint.tensors().map(|t| t.name.clone()).collect();
    for name in names.iter().filter(|name| is_matrix(name)) {
        let [own, derived] = [&model.checkpoint, &other].map(|c| c.tensor(name).unwrap());
        assert_eq!(rows(&own, dtype), rows(&derived, dtype), "{name}");
        assert_eq!(derived.stored.name(), "BF16");
    }
}

/// What [`Model::describe`] says of a checkpoint that a change was made to.
fn refusal(change: impl FnOnce(&Path, &mut Tensors)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = gptq(dir.path());
    change(dir.path(), &mut tensors);
    write(dir.path(), &tensors);
    Model::describe(dir.path(), None).err().unwrap().to_string()
}

#[test]
fn parts_that_are_missing_or_do_not_fit_are_named() {
    const M: &str = "model.layers.1.mlp.down_proj";
    type Change = fn(&mut Tensors, String);
    let cases: [(&str, Change, &str); 8] = [
        ("qzeros", |t, n| drop(t.remove(&n)), "has no `model.layers.1.mlp.down_proj.qzeros`"),
        ("scales", |t, n| drop(t.remove(&n)), "has no `model.layers.1.mlp.down_proj.scales`"),
        ("scales", |t, n| t.get_mut(&n).unwrap().0 = StoredDtype::I16, "must be F16, BF16 or F32"),
        ("qweight", |t, n| t.get_mut(&n).unwrap().0 = StoredDtype::F32, "must be I32, got F32"),
        ("g_idx", |t, n| t.get_mut(&n).unwrap().2[0] = 9, "must name groups below 3, got 9"),
        ("g_idx", |t, n| t.get_mut(&n).unwrap().2[3] = 0x80, "must name groups below 3, got -"),
        ("qzeros", |t, n| t.get_mut(&n).unwrap().1.reverse(), "expected shape [3, 8], got [8, 3]"),
        ("qweight", |t, n| t.get_mut(&n).unwrap().1.reverse(), "outputs must be a multiple of 8"),
    ];
    for (end, change, want) in cases {
        let name = format!("{M}.{end}");
        let said = refusal(|_, tensors| change(tensors, name.clone()));
        assert!(said.contains(M) && said.contains(want), "{name}: {said}");
    }
    let said = refusal(|_, tensors| {
        let (dtype, shape, bytes) = tensors[&format!("{M}.g_idx")].clone();
        tensors.insert(format!("{M}.act_order"), (dtype, shape, bytes));
    });
    assert!(said.contains("act_order") && said.contains("is no part of"), "{said}");
    let said = refusal(|_, tensors| {
        let (_, _, bytes) =
            plain(tempfile::tempdir().unwrap().path())[&format!("{M}.weight")].clone();
        tensors.insert(format!("{M}.weight"), (StoredDtype::BF16, vec![64, 96], bytes));
    });
    assert!(said.contains("stands beside `model.layers.1.mlp.down_proj.qweight`"), "{said}");
    let ordered = json!({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": true});
    let said = refusal(|dir, tensors| {
        config(dir, &ordered);
        tensors.remove(&format!("{M}.g_idx"));
    });
    assert!(said.contains("has no `model.layers.1.mlp.down_proj.g_idx`"), "{said}");
    let other = json!({"quant_method": "gptq", "bits": 4, "group_size": 48});
    let said = refusal(|dir, _| config(dir, &other));
    assert!(said.contains("inputs in groups of 48 have 2"), "{said}");
}

#[test]
fn parts_that_would_change_values_are_not_left_out() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/quantised");
    let opened = |name: &str, change: fn(&mut Tensors)| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(data.join(name).join("config.json"), dir.path().join("config.json")).unwrap();
        let mut tensors = read(&data.join(name));
        change(&mut tensors);
        write(dir.path(), &tensors);
        let names = |c: Checkpoint| c.tensors().map(|t| t.name.clone()).collect::<Vec<_>>();
        Checkpoint::open(dir.path()).map(names).map_err(|e| e.to_string())
    };
    let order = |t: &mut Tensors| {
        let words = (StoredDtype::I32, vec![64], vec![0; 256]);
        t.insert("m.weight_g_idx".into(), words);
    };
    let said = opened("int8-groups", order).unwrap_err();
    assert!(said.contains("`m.weight_g_idx`") && said.contains("beside codes of eight"), "{said}");
    let unordered = |t: &mut Tensors| {
        t.insert("m.weight_g_idx".into(), (StoredDtype::I32, vec![64], vec![0xff; 256]));
    };
    assert_eq!(opened("packed", unordered).unwrap(), ["expected", "m.weight"]);
    // Two scales: the second is left over, and refused once it is known what a model needs.
    let twice = |t: &mut Tensors| {
        let scale = t["m.weight_scale_inv"].clone();
        t.insert("m.weight_scale".into(), scale);
    };
    let names = opened("fp8-blocks", twice).unwrap();
    assert_eq!(names, ["expected", "m.weight", "m.weight_scale_inv"]);
    let embedding = |t: &mut Tensors| {
        for end in ["weight", "weight_scale"] {
            let part = t.remove(&format!("m.{end}")).unwrap();
            t.insert(format!("model.embed_tokens.{end}"), part);
        }
    };
    let said = opened("fp8-rows", embedding).unwrap_err();
    assert!(said.contains("an embedding of codes is not supported"), "{said}");
}

#[test]
fn methods_that_are_not_read_are_refused_by_key() {
    let group = |weights: Value| {
        json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
               "config_groups": {"group_0": {"weights": weights}}})
    };
    let int4 = json!({"num_bits": 4, "type": "int", "group_size": 32});
    let mut two = group(int4.clone());
    two["config_groups"]["group_1"] = json!({"weights": {"num_bits": 8, "type": "int"}});
    let mut cached = group(int4.clone());
    cached["kv_cache_scheme"] = json!({"num_bits": 8});
    let mut sparse = group(int4);
    sparse["sparsity_config"] = json!({"format": "sparse-24-bitmask"});
    for (said, want) in [
        (json!({"quant_method": "bitsandbytes"}), "quant_method` = \"bitsandbytes\" is not"),
        (json!({}), "quant_method` = {} is not supported; awq, compressed-tensors, fp8"),
        (json!({"quant_method": "gptq"}), "quantization_config.bits` is missing"),
        (json!({"quant_method": "gptq", "bits": 3}), "bits` = 3 is not supported; 2, 4 and 8 are"),
        (
            json!({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}),
            "checkpoint_format` = \"marlin\" is not supported",
        ),
        (
            json!({"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*down": {}}}),
            "dynamic` = {\"-:.*down\":{}} is not supported",
        ),
        (json!({"quant_method": "awq", "bits": 8}), "bits` = 8 is not supported; 4 is"),
        (
            json!({"quant_method": "awq", "bits": 4, "version": "gemv"}),
            "version` = \"gemv\" is not supported",
        ),
        (
            json!({"quant_method": "fp8", "weight_block_size": [128]}),
            "weight_block_size` must hold two sizes above 0, got [128]",
        ),
        (json!({"quant_method": "fp8", "fmt": "e5m2"}), "fmt` = \"e5m2\" is not supported"),
        (group(json!({"num_bits": 3})), "config_groups.group_0.weights.num_bits` = 3 is not"),
        (group(json!({"num_bits": 4, "type": "float"})), "format` = pack-quantized of float"),
        (two, "config_groups` must quantise all weights in the same way"),
        (cached, "kv_cache_scheme` = {\"num_bits\":8} is not supported; null is"),
        (sparse, "sparsity_config.format` = \"sparse-24-bitmask\" is not supported"),
    ] {
        let error = refusal(|dir, _| config(dir, &said));
        assert!(error.contains("config.json") && error.contains(want), "{said}: {error}");
    }
}

#[test]
fn a_code_that_is_no_number_names_its_row() {
    let data: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/quantised/fp8-rows");
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(data.join("config.json"), dir.path().join("config.json")).unwrap();
    let mut tensors = read(&data);
    tensors.get_mut("m.weight").unwrap().2[3 * 64 + 5] = 0x7f;
    write(dir.path(), &tensors);
    let matrix = Checkpoint::open(dir.path()).unwrap().tensor("m.weight").unwrap();
    let mut row = [0; 64];
    assert!(matrix.read_row(2, Dtype::Bf16, &mut row).is_ok(), "the control");
    let said = matrix.read_row(3, Dtype::Bf16, &mut row).unwrap_err().to_string();
    assert!(said.contains("`m.weight`") && said.contains("row 3 holds a NaN"), "{said}");
}
