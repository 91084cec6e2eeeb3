//! Matrix products with packed 16-bit weights: the layout and the tile that carry the canon.
//!
//! [`Packed`] keeps blocks of 64 output rows side by side, k interleaved in pairs, so one layout
//! feeds matrix-vector and matrix-matrix products: lanes are output rows and no horizontal sum
//! exists. bf16 pairs are interleaved element by element (what VDPBF16PS reads); f16 pairs keep 16
//! odd elements, then 16 even ones (what a widening load reads).
//!
//! A product is `out[t][r] = sum_k w[r][k] * x[t][k]`, each element one accumulator in the order of
//! the canon. Tiles of up to 6 tokens by 64 rows are handed to an epilogue as plain slices.

use super::buffer::Buffer;
use super::dtype::{Dtype, Rounded, round_bf16};
use super::lanes::{BfPair, Kernel, LANES, Lanes, dispatch};
use super::pool::{Disjoint, Turn};
use std::ops::Range;

/// Output rows packed side by side.
pub const BLOCK_ROWS: usize = 64;
/// Tokens of one register tile.
const TILE_TOKENS: usize = 6;
/// 16-bit values of one pair of k over a block.
const PAIR_STRIDE: usize = 2 * BLOCK_ROWS;
/// 16-bit values of one pair of k over 16 rows.
pub(super) const VEC_STRIDE: usize = 2 * LANES;

/// A weight matrix in the engine's layout.
pub struct Packed {
    rows: usize,
    cols: usize,
    dtype: Dtype,
    data: Buffer, // (blocks, cols / 2, BLOCK_ROWS, 2)
}

impl Packed {
    /// Packs `rows` rows of `cols` (even) values; `fill(row, out)` writes one source row's bits and
    /// is called once for each row, from several threads.
    ///
    /// # Errors
    /// When memory is refused, or the first error of `fill`.
    pub fn pack<E: Send + From<std::io::Error>>(
        turn: &Turn<'_>,
        (rows, cols): (usize, usize),
        dtype: Dtype,
        fill: impl Fn(usize, &mut [u16]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        assert!(cols % 2 == 0, "the packed layout needs an even number of columns");
        let blocks = rows.div_ceil(BLOCK_ROWS);
        let block_len = BLOCK_ROWS * cols;
        let mut data = Buffer::zeroed(blocks * block_len)?;
        let shared = Disjoint::new(&mut data);
        let failure = parking_lot::Mutex::new(None);
        turn.run(blocks, |block| {
            // SAFETY: each task owns its block.
            let out = unsafe { shared.piece(block * block_len..(block + 1) * block_len) };
            let mut row = vec![0; cols];
            for lane in 0..BLOCK_ROWS.min(rows - block * BLOCK_ROWS) {
                if let Err(e) = fill(block * BLOCK_ROWS + lane, &mut row) {
                    failure.lock().get_or_insert(e);
                    return;
                }
                scatter_row(dtype, lane, &row, out);
            }
        });
        match failure.into_inner() {
            Some(e) => Err(e),
            None => Ok(Self { rows, cols, dtype, data }),
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

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.data.len() * 2
    }

    /// Copies row `row` out of the packed layout, widened (an embedding lookup).
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        let block = &self.data[row / BLOCK_ROWS * BLOCK_ROWS * self.cols..];
        for (k, out) in out[..self.cols].iter_mut().enumerate() {
            *out = self.dtype.widen(block[offset(self.dtype, PAIR_STRIDE, row % BLOCK_ROWS, k)]);
        }
    }

    fn blocks(&self) -> usize {
        self.rows.div_ceil(BLOCK_ROWS)
    }

    fn block(&self, block: usize) -> &[u16] {
        &self.data[block * BLOCK_ROWS * self.cols..][..BLOCK_ROWS * self.cols]
    }

    /// Rows of `block` that exist (the last block may be padded).
    fn rows_of(&self, block: usize) -> Range<usize> {
        block * BLOCK_ROWS..((block + 1) * BLOCK_ROWS).min(self.rows)
    }
}

/// Where element `k` of row `lane` lies in a block whose pairs of k are `stride` apart.
#[inline(always)]
pub(super) fn offset(dtype: Dtype, stride: usize, lane: usize, k: usize) -> usize {
    let vec = k / 2 * stride + lane / LANES * VEC_STRIDE;
    match dtype {
        Dtype::Bf16 => vec + lane % LANES * 2 + k % 2,
        Dtype::F16 => vec + lane % LANES + (1 - k % 2) * LANES,
    }
}

fn scatter_row(dtype: Dtype, lane: usize, row: &[u16], block: &mut [u16]) {
    for (k, bits) in row.iter().enumerate() {
        let flushed = match dtype {
            Dtype::Bf16 => round_bf16(dtype.widen(*bits)),
            Dtype::F16 => *bits,
        };
        block[offset(dtype, PAIR_STRIDE, lane, k)] = flushed;
    }
}

/// `epilogue(token, rows, products)` for every token and block of `w`, on all threads; calls with
/// equal tokens have disjoint rows. `products` holds `w[rows] * x[token]`.
pub fn matmul(
    turn: &Turn<'_>,
    w: &Packed,
    x: &Rounded,
    epilogue: impl Fn(usize, Range<usize>, &[f32]) + Sync,
) {
    assert_eq!((w.cols, w.dtype), (x.cols(), x.dtype()), "matmul operands do not fit");
    let (blocks, isa) = (w.blocks(), turn.isa());
    for_each_task(turn, blocks, x.rows(), |block, tokens| {
        let rows = w.rows_of(block);
        let sink = |token: usize, products: &[f32; BLOCK_ROWS]| {
            epilogue(token, rows.clone(), &products[..rows.len()]);
        };
        dispatch(isa, BlockProduct { w, block, x, tokens, sink });
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
pub fn matmul_gated(
    turn: &Turn<'_>,
    w: &Packed,
    x: &Rounded,
    combine: impl Fn(usize, Range<usize>, &mut [f32], &[f32]) + Sync,
) {
    assert_eq!((w.cols, w.dtype), (x.cols(), x.dtype()), "matmul operands do not fit");
    let isa = turn.isa();
    for_each_task(turn, w.blocks() / 2, x.rows(), |pair, tokens| {
        for first in tokens.clone().step_by(TILE_TOKENS) {
            let tokens = first..(first + TILE_TOKENS).min(tokens.end);
            let mut gates = [[0.0; BLOCK_ROWS]; TILE_TOKENS];
            let keep = |token: usize, products: &[f32; BLOCK_ROWS]| {
                gates[token - first] = *products;
            };
            dispatch(
                isa,
                BlockProduct { w, block: 2 * pair, x, tokens: tokens.clone(), sink: keep },
            );
            let rows = pair * BLOCK_ROWS..(pair + 1) * BLOCK_ROWS;
            let join = |token: usize, up: &[f32; BLOCK_ROWS]| {
                combine(token, rows.clone(), &mut gates[token - first], up);
            };
            dispatch(isa, BlockProduct { w, block: 2 * pair + 1, x, tokens, sink: join });
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

/// Cuts (blocks x tokens) into tasks: enough for the threads, each with as many tokens as
/// possible, because a block's weights are read from memory once for each task.
fn for_each_task(
    turn: &Turn<'_>,
    blocks: usize,
    tokens: usize,
    task: impl Fn(usize, Range<usize>) + Sync,
) {
    let wanted = turn.threads() * 12;
    let pieces = wanted.div_ceil(blocks).min(tokens.div_ceil(TILE_TOKENS * 4)).max(1);
    let size = tokens.div_ceil(pieces).next_multiple_of(TILE_TOKENS);
    let pieces = tokens.div_ceil(size.max(1));
    turn.run(blocks * pieces, |i| {
        let first = i / blocks * size;
        task(i % blocks, first..(first + size).min(tokens));
    });
}

/// All tiles of one block over a range of tokens.
struct BlockProduct<'a, S> {
    w: &'a Packed,
    block: usize,
    x: &'a Rounded,
    tokens: Range<usize>,
    sink: S,
}

impl<S: FnMut(usize, &[f32; BLOCK_ROWS])> Kernel for BlockProduct<'_, S> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        let mut first = self.tokens.start;
        while first < self.tokens.end {
            let count = (self.tokens.end - first).min(TILE_TOKENS);
            match count {
                1 => self.tile::<L, 1>(first),
                2 => self.tile::<L, 2>(first),
                3 => self.tile::<L, 3>(first),
                4 => self.tile::<L, 4>(first),
                5 => self.tile::<L, 5>(first),
                _ => self.tile::<L, TILE_TOKENS>(first),
            }
            first += count;
        }
    }
}

impl<S: FnMut(usize, &[f32; BLOCK_ROWS])> BlockProduct<'_, S> {
    #[inline(always)]
    fn tile<L: Lanes, const T: usize>(&mut self, first: usize) {
        let mut out = [[0.0; BLOCK_ROWS]; T];
        match L::ROW_VECS {
            4 => self.vecs::<L, T, 4>(first, 0, &mut out),
            _ => {
                for v in 0..BLOCK_ROWS / LANES {
                    self.vecs::<L, T, 1>(first, v, &mut out);
                }
            }
        }
        for (t, products) in out.iter().enumerate() {
            (self.sink)(first + t, products);
        }
    }

    /// `V` vectors of 16 rows from vector `vec` on.
    #[inline(always)]
    fn vecs<L: Lanes, const T: usize, const V: usize>(
        &self,
        first: usize,
        vec: usize,
        out: &mut [[f32; BLOCK_ROWS]; T],
    ) {
        let w = &self.w.block(self.block)[vec * VEC_STRIDE..];
        let pairs = self.w.cols / 2;
        let acc = match (self.w.dtype, T) {
            (Dtype::Bf16, _) if T == 1 || L::DOT_TILES => {
                dot_tile::<L, T, V>(w, pairs, |t| self.x.bits(first + t))
            }
            (Dtype::Bf16, _) => {
                fma_tile::<L, T, V, PAIR_STRIDE, false>(w, pairs, |t| self.x.values(first + t))
            }
            (Dtype::F16, _) => {
                fma_tile::<L, T, V, PAIR_STRIDE, true>(w, pairs, |t| self.x.values(first + t))
            }
        };
        for t in 0..T {
            for v in 0..V {
                out[t][(vec + v) * LANES..][..LANES].copy_from_slice(&acc[t][v].to_array());
            }
        }
    }
}

/// The form for bf16 hardware: one two-element dot product for each pair.
#[inline(always)]
fn dot_tile<'x, L: Lanes, const T: usize, const V: usize>(
    w: &[u16],
    pairs: usize,
    x: impl Fn(usize) -> &'x [u16],
) -> [[L; V]; T] {
    assert!(w.len() >= (pairs - 1) * PAIR_STRIDE + V * VEC_STRIDE);
    let mut inputs = [std::ptr::null::<u32>(); T];
    for (t, input) in inputs.iter_mut().enumerate() {
        assert!(x(t).len() == 2 * pairs);
        *input = x(t).as_ptr().cast();
    }
    let mut acc = [[L::splat(0.0); V]; T];
    for p in 0..pairs {
        for t in 0..T {
            // SAFETY: `inputs[t]` has `pairs` pairs; the element type needs no alignment of 4.
            let pair = BfPair(u32::from_le(unsafe { inputs[t].add(p).read_unaligned() }));
            for v in 0..V {
                // SAFETY: in bounds by the assertions above.
                acc[t][v] = unsafe {
                    acc[t][v].dot_bf16(w.as_ptr().add(p * PAIR_STRIDE + v * VEC_STRIDE), pair)
                };
            }
        }
    }
    acc
}

/// The FMA form: `T` tokens by `V` vectors of rows in registers; pairs of k lie `STRIDE` apart.
#[inline(always)]
pub(super) fn fma_tile<
    'x,
    L: Lanes,
    const T: usize,
    const V: usize,
    const STRIDE: usize,
    const F16: bool,
>(
    w: &[u16],
    pairs: usize,
    x: impl Fn(usize) -> &'x [f32],
) -> [[L; V]; T] {
    assert!(w.len() >= (pairs - 1) * STRIDE + V * VEC_STRIDE);
    let mut inputs = [std::ptr::null::<f32>(); T];
    for (t, input) in inputs.iter_mut().enumerate() {
        assert!(x(t).len() == 2 * pairs);
        *input = x(t).as_ptr();
    }
    let mut acc = [[L::splat(0.0); V]; T];
    for p in 0..pairs {
        // SAFETY: in bounds by the assertions above.
        unsafe {
            let w = w.as_ptr().add(p * STRIDE);
            fma_step::<L, T, V, F16, true>(w, &inputs, 2 * p + 1, &mut acc);
            fma_step::<L, T, V, F16, false>(w, &inputs, 2 * p, &mut acc);
        }
    }
    acc
}

/// One k of a tile: the odd or the even elements of the pairs at `w`.
///
/// # Safety
/// `w` must be readable for `V` vectors of pairs, each input at `k`.
#[inline(always)]
unsafe fn fma_step<L: Lanes, const T: usize, const V: usize, const F16: bool, const ODD: bool>(
    w: *const u16,
    inputs: &[*const f32; T],
    k: usize,
    acc: &mut [[L; V]; T],
) {
    // Plain loops: a closure would not inherit the instruction set, and its intrinsics would stay
    // calls.
    let mut row = [L::splat(0.0); V];
    for v in 0..V {
        // SAFETY: the caller's promise.
        row[v] = unsafe { widen::<L, F16, ODD>(w.add(v * VEC_STRIDE)) };
    }
    for t in 0..T {
        // SAFETY: the caller's promise.
        let x = L::splat(unsafe { *inputs[t].add(k) });
        for v in 0..V {
            acc[t][v] = row[v].mul_add(x, acc[t][v]);
        }
    }
}

/// The odd or even elements of 16 packed pairs.
///
/// # Safety
/// `pairs` must be readable for 32 values.
#[inline(always)]
unsafe fn widen<L: Lanes, const F16: bool, const ODD: bool>(pairs: *const u16) -> L {
    // SAFETY: the caller's promise.
    unsafe {
        match (F16, ODD) {
            (true, true) => L::load_f16(pairs),
            (true, false) => L::load_f16(pairs.add(LANES)),
            (false, true) => L::odd_bf16(pairs),
            (false, false) => L::even_bf16(pairs),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lanes::Isa;
    use super::super::pool::Pool;
    use super::*;

    fn values(count: usize, seed: u32, scale: f32) -> Vec<f32> {
        let mut state = seed;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state as f32 / u32::MAX as f32 - 0.5) * scale
            })
            .collect()
    }

    fn packed(turn: &Turn<'_>, rows: usize, cols: usize, dtype: Dtype) -> (Packed, Vec<u16>) {
        let bits: Vec<u16> =
            values(rows * cols, 7, 2.0).into_iter().map(|x| dtype.round(x)).collect();
        let w = Packed::pack::<std::io::Error>(turn, (rows, cols), dtype, |r, out| {
            out.copy_from_slice(&bits[r * cols..][..cols]);
            Ok(())
        });
        (w.unwrap(), bits)
    }

    /// The canon, word for word.
    fn reference(w: &[u16], x: &[f32], dtype: Dtype) -> f32 {
        let mut acc = 0.0_f32;
        for p in 0..x.len() / 2 {
            acc = dtype.widen(w[2 * p + 1]).mul_add(x[2 * p + 1], acc);
            acc = dtype.widen(w[2 * p]).mul_add(x[2 * p], acc);
        }
        acc
    }

    #[test]
    fn products_follow_the_canon_on_every_instruction_set_and_shape() {
        for (rows, cols, tokens) in [(1, 2, 1), (64, 64, 1), (130, 34, 13), (192, 96, 64)] {
            for dtype in [Dtype::Bf16, Dtype::F16] {
                for isa in Isa::available() {
                    let pool = Pool::new(2, isa).unwrap();
                    let turn = pool.turn();
                    let (w, bits) = packed(&turn, rows, cols, dtype);
                    let mut x = Rounded::new(dtype, cols);
                    x.set_rows(tokens);
                    for t in 0..tokens {
                        x.set_row(t, &values(cols, 99 + t as u32, 8.0));
                    }
                    let mut out = vec![f32::NAN; rows * tokens];
                    matmul_into(&turn, &w, &x, &mut out);
                    for t in 0..tokens {
                        for r in 0..rows {
                            let want = reference(&bits[r * cols..][..cols], x.values(t), dtype);
                            let got = out[t * rows + r];
                            assert_eq!(got.to_bits(), want.to_bits(), "{isa} {dtype} {r} {t}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn rows_come_back_out_of_the_packed_layout() {
        let pool = Pool::new(1, Isa::Scalar).unwrap();
        for dtype in [Dtype::Bf16, Dtype::F16] {
            let (w, bits) = packed(&pool.turn(), 70, 6, dtype);
            let mut row = [0.0; 6];
            for r in 0..70 {
                w.row_into(r, &mut row);
                let want: Vec<f32> = bits[r * 6..][..6].iter().map(|b| dtype.widen(*b)).collect();
                assert_eq!(row.as_slice(), want, "{dtype} row {r}");
            }
        }
    }

    #[test]
    fn gated_rows_alternate_in_blocks() {
        assert_eq!(gated_rows(65), 256);
        assert_eq!(gated_row(0, 65), Some(Ok(0)));
        assert_eq!(gated_row(64, 65), Some(Err(0)));
        assert_eq!(gated_row(128, 65), Some(Ok(64)));
        assert_eq!(gated_row(192, 65), Some(Err(64)));
        assert_eq!(gated_row(129, 65), None);
    }
}
