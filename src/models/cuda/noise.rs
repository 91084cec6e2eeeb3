//! Makes weights of noise, for measurements of speed: a shape needs no checkpoint for that.

use super::error::CudaError;
use super::launch::{Card, Memory, Stream, bytes_of};
use super::memory::padded;
use super::weights::{CardLayer, CudaWeights, GATE_ROWS, Matrix};
use crate::models::spec::Spec;
use crate::ops::dtype::Dtype;
use crate::ops::lcg::Lcg;
use crate::ops::rope::Rope;
use std::sync::Arc;

/// Values that are repeated.
const VALUES: usize = 1 << 22;

impl CudaWeights {
    /// The same noise in every matrix of a dense shape without biases; rows stay about one.
    ///
    /// # Errors
    /// When the card has no room, or the shape is not such a one.
    pub fn noise(card: &Arc<Card>, spec: &Arc<Spec>, dtype: Dtype) -> Result<Self, CudaError> {
        let a = &spec.attention;
        if a.qkv_bias || a.out_bias || a.qk_norm || spec.norm.post {
            return Err(CudaError::Shape("noise is for shapes without biases".into()));
        }
        let mut noise = Lcg::new(1);
        let mut value = || (f64::from(noise.bits()) / f64::from(u32::MAX) - 0.5) as f32 * 0.05;
        let bits: Vec<u16> = (0..VALUES).map(|_| dtype.round(value())).collect();
        let (stream, before) = (Stream::new(card)?, card.memory()?.0);
        let matrix = |rows: usize, cols: usize| -> Result<Matrix, CudaError> {
            let memory = Memory::new(card, 2 * padded(rows) * padded(cols), "weights")?;
            for at in (0..memory.bytes()).step_by(2 * VALUES) {
                let len = (2 * VALUES).min(memory.bytes() - at);
                memory.write(&stream, at, &bytes_of(&bits)[..len])?;
            }
            Ok(Matrix { memory, rows, cols })
        };
        let ones = |len: usize| -> Result<Memory, CudaError> {
            let memory = Memory::new(card, 4 * len, "weights")?;
            memory.write(&stream, 0, &vec![1.0_f32; len]).map(|()| memory)
        };
        let (hidden, inter) = (spec.hidden, spec.feed_forward.inter);
        let layer = |_| -> Result<CardLayer, CudaError> {
            Ok(CardLayer {
                attention_norm: ones(hidden)?,
                qkv: matrix(spec.qkv_rows(), hidden)?,
                qkv_bias: None,
                q_norm: None,
                k_norm: None,
                out: matrix(hidden, spec.attention_cols())?,
                out_bias: None,
                post_attention_norm: None,
                feed_forward_norm: ones(hidden)?,
                router: None,
                gate_up: matrix(2 * inter.next_multiple_of(GATE_ROWS), hidden)?,
                down: matrix(hidden, inter)?,
                post_feed_forward_norm: None,
            })
        };
        let embedding = match spec.tied {
            true => None,
            false => Some(matrix(spec.vocab, hidden)?.memory),
        };
        let layers = (0..spec.layers).map(layer).collect::<Result<_, _>>()?;
        let (head, norm) = (matrix(spec.vocab, hidden)?, ones(hidden)?);
        let rope = Rope::new(a.head_dim, spec.rope.theta, spec.rope.scaling);
        let bytes = before.saturating_sub(card.memory()?.0);
        let (card, spec) = (Arc::clone(card), Arc::clone(spec));
        Ok(Self { card, spec, dtype, rope, embedding, head, norm, layers, bytes })
    }
}
