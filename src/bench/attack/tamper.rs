//! Cheaper stand-ins for a model: its weights on a coarser grid, or with parts replaced.

use crate::models::checkpoint::Checkpoint;
use crate::models::cpu::decoder::Decoder;
use crate::models::error::LoadError;
use crate::ops::dtype::Dtype;
use crate::ops::pool::Pool;
use safetensors::tensor::{Dtype as Stored, TensorView};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;

/// How a matrix is changed.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Tamper {
    /// Symmetric integers of so many bits in groups of so many columns; 0 is a whole row.
    Integers {
        /// Bits.
        bits: u32,
        /// Columns that share a scale.
        group: usize,
    },
    /// The same, in the last layers only.
    LastLayers {
        /// How many.
        layers: usize,
        /// Bits.
        bits: u32,
    },
    /// Eight-bit floats with four exponent bits, one scale for a tensor.
    Fp8,
    /// One layer does nothing.
    SkippedLayer(usize),
    /// A random update of rank 4 on every matrix, with this share of its norm.
    LowRank(f32),
}

/// The decoder of a checkpoint with its matrices changed; `scratch` holds the altered file.
///
/// # Errors
/// When the model is not a dense one of Llama's kind, or a file cannot be read or written.
pub fn tampered(
    checkpoint: &Checkpoint,
    pool: &Pool,
    tamper: Tamper,
    scratch: &Path,
) -> anyhow::Result<Decoder> {
    write(checkpoint, tamper, scratch)?;
    let altered = Checkpoint::open(scratch)?;
    let spec = Arc::new(altered.spec()?);
    Ok(Decoder::load(&altered, &spec, Dtype::Bf16, pool, |_, _| {})?)
}

/// One head of a key or value at one position, as a cache of symmetric int8 keeps it: with a scale
/// of its own.
pub fn int8_head(head: &mut [f32]) {
    integers(8, 0, head.len(), head);
}

fn write(checkpoint: &Checkpoint, tamper: Tamper, scratch: &Path) -> anyhow::Result<()> {
    let layers = checkpoint.config["num_hidden_layers"].as_u64().unwrap_or(0) as usize;
    let mut tensors = Vec::new();
    for name in names(&checkpoint.config, layers) {
        let (shape, mut values) = read(checkpoint, &name)?;
        if shape.len() == 2 && name.starts_with("model.layers.") {
            change(tamper, &name, layers, shape[1], &mut values);
        }
        let bits = values.iter().flat_map(|x| Dtype::Bf16.round(*x).to_le_bytes());
        tensors.push((name, shape, bits.collect::<Vec<u8>>()));
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Stored::BF16, shape.clone(), bytes);
        view.map(|v| (name.as_str(), v))
    });
    let views: Vec<_> = views.collect::<Result<_, _>>()?;
    safetensors::serialize_to_file(views, None, &scratch.join("model.safetensors"))?;
    let config = checkpoint.config.to_string();
    Ok(std::fs::write(scratch.join("config.json"), config)?)
}

/// The tensors of a dense Llama.
fn names(config: &Value, layers: usize) -> Vec<String> {
    let mut names = vec!["model.embed_tokens.weight".to_owned(), "model.norm.weight".to_owned()];
    if config["tie_word_embeddings"] != true {
        names.push("lm_head.weight".into());
    }
    let parts = [
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ];
    let of_layer = |i: usize| parts.map(|part| format!("model.layers.{i}.{part}.weight"));
    names.extend((0..layers).flat_map(of_layer));
    names
}

fn read(checkpoint: &Checkpoint, name: &str) -> Result<(Vec<usize>, Vec<f32>), LoadError> {
    let tensor = checkpoint.tensor(name)?;
    let mut row = vec![0; tensor.cols()];
    let mut values = Vec::with_capacity(tensor.rows() * tensor.cols());
    for index in 0..tensor.rows() {
        tensor.read_row(index, Dtype::Bf16, &mut row)?;
        values.extend(row.iter().map(|bits| Dtype::Bf16.widen(*bits)));
    }
    Ok((tensor.shape.clone(), values))
}

fn change(tamper: Tamper, name: &str, layers: usize, cols: usize, values: &mut [f32]) {
    let layer: usize = name.split('.').nth(2).and_then(|n| n.parse().ok()).unwrap_or(0);
    match tamper {
        Tamper::Integers { bits, group } => integers(bits, group, cols, values),
        Tamper::LastLayers { layers: last, bits } if layer + last >= layers => {
            integers(bits, 32, cols, values);
        }
        Tamper::LastLayers { .. } => {}
        Tamper::Fp8 => fp8(values),
        // Both branches of a layer end in these; at zero it adds nothing.
        Tamper::SkippedLayer(skipped) => {
            if layer == skipped && (name.contains("o_proj") || name.contains("down_proj")) {
                values.fill(0.0);
            }
        }
        Tamper::LowRank(share) => low_rank(share, name, cols, values),
    }
}

fn integers(bits: u32, group: usize, cols: usize, values: &mut [f32]) {
    let group = if group == 0 { cols } else { group };
    let largest = ((1 << (bits - 1)) - 1) as f32;
    for row in values.chunks_mut(cols) {
        for part in row.chunks_mut(group) {
            let max = part.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
            let scale = if max > 0.0 { max / largest } else { 1.0 };
            part.iter_mut().for_each(|x| *x = (*x / scale).round() * scale);
        }
    }
}

/// E4M3: 3 bits of mantissa, largest 448, smallest normal 2^-6.
fn fp8(values: &mut [f32]) {
    let max = values.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
    let scale = if max > 0.0 { max / 448.0 } else { 1.0 };
    for x in values {
        let y = *x / scale;
        let step = 2.0_f32.powi((y.abs().log2().floor() as i32).max(-6) - 3);
        *x = (y / step).round() * step * scale;
    }
}

fn low_rank(share: f32, name: &str, cols: usize, values: &mut [f32]) {
    const RANK: usize = 4;
    let rows = values.len() / cols;
    // The name seeds the update, so that it is the same in every run.
    let mut state = name.bytes().fold(7_u32, |s, b| s.wrapping_mul(31).wrapping_add(b.into()));
    let mut draw = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    let left: Vec<f32> = (0..rows * RANK).map(|_| draw()).collect();
    let right: Vec<f32> = (0..cols * RANK).map(|_| draw()).collect();
    let update: Vec<f32> = (0..rows * cols)
        .map(|i| {
            let (r, c) = (i / cols, i % cols);
            (0..RANK).map(|k| left[r * RANK + k] * right[c * RANK + k]).sum()
        })
        .collect();
    let norm = |v: &[f32]| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32;
    let scale = share * norm(values) / norm(&update).max(f32::MIN_POSITIVE);
    values.iter_mut().zip(update).for_each(|(x, u)| *x += scale * u);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_lie_on_the_grid_of_their_group() {
        let original: Vec<f32> = (0..64).map(|i| ((i * 37 % 64) as f32 - 31.0) / 8.0).collect();
        for (bits, group) in [(4, 16), (4, 0), (8, 16), (8, 0)] {
            let mut values = original.clone();
            integers(bits, group, 32, &mut values);
            let parts = if group == 0 { 32 } else { group };
            for (new, old) in values.chunks(parts).zip(original.chunks(parts)) {
                let max = old.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
                let step = max / ((1 << (bits - 1)) - 1) as f32;
                for (x, y) in new.iter().zip(old) {
                    assert!((x - y).abs() <= 0.5001 * step, "{bits} {group}: {y} became {x}");
                    assert!((x / step - (x / step).round()).abs() < 1e-3);
                }
            }
        }
        let mut zeros = [0.0; 8];
        int8_head(&mut zeros);
        assert_eq!(zeros, [0.0; 8]);
        let mut head = [127.0, -64.4, 0.4, 0.6];
        int8_head(&mut head);
        assert_eq!(head, [127.0, -64.0, 0.0, 1.0]);
    }

    #[test]
    fn fp8_keeps_three_bits_of_mantissa_and_zero() {
        let mut values = [448.0, 1.0, 1.06, 1.07, 0.0, -300.0, 0.001];
        fp8(&mut values);
        assert_eq!(values, [448.0, 1.0, 1.0, 1.125, 0.0, -288.0, 0.001_953_125]);
    }

    #[test]
    fn a_low_rank_update_has_the_size_it_should_and_is_repeatable() {
        let original: Vec<f32> =
            (0..32 * 48).map(|i| ((i * 29 % 97) as f32 - 48.0) / 9.0).collect();
        let change = |name: &str| {
            let mut values = original.clone();
            low_rank(0.01, name, 48, &mut values);
            values
        };
        let norm = |v: &[f32]| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let update: Vec<f32> = change("a").iter().zip(&original).map(|(x, y)| x - y).collect();
        let share = norm(&update) / norm(&original);
        assert!((share - 0.01).abs() < 1e-4, "{share}");
        assert_eq!(change("a"), change("a"));
        assert_ne!(change("a"), change("b"));
    }
}
