//! Computes mixture-of-experts layers (Mixtral, Qwen3-MoE): routing and the sum over experts.
//!
//! Routing is a softmax over all experts and the largest few, ties to the lower number. A token's
//! experts are added in ascending order, whatever else is in the batch, so its bits do not depend
//! on its neighbours.

use super::weights::Mixture;
use crate::models::spec::ExpertSpec;
use crate::ops::gated::gated;
use crate::ops::lanes::Isa;
use crate::ops::matmul::matmul_into;
use crate::ops::pool::Turn;
use crate::ops::rounded::Rounded;
use crate::ops::rounding::Rounding;
use crate::ops::rowwise::{Activation, softmax};

impl Mixture {
    /// `out[t] = sum over the chosen experts of weight * expert(x[t])`; `out` is (tokens, hidden).
    pub fn forward(
        &self,
        turn: &Turn<'_>,
        (activation, rounding): (Activation, Rounding),
        x: &Rounded,
        out: &mut [f32],
    ) {
        let tokens = x.rows();
        let hidden = out.len() / tokens;
        let mut scores = vec![0.0; tokens * self.spec.count];
        matmul_into(turn, &self.router, x, &mut scores);
        rounding.apply(&mut scores);
        let routes: Vec<Vec<(usize, f32)>> = scores
            .chunks_exact_mut(self.spec.count)
            .map(|row| route(turn.isa(), &self.spec, row))
            .collect();
        out.fill(0.0);
        for (expert, mlp) in self.experts.iter().enumerate() {
            let visits: Vec<(usize, f32)> = routes
                .iter()
                .enumerate()
                .flat_map(|(t, route)| route.iter().map(move |(e, weight)| (t, *e, *weight)))
                .filter_map(|(t, e, weight)| (e == expert).then_some((t, weight)))
                .collect();
            if visits.is_empty() {
                continue;
            }
            let mut rows = Rounded::new(x.dtype(), x.cols());
            rows.set_rows(visits.len());
            for (i, (token, _)) in visits.iter().enumerate() {
                rows.copy_row(i, x, *token);
            }
            let mut inner = Rounded::new(x.dtype(), mlp.down.cols());
            gated(turn, &mlp.gate_up, (activation, rounding), &rows, &mut inner);
            let mut result = vec![0.0; visits.len() * hidden];
            matmul_into(turn, &mlp.down, &inner, &mut result);
            rounding.apply(&mut result);
            for ((token, weight), y) in visits.iter().zip(result.chunks_exact_mut(hidden)) {
                let out = &mut out[token * hidden..][..hidden];
                let mut weight = [*weight];
                rounding.apply(&mut weight);
                y.iter_mut().for_each(|y| *y *= weight[0]);
                rounding.apply(y);
                out.iter_mut().zip(y).for_each(|(o, y)| *o += *y);
                rounding.apply(out);
            }
        }
    }
}

/// The chosen experts of one token with their weights, in ascending order.
fn route(isa: Isa, spec: &ExpertSpec, scores: &mut [f32]) -> Vec<(usize, f32)> {
    softmax(isa, scores);
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    order.truncate(spec.used);
    order.sort_unstable();
    let total: f32 = order.iter().map(|e| scores[*e]).sum();
    let scale = if spec.renormalise { total } else { 1.0 };
    order.into_iter().map(|e| (e, scores[e] / scale)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::family::ExpertNames;

    #[test]
    fn routing_takes_the_largest_and_breaks_ties_downwards() {
        let names = ExpertNames { module: "", projections: [""; 3], router_first: false };
        let spec = ExpertSpec { count: 5, used: 2, renormalise: true, names };
        let mut scores = [0.0, 2.0, 1.0, 2.0, 2.0];
        let chosen = route(Isa::best(), &spec, &mut scores);
        assert_eq!(chosen, [(1, 0.5), (3, 0.5)]);
        let mut scores = [0.0, 2.0, 1.0, 2.0, 2.0];
        let raw = route(Isa::best(), &ExpertSpec { renormalise: false, ..spec }, &mut scores);
        let e = |x: f32| x.exp();
        let total = 1.0 + 3.0 * e(2.0) + e(1.0);
        assert!((raw[0].1 - e(2.0) / total).abs() < 1e-6);
    }
}
