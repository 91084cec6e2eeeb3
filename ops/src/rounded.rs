//! Holds the inputs of matrix products: rows rounded to 16 bits, in each form that a product reads.
//!
//! - `bits` are the 16-bit patterns: what proofs commit to, and what the tiles of AMX multiply;
//! - `values` are the same numbers as f32, for fused multiply-adds;
//! - `fours` are the bits in the order of VDPBF16PS ([`fours_into`]).

use super::dtype::Dtype;
use super::pool::Disjoint;
use super::product::Input;
use std::ops::Range;

/// Values of a row that share two elements of `fours`.
const FOUR: usize = 4;

/// Rows rounded to a dtype, ready to enter a matrix product.
pub struct Rounded {
    dtype: Dtype,
    cols: usize,
    bits: Vec<u16>,   // (rows, cols)
    values: Vec<f32>, // (rows, cols)
    fours: Vec<u32>,  // (rows, fours_len(cols))
}

impl Rounded {
    /// No rows of `cols` elements.
    pub fn new(dtype: Dtype, cols: usize) -> Self {
        Self { dtype, cols, bits: Vec::new(), values: Vec::new(), fours: Vec::new() }
    }

    /// Sets the number of rows; new rows are zero.
    pub fn set_rows(&mut self, rows: usize) {
        self.bits.resize(rows * self.cols, 0);
        self.values.resize(rows * self.cols, 0.0);
        self.fours.resize(rows * fours_len(self.cols), 0);
    }

    /// Rows of the matrix, one for each output.
    pub fn rows(&self) -> usize {
        self.values.len() / self.cols
    }

    /// Elements in a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The type of the 16-bit elements that are stored.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The 16-bit patterns of row `row`.
    pub fn bits(&self, row: usize) -> &[u16] {
        &self.bits[row * self.cols..][..self.cols]
    }

    /// The 16-bit patterns of some rows: (rows, cols).
    pub fn bits_of(&self, rows: Range<usize>) -> &[u16] {
        &self.bits[rows.start * self.cols..rows.end * self.cols]
    }

    /// Row `row`, widened to f32: `cols` values.
    pub fn values(&self, row: usize) -> &[f32] {
        &self.values[row * self.cols..][..self.cols]
    }

    /// Row `row` as products of vectors read it.
    #[inline(always)]
    pub(super) fn input(&self, row: usize) -> Input<'_> {
        let len = fours_len(self.cols);
        Input { values: self.values(row), fours: &self.fours[row * len..][..len] }
    }

    /// All rows, to be filled by tasks that own disjoint rows or columns.
    pub fn pieces(&mut self) -> Pieces<'_> {
        let (dtype, cols) = (self.dtype, self.cols);
        let (bits, values) = (Disjoint::new(&mut self.bits), Disjoint::new(&mut self.values));
        Pieces { dtype, cols, bits, values, fours: Disjoint::new(&mut self.fours) }
    }

    /// Rounds `x` into row `row`.
    pub fn set_row(&mut self, row: usize, x: &[f32]) {
        assert_eq!(x.len(), self.cols);
        // SAFETY: the only piece.
        unsafe { self.pieces().round(row, 0, x) };
    }

    /// Copies row `from` of `source` into row `row`.
    pub fn copy_row(&mut self, row: usize, source: &Rounded, from: usize) {
        assert_eq!((self.cols, self.dtype), (source.cols, source.dtype));
        let (range, len) = (row * self.cols..(row + 1) * self.cols, fours_len(self.cols));
        self.bits[range.clone()].copy_from_slice(source.bits(from));
        self.values[range].copy_from_slice(source.values(from));
        self.fours[row * len..][..len].copy_from_slice(source.input(from).fours);
    }
}

/// Rows that tasks fill in disjoint pieces.
pub struct Pieces<'a> {
    dtype: Dtype,
    cols: usize,
    bits: Disjoint<'a, u16>,
    values: Disjoint<'a, f32>,
    fours: Disjoint<'a, u32>,
}

impl Pieces<'_> {
    /// Rounds `x` into the columns of `row` from `first` on, a multiple of four.
    ///
    /// # Safety
    /// No other task may touch these columns, nor those that share four with them, in the same
    /// phase.
    #[inline(always)]
    pub unsafe fn round(&self, row: usize, first: usize, x: &[f32]) {
        // SAFETY: the caller's promise.
        unsafe { self.fill(row, first, x.len(), |values| values.copy_from_slice(x)) };
    }

    /// Calls `compute` with `len` columns of `row` from `first` on, and rounds what it leaves there.
    ///
    /// # Safety
    /// As for [`round`](Self::round).
    #[inline(always)]
    pub unsafe fn fill(
        &self,
        row: usize,
        first: usize,
        len: usize,
        compute: impl FnOnce(&mut [f32]),
    ) {
        assert!(first % FOUR == 0 && first + len <= self.cols);
        let at = row * self.cols + first;
        let fours_at = row * fours_len(self.cols) + first / 2;
        // SAFETY: the caller's promise.
        let (bits, values, fours) = unsafe {
            let (bits, values) = (self.bits.piece(at..at + len), self.values.piece(at..at + len));
            (bits, values, self.fours.piece(fours_at..fours_at + fours_len(len)))
        };
        compute(values);
        for (bits, value) in bits.iter_mut().zip(&mut *values) {
            *bits = self.dtype.round(*value);
            *value = self.dtype.widen(*bits);
        }
        if self.dtype == Dtype::Bf16 {
            fours_into(values, fours);
        }
    }
}

/// Elements that [`fours_into`] makes of `len` values.
fn fours_len(len: usize) -> usize {
    2 * len.div_ceil(FOUR)
}

/// Of each four bf16 values, widened, the bits of the first and the third as the high and the low
/// half of one element, those of the second and the fourth as the halves of the next: two steps of
/// an even chain, and two of an odd one. What the last four lack is zero.
#[inline(always)]
pub(super) fn fours_into(values: &[f32], fours: &mut [u32]) {
    let pair = |high: f32, low: f32| high.to_bits() | low.to_bits() >> 16;
    let (whole, rest) = values.as_chunks::<FOUR>();
    let (pairs, _) = fours.as_chunks_mut::<2>();
    for (pairs, [a, b, c, d]) in pairs.iter_mut().zip(whole) {
        *pairs = [pair(*a, *c), pair(*b, *d)];
    }
    if !rest.is_empty() {
        let of = |i: usize| rest.get(i).copied().unwrap_or(0.0);
        pairs[whole.len()] = [pair(of(0), of(2)), pair(of(1), of(3))];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_that_are_two_apart_share_one_of_a_four() {
        let mut fours = [0; 4];
        fours_into(&[1.0, 2.0, 3.0, 4.0, -1.0, -2.0], &mut fours);
        assert_eq!(fours, [0x3f80_4040, 0x4000_4080, 0xbf80_0000, 0xc000_0000]);
    }

    #[test]
    fn every_form_of_a_row_says_the_same_however_it_was_filled() {
        for cols in [2, 4, 6, 64, 70] {
            let row: Vec<f32> = (0..cols).map(|i| i as f32 * 0.7 - 3.0).collect();
            let (mut whole, mut pieces, mut copy) = (
                Rounded::new(Dtype::Bf16, cols),
                Rounded::new(Dtype::Bf16, cols),
                Rounded::new(Dtype::Bf16, cols),
            );
            [&mut whole, &mut pieces, &mut copy]
                .into_iter()
                .for_each(|rounded| rounded.set_rows(2));
            whole.set_row(1, &row);
            copy.copy_row(1, &whole, 1);
            let half = cols / 2 / FOUR * FOUR;
            // SAFETY: one piece after the other.
            unsafe {
                pieces.pieces().round(1, 0, &row[..half]);
                pieces.pieces().round(1, half, &row[half..]);
            }
            let mut fours = vec![0; fours_len(cols)];
            fours_into(whole.values(1), &mut fours);
            for rounded in [&whole, &pieces, &copy] {
                let widened = rounded.bits(1).iter().map(|bits| Dtype::Bf16.widen(*bits));
                assert!(widened.eq(rounded.values(1).iter().copied()), "{cols}");
                assert_eq!(rounded.bits(1), whole.bits(1));
                assert_eq!(rounded.input(1).fours, fours, "{cols}");
                assert!(rounded.input(0).fours.iter().all(|four| *four == 0));
            }
        }
    }
}
