//! The whole forward pass by the kernels, launch by launch, against the CPU's decoder: equal bits
//! for every family, whatever the batch, the chunks and the variants of a kernel.

use super::matmul::packed;
use super::{Shape, args, first_difference, kernels};
use crate::common::golden;
use std::ffi::c_void;
use targon_engine::models::checkpoint::Checkpoint;
use targon_engine::models::cpu::decoder::{Decoder, Scratch};
use targon_engine::models::cpu::weights::{Embedding, FeedForward, Layer, Mlp};
use targon_engine::models::spec::Spec;
use targon_engine::ops::attention::{BLOCK_TOKENS, KvCache, Segment};
use targon_engine::ops::dtype::Dtype;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::matmul::{Packed, gated_row};
use targon_engine::ops::pool::Pool;
use targon_engine::ops::rowwise::{Activation, Norm};

/// A packed matrix on the device.
struct Matrix {
    data: Vec<u16>,
    rows: usize,
    cols: usize,
}

impl Matrix {
    /// Chosen rows of a matrix of the CPU, in order; `None` is a row of zeros.
    fn of(source: &Packed, rows: impl Iterator<Item = Option<usize>>) -> Self {
        let (cols, dtype) = (source.cols(), source.dtype());
        let (mut bits, mut values) = (Vec::new(), vec![0.0; cols]);
        for row in rows {
            values.fill(0.0);
            if let Some(row) = row {
                source.row_into(row, &mut values);
            }
            bits.extend(values.iter().map(|x| dtype.round(*x)));
        }
        Self { data: packed(&bits, cols, dtype, 0), rows: bits.len() / cols, cols }
    }

    fn whole(source: &Packed) -> Self {
        Self::of(source, (0..source.rows()).map(Some))
    }

    /// Gate rows, padding to 64, then up rows, which alternate on the CPU.
    fn gated(source: &Packed, inter: usize) -> Self {
        let stride = inter.next_multiple_of(64);
        let of_half = |is_up: bool| {
            (0..stride).map(move |row| {
                (0..source.rows()).find(|packed| match gated_row(*packed, inter) {
                    Some(Ok(source)) => !is_up && source == row,
                    Some(Err(source)) => is_up && source == row,
                    None => false,
                })
            })
        };
        Self::of(source, of_half(false).chain(of_half(true)))
    }
}

/// A decoder whose memory is the kernels'.
struct Device<'a> {
    decoder: &'a Decoder,
    embedding: Vec<u16>,
    head: Matrix,
    layers: Vec<DeviceLayer<'a>>,
    keys: Vec<Vec<u16>>,
    values: Vec<Vec<u16>>,
    /// How many tokens a product takes at once, 0 for what suits the batch.
    variant: usize,
    /// Whether long contexts are split over partitions.
    is_split: bool,
}

struct DeviceLayer<'a> {
    source: &'a Layer,
    qkv: Matrix,
    out: Matrix,
    mlps: Vec<[Matrix; 2]>,
    router: Option<Matrix>,
}

fn pointer<T>(values: Option<&[T]>) -> *const T {
    values.map_or(std::ptr::null(), <[T]>::as_ptr)
}

fn mlp(mlp: &Mlp) -> [Matrix; 2] {
    [Matrix::gated(&mlp.gate_up, mlp.down.cols()), Matrix::whole(&mlp.down)]
}

impl<'a> Device<'a> {
    fn new(decoder: &'a Decoder, blocks: usize) -> Self {
        let spec = &decoder.spec;
        let embedding = match &decoder.weights.embedding {
            Embedding::Tied(packed) => {
                let mut row = vec![0.0; spec.hidden];
                let of_row = |id: usize| -> Vec<u16> {
                    packed.row_into(id, &mut row);
                    row.iter().map(|x| decoder.dtype.round(*x)).collect()
                };
                (0..spec.vocab).flat_map(of_row).collect()
            }
            Embedding::Stored(tensor) => {
                let mut bits = vec![0; spec.vocab * spec.hidden];
                for (id, row) in bits.chunks_exact_mut(spec.hidden).enumerate() {
                    tensor.read_row(id, decoder.dtype, row).unwrap();
                }
                bits
            }
        };
        let layers = decoder.weights.layers.iter().map(|source| DeviceLayer {
            source,
            qkv: Matrix::whole(&source.qkv),
            out: Matrix::whole(&source.out),
            mlps: match &source.feed_forward {
                FeedForward::Dense(dense) => vec![mlp(dense)],
                FeedForward::Experts(mixture) => mixture.experts.iter().map(mlp).collect(),
            },
            router: match &source.feed_forward {
                FeedForward::Dense(_) => None,
                FeedForward::Experts(mixture) => Some(Matrix::whole(&mixture.router)),
            },
        });
        let a = &spec.attention;
        let heads = blocks * a.kv_heads * BLOCK_TOKENS;
        Self {
            decoder,
            embedding,
            head: Matrix::whole(decoder.weights.head()),
            layers: layers.collect(),
            keys: vec![vec![0; heads * a.head_dim.next_multiple_of(32)]; spec.layers],
            values: vec![vec![0; heads * a.head_dim]; spec.layers],
            variant: 0,
            is_split: false,
        }
    }

    fn spec(&self) -> &'a Spec {
        &self.decoder.spec
    }

    fn is_f16(&self) -> i32 {
        i32::from(self.decoder.dtype == Dtype::F16)
    }

    /// `residual += branch + bias` where there is a branch, and the rounded norm of `chosen`.
    fn add_norm(
        &self,
        residual: &mut [f32],
        branch: Option<(&[f32], Option<&[f32]>)>,
        norm: &Norm,
        chosen: Option<&[u32]>,
    ) -> Vec<u16> {
        let (weight, eps) = norm.parts();
        let (cols, rows) = (weight.len(), residual.len() / weight.len());
        let count = chosen.map_or(rows, <[u32]>::len);
        let mut out = vec![0_u16; count * cols];
        let b = pointer(branch.map(|(b, _)| b));
        let bias = pointer(branch.and_then(|(_, bias)| bias));
        let (r, w, ch, o) =
            (residual.as_mut_ptr(), weight.as_ptr(), pointer(chosen), out.as_mut_ptr());
        let (c, f16) = (cols as i32, self.is_f16());
        let args = args![r, b, bias, w, ch, o, c, eps, f16];
        kernels().launch("add_norm", [count as u32, 1, 1], 256, 4 * cols, 0, &args);
        out
    }

    fn norm_add(&self, residual: &mut [f32], branch: &[f32], bias: Option<&[f32]>, norm: &Norm) {
        let (weight, eps) = norm.parts();
        let cols = weight.len();
        let (r, b, bias, w) =
            (residual.as_mut_ptr(), branch.as_ptr(), pointer(bias), weight.as_ptr());
        let c = cols as i32;
        let args = args![r, b, bias, w, c, eps];
        let rows = (residual.len() / cols) as u32;
        kernels().launch("norm_add", [rows, 1, 1], 256, 4 * cols, 0, &args);
    }

    fn matmul(&self, w: &Matrix, x: &[u16]) -> Vec<f32> {
        let (tokens, dtype) = (x.len() / w.cols, self.decoder.dtype);
        let mut out = vec![f32::NAN; tokens * w.rows];
        let size = match self.variant {
            0 if tokens == 1 => 1,
            0 if tokens <= 4 => 4,
            0 if tokens <= 16 => 8,
            0 => 64,
            variant => variant,
        };
        let (name, rows, threads) = match size {
            64 => (format!("prefill_{dtype}"), 64, 128),
            _ => (format!("decode_{dtype}_{size}"), 32, 256),
        };
        let (m, x, o) = (w.data.as_ptr(), x.as_ptr(), out.as_mut_ptr());
        let (r, c, t) = (w.rows as i32, w.cols as i32, tokens as i32);
        let args = args![m, x, o, r, c, t];
        let grid = [tokens.div_ceil(size) as u32, w.rows.div_ceil(rows) as u32, 1];
        kernels().launch(&name, grid, threads, 0, 0, &args);
        out
    }

    fn gate(&self, gate_up: &[f32], inter: usize) -> Vec<u16> {
        let stride = inter.next_multiple_of(64);
        let tokens = gate_up.len() / (2 * stride);
        let mut out = vec![0_u16; tokens * inter];
        let gelu = self.spec().feed_forward.activation == Activation::GeluTanh;
        let (g, o) = (gate_up.as_ptr(), out.as_mut_ptr());
        let (n, s, gelu, f16) = (inter as i32, stride as i32, i32::from(gelu), self.is_f16());
        let args = args![g, o, n, s, gelu, f16];
        let grid = [inter.div_ceil(256) as u32, tokens as u32, 1];
        kernels().launch("gate", grid, 256, 0, 0, &args);
        out
    }

    /// The attended rows of a layer, its keys and values stored.
    fn attend(&mut self, index: usize, qkv: &[f32], step: &Step) -> Vec<u16> {
        let (spec, source) = (self.spec(), self.layers[index].source);
        let a = &spec.attention;
        let (rows, dtype) = (step.positions.len(), self.decoder.dtype);
        let mut queries = vec![0_u16; rows * a.heads * a.head_dim];
        let (x, b) = (qkv.as_ptr(), pointer(source.qkv_bias.as_deref()));
        let qn = pointer(source.q_norm.as_ref().map(|n| n.parts().0));
        let kn = pointer(source.k_norm.as_ref().map(|n| n.parts().0));
        let (cos, sin, slots) = (step.cos.as_ptr(), step.sin.as_ptr(), step.slots.as_ptr());
        let q = queries.as_mut_ptr();
        let (k, v) = (self.keys[index].as_mut_ptr(), self.values[index].as_mut_ptr());
        let (h, kh, hd) = (a.heads as i32, a.kv_heads as i32, a.head_dim as i32);
        let (eps, f16, packs_values) = (spec.norm.eps, self.is_f16(), 0_i32);
        let args = args![x, b, qn, kn, cos, sin, slots, q, k, v, h, kh, hd, eps, f16, packs_values];
        let grid = [rows as u32, (a.heads + 2 * a.kv_heads) as u32, 1];
        kernels().launch("qkv_finish", grid, 128, 0, 0, &args);

        let shape = Shape {
            heads: h,
            kv_heads: kh,
            head_dim: hd,
            window: a.windows[index].map_or(0, |w| w as i32),
            scale: a.scale,
            cap: a.softcap.unwrap_or(0.0),
        };
        let group = a.heads / a.kv_heads;
        let size = match step.widest * group {
            1 => 1,
            ..=4 => 4,
            _ => 8,
        };
        let tiles = step.tiles(size, group);
        let last = step.positions.iter().max().copied().unwrap();
        let partitions = last as i32 / 512 + 1;
        let mut out = vec![0_u16; queries.len()];
        let mut parts = vec![f32::NAN; rows * a.heads * partitions as usize * (a.head_dim + 2)];
        let (t, tl) = (step.table.as_ptr(), tiles.as_ptr());
        let (p, o, split) = (parts.as_mut_ptr(), out.as_mut_ptr(), i32::from(self.is_split));
        let args = args![q, k, v, t, tl, p, o, shape, partitions, split];
        let padded = a.head_dim.next_multiple_of(32);
        let depth = if self.is_split { partitions as u32 } else { 1 };
        let grid = [(tiles.len() / 6) as u32, kh as u32, depth];
        let warps = if size == 8 { 4 } else { 8 };
        let smem = 4 * size * (512 + padded + warps * a.head_dim);
        let name = format!("attend_{dtype}_{size}");
        kernels().launch(&name, grid, 32 * warps as u32, smem, 0, &args);
        if self.is_split {
            let at = step.positions.as_ptr();
            let args = args![p, at, o, shape, partitions, f16];
            let grid = [rows as u32, a.heads as u32, 1];
            kernels().launch("attend_merge", grid, 128, 0, 0, &args);
        }
        out
    }

    fn feed_forward(&self, index: usize, normed: &[u16]) -> Vec<f32> {
        let (layer, inter) = (&self.layers[index], self.spec().feed_forward.inter);
        let (FeedForward::Experts(mixture), Some(router)) =
            (&layer.source.feed_forward, &layer.router)
        else {
            let [gate_up, down] = &layer.mlps[0];
            return self.matmul(down, &self.gate(&self.matmul(gate_up, normed), inter));
        };
        let (tokens, used) = (normed.len() / self.spec().hidden, mixture.spec.used);
        let scores = self.matmul(router, normed);
        let mut chosen = vec![0_u32; tokens * used];
        let mut weights = vec![0.0_f32; tokens * used];
        let (s, c, w) = (scores.as_ptr(), chosen.as_mut_ptr(), weights.as_mut_ptr());
        let (e, u) = (mixture.spec.count as i32, used as i32);
        let renormalise = i32::from(mixture.spec.renormalise);
        let args = args![s, c, w, e, u, renormalise];
        kernels().launch("route", [tokens as u32, 1, 1], 32, 0, 0, &args);
        let product = |half: usize, x: &[u16], is_shared: bool| -> Vec<f32> {
            let data: Vec<u16> =
                layer.mlps.iter().flat_map(|mlp| mlp[half].data.iter().copied()).collect();
            let (rows, cols) = (layer.mlps[0][half].rows, layer.mlps[0][half].cols);
            let mut out = vec![f32::NAN; tokens * used * rows];
            let (m, x, o) = (data.as_ptr(), x.as_ptr(), out.as_mut_ptr());
            let (r, k, shared) = (rows as i32, cols as i32, i32::from(is_shared));
            let args = args![m, c, x, o, r, k, u, shared];
            let grid = [rows.div_ceil(32) as u32, (tokens * used) as u32, 1];
            let name = format!("expert_{}", self.decoder.dtype);
            kernels().launch(&name, grid, 256, 0, 0, &args);
            out
        };
        let inner = self.gate(&product(0, normed, true), inter);
        let result = product(1, &inner, false);
        let hidden = self.spec().hidden;
        let mut out = vec![0.0_f32; tokens * hidden];
        let (y, o, n) = (result.as_ptr(), out.as_mut_ptr(), hidden as i32);
        let args = args![y, w, o, n, u];
        kernels().launch("combine", [tokens as u32, 1, 1], 256, 0, 0, &args);
        out
    }

    /// Final-norm rows and logits of all rows of a step.
    fn step(&mut self, pool: &Pool, ids: &[u32], segments: &[Segment]) -> [Vec<f32>; 2] {
        let (spec, dtype) = (self.spec(), self.decoder.dtype);
        let step = Step::new(self.decoder, pool, segments);
        let mut residual = vec![f32::NAN; ids.len() * spec.hidden];
        let scale = spec.embed_scale.map_or(0.0, |s| dtype.widen(dtype.round(s)));
        let (e, i, r) = (self.embedding.as_ptr(), ids.as_ptr(), residual.as_mut_ptr());
        let (c, is_packed, f16) = (spec.hidden as i32, 0_i32, self.is_f16());
        let args = args![e, i, r, c, is_packed, scale, f16];
        kernels().launch("embed", [ids.len() as u32, 1, 1], 256, 0, 0, &args);
        // A branch waits for the next norm, which adds it.
        let mut waiting: Option<Vec<f32>> = None;
        for index in 0..spec.layers {
            let source = self.layers[index].source;
            let branch = waiting.take();
            let branch = branch.as_deref().map(|b| (b, None));
            let normed = self.add_norm(&mut residual, branch, &source.attention_norm, None);
            let qkv = self.matmul(&self.layers[index].qkv, &normed);
            let attended = self.attend(index, &qkv, &step);
            let branch = self.matmul(&self.layers[index].out, &attended);
            let bias = source.out_bias.as_deref();
            let before = &source.feed_forward_norm;
            let normed = match &source.post_attention_norm {
                None => self.add_norm(&mut residual, Some((&branch, bias)), before, None),
                Some(norm) => {
                    self.norm_add(&mut residual, &branch, bias, norm);
                    self.add_norm(&mut residual, None, before, None)
                }
            };
            let branch = self.feed_forward(index, &normed);
            match &source.post_feed_forward_norm {
                None => waiting = Some(branch),
                Some(norm) => self.norm_add(&mut residual, &branch, None, norm),
            }
        }
        let all: Vec<u32> = (0..ids.len() as u32).collect();
        let branch = waiting.as_deref().map(|b| (b, None));
        let rows = self.add_norm(&mut residual, branch, &self.decoder.weights.norm, Some(&all));
        let mut logits = self.matmul(&self.head, &rows);
        if let Some(cap) = spec.logit_softcap {
            let (l, n) = (logits.as_mut_ptr(), logits.len() as u64);
            let args = args![l, n, cap];
            kernels().launch("softcap", [n.div_ceil(256) as u32, 1, 1], 256, 0, 0, &args);
        }
        [rows.iter().map(|b| dtype.widen(*b)).collect(), logits]
    }
}

/// What the host sends to the device for one step.
struct Step {
    positions: Vec<u32>,
    slots: Vec<u32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    table: Vec<u32>,
    /// By segment: first row, position, rows, where its block table begins.
    segments: Vec<[usize; 4]>,
    widest: usize,
}

impl Step {
    fn new(decoder: &Decoder, pool: &Pool, segments: &[Segment]) -> Self {
        let mut step = Self {
            positions: vec![],
            slots: vec![],
            cos: vec![],
            sin: vec![],
            table: vec![],
            segments: vec![],
            widest: 0,
        };
        for s in segments {
            step.segments.push([s.rows.start, s.start, s.rows.len(), step.table.len()]);
            for position in s.start..s.start + s.rows.len() {
                let block = s.blocks[position / BLOCK_TOKENS];
                step.slots.push(block * 32 + (position % 32) as u32);
                step.positions.push(position as u32);
            }
            step.table.extend(&s.blocks);
            step.widest = step.widest.max(s.rows.len());
        }
        let table = decoder.rope.table(&pool.turn(), &step.positions);
        (step.cos, step.sin) = (table.parts().0.to_vec(), table.parts().1.to_vec());
        step
    }

    /// Tiles of queries, six numbers each.
    fn tiles(&self, size: usize, group: usize) -> Vec<i32> {
        let mut tiles = Vec::new();
        for [row, start, rows, table] in &self.segments {
            for first in (0..rows * group).step_by(size) {
                let count = (rows * group - first).min(size);
                tiles.extend([*row, *start, first, count, *table, 0].map(|x| x as i32));
            }
        }
        tiles
    }
}

/// Final-norm rows and logits by the CPU.
fn on_the_cpu(decoder: &Decoder, pool: &Pool, ids: &[u32], blocks: usize) -> [Vec<f32>; 2] {
    let turn = pool.turn();
    let mut cache = KvCache::new(decoder.spec.kv_dims(), decoder.dtype, blocks).unwrap();
    let segment = segment(0..ids.len(), 0, (0..blocks as u32).collect());
    let mut scratch = Scratch::new(decoder);
    decoder.forward(&turn, &mut cache, ids, &[segment], &mut scratch).unwrap();
    let all: Vec<usize> = (0..ids.len()).collect();
    let rows = decoder.final_rows(&turn, &all, &scratch);
    let mut logits = Vec::new();
    decoder.logits(&turn, &rows, &mut logits);
    [all.iter().flat_map(|r| rows.widened(*r)).collect(), logits]
}

fn segment(rows: std::ops::Range<usize>, start: usize, blocks: Vec<u32>) -> Segment {
    Segment { rows, start, blocks }
}

fn assert_rows(
    got: &[Vec<f32>; 2],
    want: &[Vec<f32>; 2],
    rows: std::ops::Range<usize>,
    place: &str,
) {
    for (kind, (got, want)) in ["hidden", "logits"].iter().zip(got.iter().zip(want)) {
        let len = got.len() / rows.len();
        let want = &want[rows.start * len..rows.end * len];
        assert_eq!(first_difference(got, want), None, "{place}: {kind}");
    }
}

/// A prompt at once, in chunks beside another sequence, and token by token.
fn check(family: &str) {
    let dir = golden(family);
    let pool = Pool::new(2, Isa::best()).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let decoder = crate::common::decoder(&checkpoint, None, &pool).unwrap();
    let vocab = decoder.spec.vocab as u32;
    let ids: Vec<u32> = (0..70).map(|i| (i * i * 7 + 3 * i + 1) % vocab).collect();
    let (n, blocks) = (ids.len(), ids.len().div_ceil(BLOCK_TOKENS));
    let want = on_the_cpu(&decoder, &pool, &ids, blocks);
    let mut device = Device::new(&decoder, 2 * blocks + 1);
    let own: Vec<u32> = (0..blocks as u32).map(|b| 2 * b + 1).collect();
    let other: Vec<u32> = (0..blocks as u32).rev().map(|b| 2 * b).collect();
    let got = device.step(&pool, &ids, &[segment(0..n, 0, own.clone())]);
    assert_rows(&got, &want, 0..n, &format!("{family}: the prompt at once"));

    // The cache is used again; another sequence shares the steps.
    device.is_split = true;
    let mut other_at = 0;
    for (i, (first, end)) in [(0, 33), (33, 64), (64, 65), (65, 67), (67, 70)].iter().enumerate() {
        device.variant = [0, 8, 1, 4, 64][i];
        let mut batch = ids[*first..*end].to_vec();
        let mine = 0..end - first;
        batch.extend(&ids[other_at..other_at + 2]);
        let segments = [
            segment(mine.clone(), *first, own.clone()),
            segment(mine.end..mine.end + 2, other_at, other.clone()),
        ];
        let got = device.step(&pool, &batch, &segments);
        let split = |of: &[f32]| of[..of.len() / batch.len() * mine.len()].to_vec();
        let rest = |of: &[f32]| of[of.len() / batch.len() * mine.len()..].to_vec();
        let place = format!("{family}: rows {first} to {end}");
        assert_rows(&[split(&got[0]), split(&got[1])], &want, *first..*end, &place);
        let beside = format!("{family}: beside them");
        assert_rows(&[rest(&got[0]), rest(&got[1])], &want, other_at..other_at + 2, &beside);
        other_at += 2;
    }
}

crate::common::golden_tests!(check);
