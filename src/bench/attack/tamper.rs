//! Makes cheaper substitutes for a model: its weights are rounded more coarsely, or parts are
//! replaced.

use crate::models::checkpoint::Checkpoint;
use crate::models::cpu::decoder::Decoder;
use crate::models::error::LoadError;
use crate::models::grid::{Fp8Scale, Grid};
use crate::models::spec::Spec;
use crate::ops::dtype::Dtype;
use crate::ops::lcg::Lcg;
use crate::ops::pool::Pool;
use anyhow::bail;
use safetensors::tensor::{Dtype as Stored, TensorView};
use std::path::Path;
use std::sync::Arc;

/// How a matrix is changed.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Tamper {
    /// Symmetric integers of so many bits in groups of so many columns; 0 is a whole row.
    Integers {
        /// Bits of an integer.
        bits: u32,
        /// Columns that share a scale.
        group: usize,
    },
    /// The same, in the last layers only.
    LastLayers {
        /// How many.
        layers: usize,
        /// Bits of an integer.
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
/// When the model is a mixture of experts, or a file cannot be read or written.
pub fn tampered(
    checkpoint: &Checkpoint,
    pool: &Pool,
    tamper: Tamper,
    scratch: &Path,
) -> anyhow::Result<Decoder> {
    let spec = checkpoint.spec()?;
    if spec.feed_forward.experts.is_some() {
        bail!("weights of a mixture of experts ({}) are not changed here", spec.family.name);
    }
    write(checkpoint, &spec, tamper, scratch)?;
    let altered = Checkpoint::open(scratch)?;
    let spec = Arc::new(altered.spec()?);
    Ok(Decoder::load(&altered, &spec, Dtype::Bf16, pool, |_, _| {})?)
}

/// One head of a key or value at one position, as a cache of symmetric int8 keeps it: with a scale
/// of its own.
pub fn int8_head(head: &mut [f32]) {
    Grid::integers(8, 0).apply(head.len(), head);
}

fn write(
    checkpoint: &Checkpoint,
    spec: &Spec,
    tamper: Tamper,
    scratch: &Path,
) -> anyhow::Result<()> {
    let mut tensors = Vec::new();
    for name in spec.tensor_names().into_iter().filter(|name| checkpoint.has(name)) {
        let (shape, mut values) = read(checkpoint, &name)?;
        if shape.len() == 2 && name.starts_with("model.layers.") {
            change(tamper, &name, spec.layers, shape[1], &mut values);
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
        Tamper::Integers { bits, group } => Grid::integers(bits, group).apply(cols, values),
        Tamper::LastLayers { layers: last, bits } if layer + last >= layers => {
            Grid::integers(bits, 32).apply(cols, values);
        }
        Tamper::LastLayers { .. } => {}
        Tamper::Fp8 => Grid::Fp8(Fp8Scale::Tensor).apply(cols, values),
        // Both branches of a layer end in these; at zero it adds nothing.
        Tamper::SkippedLayer(skipped) => {
            if layer == skipped && (name.contains("o_proj") || name.contains("down_proj")) {
                values.fill(0.0);
            }
        }
        Tamper::LowRank(share) => low_rank(share, name, cols, values),
    }
}

fn low_rank(share: f32, name: &str, cols: usize, values: &mut [f32]) {
    const RANK: usize = 4;
    let rows = values.len() / cols;
    // The name seeds the update, so that it is the same in every run.
    let seed = name.bytes().fold(7_u32, |s, b| s.wrapping_mul(31).wrapping_add(b.into()));
    let mut noise = Lcg::new(seed);
    let mut draw = || (noise.bits() >> 8) as f32 / (1 << 24) as f32 - 0.5;
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
    fn a_cache_of_bytes_has_a_scale_for_each_head() {
        let mut zeros = [0.0; 8];
        int8_head(&mut zeros);
        assert_eq!(zeros, [0.0; 8]);
        let mut head = [127.0, -64.4, 0.4, 0.6];
        int8_head(&mut head);
        assert_eq!(head, [127.0, -64.0, 0.0, 1.0]);
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
