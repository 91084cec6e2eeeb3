//! What a checkpoint holds into the processor's packed matrices.

use super::decoder::Decoder;
use super::weights::{Embedding, FeedForward, Layer, Mixture, Mlp, Weights};
use crate::models::checkpoint::Checkpoint;
use crate::models::error::LoadError;
use crate::models::source::{FeedForwardSource, MlpSource, Rows, Source};
use crate::models::spec::Spec;
use crate::ops::dtype::Dtype;
use crate::ops::matmul::{Packed, gated_row, gated_rows};
use crate::ops::pool::{Pool, Turn};
use std::sync::Arc;

impl Decoder {
    /// Packs the weights of a checkpoint of this shape, to be computed in `dtype`;
    /// `progress(done, layers)` is called after each layer.
    ///
    /// # Errors
    /// When a tensor is missing, cannot be read, or is not what the shape says.
    pub fn load(
        checkpoint: &Checkpoint,
        spec: &Arc<Spec>,
        dtype: Dtype,
        pool: &Pool,
        progress: impl Fn(usize, usize),
    ) -> Result<Self, LoadError> {
        let loader =
            Loader { source: Source { checkpoint, spec, dtype }, dtype, turn: &pool.turn() };
        let weights = loader.load(&|done| progress(done, spec.layers))?;
        let rope = loader.source.rope()?;
        Ok(Decoder { spec: Arc::clone(spec), dtype, weights, rope })
    }
}

/// What is being loaded, into what.
struct Loader<'a> {
    source: Source<'a>,
    dtype: Dtype,
    turn: &'a Turn<'a>,
}

impl Loader<'_> {
    fn load(&self, progress: &dyn Fn(usize)) -> Result<Weights, LoadError> {
        let spec = self.source.spec;
        let packed = self.pack(&self.source.head()?)?;
        let (embedding, head) = match spec.tied {
            true => (Embedding::Tied(packed), None),
            false => (Embedding::Stored(self.source.embedding()?), Some(packed)),
        };
        let layers = (0..spec.layers)
            .map(|index| {
                let layer = self.layer(index)?;
                progress(index + 1);
                Ok(layer)
            })
            .collect::<Result<_, LoadError>>()?;
        Ok(Weights { embedding, head, norm: self.source.final_norm()?, layers })
    }

    fn layer(&self, index: usize) -> Result<Layer, LoadError> {
        let source = self.source.layer(index)?;
        Ok(Layer {
            attention_norm: source.attention_norm,
            qkv: self.pack(&source.qkv)?,
            qkv_bias: source.qkv_bias,
            q_norm: source.q_norm,
            k_norm: source.k_norm,
            out: self.pack(&source.out)?,
            out_bias: source.out_bias,
            post_attention_norm: source.post_attention_norm,
            feed_forward_norm: source.feed_forward_norm,
            feed_forward: match source.feed_forward {
                FeedForwardSource::Dense(mlp) => FeedForward::Dense(self.mlp(&mlp)?),
                FeedForwardSource::Experts { spec, router, experts } => {
                    let experts = experts.iter().map(|mlp| self.mlp(mlp));
                    let experts = experts.collect::<Result<_, _>>()?;
                    FeedForward::Experts(Mixture { spec, router: self.pack(&router)?, experts })
                }
            },
            post_feed_forward_norm: source.post_feed_forward_norm,
        })
    }

    fn mlp(&self, source: &MlpSource) -> Result<Mlp, LoadError> {
        let gate_up = self.pack_gated(&source.gate, &source.up)?;
        Ok(Mlp { gate_up, down: self.pack(&source.down)? })
    }

    fn pack(&self, rows: &Rows) -> Result<Packed, LoadError> {
        let reader = rows.reader(self.turn.threads())?;
        Packed::pack(self.turn, (rows.rows(), rows.cols()), self.dtype, |row, out| {
            reader.read_row(row, self.dtype, out)
        })
    }

    /// Packs gate and up rows in alternating blocks.
    fn pack_gated(&self, gate: &Rows, up: &Rows) -> Result<Packed, LoadError> {
        let (inter, threads) = (gate.rows(), self.turn.threads());
        let (gate_rows, up_rows) = (gate.reader(threads)?, up.reader(threads)?);
        let shape = (gated_rows(inter), gate.cols());
        Packed::pack(self.turn, shape, self.dtype, |row, out| match gated_row(row, inter) {
            Some(Ok(row)) => gate_rows.read_row(row, self.dtype, out),
            Some(Err(row)) => up_rows.read_row(row, self.dtype, out),
            None => {
                out.fill(0);
                Ok(())
            }
        })
    }
}
