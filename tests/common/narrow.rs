//! Golden checkpoints with fewer heads.

use super::golden;
use safetensors::tensor::{SafeTensors, TensorView};
use serde_json::Value;
use std::path::Path;

/// Copies the golden checkpoint of a family.
pub fn copied(family: &str, place: &Path) {
    for entry in std::fs::read_dir(golden(family)).unwrap() {
        let file = entry.unwrap().file_name();
        if file != "golden.safetensors" {
            std::fs::copy(golden(family).join(&file), place.join(&file)).unwrap();
        }
    }
}

/// The same with fewer heads, so that they are as wide as the hidden row, where the other class
/// knows nothing else: the first rows of q, k and v, and the first columns of the output.
pub fn narrowed(family: &str, place: &Path) {
    copied(family, place);
    let path = place.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let get = |key: &str| config[key].as_u64().unwrap() as usize;
    let (hidden, head) = (get("hidden_size"), get("head_dim"));
    config["num_attention_heads"] = (hidden / head).into();
    config["num_key_value_heads"] = 1.into();
    std::fs::write(&path, config.to_string()).unwrap();
    for entry in std::fs::read_dir(place).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let bytes = std::fs::read(&path).unwrap();
            narrow(&SafeTensors::deserialize(&bytes).unwrap(), (hidden, head), &path);
        }
    }
}

fn narrow(tensors: &SafeTensors<'_>, (q, kv): (usize, usize), path: &Path) {
    let cut = |(name, tensor): (String, TensorView<'_>)| {
        let (mut shape, data) = (tensor.shape().to_vec(), tensor.data());
        let row = data.len() / shape[0];
        let rows = match name.split('.').rev().nth(1) {
            Some("q_proj") => q,
            Some("k_proj" | "v_proj") => kv,
            _ => shape[0],
        };
        let columns = if name.contains("o_proj.weight") { q * row / shape[1] } else { row };
        let cut = data.chunks(row).take(rows).flat_map(|row| row[..columns].to_vec()).collect();
        shape[0] = rows;
        if name.contains("o_proj.weight") {
            shape[1] = q;
        }
        (name, shape, tensor.dtype(), cut)
    };
    let cut: Vec<(_, _, _, Vec<u8>)> = tensors.tensors().into_iter().map(cut).collect();
    let views = cut.iter().map(|(name, shape, dtype, data)| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}
