//! Says where values are rounded between matrix products: nowhere in the canon; everywhere in a
//! stack whose tensors all have 16 bits.
//!
//! [`Rounding::Everywhere`] mimics such a stack step by step, in one fixed order, with the products
//! of the canon: so its rows err as honest rows of other software do, and their distance from ours
//! says how far an honest row may lie.

use super::dtype::Dtype;
use super::lanes::Isa;
use super::pool::{Disjoint, Turn};
use super::rope::RopeTable;
use super::rounded::Rounded;
use super::rowwise::{Activation, Norm};

/// Values that a task rounds at once.
const PIECE: usize = 4096;

/// Where values between matrix products are rounded; their inputs always are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Rounding {
    /// Nowhere: the canon.
    #[default]
    Inputs,
    /// After every operation, to this type.
    Everywhere(Dtype),
}

impl Rounding {
    /// Rounds what an operation left in `values`.
    #[inline(always)]
    pub fn apply(self, values: &mut [f32]) {
        if let Self::Everywhere(dtype) = self {
            values.iter_mut().for_each(|x| *x = dtype.widen(dtype.round(*x)));
        }
    }

    /// The same on all threads.
    pub fn apply_all(self, turn: &Turn<'_>, values: &mut [f32]) {
        if self == Self::Inputs {
            return;
        }
        let (count, values) = (values.len(), Disjoint::new(values));
        turn.run_ranges(count, PIECE, |range| {
            // SAFETY: `run_ranges` hands out disjoint ranges.
            self.apply(unsafe { values.piece(range) });
        });
    }

    /// Normalises one row in place; rounded before the gain and after it.
    pub fn norm(self, isa: Isa, norm: &Norm, row: &mut [f32]) {
        if self == Self::Inputs {
            return norm.apply(isa, row);
        }
        let scale = norm.scale(isa, row);
        row.iter_mut().for_each(|x| *x *= scale);
        self.apply(row);
        row.iter_mut().zip(norm.parts().0).for_each(|(x, gain)| *x *= gain);
        self.apply(row);
    }

    /// Normalises every row of `x` (tokens, cols) into `out`, rounded to its type.
    pub fn norm_rows(self, turn: &Turn<'_>, norm: &Norm, x: &[f32], out: &mut Rounded) {
        if self == Self::Inputs {
            return norm.apply_rounded(turn, x, out);
        }
        let mut row = vec![0.0; norm.cols()];
        out.set_rows(x.len() / row.len());
        for (index, from) in x.chunks_exact(norm.cols()).enumerate() {
            row.copy_from_slice(from);
            self.norm(turn.isa(), norm, &mut row);
            out.set_row(index, &row);
        }
    }

    /// `residual += branch`, of which each row is normalised first where there is a norm.
    pub fn add(
        self,
        turn: &Turn<'_>,
        norm: Option<&Norm>,
        branch: &mut [f32],
        residual: &mut [f32],
    ) {
        match (self, norm) {
            (Self::Inputs, Some(norm)) => return norm.apply_add(turn, branch, residual),
            (_, Some(norm)) => {
                let rows = branch.chunks_exact_mut(norm.cols());
                rows.for_each(|row| self.norm(turn.isa(), norm, row));
            }
            (_, None) => {}
        }
        residual.iter_mut().zip(branch).for_each(|(r, b)| *r += *b);
        self.apply_all(turn, residual);
    }

    /// `gate = activation(gate) * up`; what the products left, the activation and its product with
    /// `up` are rounded one after the other.
    pub fn gate(self, isa: Isa, activation: Activation, gate: &mut [f32], up: &[f32]) {
        if self == Self::Inputs {
            return activation.gate(isa, gate, up);
        }
        let (mut up, one) = (up.to_vec(), vec![1.0; up.len()]);
        self.apply(gate);
        self.apply(&mut up);
        activation.gate(isa, gate, &one);
        self.apply(gate);
        gate.iter_mut().zip(up).for_each(|(gate, up)| *gate *= up);
        self.apply(gate);
    }

    /// Rounds sines and cosines.
    pub fn table(self, mut table: RopeTable) -> RopeTable {
        table.parts_mut().into_iter().for_each(|values| self.apply(values));
        table
    }

    /// Rotates one head of row `row` in place; both products and their sum are rounded, as the
    /// [table](Self::table) was.
    pub fn rotate(self, isa: Isa, table: &RopeTable, row: usize, head: &mut [f32]) {
        let Self::Everywhere(dtype) = self else { return table.rotate(isa, row, head) };
        let round = |x: f32| dtype.widen(dtype.round(x));
        let (cos, sin) = table.row(row);
        let (first, second) = head.split_at_mut(cos.len());
        for (((x, y), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            let (a, b) = (*x, *y);
            *x = round(round(a * cos) - round(b * sin));
            *y = round(round(b * cos) + round(a * sin));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::pool::Pool;
    use super::super::rope::{Rope, RopeScaling};
    use super::*;

    const BF16: Rounding = Rounding::Everywhere(Dtype::Bf16);

    fn row(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.113).collect()
    }

    fn is_bf16(values: &[f32]) -> bool {
        values.iter().all(|x| Dtype::Bf16.widen(Dtype::Bf16.round(*x)) == *x)
    }

    /// Runs every operation on one row and returns what it leaves.
    fn all(rounding: Rounding) -> Vec<Vec<f32>> {
        let (isa, pool) = (Isa::best(), Pool::new(2, Isa::best()).unwrap());
        let turn = pool.turn();
        let norm = Norm::new((0..96).map(|i| 0.5 + i as f32 * 0.013).collect(), 1e-5);
        let table = Rope::new(96, 10_000.0, RopeScaling::None).table(&turn, &[77]);
        let table = rounding.table(table);
        let mut outcomes = vec![row(96); 6];
        rounding.apply(&mut outcomes[0]);
        rounding.norm(isa, &norm, &mut outcomes[1]);
        rounding.gate(isa, Activation::Silu, &mut outcomes[2], &row(96));
        rounding.rotate(isa, &table, 0, &mut outcomes[3]);
        rounding.add(&turn, None, &mut row(96), &mut outcomes[4]);
        rounding.add(&turn, Some(&norm), &mut row(96), &mut outcomes[5]);
        let mut rounded = Rounded::new(Dtype::Bf16, 96);
        rounding.norm_rows(&turn, &norm, &row(96), &mut rounded);
        outcomes.push(rounded.widened(0));
        outcomes
    }

    #[test]
    fn what_is_rounded_everywhere_is_near_what_is_not_and_of_the_type() {
        let (canon, stepwise) = (all(Rounding::Inputs), all(BF16));
        for (place, (exact, rounded)) in canon.iter().zip(&stepwise).enumerate() {
            assert!(is_bf16(rounded), "operation {place}");
            assert_ne!(exact, rounded, "operation {place} rounds nothing");
            for (a, b) in exact.iter().zip(rounded) {
                assert!((a - b).abs() <= 0.02 * a.abs().max(1.0), "operation {place}: {a} {b}");
            }
        }
        assert_eq!(canon[0], row(96));
        assert!(canon[..6].iter().all(|values| !is_bf16(values)), "the control: no operation is");
    }

    #[test]
    fn each_step_is_rounded_by_itself() {
        // 1 + 2^-7 times 1 + 2^-6 would be rounded once otherwise.
        let (isa, norm) = (Isa::best(), Norm::new(vec![1.011; 4], 0.0));
        let mut got = [0.3, -1.7, 2.9, 0.7];
        let mean = got.iter().map(|x| x * x).sum::<f32>() / 4.0;
        let bf16 = |x: f32| half::bf16::from_f32(x).to_f32();
        let want = got.map(|x| bf16(bf16(x / mean.sqrt()) * 1.011));
        BF16.norm(isa, &norm, &mut got);
        assert_eq!(got, want);
        let (mut gate, up) = ([1.2345, -0.777], [3.456_7, 2.222]);
        let want = [0, 1].map(|i: usize| {
            let x = bf16(gate[i]);
            bf16(bf16(x / (1.0 + (-x).exp())) * bf16(up[i]))
        });
        BF16.gate(isa, Activation::Silu, &mut gate, &up);
        assert_eq!(gate, want);
    }

    #[test]
    fn numbers_that_are_none_stay_so() {
        let mut values = [f32::NAN, f32::INFINITY, f32::MAX];
        BF16.apply(&mut values);
        assert!(values[0].is_nan() && values[1..] == [f32::INFINITY; 2], "{values:?}");
    }
}
