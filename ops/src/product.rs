//! Defines the product of the canon: its order of additions, the layout of its pairs, and its
//! register tile.
//!
//! # Order
//!
//! k is cut into blocks of [`BLOCK_K`] from 0; the last one is filled up with zeros. A block has
//! two chains of fused multiply-adds, both from +0: `even` over its elements 0, 2, ..., 30 and
//! `odd` over 1, 3, ..., 31. Its sum is `even + odd`; the result starts from +0 and adds the sums
//! in ascending order. This is what one TDPBF16PS of AMX does per block (Intel's manual, and
//! 512,000 outputs of a Sapphire Rapids), and what two FMAs repeat on every other CPU and on a GPU.
//! [`amx`](super::amx) uses that instruction itself. VDPBF16PS of AVX-512 BF16 adds two products to
//! an accumulator one after the other, so it is two steps of a chain at once where its operands
//! hold elements that are 2 apart, as weights do here.
//!
//! # Zeros
//!
//! A sum of two numbers is -0 only if both are -0, rounding to nearest. A chain starts from +0 and
//! its products are exact, so no product rounds to -0 from below: `even`, `odd`, the sums and the
//! result are never -0. Hence the zeros of the last block change nothing (`0 * 0 + a` is `a` unless
//! `a` is -0) and the tile leaves them out. A chain that began with its first product instead would
//! differ only where all products are zero and negative: its -0 would meet the `0 +` of the result
//! and vanish. Where a chain starts can therefore reach no result.
//!
//! # No subnormals
//!
//! AMX flushes subnormals, IEEE arithmetic does not; here neither meets one. bf16 magnitudes below
//! 2^-50 are zero ([`BF16_FLUSH`](super::dtype::BF16_FLUSH)) and bf16 has eight significant bits,
//! so every input is a multiple of 2^-57 and every product one of 2^-114. If a and b are multiples
//! of 2^-114, so is their exact sum; rounding it to 24 bits leaves it as it is where its last bit
//! is worth 2^-114 or less, and makes it a multiple of a larger power of two elsewhere. So by
//! induction every value of a chain, every `even + odd` and every sum of blocks is a multiple of
//! 2^-114: zero, or at least 2^-114, far above the smallest normal 2^-126. The order does not enter
//! the argument. f16 inputs are multiples of 2^-24, so the same holds with 2^-48.
//!
//! # Layout
//!
//! 16 outputs lie side by side, and k in pairs of two steps of one chain: of each four elements of
//! k the first and the third, then the second and the fourth. The last four are filled up with
//! zeros. In a pair of bf16 values the first is the high half of each output's 32 bits and the
//! second the low one: an operand of VDPBF16PS, of which a mask or a shift makes f32. A pair of f16
//! values is 16 firsts, then 16 seconds: what a widening load reads. Tiles of AMX read bf16 values
//! in pairs of neighbours (`Pairing`).

use super::dtype::Dtype;
use super::lanes::{Isa, LANES, Lanes, prefetch};
use std::marker::PhantomData;

/// Elements of k in a block: two chains of half as many.
pub const BLOCK_K: usize = 32;
const BLOCK_PAIRS: usize = BLOCK_K / 2;
/// 16-bit values of one pair of k over 16 outputs.
pub(super) const VEC_STRIDE: usize = 2 * LANES;

/// Vectors of outputs that a product computes at once at most.
pub(super) const VECS_MAX: usize = 4;
/// Elements of k whose chains share two pairs.
pub(super) const FOUR: usize = 4;

/// Which elements of k are a pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Pairing {
    /// Two steps of one chain: 0 and 2, 1 and 3, 4 and 6, ...
    Chains,
    /// Neighbours, of bf16 values: 0 and 1, 2 and 3, ... 16 pairs of 16 outputs, loaded with the
    /// stride of a pair, are a B tile of AMX, and rows of inputs as they lie are its A tiles.
    Neighbours,
}

impl Pairing {
    /// That of weights which `isa` multiplies.
    pub(super) fn of(isa: Isa, dtype: Dtype) -> Self {
        if isa.has_tiles() && dtype == Dtype::Bf16 { Self::Neighbours } else { Self::Chains }
    }

    /// Elements of k that are stored for `cols` of them, an even number.
    pub(super) fn stored(self, cols: usize) -> usize {
        match self {
            Self::Chains => cols.next_multiple_of(FOUR),
            Self::Neighbours => cols,
        }
    }

    /// Where element `k` of output `lane` lies in a matrix whose pairs are `stride` apart.
    #[inline(always)]
    pub(super) fn offset(self, dtype: Dtype, stride: usize, lane: usize, k: usize) -> usize {
        match self {
            Self::Chains => chain_offset(dtype, stride, lane, k),
            Self::Neighbours => k / 2 * stride + 2 * lane + k % 2,
        }
    }
}

/// The same with pairs of [`Pairing::Chains`].
#[inline(always)]
pub(super) fn chain_offset(dtype: Dtype, stride: usize, lane: usize, k: usize) -> usize {
    let (pair, is_second) = (k / FOUR * 2 + k % 2, k / 2 % 2);
    let vec = pair * stride + lane / LANES * VEC_STRIDE;
    match dtype {
        Dtype::Bf16 => vec + lane % LANES * 2 + (1 - is_second),
        Dtype::F16 => vec + lane % LANES + is_second * LANES,
    }
}

/// A row of inputs, rounded to 16 bits and filled up with zeros to whole fours: as f32, or as
/// `rounded::fours_into` has them, an element for each pair. What the product does not read is
/// empty.
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    pub(super) values: &'a [f32],
    pub(super) fours: &'a [u32],
}

/// Where the values of a row begin.
#[derive(Clone, Copy)]
pub(super) struct At {
    values: *const f32,
    fours: *const u32,
}

impl Input<'_> {
    pub(super) const NOTHING: Self = Self { values: &[], fours: &[] };

    pub(super) fn start(self) -> At {
        At { values: self.values.as_ptr(), fours: self.fours.as_ptr() }
    }
}

impl At {
    pub(super) const NOWHERE: At = At { values: std::ptr::null(), fours: std::ptr::null() };

    /// The place of the values from `k` on, a multiple of four: two of each four values share one
    /// element of `fours`.
    fn add(self, k: usize) -> At {
        // One of them points to nothing, and is not read.
        At { values: self.values.wrapping_add(k), fours: self.fours.wrapping_add(k / 2) }
    }
}

/// `T` rows of inputs, 2 * `pairs` values each, in the form that products of `L` read. They are
/// looked up once for all outputs of a tile.
pub(super) struct Inputs<'x, L, const T: usize, const F16: bool> {
    starts: [At; T],
    pairs: usize,
    rows: PhantomData<(L, &'x [f32])>,
}

impl<'x, L: Lanes, const T: usize, const F16: bool> Inputs<'x, L, T, F16> {
    #[inline(always)]
    pub(super) fn new(pairs: usize, rows: [Input<'x>; T]) -> Self {
        assert!(pairs.is_multiple_of(2), "two pairs are a four");
        let mut starts = [At::NOWHERE; T];
        for (start, row) in starts.iter_mut().zip(rows) {
            assert!(match L::HAS_DOT && !F16 {
                true => row.fours.len() == pairs,
                false => row.values.len() == 2 * pairs,
            });
            *start = row.start();
        }
        Self { starts, pairs, rows: PhantomData }
    }
}

/// Vectors of outputs, at most [`VECS_MAX`], that products of `tokens` rows compute at once: their
/// sums and their weights fit into registers.
pub(super) const fn vecs_at_once<L: Lanes>(tokens: usize) -> usize {
    let mut vecs = VECS_MAX;
    while vecs > 1 && vecs * (tokens + 1) >= L::REGISTERS {
        vecs /= 2;
    }
    vecs
}

/// Products of `T` rows of inputs with `V` vectors of 16 outputs from `w` on, whose pairs of k lie
/// `stride` apart. `next` lies as `w` does and is read after it, so it is prefetched meanwhile.
#[inline(always)]
pub(super) fn product<L: Lanes, const T: usize, const V: usize, const F16: bool>(
    w: &[u16],
    stride: usize,
    x: &Inputs<'_, L, T, F16>,
    next: Option<&[u16]>,
) -> [[L; V]; T] {
    let pairs = x.pairs;
    assert!(pairs > 0 && w.len() >= (pairs - 1) * stride + V * VEC_STRIDE);
    let mut acc = [[L::splat(0.0); V]; T];
    let mut first = 0;
    while first < pairs {
        let count = (pairs - first).min(BLOCK_PAIRS);
        let mut at = x.starts;
        for x in &mut at {
            *x = x.add(2 * first);
        }
        let next = next.map(|next| next.as_ptr().wrapping_add(first * stride));
        // SAFETY: `first + count` pairs are in bounds by the assertions above.
        let sums = unsafe {
            block::<L, T, V, F16>(w.as_ptr().add(first * stride), (count, stride), &at, next)
        };
        for t in 0..T {
            for v in 0..V {
                acc[t][v] = acc[t][v].add(sums[t][v]);
            }
        }
        first += count;
    }
    acc
}

/// One block: `even + odd`. With many outputs the chains take turns, because both would not fit
/// into the registers; each reads pairs of its own. What lies at `next` as the block does at `w` is
/// prefetched beside the odd pairs, line by line: asked for all at once, the lines would be waited
/// for.
///
/// # Safety
/// `w` must be readable for `count` pairs, an even number, `stride` apart of `V` vectors each, each
/// input for 2 * `count` values or `count` fours.
#[inline(always)]
pub(super) unsafe fn block<L: Lanes, const T: usize, const V: usize, const F16: bool>(
    w: *const u16,
    (count, stride): (usize, usize),
    inputs: &[At; T],
    next: Option<*const u16>,
) -> [[L; V]; T] {
    let (mut even, mut odd) = ([[L::splat(0.0); V]; T], [[L::splat(0.0); V]; T]);
    let is_beside = 2 * T * V <= L::CHAINS;
    // SAFETY: the caller's promise.
    unsafe {
        for p in (0..count).step_by(2) {
            steps::<L, T, V, F16, false>(w.add(p * stride), inputs, p, &mut even);
            if is_beside {
                prefetch_pairs::<V>(next, p * stride, stride);
                steps::<L, T, V, F16, true>(w.add((p + 1) * stride), inputs, p, &mut odd);
            }
        }
        if !is_beside {
            for p in (0..count).step_by(2) {
                prefetch_pairs::<V>(next, p * stride, stride);
                steps::<L, T, V, F16, true>(w.add((p + 1) * stride), inputs, p, &mut odd);
            }
        }
    }
    for t in 0..T {
        for v in 0..V {
            even[t][v] = even[t][v].add(odd[t][v]);
        }
    }
    even
}

/// Prefetches `V` vectors of two pairs at `next` plus `offset`.
#[inline(always)]
fn prefetch_pairs<const V: usize>(next: Option<*const u16>, offset: usize, stride: usize) {
    if let Some(next) = next {
        for v in 0..V {
            prefetch(next.wrapping_add(offset + v * VEC_STRIDE));
            prefetch(next.wrapping_add(offset + stride + v * VEC_STRIDE));
        }
    }
}

/// Two steps of the odd or the even chains: the pair at `w`. `p` is the first pair of its four.
///
/// # Safety
/// `w` must be readable for `V` vectors of a pair, each input from its value 2 * `p` on for four.
#[inline(always)]
unsafe fn steps<L: Lanes, const T: usize, const V: usize, const F16: bool, const ODD: bool>(
    w: *const u16,
    inputs: &[At; T],
    p: usize,
    acc: &mut [[L; V]; T],
) {
    // SAFETY: the caller's promise.
    unsafe {
        if L::HAS_DOT && !F16 {
            let mut row = [L::splat(0.0); V];
            for v in 0..V {
                row[v] = L::load(w.add(v * VEC_STRIDE).cast());
            }
            for t in 0..T {
                let x = &*inputs[t].fours.add(p + usize::from(ODD));
                for v in 0..V {
                    acc[t][v] = row[v].dot_bf16(x, acc[t][v]);
                }
            }
        } else {
            let k = 2 * p + usize::from(ODD);
            step::<L, T, V, F16, false>(w, inputs, k, acc);
            step::<L, T, V, F16, true>(L::again(w), inputs, k + 2, acc);
        }
    }
}

/// One step: the first or the second elements of the pair at `w`, which are element `k` of the
/// inputs.
///
/// # Safety
/// `w` must be readable for `V` vectors of a pair, each input at `k`.
#[inline(always)]
unsafe fn step<L: Lanes, const T: usize, const V: usize, const F16: bool, const SECOND: bool>(
    w: *const u16,
    inputs: &[At; T],
    k: usize,
    acc: &mut [[L; V]; T],
) {
    // Plain loops: a closure would not inherit the instruction set, and its intrinsics would stay
    // calls.
    let mut row = [L::splat(0.0); V];
    for v in 0..V {
        // SAFETY: the caller's promise.
        row[v] = unsafe { widen::<L, F16, SECOND>(w.add(v * VEC_STRIDE)) };
    }
    for t in 0..T {
        // SAFETY: the caller's promise.
        let x = L::splat(unsafe { *inputs[t].values.add(k) });
        for v in 0..V {
            acc[t][v] = row[v].mul_add(x, acc[t][v]);
        }
    }
}

/// The first or the second elements of a pair over 16 outputs.
///
/// # Safety
/// `pair` must be readable for 32 values.
#[inline(always)]
unsafe fn widen<L: Lanes, const F16: bool, const SECOND: bool>(pair: *const u16) -> L {
    // SAFETY: the caller's promise.
    unsafe {
        match (F16, SECOND) {
            (true, false) => L::load_f16(pair),
            (true, true) => L::load_f16(pair.add(LANES)),
            (false, false) => L::high_bf16(pair),
            (false, true) => L::low_bf16(pair),
        }
    }
}
