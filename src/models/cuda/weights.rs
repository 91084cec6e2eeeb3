//! Holds the weights of a model in a card's memory.
//!
//! Rows go to the card as the file has them, a piece at a time, and the card packs them in the
//! tiles that the kernels read: loading needs little memory beside the weights, on either side.

use super::error::CudaError;
use super::launch::{Card, Launch, Memory, Pinned, Pointer, Stream, args, bytes_of};
use super::memory::padded;
use crate::models::checkpoint::Checkpoint;
use crate::models::error::LoadError;
use crate::models::source::{FeedForwardSource, MatrixRows, MlpSource, Source};
use crate::models::spec::{ExpertSpec, Spec};
use crate::ops::dtype::Dtype;
use crate::ops::pool::Pool;
use crate::ops::rope::Rope;
use crate::ops::rowwise::Norm;
use parking_lot::Mutex;
use std::sync::Arc;

/// Bytes of rows that are copied at once; a buffer of that size is on the card while a model loads.
const PIECE_BYTES: usize = 16 << 20;
/// Gate and up rows begin at multiples of this.
pub(super) const GATE_ROWS: usize = 64;
/// Experts that the routing kernels have room for.
pub(super) const EXPERTS_MAX: usize = 256;
/// Elements of the largest head that the kernels take.
const HEAD_DIM_MAX: usize = 256;
/// Elements of the largest row whose norm fits in a thread block's memory on every card.
const HIDDEN_MAX: usize = (96 << 10) / 4;

/// A model in a card's memory. Passes share it.
pub struct CudaWeights {
    pub(super) card: Arc<Card>,
    pub(super) spec: Arc<Spec>,
    pub(super) dtype: Dtype,
    pub(super) rope: Rope,
    pub(super) embedding: Option<Memory>, // (vocab, hidden) where it is not the head
    pub(super) head: Matrix,
    pub(super) norm: Memory,
    pub(super) layers: Vec<CardLayer>,
    pub(super) bytes: usize,
}

/// A packed matrix, or several of equal shape one behind the other.
pub(super) struct Matrix {
    pub(super) memory: Memory,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

/// One decoder layer; vectors are f32.
pub(super) struct CardLayer {
    pub(super) attention_norm: Memory,
    pub(super) qkv: Matrix,
    pub(super) qkv_bias: Option<Memory>,
    pub(super) q_norm: Option<Memory>,
    pub(super) k_norm: Option<Memory>,
    pub(super) out: Matrix,
    pub(super) out_bias: Option<Memory>,
    pub(super) post_attention_norm: Option<Memory>,
    pub(super) feed_forward_norm: Memory,
    /// Scores the experts, in a mixture.
    pub(super) router: Option<(ExpertSpec, Matrix)>,
    /// Gate rows, then up rows; of all experts in a mixture.
    pub(super) gate_up: Matrix,
    pub(super) down: Matrix,
    pub(super) post_feed_forward_norm: Option<Memory>,
}

/// Bytes of the matrices of a shape on a card, where an allocation of so many takes what `held`
/// says.
pub(super) fn weight_bytes(spec: &Spec, held: fn(u64) -> u64) -> u64 {
    let several = |count: usize, rows: usize, cols: usize| {
        held((2 * count * padded(rows) * padded(cols)) as u64)
    };
    let matrix = |rows: usize, cols: usize| several(1, rows, cols);
    let (hidden, inter) = (spec.hidden, spec.feed_forward.inter);
    let (experts, router) =
        spec.feed_forward.experts.map_or((1, 0), |e| (e.count, matrix(e.count, hidden)));
    let feed_forward = several(experts, 2 * inter.next_multiple_of(GATE_ROWS), hidden)
        + several(experts, hidden, inter)
        + router;
    let attention = matrix(spec.qkv_rows(), hidden) + matrix(hidden, spec.attention_cols());
    let table = if spec.tied { 0 } else { held((2 * spec.vocab * hidden) as u64) };
    spec.layers as u64 * (attention + feed_forward) + matrix(spec.vocab, hidden) + table
}

impl CudaWeights {
    /// Packs a checkpoint of this shape into the memory of `card`, to be computed in `dtype`;
    /// `progress(done, layers)` is called after each layer.
    ///
    /// # Errors
    /// When a tensor is missing or cannot be read, the shape is one that the kernels were not made
    /// for, or the card has no room.
    pub fn load(
        card: &Arc<Card>,
        checkpoint: &Checkpoint,
        spec: &Arc<Spec>,
        dtype: Dtype,
        pool: &Pool,
        progress: impl Fn(usize, usize),
    ) -> Result<Self, LoadError> {
        check(spec)?;
        let loader = Loader {
            card,
            stream: Stream::new(card)?,
            staging: Mutex::new(Staging(None)),
            source: Source { checkpoint, spec, dtype },
            dtype,
            pool: pool.separate(),
        };
        let before = card.memory()?.0;
        let head = loader.matrix(&loader.source.head()?)?;
        let embedding = if spec.tied { None } else { Some(loader.table()?) };
        let mut layers = Vec::with_capacity(spec.layers);
        for index in 0..spec.layers {
            layers.push(loader.layer(index)?);
            progress(index + 1, spec.layers);
        }
        let norm = loader.norm(loader.source.final_norm()?)?;
        let rope = loader.source.rope()?;
        loader.stream.wait()?;
        drop(loader);
        let bytes = before.saturating_sub(card.memory()?.0);
        let (card, spec) = (Arc::clone(card), Arc::clone(spec));
        Ok(Self { card, spec, dtype, rope, embedding, head, norm, layers, bytes })
    }

    /// The shape of the model.
    pub fn spec(&self) -> &Arc<Spec> {
        &self.spec
    }

    /// Type of weights and arithmetic.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The card whose memory holds them.
    pub fn card(&self) -> &Arc<Card> {
        &self.card
    }

    /// Bytes of the card's memory that loading took.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Refuses what the kernels cannot compute.
fn check(spec: &Spec) -> Result<(), CudaError> {
    let limit = |what: &str, value: usize, limit: usize| match value <= limit {
        true => Ok(()),
        false => Err(CudaError::Shape(format!(
            "{what} of {value} is more than the {limit} that the kernels for NVIDIA cards take"
        ))),
    };
    limit("a hidden size", spec.hidden, HIDDEN_MAX)?;
    limit("a head dimension", spec.attention.head_dim, HEAD_DIM_MAX)?;
    limit("a number of experts", spec.feed_forward.experts.map_or(0, |e| e.count), EXPERTS_MAX)
}

struct Loader<'a> {
    card: &'a Arc<Card>,
    stream: Stream,
    staging: Mutex<Staging>,
    source: Source<'a>,
    dtype: Dtype,
    /// With an account of its own: loading has its share of the threads beside engines.
    pool: Pool,
}

/// Writes a row of a matrix into zeros.
type Fill<'a> = dyn Fn(usize, &mut [u16]) -> Result<(), LoadError> + Sync + 'a;

impl Loader<'_> {
    fn layer(&self, index: usize) -> Result<CardLayer, LoadError> {
        let source = self.source.layer(index)?;
        let optional = |norm: Option<Norm>| norm.map(|n| self.norm(n)).transpose();
        let bias = |bias: Option<Vec<f32>>| bias.map(|b| self.vector(&b)).transpose();
        let (router, experts) = match source.feed_forward {
            FeedForwardSource::Dense(mlp) => (None, vec![mlp]),
            FeedForwardSource::Experts { spec, router, experts } => {
                (Some((spec, self.matrix(&router)?)), experts)
            }
        };
        Ok(CardLayer {
            attention_norm: self.norm(source.attention_norm)?,
            qkv: self.matrix(&source.qkv)?,
            qkv_bias: bias(source.qkv_bias)?,
            q_norm: optional(source.q_norm)?,
            k_norm: optional(source.k_norm)?,
            out: self.matrix(&source.out)?,
            out_bias: bias(source.out_bias)?,
            post_attention_norm: optional(source.post_attention_norm)?,
            feed_forward_norm: self.norm(source.feed_forward_norm)?,
            router,
            gate_up: self.gate_up(&experts)?,
            down: self.down(&experts)?,
            post_feed_forward_norm: optional(source.post_feed_forward_norm)?,
        })
    }

    fn norm(&self, norm: Norm) -> Result<Memory, LoadError> {
        self.vector(norm.parts().0)
    }

    fn vector(&self, values: &[f32]) -> Result<Memory, LoadError> {
        let memory = Memory::new(self.card, size_of_val(values), "weights")?;
        memory.write(&self.stream, 0, values)?;
        Ok(memory)
    }

    /// The embedding row by row, as the file has it.
    fn table(&self) -> Result<Memory, LoadError> {
        let tensor = self.source.embedding()?;
        let (rows, cols) = (tensor.rows(), tensor.cols());
        let memory = Memory::new(self.card, 2 * rows * cols, "the embedding")?;
        let piece_rows = (PIECE_BYTES / (2 * cols)).max(1);
        for first in (0..rows).step_by(piece_rows) {
            let read = |row: usize| {
                let mut bits = vec![0_u16; cols];
                tensor.read_row(first + row, self.dtype, &mut bits).map(|()| bits)
            };
            let piece = joined(self.pool.turn().map(piece_rows.min(rows - first), read))?;
            memory.write(&self.stream, 2 * first * cols, &piece)?;
        }
        Ok(memory)
    }

    fn matrix(&self, rows: &MatrixRows) -> Result<Matrix, LoadError> {
        let reader = rows.reader(self.pool.threads())?;
        let fill = |row: usize, out: &mut [u16]| reader.read_row(row, self.dtype, out);
        self.pack(rows.rows(), rows.cols(), 1, &fill)
    }

    /// Gate rows, then up rows, each filled up to 64; one such matrix an expert.
    fn gate_up(&self, experts: &[MlpSource]) -> Result<Matrix, LoadError> {
        let threads = self.pool.threads();
        let readers = experts.iter().map(|e| Ok([e.gate.reader(threads)?, e.up.reader(threads)?]));
        let readers = readers.collect::<Result<Vec<_>, LoadError>>()?;
        let (inter, cols) = (experts[0].gate.rows(), experts[0].gate.cols());
        let stride = inter.next_multiple_of(GATE_ROWS);
        let fill = |row: usize, out: &mut [u16]| {
            let (expert, row) = (row / (2 * stride), row % (2 * stride));
            match row % stride < inter {
                true => readers[expert][row / stride].read_row(row % stride, self.dtype, out),
                false => Ok(()),
            }
        };
        self.pack(2 * stride, cols, experts.len(), &fill)
    }

    fn down(&self, experts: &[MlpSource]) -> Result<Matrix, LoadError> {
        let threads = self.pool.threads();
        let readers = experts.iter().map(|e| e.down.reader(threads));
        let readers = readers.collect::<Result<Vec<_>, LoadError>>()?;
        let (rows, cols) = (experts[0].down.rows(), experts[0].down.cols());
        let fill = |row: usize, out: &mut [u16]| {
            readers[row / padded(rows)].read_row(row % padded(rows), self.dtype, out)
        };
        self.pack(rows, cols, experts.len(), &fill)
    }

    /// Packs `count` matrices one behind the other, each filled up to whole tiles of 32 rows;
    /// `fill` is called for the rows of all of them, counted through.
    fn pack(
        &self,
        rows: usize,
        cols: usize,
        count: usize,
        fill: &Fill<'_>,
    ) -> Result<Matrix, LoadError> {
        let all = count * padded(rows);
        let memory = Memory::new(self.card, 2 * all * padded(cols), "weights")?;
        memory.zero(&self.stream)?;
        let piece_rows = (PIECE_BYTES / (2 * cols)).clamp(1, all);
        for first in (0..all).step_by(piece_rows) {
            let read = |row: usize| {
                let (row, mut bits) = (first + row, vec![0_u16; cols]);
                match row % padded(rows) < rows {
                    true => fill(row, &mut bits).map(|()| bits),
                    false => Ok(bits),
                }
            };
            let here = piece_rows.min(all - first);
            let piece = joined(self.pool.turn().map(here, read))?;
            let raw = self.staging.lock().send(&self.stream, &piece)?;
            let is_f16 = i32::from(self.dtype == Dtype::F16);
            let args = args![raw, &memory, cols as i32, first as i32, is_f16].to_vec();
            let grid = [here, 1, 1];
            self.stream.run(&[Launch { kernel: "pack", grid, threads: 256, shared: 0, args }])?;
        }
        Ok(Matrix { memory, rows, cols })
    }
}

/// Rows on their way to the card, as the file has them: a host buffer and its copy.
struct Staging(Option<(Pinned, Memory)>);

impl Staging {
    /// Starts the copy of a piece, once the card has packed the one before it.
    fn send(&mut self, stream: &Stream, piece: &[u16]) -> Result<Pointer, CudaError> {
        let bytes = size_of_val(piece);
        if self.0.as_ref().is_none_or(|(pinned, _)| pinned.size() < bytes) {
            // The old one may be in use.
            stream.wait()?;
            self.0 = None;
            let memory = Memory::new(stream.card(), bytes, "rows of weights")?;
            self.0 = Some((Pinned::new(stream, bytes)?, memory));
        }
        let Some((pinned, memory)) = &mut self.0 else {
            return Err(CudaError::Shape("a buffer that was just made".into()));
        };
        pinned.bytes()?[..bytes].copy_from_slice(bytes_of(piece));
        pinned.send(memory, bytes)?;
        Ok(memory.pointer())
    }
}

fn joined(pieces: Vec<Result<Vec<u16>, LoadError>>) -> Result<Vec<u16>, LoadError> {
    Ok(pieces.into_iter().collect::<Result<Vec<_>, _>>()?.concat())
}
