//! The forward pass of every dense family: token ids to hidden rows to logits.
//!
//! One step takes the rows of all sequences at once; sequences differ only in their [`Segment`].
//! Everything between two matrix products happens row by row or head by head.

use super::mlp::gated;
use super::weights::{Embedding, FeedForward, Layer, Weights};
use crate::models::error::LoadError;
use crate::models::spec::Spec;
use crate::ops::attention::{Attention, KvCache, Segment};
use crate::ops::dtype::{Dtype, Rounded};
use crate::ops::matmul::{matmul_add, matmul_into};
use crate::ops::pool::{Disjoint, Turn};
use crate::ops::rope::{Rope, RopeTable};
use crate::ops::rowwise::{Norm, softcap};
use std::sync::Arc;

/// A loaded transformer.
pub struct Decoder {
    /// The model's shape and options.
    pub spec: Arc<Spec>,
    /// The model's type of weights, matrix inputs and KV cache.
    pub dtype: Dtype,
    /// The weights.
    pub weights: Weights,
    /// Rotary frequencies.
    pub rope: Rope,
}

/// Buffers of a step, reused by the next.
pub struct Scratch {
    residual: Vec<f32>, // (rows, hidden)
    normed: Rounded,    // (rows, hidden)
    qkv: Vec<f32>,      // (rows, qkv_rows)
    attended: Rounded,  // (rows, heads * head_dim)
    inner: Rounded,     // (rows, inter)
    branch: Vec<f32>,   // (rows, hidden), where a branch is normed before it is added
}

impl Scratch {
    /// Empty buffers for `decoder`.
    pub fn new(decoder: &Decoder) -> Self {
        let (spec, dtype) = (&decoder.spec, decoder.dtype);
        Self {
            residual: Vec::new(),
            normed: Rounded::new(dtype, spec.hidden),
            qkv: Vec::new(),
            attended: Rounded::new(dtype, spec.attention_cols()),
            inner: Rounded::new(dtype, spec.feed_forward.inter),
            branch: Vec::new(),
        }
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
        self.embed(turn, ids, &mut scratch.residual)?;
        let positions: Vec<u32> = segments
            .iter()
            .flat_map(|s| s.rows.clone().map(|row| (s.start + row - s.rows.start) as u32))
            .collect();
        assert_eq!(positions.len(), ids.len(), "segments must cover the rows");
        let table = self.rope.table(turn, &positions);
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
        self.weights.norm.apply_rounded(turn, &chosen, &mut out);
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
        let Scratch { residual, normed, qkv, attended, branch, .. } = scratch;
        layer.attention_norm.apply_rounded(turn, residual, normed);
        qkv.resize(normed.rows() * row_len, 0.0);
        matmul_into(turn, &layer.qkv, normed, qkv);
        self.finish_qkv(turn, layer, table, qkv);
        cache.store(turn, index, segments, (qkv, row_len, k_at));
        let attention = Attention {
            heads: a.heads,
            scale: a.scale,
            softcap: a.softcap,
            window: a.windows[index],
        };
        cache.attend(turn, index, attention, segments, (qkv, row_len), attended);
        match &layer.post_attention_norm {
            None => {
                matmul_add(turn, &layer.out, attended, residual);
                add_bias(residual, layer.out_bias.as_deref());
            }
            Some(norm) => {
                branch.resize(residual.len(), 0.0);
                matmul_into(turn, &layer.out, attended, branch);
                add_bias(branch, layer.out_bias.as_deref());
                norm.apply_add(turn, branch, residual);
            }
        }
    }

    /// Bias, head norms and rotation of queries and keys, row by row.
    fn finish_qkv(&self, turn: &Turn<'_>, layer: &Layer, table: &RopeTable, qkv: &mut [f32]) {
        let (a, row_len, isa) = (&self.spec.attention, self.spec.qkv_rows(), turn.isa());
        let rows = qkv.len() / row_len;
        let shared = Disjoint::new(qkv);
        turn.run_ranges(rows, 4, |range| {
            for row in range {
                // SAFETY: each row belongs to one task.
                let qkv = unsafe { shared.piece(row * row_len..(row + 1) * row_len) };
                add_bias(qkv, layer.qkv_bias.as_deref());
                let rotated = &mut qkv[..(a.heads + a.kv_heads) * a.head_dim];
                for (head, values) in rotated.chunks_exact_mut(a.head_dim).enumerate() {
                    let norm = if head < a.heads { &layer.q_norm } else { &layer.k_norm };
                    if let Some(norm) = norm {
                        norm.apply(isa, values);
                    }
                    table.rotate(isa, row, values);
                }
            }
        });
    }

    fn feed_forward(&self, turn: &Turn<'_>, layer: &Layer, scratch: &mut Scratch) {
        let Scratch { residual, normed, inner, branch, .. } = scratch;
        let activation = self.spec.feed_forward.activation;
        layer.feed_forward_norm.apply_rounded(turn, residual, normed);
        match (&layer.feed_forward, &layer.post_feed_forward_norm) {
            (FeedForward::Dense(mlp), None) => {
                gated(turn, mlp, activation, normed, inner);
                matmul_add(turn, &mlp.down, inner, residual);
            }
            (FeedForward::Dense(mlp), Some(norm)) => {
                gated(turn, mlp, activation, normed, inner);
                branch.resize(residual.len(), 0.0);
                matmul_into(turn, &mlp.down, inner, branch);
                norm.apply_add(turn, branch, residual);
            }
            (FeedForward::Experts(mixture), norm) => {
                branch.resize(residual.len(), 0.0);
                mixture.forward(turn, activation, normed, branch);
                add_branch(turn, norm.as_ref(), branch, residual);
            }
        }
    }
}

fn add_branch(turn: &Turn<'_>, norm: Option<&Norm>, branch: &mut [f32], residual: &mut [f32]) {
    match norm {
        Some(norm) => norm.apply_add(turn, branch, residual),
        None => residual.iter_mut().zip(branch).for_each(|(r, b)| *r += *b),
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
