//! Launches the layers of a step on a card: token ids to hidden rows to logits.
//!
//! The same operations in the same order as `models/cpu/decoder.rs`, so a row has the same bits;
//! only products and attention of tensor arithmetic have orders of their own. A branch waits for
//! the next norm, which adds it to the residual stream.

use super::choose::{AttentionKernel, Product, slot_tiles};
use super::error::CudaError;
use super::launch::{Arg, AttentionShape, GRID_MAX, Launch, Memory, Pointer, args};
use super::layout::Layout;
use super::memory::{GrowingBuffer, Inputs, KvBlocks, Offset, grained, held};
use super::weights::{CardLayer, CudaWeights, EXPERTS_MAX, GATE_ROWS, Matrix};
use crate::models::arithmetic::Arithmetic;
use crate::models::spec::{ExpertSpec, Spec};
use crate::ops::attention::PARTITION_TOKENS;
use crate::ops::dtype::Dtype;
use crate::ops::rowwise::Activation;
use std::cell::RefCell;

/// Bytes of partial results of long contexts that are split over thread blocks.
const PARTS_BYTES_MAX: usize = 64 << 20;
/// Thread blocks of attention from which on a card is busy without splitting contexts.
const TILES_MAX: usize = 256;

/// Buffers between kernels.
pub(super) struct StepMemory {
    residual: GrowingBuffer,
    normed: GrowingBuffer,
    qkv: GrowingBuffer,
    queries: GrowingBuffer,
    attended: GrowingBuffer,
    parts: GrowingBuffer,
    branch: GrowingBuffer,
    gate_up: GrowingBuffer,
    inner: GrowingBuffer,
    routing: GrowingBuffer,
    experts: GrowingBuffer,
}

/// Where they are, for a step of some rows.
#[derive(Clone, Copy)]
pub(super) struct Buffers {
    residual: Pointer,          // f32 (rows, hidden)
    pub(super) normed: Pointer, // 16 bits (rows, hidden)
    qkv: Pointer,               // f32 (rows, qkv_rows)
    queries: Pointer,           // 16 bits (rows, heads * head_dim)
    attended: Pointer,          // 16 bits (rows, heads * head_dim)
    parts: Option<Parts>,
    branch: Pointer,     // f32 (rows, hidden)
    gate_up: Pointer,    // f32 (slots, 2 * stride)
    inner: Pointer,      // 16 bits (slots, inter)
    scores: Pointer,     // f32 (rows, experts)
    chosen: Pointer,     // u32 (rows, used)
    shares: Pointer,     // f32 (rows, used)
    grouped: Pointer,    // u32 (slots): slots by expert
    slot_tiles: Pointer, // four u32 (tiles)
    experts: Pointer,    // f32 (slots, hidden)
}

/// Partial results of contexts that are split over thread blocks.
#[derive(Clone, Copy)]
struct Parts {
    at: Pointer, // f32 (rows, heads, depth, head_dim + 2)
    /// Partitions that there is room for.
    depth: usize,
}

/// Bytes of a card's memory for steps of `rows` rows, without logits and results.
pub(super) fn workspace_bytes(spec: &Spec, rows: usize) -> u64 {
    // Rotations are the largest of what a row is told.
    let inputs = rows * (4 * spec.attention.head_dim + 128);
    let parts = if spec.context > PARTITION_TOKENS { PARTS_BYTES_MAX } else { 0 };
    let buffers = Sizes::new(spec, rows).0.into_iter().chain([inputs, parts]);
    buffers.map(|bytes| held(grained(bytes) as u64)).sum()
}

/// Bytes of the buffers, in the order of [`StepMemory`], but for the partial results.
struct Sizes([usize; 10]);

impl Sizes {
    fn new(spec: &Spec, rows: usize) -> Self {
        let (experts, used) = spec.feed_forward.experts.map_or((0, 0), |e| (e.count, e.used));
        let slots = rows * used.max(1);
        let (hidden, inter) = (spec.hidden, spec.feed_forward.inter);
        Self([
            4 * rows * hidden,
            2 * rows * hidden,
            4 * rows * spec.qkv_rows(),
            2 * rows * spec.attention_cols(),
            2 * rows * spec.attention_cols(),
            4 * rows * hidden,
            8 * slots * inter.next_multiple_of(GATE_ROWS),
            2 * slots * inter,
            routing(rows, experts, used)[5],
            4 * rows * used * hidden,
        ])
    }
}

/// Where scores, chosen experts, their shares, grouped slots and tiles of these begin in one
/// buffer, and where it ends.
fn routing(rows: usize, experts: usize, used: usize) -> [usize; 6] {
    let slots = rows * used;
    // The smallest tile is 8 slots.
    let tiles = slots / 8 + experts.min(slots);
    let mut ends = [0, 4 * rows * experts, 4 * slots, 4 * slots, 4 * slots, 16 * tiles];
    for i in 1..ends.len() {
        ends[i] = ends[i - 1] + ends[i].next_multiple_of(16);
    }
    ends
}

impl StepMemory {
    pub(super) fn new() -> Self {
        let buffer = || GrowingBuffer::new("a step's buffers");
        Self {
            residual: buffer(),
            normed: buffer(),
            qkv: buffer(),
            queries: buffer(),
            attended: buffer(),
            parts: buffer(),
            branch: buffer(),
            gate_up: buffer(),
            inner: buffer(),
            routing: buffer(),
            experts: buffer(),
        }
    }

    pub(super) fn fit(
        &mut self,
        weights: &CudaWeights,
        layout: &Layout,
    ) -> Result<Buffers, CudaError> {
        let (spec, card) = (&*weights.spec, &weights.card);
        let Sizes([residual, normed, qkv, queries, attended, branch, gate_up, inner, route, out]) =
            Sizes::new(spec, layout.rows);
        let (experts, used) = spec.feed_forward.experts.map_or((0, 0), |e| (e.count, e.used));
        let places = routing(layout.rows, experts, used);
        let route = self.routing.fit(card, route)?;
        Ok(Buffers {
            residual: self.residual.fit(card, residual)?,
            normed: self.normed.fit(card, normed)?,
            qkv: self.qkv.fit(card, qkv)?,
            queries: self.queries.fit(card, queries)?,
            attended: self.attended.fit(card, attended)?,
            parts: self.fit_parts(weights, layout)?,
            branch: self.branch.fit(card, branch)?,
            gate_up: self.gate_up.fit(card, gate_up)?,
            inner: self.inner.fit(card, inner)?,
            scores: route.plus(places[0]),
            chosen: route.plus(places[1]),
            shares: route.plus(places[2]),
            grouped: route.plus(places[3]),
            slot_tiles: route.plus(places[4]),
            experts: self.experts.fit(card, out)?,
        })
    }

    /// Room for partial results, where contexts are split. Partitions are rounded up to a power of
    /// two, so that a growing context seldom is another kind of step, which would need another
    /// graph: thread blocks of partitions that are not there return at once, and nobody reads them.
    fn fit_parts(
        &mut self,
        weights: &CudaWeights,
        layout: &Layout,
    ) -> Result<Option<Parts>, CudaError> {
        let (a, count) = (&weights.spec.attention, layout.partitions);
        if count == 1 || layout.tile_count * a.kv_heads >= TILES_MAX {
            return Ok(None);
        }
        let bytes = |depth: usize| 4 * layout.rows * a.heads * depth * (a.head_dim + 2);
        let depths = [count.next_power_of_two(), count];
        let Some(depth) = depths.into_iter().find(|d| bytes(*d) <= PARTS_BYTES_MAX) else {
            return Ok(None);
        };
        let at = self.parts.fit(&weights.card, bytes(depth))?;
        Ok(Some(Parts { at, depth }))
    }
}

/// A step under way.
pub(super) struct StepRun<'a> {
    pub(super) weights: &'a CudaWeights,
    pub(super) arithmetic: Arithmetic,
    pub(super) kv: &'a KvBlocks,
    pub(super) inputs: &'a Inputs,
    pub(super) layout: &'a Layout,
    pub(super) buffers: Buffers,
    /// What was launched so far.
    pub(super) launches: RefCell<Vec<Launch>>,
}

/// What a norm adds first: a branch, and its bias.
pub(super) type Branch = [Pointer; 2];

impl StepRun<'_> {
    /// Adds a launch to the step.
    pub(super) fn launch(
        &self,
        kernel: &'static str,
        grid: [usize; 3],
        threads: u32,
        shared: usize,
        args: &[Arg],
    ) {
        let launch = Launch { kernel, grid, threads, shared, args: args.to_vec() };
        self.launches.borrow_mut().push(launch);
    }

    fn spec(&self) -> &Spec {
        &self.weights.spec
    }

    pub(super) fn is_f16(&self) -> i32 {
        i32::from(self.weights.dtype == Dtype::F16)
    }

    pub(super) fn input(&self, at: Offset) -> Pointer {
        self.inputs.pointer(at)
    }

    /// All layers; whether the last branch still waits to be added.
    pub(super) fn layers(&self) -> bool {
        let b = self.buffers;
        self.embed();
        let mut waits = false;
        for (index, layer) in self.weights.layers.iter().enumerate() {
            self.add_norm(self.branch(waits, None), &layer.attention_norm, None, b.normed);
            self.matmul(&layer.qkv, b.normed, b.qkv, self.layout.rows);
            self.attend(index, layer);
            self.matmul(&layer.out, b.attended, b.branch, self.layout.rows);
            let bias = layer.out_bias.as_ref();
            let before = &layer.feed_forward_norm;
            match &layer.post_attention_norm {
                None => self.add_norm(self.branch(true, bias), before, None, b.normed),
                Some(norm) => {
                    self.norm_add(self.branch(true, bias), norm);
                    self.add_norm(self.branch(false, None), before, None, b.normed);
                }
            }
            self.feed_forward(layer);
            waits = layer.post_feed_forward_norm.is_none();
            if let Some(norm) = &layer.post_feed_forward_norm {
                self.norm_add(self.branch(true, None), norm);
            }
        }
        waits
    }

    pub(super) fn branch(&self, is_there: bool, bias: Option<&Memory>) -> Branch {
        let branch = if is_there { self.buffers.branch } else { Pointer::NULL };
        [branch, bias.map_or(Pointer::NULL, Memory::pointer)]
    }

    fn embed(&self) {
        let (spec, weights) = (self.spec(), self.weights);
        // The kernel takes 0 for none.
        let scale = spec.embed_scale.map_or(0.0, |s| weights.dtype.widen(weights.dtype.round(s)));
        let table = weights.embedding.as_ref().unwrap_or(&weights.head.memory);
        let (cols, is_packed) = (spec.hidden as i32, i32::from(weights.embedding.is_none()));
        let ids = self.input(self.layout.ids);
        let args = args![table, ids, self.buffers.residual, cols, is_packed, scale, self.is_f16()];
        self.launch("embed", [self.layout.rows, 1, 1], 256, 0, args);
    }

    /// Adds a branch to the residual stream where there is one, and norms: `chosen` rows, or all.
    pub(super) fn add_norm(
        &self,
        [branch, bias]: Branch,
        weight: &Memory,
        chosen: Option<(Offset, usize)>,
        out: Pointer,
    ) {
        let (cols, eps) = (self.spec().hidden, self.spec().norm.eps);
        let (rows, count) = match chosen {
            Some((at, count)) => (self.input(at), count),
            None => (Pointer::NULL, self.layout.rows),
        };
        let residual = self.buffers.residual;
        let args =
            args![residual, branch, bias, weight, rows, out, cols as i32, eps, self.is_f16()];
        self.launch("add_norm", [count, 1, 1], 256, 4 * cols, args);
    }

    /// Adds a branch to the residual stream after its own norm (Gemma 2).
    fn norm_add(&self, [branch, bias]: Branch, weight: &Memory) {
        let (cols, eps) = (self.spec().hidden, self.spec().norm.eps);
        let args = args![self.buffers.residual, branch, bias, weight, cols as i32, eps];
        self.launch("norm_add", [self.layout.rows, 1, 1], 256, 4 * cols, args);
    }

    /// `out[t][r] = sum_k w[r][k] x[t][k]`.
    fn matmul(&self, w: &Matrix, x: Pointer, out: Pointer, tokens: usize) {
        let Product { kernel, group, rows, threads } =
            Product::new(self.arithmetic, tokens, w.cols, self.weights.dtype);
        let grid = [tokens.div_ceil(group), w.rows.div_ceil(rows), 1];
        let args = args![&w.memory, x, out, w.rows as i32, w.cols as i32, tokens as i32];
        self.launch(kernel, grid, threads, 0, args);
    }

    /// Finishes queries, keys and values, stores and attends.
    fn attend(&self, index: usize, layer: &CardLayer) {
        let (spec, b, layout) = (self.spec(), self.buffers, self.layout);
        let a = &spec.attention;
        let [keys, values] = self.kv.layer(index);
        let (heads, kv_heads, head_dim) = (a.heads as i32, a.kv_heads as i32, a.head_dim as i32);
        let optional =
            |memory: &Option<Memory>| memory.as_ref().map_or(Pointer::NULL, Memory::pointer);
        let args = args![
            b.qkv,
            optional(&layer.qkv_bias),
            optional(&layer.q_norm),
            optional(&layer.k_norm),
            self.input(layout.cos),
            self.input(layout.sin),
            self.input(layout.slots),
            b.queries,
            keys,
            values,
            heads,
            kv_heads,
            head_dim,
            spec.norm.eps,
            self.is_f16(),
            i32::from(self.arithmetic == Arithmetic::Tensor),
        ];
        let grid = [layout.rows, a.heads + 2 * a.kv_heads, 1];
        self.launch("qkv_finish", grid, 128, 0, args);
        let shape = AttentionShape {
            heads,
            kv_heads,
            head_dim,
            window: a.windows[index].map_or(0, |w| w as i32),
            scale: a.scale,
            cap: a.softcap.unwrap_or(0.0),
        };
        self.attend_tiles(shape, [keys, values]);
        let Some(Parts { at, depth }) = b.parts else { return };
        let (positions, depth) = (self.input(layout.positions), depth as i32);
        let args = args![at, positions, b.attended, shape, depth, self.is_f16()];
        self.launch("attend_merge", [layout.rows, a.heads, 1], 128, 0, args);
    }

    fn attend_tiles(&self, shape: AttentionShape, [keys, values]: [Pointer; 2]) {
        let (a, b, layout) = (&self.spec().attention, self.buffers, self.layout);
        let AttentionKernel { kernel, threads, shared } = AttentionKernel::new(
            self.arithmetic,
            layout.tile_queries,
            a.head_dim,
            self.weights.dtype,
        );
        let Parts { at, depth } = b.parts.unwrap_or(Parts { at: Pointer::NULL, depth: 1 });
        let (table, tiles) = (self.input(layout.table), self.input(layout.tiles));
        let split = i32::from(b.parts.is_some());
        let args = args![
            b.queries,
            keys,
            values,
            table,
            tiles,
            at,
            b.attended,
            shape,
            depth as i32,
            split
        ];
        let grid = [layout.tile_count, a.kv_heads, depth];
        self.launch(kernel, grid, threads, shared, args);
    }

    fn feed_forward(&self, layer: &CardLayer) {
        let (b, rows) = (self.buffers, self.layout.rows);
        let Some((mixture, router)) = &layer.router else {
            self.matmul(&layer.gate_up, b.normed, b.gate_up, rows);
            self.gate(rows);
            return self.matmul(&layer.down, b.inner, b.branch, rows);
        };
        self.matmul(router, b.normed, b.scores, rows);
        let (count, used) = (mixture.count as i32, mixture.used as i32);
        let args =
            args![b.scores, b.chosen, b.shares, count, used, i32::from(mixture.renormalise),];
        self.launch("route", [rows, 1, 1], 32, 0, args);
        if rows > 1 {
            self.group(mixture);
        }
        self.expert(mixture, &layer.gate_up, (b.normed, true), b.gate_up);
        self.gate(rows * mixture.used);
        self.expert(mixture, &layer.down, (b.inner, false), b.experts);
        let args = args![b.experts, b.shares, b.branch, self.spec().hidden as i32, used];
        self.launch("combine", [rows, 1, 1], 256, 0, args);
    }

    fn gate(&self, slots: usize) {
        let feed_forward = &self.spec().feed_forward;
        let inter = feed_forward.inter;
        let stride = inter.next_multiple_of(GATE_ROWS);
        let is_gelu = i32::from(feed_forward.activation == Activation::GeluTanh);
        for first in (0..slots).step_by(GRID_MAX) {
            let gate_up = self.buffers.gate_up.plus(8 * first * stride);
            let out = self.buffers.inner.plus(2 * first * inter);
            let args = args![gate_up, out, inter as i32, stride as i32, is_gelu, self.is_f16()];
            let grid = [inter.div_ceil(256), GRID_MAX.min(slots - first), 1];
            self.launch("gate", grid, 256, 0, args);
        }
    }

    /// Brings the slots of each expert together, cut into tiles for the kernel of their products.
    fn group(&self, mixture: &ExpertSpec) {
        let (b, slots) = (self.buffers, self.layout.rows * mixture.used);
        let size = self.grouped(mixture).group;
        let tiles = slot_tiles(slots, size, mixture) as i32;
        let args = args![b.chosen, b.grouped, b.slot_tiles, slots as i32, size as i32, tiles];
        self.launch("group_slots", [1, 1, 1], EXPERTS_MAX as u32, 0, args);
    }

    fn grouped(&self, mixture: &ExpertSpec) -> Product {
        let slots = self.layout.rows * mixture.used;
        Product::grouped(self.arithmetic, slots, (self.spec(), mixture), self.weights.dtype)
    }

    /// Products of each row's experts; all of a row's slots read one input, or each its own. The
    /// slots of one row have no expert in common; those of several are grouped.
    fn expert(
        &self,
        mixture: &ExpertSpec,
        w: &Matrix,
        (x, is_shared): (Pointer, bool),
        out: Pointer,
    ) {
        let (b, slots, used) = (self.buffers, self.layout.rows * mixture.used, mixture.used as i32);
        let (rows, cols) = (w.rows as i32, w.cols as i32);
        if self.layout.rows > 1 {
            let Product { kernel, group, rows: tile, threads } = self.grouped(mixture);
            let used = if is_shared { used } else { 1 };
            let args = args![&w.memory, x, out, b.grouped, b.slot_tiles, rows, cols, used];
            let grid = [slot_tiles(slots, group, mixture), w.rows.div_ceil(tile), 1];
            return self.launch(kernel, grid, threads, 0, args);
        }
        let kernel = match (self.arithmetic, self.weights.dtype) {
            (Arithmetic::Portable, Dtype::Bf16) => "expert_bf16",
            (Arithmetic::Portable, Dtype::F16) => "expert_f16",
            (Arithmetic::Tensor, Dtype::Bf16) => "expert_mma_bf16",
            (Arithmetic::Tensor, Dtype::F16) => "expert_mma_f16",
        };
        let args = args![&w.memory, b.chosen, x, out, rows, cols, used, i32::from(is_shared)];
        self.launch(kernel, [w.rows.div_ceil(32), slots, 1], 256, 0, args);
    }

    /// The final norm of chosen rows.
    pub(super) fn final_rows(&self, branch: bool, rows: Offset, count: usize, out: Pointer) {
        let branch = self.branch(branch, None);
        self.add_norm(branch, &self.weights.norm, Some((rows, count)), out)
    }

    /// Logits (rows, vocab) of the first `rows` final rows.
    pub(super) fn logits(&self, finals: Pointer, out: Pointer, rows: usize) {
        self.matmul(&self.weights.head, finals, out, rows);
        let Some(cap) = self.spec().logit_softcap else { return };
        let count = rows * self.spec().vocab;
        let args = args![out, count as u64, cap];
        self.launch("softcap", [count.div_ceil(256), 1, 1], 256, 0, args);
    }
}
