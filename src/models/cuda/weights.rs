//! Holds the weights of a model in a card's memory.
//!
//! Matrices are packed on the host, in the tiles that the kernels read, a piece at a time, so that
//! loading needs little host memory beside the checkpoint's pages.

use super::error::CudaError;
use super::launch::{Card, Memory};
use super::memory::{TILE, padded};
use crate::models::checkpoint::Checkpoint;
use crate::models::error::LoadError;
use crate::models::source::{FeedForwardSource, MlpSource, Rows, Source};
use crate::models::spec::{ExpertSpec, Spec};
use crate::ops::dtype::{Dtype, round_bf16};
use crate::ops::pool::{Pool, Turn};
use crate::ops::rope::Rope;
use crate::ops::rowwise::Norm;
use std::sync::Arc;

/// Bytes that are packed on the host before they are copied.
const PIECE_BYTES: usize = 64 << 20;
/// Gate and up rows begin at multiples of this.
pub(super) const GATE_ROWS: usize = 64;
/// Experts that the routing kernel has room for.
const EXPERTS_MAX: usize = 256;
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
    pub(super) layers: Vec<Layer>,
    pub(super) bytes: usize,
}

/// A packed matrix, or several of equal shape one behind the other.
pub(super) struct Matrix {
    pub(super) memory: Memory,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

/// One decoder layer; vectors are f32.
pub(super) struct Layer {
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

/// Bytes of the weights of a shape on a card.
pub(super) fn weight_bytes(spec: &Spec) -> u64 {
    let matrix = |rows: usize, cols: usize| (2 * padded(rows) * padded(cols)) as u64;
    let inter = spec.feed_forward.inter;
    let mlp =
        matrix(2 * inter.next_multiple_of(GATE_ROWS), spec.hidden) + matrix(spec.hidden, inter);
    let feed_forward = match spec.feed_forward.experts {
        None => mlp,
        Some(e) => e.count as u64 * mlp + matrix(e.count, spec.hidden),
    };
    let attention =
        matrix(spec.qkv_rows(), spec.hidden) + matrix(spec.hidden, spec.attention_cols());
    let table = if spec.tied { 0 } else { (2 * spec.vocab * spec.hidden) as u64 };
    spec.layers as u64 * (attention + feed_forward) + matrix(spec.vocab, spec.hidden) + table
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
        let loader =
            Loader { card, source: Source { checkpoint, spec, dtype }, dtype, turn: &pool.turn() };
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
        card.settle()?;
        let bytes = before.saturating_sub(card.memory()?.0);
        let (card, spec) = (Arc::clone(card), Arc::clone(spec));
        Ok(Self { card, spec, dtype, rope, embedding, head, norm, layers, bytes })
    }

    /// The card.
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
    source: Source<'a>,
    dtype: Dtype,
    turn: &'a Turn<'a>,
}

/// Writes a row of a matrix; rows that fill up are left as the zeros they are.
type Fill<'a> = dyn Fn(usize, &mut [u16]) -> Result<(), LoadError> + Sync + 'a;

impl Loader<'_> {
    fn layer(&self, index: usize) -> Result<Layer, LoadError> {
        let source = self.source.layer(index)?;
        let optional = |norm: Option<Norm>| norm.map(|n| self.norm(n)).transpose();
        let bias = |bias: Option<Vec<f32>>| bias.map(|b| self.vector(&b)).transpose();
        let (router, experts) = match source.feed_forward {
            FeedForwardSource::Dense(mlp) => (None, vec![mlp]),
            FeedForwardSource::Experts { spec, router, experts } => {
                (Some((spec, self.matrix(&router)?)), experts)
            }
        };
        Ok(Layer {
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
        memory.write(0, values)?;
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
            let piece = joined(self.turn.map(piece_rows.min(rows - first), read))?;
            memory.write(2 * first * cols, &piece)?;
        }
        Ok(memory)
    }

    fn matrix(&self, rows: &Rows) -> Result<Matrix, LoadError> {
        let reader = rows.reader(self.turn.threads())?;
        let fill = |row: usize, out: &mut [u16]| reader.read_row(row, self.dtype, out);
        self.pack(rows.rows(), rows.cols(), 1, &fill)
    }

    /// Gate rows, then up rows, each filled up to 64; one such matrix an expert.
    fn gate_up(&self, experts: &[MlpSource]) -> Result<Matrix, LoadError> {
        let threads = self.turn.threads();
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
        let threads = self.turn.threads();
        let readers = experts.iter().map(|e| e.down.reader(threads));
        let readers = readers.collect::<Result<Vec<_>, LoadError>>()?;
        let (rows, cols) = (experts[0].down.rows(), experts[0].down.cols());
        let fill = |row: usize, out: &mut [u16]| match row % padded(rows) < rows {
            true => readers[row / padded(rows)].read_row(row % padded(rows), self.dtype, out),
            false => Ok(()),
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
        let row_tiles = padded(rows) / TILE;
        let tile_row = TILE * padded(cols); // values of 32 rows
        let memory = Memory::new(self.card, 2 * count * row_tiles * tile_row, "weights")?;
        let piece_tiles = (PIECE_BYTES / (2 * tile_row)).clamp(1, count * row_tiles);
        for first in (0..count * row_tiles).step_by(piece_tiles) {
            let pack = |tile: usize| {
                let first_row = (first + tile) * TILE;
                let left = rows.saturating_sub(first_row % (row_tiles * TILE));
                let fill = |row: usize, out: &mut [u16]| fill(first_row + row, out);
                pack_tiles(self.dtype, left.min(TILE), cols, fill)
            };
            let tiles = piece_tiles.min(count * row_tiles - first);
            memory.write(2 * first * tile_row, &joined(self.turn.map(tiles, pack))?)?;
        }
        Ok(Matrix { memory, rows, cols })
    }
}

fn joined(pieces: Vec<Result<Vec<u16>, LoadError>>) -> Result<Vec<u16>, LoadError> {
    Ok(pieces.into_iter().collect::<Result<Vec<_>, _>>()?.concat())
}

/// The first `rows` of 32 rows as a row of tiles: 32 columns each, four planes of 32 rows by 8.
/// Tiny magnitudes of bf16 become zero, as on the CPU.
fn pack_tiles(
    dtype: Dtype,
    rows: usize,
    cols: usize,
    fill: impl Fn(usize, &mut [u16]) -> Result<(), LoadError>,
) -> Result<Vec<u16>, LoadError> {
    let (mut tiles, mut row_bits) = (vec![0_u16; TILE * padded(cols)], vec![0_u16; cols]);
    for row in 0..rows {
        row_bits.fill(0);
        fill(row, &mut row_bits)?;
        for (k, bits) in row_bits.iter().enumerate() {
            let flushed = match dtype {
                Dtype::Bf16 => round_bf16(dtype.widen(*bits)),
                Dtype::F16 => *bits,
            };
            let plane = k % TILE / 8;
            tiles[k / TILE * TILE * TILE + (plane * TILE + row) * 8 + k % 8] = flushed;
        }
    }
    Ok(tiles)
}
