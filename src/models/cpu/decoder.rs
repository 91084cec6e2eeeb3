//! Computes the forward pass of every dense family: token ids to hidden rows to logits.
//!
//! One step takes the rows of all sequences at once; sequences differ only in their [`Segment`].
//! Everything between two matrix products happens row by row or head by head.

use super::weights::{Embedding, FeedForward, Layer, Weights};
use crate::models::departure::Departure;
use crate::models::error::LoadError;
use crate::models::grid::Grid;
use crate::models::spec::Spec;
use crate::ops::attention::{Attention, KvCache, Segment};
use crate::ops::dtype::Dtype;
use crate::ops::gated::gated;
use crate::ops::matmul::{matmul_add, matmul_into};
use crate::ops::pool::{Disjoint, Turn};
use crate::ops::rope::{Rope, RopeTable};
use crate::ops::rounded::Rounded;
use crate::ops::rounding::Rounding;
use crate::ops::rowwise::softcap;
use std::sync::Arc;

/// A transformer whose weights are in this machine's memory.
pub struct Decoder {
    /// The model's shape and options.
    pub spec: Arc<Spec>,
    /// The model's type of weights, matrix inputs and KV cache.
    pub dtype: Dtype,
    /// Its matrices, packed for the lanes.
    pub weights: Weights,
    /// Rotary frequencies.
    pub rope: Rope,
}

/// Buffers of a step, reused by the next, and how it departs from the canon.
pub struct Scratch {
    departure: Departure,
    residual: Vec<f32>, // (rows, hidden)
    normed: Rounded,    // (rows, hidden)
    qkv: Vec<f32>,      // (rows, qkv_rows)
    attended: Rounded,  // (rows, heads * head_dim)
    inner: Rounded,     // (rows, inter)
    branch: Vec<f32>,   // (rows, hidden), where it is not added as it is
}

impl Scratch {
    /// Empty buffers for `decoder`, by the canon.
    pub fn new(decoder: &Decoder) -> Self {
        let (spec, dtype) = (&decoder.spec, decoder.dtype);
        Self {
            departure: Departure::default(),
            residual: Vec::new(),
            normed: Rounded::new(dtype, spec.hidden),
            qkv: Vec::new(),
            attended: Rounded::new(dtype, spec.attention_cols()),
            inner: Rounded::new(dtype, spec.feed_forward.inter),
            branch: Vec::new(),
        }
    }

    /// The same for steps that depart from the canon.
    pub fn departing(self, departure: Departure) -> Self {
        Self { departure, ..self }
    }

    /// Bytes that a step of `rows` rows needs.
    pub fn bytes(spec: &Spec, rows: usize) -> usize {
        let rounded = spec.hidden + spec.attention_cols() + spec.feed_forward.inter;
        rows * (4 * (2 * spec.hidden + spec.qkv_rows()) + 6 * rounded)
    }
}

impl Decoder {
    /// Runs the layers over one step and leaves the residual stream in `scratch`.
    ///
    /// # Errors
    /// When an embedding row cannot be read.
    pub fn forward(
        &self,
        turn: &Turn<'_>,
        cache: &mut KvCache,
        ids: &[u32],
        segments: &[Segment],
        scratch: &mut Scratch,
    ) -> Result<(), LoadError> {
        let rounding = scratch.departure.rounding;
        self.embed(turn, ids, &mut scratch.residual)?;
        rounding.apply_all(turn, &mut scratch.residual);
        let positions: Vec<u32> = segments
            .iter()
            .flat_map(|s| s.rows.clone().map(|row| (s.start + row - s.rows.start) as u32))
            .collect();
        assert_eq!(positions.len(), ids.len(), "segments must cover the rows");
        let table = rounding.table(self.rope.table(turn, &positions));
        for (index, layer) in self.weights.layers.iter().enumerate() {
            self.attention(turn, (index, layer), cache, segments, &table, scratch);
            self.feed_forward(turn, layer, scratch);
        }
        Ok(())
    }

    /// The final norm of the given rows: what the head reads and what proofs commit to.
    pub fn final_rows(&self, turn: &Turn<'_>, rows: &[usize], scratch: &Scratch) -> Rounded {
        let hidden = self.spec.hidden;
        let mut chosen = Vec::with_capacity(rows.len() * hidden);
        for row in rows {
            chosen.extend_from_slice(&scratch.residual[row * hidden..][..hidden]);
        }
        let mut out = Rounded::new(self.dtype, hidden);
        scratch.departure.rounding.norm_rows(turn, &self.weights.norm, &chosen, &mut out);
        out
    }

    /// Logits (rows, vocab) of rows that went through [`final_rows`](Self::final_rows).
    pub fn logits(&self, turn: &Turn<'_>, rows: &Rounded, out: &mut Vec<f32>) {
        let vocab = self.spec.vocab;
        out.resize(rows.rows() * vocab, 0.0);
        matmul_into(turn, self.weights.head(), rows, out);
        if let Some(cap) = self.spec.logit_softcap {
            let out = Disjoint::new(out);
            turn.run_ranges(rows.rows() * vocab, 4096, |range| {
                // SAFETY: `run_ranges` hands out disjoint ranges.
                softcap(turn.isa(), cap, unsafe { out.piece(range) });
            });
        }
    }

    fn embed(&self, turn: &Turn<'_>, ids: &[u32], out: &mut Vec<f32>) -> Result<(), LoadError> {
        let hidden = self.spec.hidden;
        out.resize(ids.len() * hidden, 0.0);
        let shared = Disjoint::new(out);
        let scale = self.spec.embed_scale.map(|s| self.dtype.widen(self.dtype.round(s)));
        let failure = parking_lot::Mutex::new(None);
        turn.run_ranges(ids.len(), 16, |rows| {
            let mut bits = vec![0; hidden];
            for row in rows {
                // SAFETY: each row belongs to one task.
                let out = unsafe { shared.piece(row * hidden..(row + 1) * hidden) };
                match &self.weights.embedding {
                    Embedding::Tied(packed) => packed.row_into(ids[row] as usize, out),
                    Embedding::Stored(tensor) => {
                        if let Err(e) = tensor.read_row(ids[row] as usize, self.dtype, &mut bits) {
                            failure.lock().get_or_insert(e);
                            return;
                        }
                        let widened = bits.iter().map(|b| self.dtype.widen(*b));
                        out.iter_mut().zip(widened).for_each(|(o, x)| *o = x);
                    }
                }
                if let Some(scale) = scale {
                    out.iter_mut().for_each(|x| *x *= scale);
                }
            }
        });
        failure.into_inner().map_or(Ok(()), Err)
    }

    fn attention(
        &self,
        turn: &Turn<'_>,
        (index, layer): (usize, &Layer),
        cache: &mut KvCache,
        segments: &[Segment],
        table: &RopeTable,
        scratch: &mut Scratch,
    ) {
        let a = &self.spec.attention;
        let (row_len, k_at) = (self.spec.qkv_rows(), a.heads * a.head_dim);
        let Scratch { departure, residual, normed, qkv, attended, branch, .. } = scratch;
        let rounding = departure.rounding;
        rounding.norm_rows(turn, &layer.attention_norm, residual, normed);
        coarsen(departure.inputs, normed);
        qkv.resize(normed.rows() * row_len, 0.0);
        matmul_into(turn, &layer.qkv, normed, qkv);
        self.finish_qkv(turn, (layer, *departure), table, qkv);
        cache.store(turn, index, segments, (qkv, row_len, k_at));
        let attention = Attention {
            heads: a.heads,
            scale: a.scale,
            softcap: a.softcap,
            window: a.windows[index],
        };
        cache.attend(turn, index, attention, segments, (qkv, row_len), attended);
        coarsen(departure.inputs, attended);
        match (&layer.post_attention_norm, rounding) {
            (None, Rounding::Inputs) => {
                matmul_add(turn, &layer.out, attended, residual);
                add_bias(residual, layer.out_bias.as_deref());
            }
            (norm, _) => {
                branch.resize(residual.len(), 0.0);
                matmul_into(turn, &layer.out, attended, branch);
                add_bias(branch, layer.out_bias.as_deref());
                rounding.apply_all(turn, branch);
                rounding.add(turn, norm.as_ref(), branch, residual);
            }
        }
    }

    /// Bias, head norms and rotation of queries and keys, and the grid of the cache, row by row.
    fn finish_qkv(
        &self,
        turn: &Turn<'_>,
        (layer, departure): (&Layer, Departure),
        table: &RopeTable,
        qkv: &mut [f32],
    ) {
        let Departure { rounding, cache, .. } = departure;
        let (a, row_len, isa) = (&self.spec.attention, self.spec.qkv_rows(), turn.isa());
        let rows = qkv.len() / row_len;
        let shared = Disjoint::new(qkv);
        turn.run_ranges(rows, 4, |range| {
            for row in range {
                // SAFETY: each row belongs to one task.
                let qkv = unsafe { shared.piece(row * row_len..(row + 1) * row_len) };
                add_bias(qkv, layer.qkv_bias.as_deref());
                rounding.apply(qkv);
                let rotated = &mut qkv[..(a.heads + a.kv_heads) * a.head_dim];
                for (head, values) in rotated.chunks_exact_mut(a.head_dim).enumerate() {
                    let norm = if head < a.heads { &layer.q_norm } else { &layer.k_norm };
                    if let Some(norm) = norm {
                        rounding.norm(isa, norm, values);
                    }
                    rounding.rotate(isa, table, row, values);
                }
                if let Some(grid) = cache {
                    grid.apply(a.head_dim, &mut qkv[a.heads * a.head_dim..]);
                }
            }
        });
    }

    fn feed_forward(&self, turn: &Turn<'_>, layer: &Layer, scratch: &mut Scratch) {
        let Scratch { departure, residual, normed, inner, branch, .. } = scratch;
        let rounding = departure.rounding;
        let between = (self.spec.feed_forward.activation, rounding);
        rounding.norm_rows(turn, &layer.feed_forward_norm, residual, normed);
        coarsen(departure.inputs, normed);
        match &layer.feed_forward {
            FeedForward::Dense(mlp) => {
                gated(turn, &mlp.gate_up, between, normed, inner);
                coarsen(departure.inputs, inner);
                if layer.post_feed_forward_norm.is_none() && rounding == Rounding::Inputs {
                    return matmul_add(turn, &mlp.down, inner, residual);
                }
                branch.resize(residual.len(), 0.0);
                matmul_into(turn, &mlp.down, inner, branch);
                rounding.apply_all(turn, branch);
            }
            FeedForward::Experts(mixture) => {
                branch.resize(residual.len(), 0.0);
                mixture.forward(turn, between, normed, branch);
            }
        }
        rounding.add(turn, layer.post_feed_forward_norm.as_ref(), branch, residual);
    }
}

/// Moves each row to a grid, if there is one.
fn coarsen(grid: Option<Grid>, rows: &mut Rounded) {
    let Some(grid) = grid else { return };
    for row in 0..rows.rows() {
        let mut values = rows.widened(row);
        grid.apply(rows.cols(), &mut values);
        rows.set_row(row, &values);
    }
}

/// Adds `bias` to every row of `x`.
fn add_bias(x: &mut [f32], bias: Option<&[f32]>) {
    if let Some(bias) = bias {
        for row in x.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        }
    }
}
