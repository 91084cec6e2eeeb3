//! Holds the inputs of matrix products: rows rounded to 16 bits, in each form that a product reads.
//!
//! - `bits` are the 16-bit patterns: what proofs commit to, and what the tiles of AMX multiply;
//! - `values` are the same numbers as f32, for fused multiply-adds;
//! - `fours` are the bits of bf16 values in the order of VDPBF16PS (`fours_into`).
//!
//! The last two are filled up with zeros to whole fours, as weights are. Of them a row has what its
//! instruction set reads, because what nobody reads would be written to memory all the same.

use super::dtype::{Dtype, round_bf16, round_f16};
use super::lanes::{Isa, Kernel, LANES, Lanes, Scalar, dispatch};
use super::pool::Disjoint;
use super::product::{FOUR, Input, Pairing};
use std::ops::Range;

/// Rows rounded to a dtype, ready to enter a matrix product.
pub struct Rounded {
    dtype: Dtype,
    cols: usize,
    bits: Vec<u16>,           // (rows, cols)
    values: Option<Vec<f32>>, // (rows, values_len(cols))
    fours: Option<Vec<u32>>,  // (rows, fours_len(cols))
}

/// What products read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Bits,
    Values,
    Fours,
}

impl Form {
    /// That of products of `dtype` with `isa`.
    fn of(dtype: Dtype, isa: Isa) -> Self {
        match Pairing::of(isa, dtype) {
            Pairing::Neighbours => Self::Bits,
            Pairing::Chains if dtype == Dtype::Bf16 && isa.has_dot() => Self::Fours,
            Pairing::Chains => Self::Values,
        }
    }
}

impl Rounded {
    /// No rows of `cols` elements, in every form.
    pub fn new(dtype: Dtype, cols: usize) -> Self {
        let fours = (dtype == Dtype::Bf16).then(Vec::new);
        Self { dtype, cols, bits: Vec::new(), values: Some(Vec::new()), fours }
    }

    /// Sets the number of rows; new rows are zero.
    pub fn set_rows(&mut self, rows: usize) {
        self.bits.resize(rows * self.cols, 0);
        if let Some(values) = &mut self.values {
            values.resize(rows * values_len(self.cols), 0.0);
        }
        if let Some(fours) = &mut self.fours {
            fours.resize(rows * fours_len(self.cols), 0);
        }
    }

    /// Rows of the matrix, one for each output.
    pub fn rows(&self) -> usize {
        self.bits.len() / self.cols
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

    /// Row `row` as f32: `cols` values.
    pub fn widened(&self, row: usize) -> Vec<f32> {
        self.bits(row).iter().map(|bits| self.dtype.widen(*bits)).collect()
    }

    /// Whether each row has the form that products with `isa` read.
    pub(super) fn suits(&self, isa: Isa) -> bool {
        match Form::of(self.dtype, isa) {
            Form::Bits => true,
            Form::Values => self.values.is_some(),
            Form::Fours => self.fours.is_some(),
        }
    }

    /// Row `row` as products of vectors read it; a form that it lacks is empty.
    #[inline(always)]
    pub(super) fn input(&self, row: usize) -> Input<'_> {
        let (values_len, fours_len) = (values_len(self.cols), fours_len(self.cols));
        let values = self.values.as_ref().map(|all| &all[row * values_len..][..values_len]);
        let fours = self.fours.as_ref().map(|all| &all[row * fours_len..][..fours_len]);
        Input { values: values.unwrap_or_default(), fours: fours.unwrap_or_default() }
    }

    /// All rows, to be filled for products with `isa` by tasks that own disjoint rows or columns.
    pub fn pieces(&mut self, isa: Isa) -> Pieces<'_> {
        let (dtype, cols, rows) = (self.dtype, self.cols, self.rows());
        let (has_values, has_fours) = match Form::of(dtype, isa) {
            Form::Bits => (None, None),
            Form::Values => (Some(rows * values_len(cols)), None),
            Form::Fours => (None, Some(rows * fours_len(cols))),
        };
        let values = resized(&mut self.values, has_values).map(Disjoint::new);
        let fours = resized(&mut self.fours, has_fours).map(Disjoint::new);
        Pieces { dtype, cols, isa, bits: Disjoint::new(&mut self.bits), values, fours }
    }

    /// Rounds `x` into row `row`.
    pub fn set_row(&mut self, row: usize, x: &[f32]) {
        let (values_len, fours_len) = (values_len(self.cols), fours_len(self.cols));
        let bits = &mut self.bits[row * self.cols..][..self.cols];
        let values = self.values.as_mut().map(|all| &mut all[row * values_len..][..self.cols]);
        let fours = self.fours.as_mut().map(|all| &mut all[row * fours_len..][..fours_len]);
        Round { dtype: self.dtype, x, bits, values, fours }.run::<Scalar>();
    }

    /// Copies row `from` of `source` into row `row`, in the forms that both have; others are lost.
    pub fn copy_row(&mut self, row: usize, source: &Rounded, from: usize) {
        assert_eq!((self.cols, self.dtype), (source.cols, source.dtype));
        let (values_len, fours_len) = (values_len(self.cols), fours_len(self.cols));
        self.bits[row * self.cols..][..self.cols].copy_from_slice(source.bits(from));
        let input = source.input(from);
        match &mut self.values {
            Some(values) if source.values.is_some() => {
                values[row * values_len..][..values_len].copy_from_slice(input.values);
            }
            values => *values = None,
        }
        match &mut self.fours {
            Some(fours) if source.fours.is_some() => {
                fours[row * fours_len..][..fours_len].copy_from_slice(input.fours);
            }
            fours => *fours = None,
        }
    }
}

/// Makes a form have `len` elements, or gives it up.
fn resized<T: Copy + Default>(form: &mut Option<Vec<T>>, len: Option<usize>) -> Option<&mut [T]> {
    let Some(len) = len else {
        *form = None;
        return None;
    };
    let all = form.get_or_insert_default();
    all.resize(len, T::default());
    Some(all)
}

/// Rows that tasks fill in disjoint pieces.
pub struct Pieces<'a> {
    dtype: Dtype,
    cols: usize,
    isa: Isa,
    bits: Disjoint<'a, u16>,
    values: Option<Disjoint<'a, f32>>,
    fours: Option<Disjoint<'a, u32>>,
}

impl Pieces<'_> {
    /// Rounds `x` into the columns of `row` from `first` on, a multiple of four.
    ///
    /// # Safety
    /// No other task may touch these columns, nor those that share four with them, in the same
    /// phase.
    #[inline(always)]
    pub unsafe fn round(&self, row: usize, first: usize, x: &[f32]) {
        assert!(first.is_multiple_of(FOUR) && first + x.len() <= self.cols);
        let all = |at: usize| at..at + x.len();
        let values_at = row * values_len(self.cols) + first;
        let fours_at = row * fours_len(self.cols) + first / 2;
        // SAFETY: the caller's promise.
        let (bits, values, fours) = unsafe {
            let values = self.values.as_ref().map(|values| values.piece(all(values_at)));
            let fours = self.fours.as_ref();
            let fours = fours.map(|f| f.piece(fours_at..fours_at + fours_len(x.len())));
            (self.bits.piece(all(row * self.cols + first)), values, fours)
        };
        dispatch(self.isa, Round { dtype: self.dtype, x, bits, values, fours });
    }
}

/// Rounds `x` to `dtype`, as bits alone.
pub(super) fn round_bits(isa: Isa, dtype: Dtype, x: &[f32], bits: &mut [u16]) {
    dispatch(isa, Round { dtype, x, bits, values: None, fours: None });
}

/// Rounds values, and gives them the forms that products read.
struct Round<'a> {
    dtype: Dtype,
    x: &'a [f32],
    bits: &'a mut [u16],
    values: Option<&'a mut [f32]>,
    fours: Option<&'a mut [u32]>,
}

impl Kernel for Round<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        match self.dtype {
            Dtype::Bf16 => self.bf16::<L>(),
            Dtype::F16 => self.f16(),
        }
    }
}

impl Round<'_> {
    #[inline(always)]
    fn bf16<L: Lanes>(self) {
        let Self { x, bits, mut values, mut fours, .. } = self;
        let (whole, rest) = x.as_chunks::<LANES>();
        let (bits, rest_bits) = bits.as_chunks_mut::<LANES>();
        for (v, (x, bits)) in whole.iter().zip(bits).enumerate() {
            // SAFETY: chunks and slices have 16 values, those of fours 8.
            unsafe {
                let nearest = L::load(x.as_ptr()).nearest_bf16();
                nearest.store_bf16(bits.as_mut_ptr());
                if let Some(values) = &mut values {
                    nearest.store(values[v * LANES..][..LANES].as_mut_ptr());
                }
                if let Some(fours) = &mut fours {
                    nearest.store_fours(fours[v * LANES / 2..][..LANES / 2].as_mut_ptr());
                }
            }
        }
        let mut last = [0.0; LANES];
        let last = &mut last[..rest.len()];
        for ((last, bits), x) in last.iter_mut().zip(rest_bits).zip(rest) {
            *bits = round_bf16(*x);
            *last = f32::from_bits(u32::from(*bits) << 16);
        }
        if let Some(values) = values {
            values[whole.len() * LANES..].copy_from_slice(last);
        }
        if let Some(fours) = fours {
            fours_into(last, &mut fours[whole.len() * LANES / 2..]);
        }
    }

    #[inline(always)]
    fn f16(self) {
        for (bits, x) in self.bits.iter_mut().zip(self.x) {
            *bits = round_f16(*x);
        }
        for (value, bits) in self.values.into_iter().flatten().zip(self.bits) {
            *value = Dtype::F16.widen(*bits);
        }
    }
}

/// Elements of the form `values` for `len` values.
fn values_len(len: usize) -> usize {
    len.next_multiple_of(FOUR)
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
    fn rows_that_were_filled_for_another_instruction_set_are_told() {
        for isa in Isa::available() {
            let mut rounded = Rounded::new(Dtype::Bf16, 64);
            rounded.set_rows(1);
            assert!(rounded.suits(isa));
            // SAFETY: the only pieces.
            unsafe { rounded.pieces(Isa::SCALAR).round(0, 0, &[1.0; 64]) };
            let form = Form::of(Dtype::Bf16, isa);
            assert_eq!(rounded.suits(isa), form != Form::Fours, "{isa}");
            assert!(rounded.suits(Isa::SCALAR), "{isa}");
            let mut copy = Rounded::new(Dtype::Bf16, 64);
            copy.set_rows(1);
            copy.copy_row(0, &rounded, 0);
            assert_eq!(copy.suits(isa), rounded.suits(isa), "{isa}");
            // SAFETY: as above.
            unsafe { rounded.pieces(isa).round(0, 0, &[1.0; 64]) };
            assert!(rounded.suits(isa), "{isa}");
            assert_eq!(rounded.suits(Isa::SCALAR), form == Form::Values, "{isa}");
        }
    }

    /// Every sign, exponent and kept mantissa, with what is cut off zero, below, at and above half.
    #[test]
    fn every_instruction_set_rounds_every_kind_of_value_alike() {
        let lows = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
        let bits = lows.iter().flat_map(|low| (0..=0xffff).map(move |high| high << 16 | low));
        let row: Vec<f32> = bits.map(f32::from_bits).collect();
        let want: Vec<u16> = row.iter().map(|x| round_bf16(*x)).collect();
        let cut: Vec<u16> = row.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
        assert_ne!(want, cut, "rounding must be more than cutting off");
        for isa in Isa::available() {
            let mut rounded = Rounded::new(Dtype::Bf16, row.len());
            rounded.set_rows(1);
            // SAFETY: the only piece.
            unsafe { rounded.pieces(isa).round(0, 0, &row) };
            assert!(rounded.bits(0) == want, "{isa}");
            let widened = rounded.widened(0);
            let mut fours = vec![0; fours_len(row.len())];
            fours_into(&widened, &mut fours);
            let same = |a: &[f32]| a.iter().zip(&widened).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(rounded.values.as_deref().is_none_or(same), "{isa}");
            assert!(rounded.fours.is_none_or(|all| all == fours), "{isa}");
        }
    }

    #[test]
    fn elements_that_are_two_apart_share_one_of_a_four() {
        let mut fours = [0; 4];
        fours_into(&[1.0, 2.0, 3.0, 4.0, -1.0, -2.0], &mut fours);
        assert_eq!(fours, [0x3f80_4040, 0x4000_4080, 0xbf80_0000, 0xc000_0000]);
    }

    #[test]
    fn every_form_of_a_row_says_the_same_however_it_was_filled() {
        for cols in [2, 4, 6, 22, 30, 64, 70] {
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
            let all = pieces.pieces(Isa::best());
            // SAFETY: one piece after the other.
            unsafe {
                all.round(1, 0, &row[..half]);
                all.round(1, half, &row[half..]);
            }
            let widened: Vec<f32> = row.iter().map(|x| Dtype::Bf16.widen(round_bf16(*x))).collect();
            let mut fours = vec![0; fours_len(cols)];
            fours_into(&widened, &mut fours);
            let form = Form::of(Dtype::Bf16, Isa::best());
            assert_eq!(pieces.values.is_some(), form == Form::Values);
            assert_eq!(pieces.fours.is_some(), form == Form::Fours);
            for rounded in [&whole, &pieces, &copy] {
                let bits = rounded.bits(1).iter().map(|bits| Dtype::Bf16.widen(*bits));
                assert!(bits.eq(widened.iter().copied()), "{cols}");
                let (zero, input) = (rounded.input(0), rounded.input(1));
                if rounded.values.is_some() {
                    assert_eq!(input.values[..cols], widened, "{cols}");
                    assert!(input.values[cols..].iter().all(|x| x.to_bits() == 0), "{cols}");
                    assert!(input.values.len().is_multiple_of(FOUR), "{cols}");
                }
                if rounded.fours.is_some() {
                    assert_eq!(input.fours, fours, "{cols}");
                }
                assert!(
                    zero.values.iter().all(|x| *x == 0.0) && zero.fours.iter().all(|f| *f == 0)
                );
            }
        }
    }
}
