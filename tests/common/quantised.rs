//! A tiny checkpoint whose matrices are quantised, and the same one in bf16.

use super::{Noise, tiny_config, write_checkpoint};
use safetensors::Dtype as StoredDtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Type, shape and bytes of tensors by name.
pub type Tensors = BTreeMap<String, (StoredDtype, Vec<usize>, Vec<u8>)>;

pub fn read(dir: &Path) -> Tensors {
    let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
    let all = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let own = |(name, t): (String, TensorView<'_>)| {
        (name, (t.dtype(), t.shape().to_vec(), t.data().to_vec()))
    };
    all.tensors().into_iter().map(own).collect()
}

pub fn write(dir: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

pub fn is_matrix(name: &str) -> bool {
    name.ends_with("_proj.weight")
}

/// A small whole number for each element of a matrix.
fn codes(seed: u32, count: usize) -> Vec<i32> {
    let mut noise = Noise(seed);
    (0..count).map(|_| noise.below(16) as i32).collect()
}

const ZERO: i32 = 7;
const SCALE: f32 = 0.03125;

/// The tiny checkpoint with matrices of codes, each as its values in bf16.
pub fn plain(dir: &Path) -> Tensors {
    write_checkpoint(dir, &tiny_config(), 3);
    let mut tensors = read(dir);
    let matrices = tensors.iter_mut().filter(|(name, _)| is_matrix(name)).enumerate();
    for (number, (_, (_, shape, bytes))) in matrices {
        let codes = codes(number as u32, shape.iter().product());
        let value = |code: &i32| half::bf16::from_f32((code - ZERO) as f32 * SCALE).to_le_bytes();
        *bytes = codes.iter().flat_map(value).collect();
    }
    write(dir, &tensors);
    tensors
}

/// The same checkpoint as GPTQ stores it.
pub fn gptq(dir: &Path) -> Tensors {
    let mut tensors = plain(dir);
    let names: Vec<String> = tensors.keys().filter(|name| is_matrix(name)).cloned().collect();
    for (number, name) in names.iter().enumerate() {
        let (_, shape, _) = tensors.remove(name).unwrap();
        let (rows, cols) = (shape[0], shape[1]);
        let codes = codes(number as u32, rows * cols);
        let mut words = vec![0_u32; cols / 8 * rows];
        for (at, code) in codes.iter().enumerate() {
            let (row, col) = (at / cols, at % cols);
            words[col / 8 * rows + row] |= (*code as u32) << (4 * (col % 8));
        }
        let module = name.strip_suffix(".weight").unwrap();
        let mut add = |end: &str, dtype, shape: &[usize], bytes: Vec<u8>| {
            tensors.insert(format!("{module}.{end}"), (dtype, shape.to_vec(), bytes));
        };
        let groups = cols / 32;
        let scale = half::bf16::from_f32(SCALE).to_le_bytes();
        let (i32, bf16) = (StoredDtype::I32, StoredDtype::BF16);
        let words = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        add("qweight", i32, &[cols / 8, rows], words);
        // Six stands for seven.
        add("qzeros", i32, &[groups, rows / 8], [0x66; 4].repeat(groups * rows / 8));
        add("scales", bf16, &[groups, rows], scale.repeat(groups * rows));
        let of_inputs = (0..cols as u32).flat_map(|c| (c / 32).to_le_bytes()).collect();
        add("g_idx", i32, &[cols], of_inputs);
    }
    write(dir, &tensors);
    config(dir, &json!({"quant_method": "gptq", "bits": 4, "group_size": 32}));
    tensors
}

pub fn config(dir: &Path, quantization: &Value) {
    let mut config = tiny_config();
    config["quantization_config"] = quantization.clone();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}
