//! Converts weights as the current SDK does: `_conform` and `clip_to_max_weight` of bittensor 11.3,
//! in f64.

use super::{VectorError, WEIGHT_MAX, WeightLimits, is_own};

/// The SDK's guard against division by zero in the clip.
const EPSILON: f64 = 1e-7;

/// Uid and share of each weight; those of zero are still among them.
pub(super) fn shares(
    raw: &[(u16, f64)],
    limits: &WeightLimits,
) -> Result<Vec<(u16, f64)>, VectorError> {
    if limits.max_limit == WEIGHT_MAX || is_own(raw, limits) {
        return Ok(raw.to_vec());
    }
    let limit = f64::from(limits.max_limit) / f64::from(WEIGHT_MAX);
    let values: Vec<f64> = raw.iter().map(|(_, value)| *value).collect();
    Ok(raw.iter().map(|(uid, _)| *uid).zip(clipped(&values, limit)?).collect())
}

/// Shares whose sum is 1, none above `limit`; where that cannot be, all the same.
///
/// # Errors
/// When all weights are zero.
pub fn clipped(weights: &[f64], limit: f64) -> Result<Vec<f64>, VectorError> {
    let count = weights.len();
    let total: f64 = weights.iter().sum();
    if total <= 0.0 {
        return Err(VectorError::AllZero);
    }
    if count as f64 * limit <= 1.0 {
        return Ok(vec![1.0 / count as f64; count]);
    }
    let shares: Vec<f64> = weights.iter().map(|value| value / total).collect();
    let mut sorted = shares.clone();
    sorted.sort_by(f64::total_cmp);
    if sorted[count - 1] <= limit {
        return Ok(shares);
    }
    let mut running = 0.0;
    let cumulated: Vec<f64> = sorted
        .iter()
        .map(|share| {
            running += share;
            running
        })
        .collect();
    let kept = (0..count).filter(|i| {
        let rest = (count - i - 1) as f64 * sorted[*i];
        sorted[*i] / (rest + cumulated[*i] + EPSILON) < limit
    });
    let kept = kept.count();
    // Python's index -1 is the last one.
    let last = cumulated[kept.checked_sub(1).unwrap_or(count - 1)];
    let scale = (limit * last - EPSILON) / (1.0 - limit * (count - kept) as f64);
    let cut: Vec<f64> = weights.iter().map(|value| value.min(scale * total)).collect();
    let whole: f64 = cut.iter().sum();
    Ok(cut.into_iter().map(|value| value / whole).collect())
}
