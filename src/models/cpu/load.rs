//! Packs the tensors of a checkpoint into the matrices that the processor multiplies by.

use super::decoder::Decoder;
use super::weights::{Embedding, FeedForward, Layer, Mixture, Mlp, Weights};
use crate::models::checkpoint::Checkpoint;
use crate::models::error::LoadError;
use crate::models::grid::Grid;
use crate::models::source::{FeedForwardSource, MatrixRows, MlpSource, RowReader, Source};
use crate::models::spec::Spec;
use crate::ops::dtype::Dtype;
use crate::ops::matmul::{Packed, gated_row, gated_rows};
use crate::ops::pool::Pool;
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
        let source = Source { checkpoint, spec, dtype };
        let loader = Loader { source, dtype, grid: None, pool: pool.separate() };
        loader.decoder(spec, &|done| progress(done, spec.layers))
    }

    /// The same with the matrices of all layers on a grid; embedding, head and routers stay.
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    pub fn coarse(
        checkpoint: &Checkpoint,
        (spec, dtype): (&Arc<Spec>, Dtype),
        grid: Grid,
        pool: &Pool,
    ) -> Result<Self, LoadError> {
        let source = Source { checkpoint, spec, dtype };
        let loader = Loader { source, dtype, grid: Some(grid), pool: pool.separate() };
        loader.decoder(spec, &|_| {})
    }
}

/// What is being loaded, into what.
struct Loader<'a> {
    source: Source<'a>,
    dtype: Dtype,
    grid: Option<Grid>,
    /// With an account of its own: loading has its share of the threads beside engines.
    pool: Pool,
}

/// The rows of a matrix, from the checkpoint or changed in memory.
enum Filler<'a> {
    Stored(RowReader<'a>),
    Changed(Vec<u16>),
}

impl Filler<'_> {
    fn fill(&self, row: usize, dtype: Dtype, out: &mut [u16]) -> Result<(), LoadError> {
        match self {
            Self::Stored(reader) => reader.read_row(row, dtype, out),
            Self::Changed(bits) => {
                out.copy_from_slice(&bits[row * out.len()..][..out.len()]);
                Ok(())
            }
        }
    }
}

impl Loader<'_> {
    fn decoder(&self, spec: &Arc<Spec>, progress: &dyn Fn(usize)) -> Result<Decoder, LoadError> {
        let weights = self.load(progress)?;
        Ok(Decoder {
            spec: Arc::clone(spec),
            dtype: self.dtype,
            weights,
            rope: self.source.rope()?,
        })
    }

    fn load(&self, progress: &dyn Fn(usize)) -> Result<Weights, LoadError> {
        let spec = self.source.spec;
        let packed = self.pack(&self.source.head()?, None)?;
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
            qkv: self.pack(&source.qkv, self.grid)?,
            qkv_bias: source.qkv_bias,
            q_norm: source.q_norm,
            k_norm: source.k_norm,
            out: self.pack(&source.out, self.grid)?,
            out_bias: source.out_bias,
            post_attention_norm: source.post_attention_norm,
            feed_forward_norm: source.feed_forward_norm,
            feed_forward: match source.feed_forward {
                FeedForwardSource::Dense(mlp) => FeedForward::Dense(self.mlp(&mlp)?),
                FeedForwardSource::Experts { spec, router, experts } => {
                    let experts = experts.iter().map(|mlp| self.mlp(mlp));
                    let experts = experts.collect::<Result<_, _>>()?;
                    FeedForward::Experts(Mixture {
                        spec,
                        router: self.pack(&router, None)?,
                        experts,
                    })
                }
            },
            post_feed_forward_norm: source.post_feed_forward_norm,
        })
    }

    fn mlp(&self, source: &MlpSource) -> Result<Mlp, LoadError> {
        let gate_up = self.pack_gated(&source.gate, &source.up)?;
        Ok(Mlp { gate_up, down: self.pack(&source.down, self.grid)? })
    }

    fn pack(&self, rows: &MatrixRows, grid: Option<Grid>) -> Result<Packed, LoadError> {
        let filler = self.filler(rows, grid)?;
        Packed::pack_beside(&self.pool, (rows.rows(), rows.cols()), self.dtype, |row, out| {
            filler.fill(row, self.dtype, out)
        })
    }

    fn filler<'a>(
        &self,
        rows: &'a MatrixRows,
        grid: Option<Grid>,
    ) -> Result<Filler<'a>, LoadError> {
        let reader = rows.reader(self.pool.threads())?;
        let Some(grid) = grid else { return Ok(Filler::Stored(reader)) };
        let (cols, dtype) = (rows.cols(), self.dtype);
        let mut all = vec![0; rows.rows() * cols];
        for (row, out) in all.chunks_exact_mut(cols).enumerate() {
            reader.read_row(row, dtype, out)?;
        }
        let mut rest = all.as_mut_slice();
        for count in rows.parts() {
            let (part, after) = rest.split_at_mut(count * cols);
            let mut values: Vec<f32> = part.iter().map(|bits| dtype.widen(*bits)).collect();
            grid.apply(cols, &mut values);
            part.iter_mut().zip(values).for_each(|(bits, x)| *bits = dtype.round(x));
            rest = after;
        }
        Ok(Filler::Changed(all))
    }

    /// Packs gate and up rows in alternating blocks.
    fn pack_gated(&self, gate: &MatrixRows, up: &MatrixRows) -> Result<Packed, LoadError> {
        let inter = gate.rows();
        let (gate_rows, up_rows) = (self.filler(gate, self.grid)?, self.filler(up, self.grid)?);
        let shape = (gated_rows(inter), gate.cols());
        Packed::pack_beside(&self.pool, shape, self.dtype, |row, out| match gated_row(row, inter) {
            Some(Ok(row)) => gate_rows.fill(row, self.dtype, out),
            Some(Err(row)) => up_rows.fill(row, self.dtype, out),
            None => {
                out.fill(0);
                Ok(())
            }
        })
    }
}
