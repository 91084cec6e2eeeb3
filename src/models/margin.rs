//! Computes the margin of a token: how far it is from being the token that is drawn, if the noise
//! is known.

use super::sampler::{Distribution, Sampling};
use crate::ops::gumbel::gumbel;

/// Margins count at most this much, so that one outlier is one token's worth of evidence.
pub const MARGIN_CLIP: f64 = 1.0;
/// How far a truncation's edge may lie from ours on another stack: in top-p, in logits beside the
/// last of top-k, in the share that min-p and top-a ask for. Logits of an honest bf16 stack are off
/// by a tenth or two.
const TOP_P_SLACK: f32 = 0.03;
const TOP_K_SLACK: f32 = 0.25;
const FLOOR_SLACK: f32 = 0.8;

/// How far a token is from winning the draw.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Margin {
    /// In logits, clipped at [`MARGIN_CLIP`]; zero when it wins, also where it does only with
    /// another stack's edge of a truncation.
    pub logits: f64,
    /// Whether it is the one that this engine would have drawn.
    pub is_drawn: bool,
}

/// How far `token` is from winning the draw at `position`.
///
/// Rounding moves the edge of a truncation. So a token counts as kept that a looser truncation
/// keeps, and it need only beat what a tighter one keeps.
pub fn margin(drawn: &Distribution<'_>, sampling: &Sampling, position: u32, token: u32) -> Margin {
    let row = drawn.row();
    let off = |logits: f64| Margin { logits, is_drawn: false };
    let winner = drawn.draw(sampling, position);
    if winner == token {
        return Margin { logits: 0.0, is_drawn: true };
    }
    if sampling.is_greedy() {
        let distance = f64::from(row[winner as usize] - row[token as usize]);
        return off(distance.min(MARGIN_CLIP));
    }
    let (loose, tight) = edges(drawn, sampling);
    let kept = drawn.survivors(&loose);
    if kept.is_some_and(|kept| kept.iter().all(|(id, _)| *id != token)) {
        return off(MARGIN_CLIP);
    }
    let temperature = f64::from(sampling.temperature);
    let value = |id: u32| {
        f64::from(row[id as usize]) + temperature * gumbel(sampling.noise_key, position, id)
    };
    let Some(tight) = tight else { return off(0.0) };
    let distance = value(drawn.draw(&tight, position)) - value(token);
    off(distance.clamp(0.0, MARGIN_CLIP))
}

/// Truncations whose edges lie on either side of this one's; a tight one may keep nothing for sure.
fn edges(drawn: &Distribution<'_>, sampling: &Sampling) -> (Sampling, Option<Sampling>) {
    let Sampling { top_p, top_k, min_p, top_a, .. } = *sampling;
    let of = |top_p: f32, top_k: usize, floor: f32| Sampling {
        top_p,
        top_k,
        min_p: (min_p * floor).min(1.0),
        top_a: (top_a * floor).min(1.0),
        ..sampling.clone()
    };
    // Ranks change places where logits are close, and only there.
    let by_rank = Sampling { top_p: 1.0, min_p: 0.0, top_a: 0.0, ..sampling.clone() };
    let last = drawn.survivors(&by_rank).and_then(|kept| kept.last().map(|(_, x)| *x));
    let (more, fewer) = last.map_or((top_k, top_k), |edge| {
        let above = |edge: f32| drawn.row().iter().filter(|x| **x >= edge).count();
        (above(edge - TOP_K_SLACK), above(edge + TOP_K_SLACK).min(top_k))
    });
    // Close to 1 the slack must not open what is closed.
    let slack = TOP_P_SLACK.min((1.0 - top_p) / 2.0);
    let tight = of((top_p - slack).max(f32::MIN_POSITIVE), fewer, 1.0 / FLOOR_SLACK);
    // A top-k of 0 would keep all.
    let is_sure = last.is_none() || fewer > 0;
    (of(top_p + slack, more, FLOOR_SLACK), is_sure.then_some(tight))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::lanes::Isa;

    fn sampling(top_k: usize, top_p: f32, min_p: f32) -> Sampling {
        Sampling { temperature: 1.0, noise_key: 9, top_k, top_p, min_p, ..Sampling::greedy() }
    }

    fn of(row: &[f32], sampling: &Sampling, position: u32, token: u32) -> Margin {
        margin(&Distribution::new(Isa::best(), row, sampling), sampling, position, token)
    }

    /// Tokens of a row that have no margin at some position.
    fn accepted(row: &[f32], sampling: &Sampling) -> Vec<usize> {
        let is_drawn = |token: usize| {
            let margin = |position| of(row, sampling, position, token as u32);
            (0..400).any(|position| margin(position).logits == 0.0)
        };
        (0..row.len()).filter(|token| is_drawn(*token)).collect()
    }

    #[test]
    fn edges_give_way_by_rounding_and_no_further() {
        let row = [3.0, 2.9, 2.0, 1.9, 0.0];
        assert_eq!(accepted(&row, &sampling(0, 1.0, 0.0)), [0, 1, 2, 3, 4]);
        // The second token lies a tenth below the edge, the third a whole logit.
        assert_eq!(accepted(&row, &sampling(1, 1.0, 0.0)), [0, 1]);
        assert_eq!(accepted(&row, &sampling(2, 1.0, 0.0)), [0, 1]);
        assert_eq!(accepted(&row, &sampling(3, 1.0, 0.0)), [0, 1, 2, 3]);
        // Of the first token's weight, the third has 0.37 and the last 0.05.
        assert_eq!(accepted(&row, &sampling(0, 1.0, 0.5)), [0, 1]);
        assert_eq!(accepted(&row, &sampling(0, 1.0, 0.4)), [0, 1, 2, 3]);
        // All but the last have 0.98 together.
        assert!(!accepted(&row, &sampling(0, 0.9, 0.0)).contains(&4));
        assert!(!accepted(&row, &sampling(0, 0.95, 0.0)).contains(&4));
    }

    #[test]
    fn a_token_that_only_our_edge_keeps_costs_an_honest_miner_nothing() {
        let row = [3.0, 2.9, 2.0];
        let cut = sampling(1, 1.0, 0.0);
        for position in 0..200 {
            // A stack that has the two the other way round draws the second, always.
            assert_eq!(of(&row, &cut, position, 1), Margin { logits: 0.0, is_drawn: false });
        }
    }
}
