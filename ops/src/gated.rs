//! Computes the gated half of a perceptron, of dense layers and of experts.

use super::matmul::{Packed, matmul_gated};
use super::pool::Turn;
use super::rounded::Rounded;
use super::rounding::Rounding;
use super::rowwise::Activation;

/// `out = round(activation(gate x) * (up x))`, both halves of a block in one task; `rounding` is
/// that of what comes between. `gate_up` has alternating blocks ([`super::matmul::gated_row`]).
pub fn gated(
    turn: &Turn<'_>,
    gate_up: &Packed,
    (activation, rounding): (Activation, Rounding),
    x: &Rounded,
    out: &mut Rounded,
) {
    let (inter, isa) = (out.cols(), turn.isa());
    out.set_rows(x.rows());
    let out = out.pieces(isa);
    matmul_gated(turn, gate_up, x, |token, rows, gate, up| {
        // Half of the last block may be padding alone.
        let len = inter.min(rows.end).saturating_sub(rows.start);
        if len == 0 {
            return;
        }
        let gate = &mut gate[..len];
        rounding.gate(isa, activation, gate, &up[..len]);
        // SAFETY: rows of one token are disjoint between calls.
        unsafe { out.round(token, rows.start, gate) };
    });
}

#[cfg(test)]
mod tests {
    use super::super::dtype::Dtype;
    use super::super::lanes::Isa;
    use super::super::matmul::{gated_row, gated_rows};
    use super::super::pool::Pool;
    use super::*;

    /// The bits of a gated half with `inter` columns for each of `tokens` rows of 96.
    fn bits(isa: Isa, dtype: Dtype, (inter, tokens): (usize, usize)) -> Vec<u16> {
        let cols = 96;
        let pool = Pool::new(2, isa).unwrap();
        let turn = pool.turn();
        let value = |i: usize| ((i * 7919 % 1009) as f32 - 504.0) * 0.004;
        let w =
            Packed::pack::<std::io::Error>(&turn, (gated_rows(inter), cols), dtype, |row, out| {
                let source = gated_row(row, inter).map(|half| half.unwrap_or_else(|up| up + inter));
                for (k, out) in out.iter_mut().enumerate() {
                    *out = source.map_or(0, |row| dtype.round(value(row * cols + k)));
                }
                Ok(())
            });
        let (mut x, mut out) = (Rounded::new(dtype, cols), Rounded::new(dtype, inter));
        x.set_rows(tokens);
        for token in 0..tokens {
            let row: Vec<f32> = (0..cols).map(|k| value((token * 31 + k) * 3)).collect();
            x.set_row(token, &row);
        }
        gated(&turn, &w.unwrap(), (Activation::Silu, Rounding::Inputs), &x, &mut out);
        (0..tokens).flat_map(|token| out.bits(token).to_vec()).collect()
    }

    #[test]
    fn a_row_has_the_same_bits_on_every_instruction_set_and_beside_others() {
        // Of 140 the last block is shared by two threads, and half of it is padding.
        for (dtype, inter) in
            [Dtype::Bf16, Dtype::F16].into_iter().flat_map(|dtype| [(dtype, 70), (dtype, 140)])
        {
            let alone = bits(Isa::SCALAR, dtype, (inter, 1));
            assert!(alone.iter().any(|bits| *bits != 0));
            for isa in Isa::available_and_emulated() {
                for tokens in [1, 2, 3, 16, 33, 70] {
                    let got = bits(isa, dtype, (inter, tokens));
                    let want = bits(Isa::SCALAR, dtype, (inter, tokens));
                    assert!(got == want, "{isa} {dtype} {inter} {tokens}");
                    assert!(got[..inter] == alone, "{isa} {dtype} {inter} {tokens}: the first row");
                }
            }
        }
    }
}
