//! Computes the gated half of a perceptron, of dense layers and of experts.

use super::dtype::Rounded;
use super::matmul::{Packed, matmul_gated};
use super::pool::{Disjoint, Turn};
use super::rounding::Rounding;
use super::rowwise::{Activation, round_piece};

/// `out = round(activation(gate x) * (up x))`, both halves of a block in one task; `rounding` is
/// that of what comes between. `gate_up` has alternating blocks ([`super::matmul::gated_row`]).
pub fn gated(
    turn: &Turn<'_>,
    gate_up: &Packed,
    (activation, rounding): (Activation, Rounding),
    x: &Rounded,
    out: &mut Rounded,
) {
    let (inter, dtype, isa) = (out.cols(), out.dtype(), turn.isa());
    out.set_rows(x.rows());
    let (bits, values) = out.parts_mut();
    let (bits, values) = (Disjoint::new(bits), Disjoint::new(values));
    matmul_gated(turn, gate_up, x, |token, rows, gate, up| {
        let len = inter.min(rows.end) - rows.start;
        let gate = &mut gate[..len];
        rounding.gate(isa, activation, gate, &up[..len]);
        // SAFETY: rows of one token are disjoint between calls.
        unsafe { round_piece(dtype, gate, &bits, &values, token * inter + rows.start) };
    });
}
