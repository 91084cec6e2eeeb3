//! Multiplies matrices with packed 16-bit weights.
//!
//! [`Packed`] keeps blocks of 64 output rows side by side, k in pairs
//! ([`product`](super::product)), so one layout feeds matrix-vector and matrix-matrix products:
//! lanes are output rows and no horizontal sum exists.
//!
//! A product is `out[t][r] = sum_k w[r][k] * x[t][k]`, each element in the order of the canon.
//! Tiles of up to 6 tokens by 64 rows (with AMX 32 tokens) are handed to an epilogue as plain
//! slices.

use super::amx::unit::{OUTPUTS, ROWS_MAX, Tiles};
use super::buffer::Buffer;
use super::dtype::{Dtype, round_bf16};
use super::lanes::{Isa, Kernel, LANES, Lanes, dispatch};
use super::pool::{Disjoint, Pool, Turn};
use super::product::{BLOCK_K, Input, Inputs, Pairing, VEC_STRIDE, product, vecs_at_once};
use super::rounded::Rounded;
use super::tasks::{Grain, Task, Tasks};
use std::ops::Range;

/// Output rows packed side by side.
pub const BLOCK_ROWS: usize = 64;
/// Tokens of one register tile.
const TILE_TOKENS: usize = 6;
/// Tokens of a tile above which half of its rows are computed at a time.
const HALF_TILE_TOKENS: usize = 4;
/// How far ahead of a product its weights are prefetched: two blocks of k.
const AHEAD: usize = 2 * BLOCK_K / 2 * PAIR_STRIDE;
/// Tokens of a tile from which weights are prefetched. For fewer it gained nothing where a block is
/// read in one stream.
const AHEAD_TOKENS_MIN: usize = 3;
/// The same with VDPBF16PS.
const AHEAD_TOKENS_MIN_DOT: usize = 4;
/// Bytes that are packed in one turn while others wait for theirs.
const TURN_BYTES: usize = 8 << 20;
/// 16-bit values of one pair of k over a block.
const PAIR_STRIDE: usize = 2 * BLOCK_ROWS;
/// Vectors of a block's rows.
const ROW_VECS: usize = BLOCK_ROWS / LANES;

/// A weight matrix in the engine's layout.
pub struct Packed {
    rows: usize,
    cols: usize,
    dtype: Dtype,
    pairing: Pairing,
    data: Buffer, // (blocks, stored cols / 2, BLOCK_ROWS, 2)
}

impl Packed {
    /// Packs `rows` rows of `cols` (even) values; `fill(row, out)` writes one source row's bits and
    /// is called once for each row, from several threads.
    ///
    /// # Errors
    /// When memory is refused, or the first error of `fill`.
    pub fn pack<E: Send + From<std::io::Error>>(
        turn: &Turn<'_>,
        shape: (usize, usize),
        dtype: Dtype,
        fill: impl Fn(usize, &mut [u16]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let pairing = Pairing::of(turn.isa(), dtype);
        Self::pack_by(|blocks, task| turn.run(blocks, task), shape, (dtype, pairing), fill)
    }

    /// The same in many short turns, between which others have theirs: engines go on while a model
    /// is loaded beside them.
    ///
    /// # Errors
    /// As for [`pack`](Self::pack).
    pub fn pack_beside<E: Send + From<std::io::Error>>(
        pool: &Pool,
        (rows, cols): (usize, usize),
        dtype: Dtype,
        fill: impl Fn(usize, &mut [u16]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let each = (TURN_BYTES / (2 * BLOCK_ROWS * cols.max(1))).max(pool.threads());
        let in_turns = |blocks: usize, task: &(dyn Fn(usize) + Sync)| {
            for first in (0..blocks).step_by(each) {
                pool.turn().run(each.min(blocks - first), |i| task(first + i));
            }
        };
        let pairing = Pairing::of(pool.turn().isa(), dtype);
        Self::pack_by(in_turns, (rows, cols), (dtype, pairing), fill)
    }

    /// Packs block by block; `run` calls a task for each of so many.
    fn pack_by<E: Send + From<std::io::Error>>(
        run: impl Fn(usize, &(dyn Fn(usize) + Sync)),
        (rows, cols): (usize, usize),
        (dtype, pairing): (Dtype, Pairing),
        fill: impl Fn(usize, &mut [u16]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        assert!(cols % 2 == 0, "the packed layout needs an even number of columns");
        let blocks = rows.div_ceil(BLOCK_ROWS);
        let block_len = BLOCK_ROWS * pairing.stored(cols);
        let mut data = Buffer::zeroed(blocks * block_len)?;
        let shared = Disjoint::new(&mut data);
        let failure = parking_lot::Mutex::new(None);
        run(blocks, &|block| {
            // SAFETY: each task owns its block.
            let out = unsafe { shared.piece(block * block_len..(block + 1) * block_len) };
            let mut row = vec![0; cols];
            for lane in 0..BLOCK_ROWS.min(rows - block * BLOCK_ROWS) {
                if let Err(e) = fill(block * BLOCK_ROWS + lane, &mut row) {
                    failure.lock().get_or_insert(e);
                    return;
                }
                scatter_row((dtype, pairing), lane, &row, out);
            }
        });
        match failure.into_inner() {
            Some(e) => Err(e),
            None => Ok(Self { rows, cols, dtype, pairing, data }),
        }
    }

    /// Number of output rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns (k).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The type of the 16-bit elements that are stored.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes of memory that the packed matrix takes, padding included.
    pub fn bytes(&self) -> usize {
        self.data.len() * 2
    }

    /// Copies row `row` out of the packed layout, widened (an embedding lookup).
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        let block = self.block(row / BLOCK_ROWS);
        for (k, out) in out[..self.cols].iter_mut().enumerate() {
            let at = self.pairing.offset(self.dtype, PAIR_STRIDE, row % BLOCK_ROWS, k);
            *out = self.dtype.widen(block[at]);
        }
    }

    fn blocks(&self) -> usize {
        self.rows.div_ceil(BLOCK_ROWS)
    }

    fn block_len(&self) -> usize {
        BLOCK_ROWS * self.pairing.stored(self.cols)
    }

    fn block(&self, block: usize) -> &[u16] {
        &self.data[block * self.block_len()..][..self.block_len()]
    }

    /// What lies [`AHEAD`] behind vector `vec` of `block`, in this block or the next ones.
    fn ahead(&self, block: usize, vec: usize) -> Option<&[u16]> {
        self.data.get(block * self.block_len() + vec * VEC_STRIDE + AHEAD..)
    }

    /// Rows of these vectors of `block` that exist (the last block may be padded).
    fn rows_of(&self, block: usize, vecs: &Range<usize>) -> Range<usize> {
        let start = (block * BLOCK_ROWS + vecs.start * LANES).min(self.rows);
        start..(block * BLOCK_ROWS + vecs.end * LANES).min(self.rows)
    }
}

fn scatter_row((dtype, pairing): (Dtype, Pairing), lane: usize, row: &[u16], block: &mut [u16]) {
    for (k, bits) in row.iter().enumerate() {
        let flushed = match dtype {
            Dtype::Bf16 => round_bf16(dtype.widen(*bits)),
            Dtype::F16 => *bits,
        };
        block[pairing.offset(dtype, PAIR_STRIDE, lane, k)] = flushed;
    }
}

/// Panics where weights and inputs do not fit each other or the instruction set.
fn check(turn: &Turn<'_>, w: &Packed, x: &Rounded) {
    assert_eq!((w.cols, w.dtype), (x.cols(), x.dtype()), "matmul operands do not fit");
    let pairing = Pairing::of(turn.isa(), w.dtype);
    assert_eq!(w.pairing, pairing, "the weights were packed for another instruction set");
    assert!(x.suits(turn.isa()), "the inputs were filled for another instruction set");
}

/// `epilogue(token, rows, products)` for every token and block of `w`, on all threads; calls with
/// equal tokens have disjoint rows. `products` holds `w[rows] * x[token]`.
pub(super) fn matmul(
    turn: &Turn<'_>,
    w: &Packed,
    x: &Rounded,
    epilogue: impl Fn(usize, Range<usize>, &[f32]) + Sync,
) {
    check(turn, w, x);
    let unit = Unit::of(turn.isa(), w);
    for_each_task(turn, unit, w.blocks(), x.rows(), |task| {
        let (block, vecs) = (task.block, vecs_of(&task));
        let rows = w.rows_of(block, &vecs);
        let part = Part { w, block, vecs, x, tokens: task.tokens };
        unit.start().run(part, |token, products| {
            epilogue(token, rows.clone(), &products[..rows.len()]);
        });
    });
}

/// `out[t][r] = sum_k w[r][k] x[t][k]`, `out` being (tokens, rows).
pub fn matmul_into(turn: &Turn<'_>, w: &Packed, x: &Rounded, out: &mut [f32]) {
    let (stride, out) = (w.rows, Disjoint::new(out));
    matmul(turn, w, x, |token, rows, products| {
        // SAFETY: rows of one token are disjoint between calls.
        let out = unsafe { out.piece(token * stride + rows.start..token * stride + rows.end) };
        out.copy_from_slice(products);
    });
}

/// `out[t][r] += sum_k w[r][k] x[t][k]`: a product added to the residual stream.
pub fn matmul_add(turn: &Turn<'_>, w: &Packed, x: &Rounded, out: &mut [f32]) {
    let (stride, out) = (w.rows, Disjoint::new(out));
    matmul(turn, w, x, |token, rows, products| {
        // SAFETY: rows of one token are disjoint between calls.
        let out = unsafe { out.piece(token * stride + rows.start..token * stride + rows.end) };
        out.iter_mut().zip(products).for_each(|(o, p)| *o += p);
    });
}

/// For a matrix whose blocks alternate between gate and up rows (see [`gated_row`]):
/// `combine(token, rows, gate, up)` with the two products of the same rows.
pub(super) fn matmul_gated(
    turn: &Turn<'_>,
    w: &Packed,
    x: &Rounded,
    combine: impl Fn(usize, Range<usize>, &mut [f32], &[f32]) + Sync,
) {
    check(turn, w, x);
    let unit = Unit::of(turn.isa(), w);
    for_each_task(turn, unit, w.blocks() / 2, x.rows(), |task| {
        let (mut started, vecs) = (unit.start(), vecs_of(&task));
        let mut gates = [[0.0; BLOCK_ROWS]; ROWS_MAX];
        let first_row = task.block * BLOCK_ROWS;
        let rows = first_row + vecs.start * LANES..first_row + vecs.end * LANES;
        for tokens in unit.tiles(task.tokens) {
            let first = tokens.start;
            let part = |block| Part { w, block, vecs: vecs.clone(), x, tokens: tokens.clone() };
            started.run(part(2 * task.block), |token, products| {
                gates[token - first][..products.len()].copy_from_slice(products);
            });
            started.run(part(2 * task.block + 1), |token, up| {
                combine(token, rows.clone(), &mut gates[token - first][..up.len()], up);
            });
        }
    });
}

/// For the packed rows of a gated pair of `(inter, k)` matrices: which source row (gate: `Ok`, up:
/// `Err`) packed row `row` holds; `None` for padding. Blocks alternate gate, up.
pub fn gated_row(row: usize, inter: usize) -> Option<Result<usize, usize>> {
    let (block, lane) = (row / BLOCK_ROWS, row % BLOCK_ROWS);
    let source = block / 2 * BLOCK_ROWS + lane;
    let half = if block % 2 == 0 { Ok(source) } else { Err(source) };
    (source < inter).then_some(half)
}

/// Packed rows of a gated pair of `(inter, k)` matrices.
pub fn gated_rows(inter: usize) -> usize {
    inter.div_ceil(BLOCK_ROWS) * BLOCK_ROWS * 2
}

/// What computes a product.
#[derive(Clone, Copy)]
enum Unit {
    Lanes(Isa),
    Tiles(Isa),
}

/// The same for a thread that has begun.
enum Started {
    Lanes(Isa),
    Tiles(Tiles),
}

impl Unit {
    fn of(isa: Isa, w: &Packed) -> Self {
        match w.pairing {
            Pairing::Chains => Self::Lanes(isa),
            Pairing::Neighbours => Self::Tiles(isa),
        }
    }

    /// Pieces of `tokens` that it multiplies at once.
    fn tiles(self, tokens: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        match self {
            Self::Lanes(_) => tiles(tokens, TILE_TOKENS, 1),
            Self::Tiles(_) => tiles(tokens, ROWS_MAX, ROWS_MAX / 2),
        }
    }

    /// How a product of so many tokens may be cut. Half a block is read more slowly than a whole
    /// one: the half of its lines that lies between is not fetched ahead. With few tokens, reading
    /// is what takes the time.
    fn grain(self, tokens: usize) -> Grain {
        let parts = if tokens > HALF_TILE_TOKENS { 2 } else { 1 };
        match self {
            Self::Lanes(_) => Grain { tokens: TILE_TOKENS * 4, step: 1, parts },
            Self::Tiles(_) => Grain { tokens: ROWS_MAX, step: ROWS_MAX / 2, parts: 1 },
        }
    }

    fn start(self) -> Started {
        match self {
            Self::Lanes(isa) => Started::Lanes(isa),
            Self::Tiles(isa) => match isa.tiles() {
                Some(tiles) => Started::Tiles(tiles),
                None => unreachable!("weights in pairs of neighbours were packed for tiles"),
            },
        }
    }
}

impl Started {
    /// Calls `sink(token, products)` for each token of the part.
    fn run(&mut self, part: Part<'_>, mut sink: impl FnMut(usize, &[f32])) {
        match self {
            Self::Lanes(isa) => dispatch(*isa, BlockProduct { part, sink }),
            Self::Tiles(tiles) => part.by_tiles(tiles, &mut sink),
        }
    }
}

/// Runs the tasks of (blocks x tokens) on all threads.
fn for_each_task(
    turn: &Turn<'_>,
    unit: Unit,
    blocks: usize,
    tokens: usize,
    run: impl Fn(Task) + Sync,
) {
    let tasks = Tasks::of(turn.threads(), unit.grain(tokens), blocks, tokens);
    turn.run(tasks.count(), |i| {
        if let Some(task) = tasks.get(i) {
            run(task);
        }
    });
}

/// The vectors of a block's outputs that a task has.
fn vecs_of(task: &Task) -> Range<usize> {
    task.part * ROW_VECS / task.parts..(task.part + 1) * ROW_VECS / task.parts
}

/// As few pieces of `tokens` as possible with at most `most`, all of about the same size: a
/// multiple of `step` but for the last one.
#[inline(always)]
fn tiles(tokens: Range<usize>, most: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    let Range { mut start, end } = tokens;
    std::iter::from_fn(move || {
        let left = end - start;
        let size = left.div_ceil(left.div_ceil(most).max(1)).next_multiple_of(step).min(left);
        start += size;
        (size > 0).then(|| start - size..start)
    })
}

/// Some vectors of one block's outputs over a range of tokens.
struct Part<'a> {
    w: &'a Packed,
    block: usize,
    vecs: Range<usize>,
    x: &'a Rounded,
    tokens: Range<usize>,
}

/// The products of a part, by vectors.
struct BlockProduct<'a, S> {
    part: Part<'a>,
    sink: S,
}

impl<S: FnMut(usize, &[f32])> Kernel for BlockProduct<'_, S> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { part, mut sink } = self;
        match part.w.dtype {
            Dtype::Bf16 => part.by_lanes::<L, false>(&mut sink),
            Dtype::F16 => part.by_lanes::<L, true>(&mut sink),
        }
    }
}

impl Part<'_> {
    /// The outputs within the block.
    fn outputs(&self) -> Range<usize> {
        self.vecs.start * LANES..self.vecs.end * LANES
    }

    fn by_tiles(&self, amx: &mut Tiles, sink: &mut impl FnMut(usize, &[f32])) {
        const { assert!(OUTPUTS == BLOCK_ROWS) };
        let mut out = [[0.0; BLOCK_ROWS]; ROWS_MAX];
        for tokens in tiles(self.tokens.clone(), ROWS_MAX, ROWS_MAX / 2) {
            let x = self.x.bits_of(tokens.clone());
            amx.product(self.w.block(self.block), x, tokens.len(), &mut out);
            tokens.zip(&out).for_each(|(token, out)| sink(token, &out[self.outputs()]));
        }
    }

    #[inline(always)]
    fn by_lanes<L: Lanes, const F16: bool>(&self, sink: &mut impl FnMut(usize, &[f32])) {
        for tokens in tiles(self.tokens.clone(), TILE_TOKENS, 1) {
            match tokens.len() {
                1 => self.tile::<L, 1, F16>(tokens.start, sink),
                2 => self.tile::<L, 2, F16>(tokens.start, sink),
                3 => self.tile::<L, 3, F16>(tokens.start, sink),
                4 => self.tile::<L, 4, F16>(tokens.start, sink),
                5 => self.tile::<L, 5, F16>(tokens.start, sink),
                _ => self.tile::<L, TILE_TOKENS, F16>(tokens.start, sink),
            }
        }
    }

    #[inline(always)]
    fn tile<L: Lanes, const T: usize, const F16: bool>(
        &self,
        first: usize,
        sink: &mut impl FnMut(usize, &[f32]),
    ) {
        let mut rows = [Input::NOTHING; T];
        for t in 0..T {
            rows[t] = self.x.input(first + t);
        }
        let x = Inputs::new(self.w.pairing.stored(self.w.cols) / 2, rows);
        let most = if T > HALF_TILE_TOKENS { ROW_VECS / 2 } else { ROW_VECS };
        let most = vecs_at_once::<L>(T).min(most);
        let has_dot = L::HAS_DOT && !F16;
        let tokens_min = if has_dot { AHEAD_TOKENS_MIN_DOT } else { AHEAD_TOKENS_MIN };
        let gains = T >= tokens_min || most < ROW_VECS;
        let asks_ahead = gains && first == self.tokens.start;
        let mut out = [[0.0; BLOCK_ROWS]; T];
        let mut vec = self.vecs.start;
        while vec < self.vecs.end {
            vec += match (self.vecs.end - vec).min(most) {
                4 => self.vecs::<L, T, 4, F16>(&x, vec, asks_ahead, &mut out),
                2 | 3 => self.vecs::<L, T, 2, F16>(&x, vec, asks_ahead, &mut out),
                _ => self.vecs::<L, T, 1, F16>(&x, vec, asks_ahead, &mut out),
            };
        }
        for (t, out) in out.iter().enumerate() {
            sink(first + t, &out[self.outputs()]);
        }
    }

    /// `V` vectors of 16 rows from vector `vec` on; returns `V`.
    #[inline(always)]
    fn vecs<L: Lanes, const T: usize, const V: usize, const F16: bool>(
        &self,
        x: &Inputs<'_, L, T, F16>,
        vec: usize,
        asks_ahead: bool,
        out: &mut [[f32; BLOCK_ROWS]; T],
    ) -> usize {
        let w = &self.w.block(self.block)[vec * VEC_STRIDE..];
        let next = if asks_ahead { self.w.ahead(self.block, vec) } else { None };
        let acc = product::<L, T, V, F16>(w, PAIR_STRIDE, x, next);
        for t in 0..T {
            for v in 0..V {
                out[t][(vec + v) * LANES..][..LANES].copy_from_slice(&acc[t][v].to_array());
            }
        }
        V
    }
}

#[cfg(test)]
mod tests;
