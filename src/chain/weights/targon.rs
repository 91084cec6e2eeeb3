//! Converts weights as the original validator does: `process_weights` and `normalize_max_weight` of
//! bittensor 8.5 as NumPy 2 computes them, with the same roundings in the same order.

use super::{VectorError, WEIGHT_MAX, WeightLimits};

/// What everybody gets where too few have a weight.
const LEAST: f64 = 1e-5;
/// The original's guard against division by zero in the cap.
const EPSILON: f64 = 1e-7;
/// Elements that NumPy adds up without halving the array.
const BLOCK: usize = 128;
/// Partial sums that NumPy keeps in a block.
const LANES: usize = 8;

/// The two widths in which the original computes.
trait Float:
    Copy
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Sub<Output = Self>
{
    fn of(value: f64) -> Self;
    fn wide(self) -> f64;
}

impl Float for f32 {
    fn of(value: f64) -> Self {
        value as f32
    }

    fn wide(self) -> f64 {
        self.into()
    }
}

impl Float for f64 {
    fn of(value: f64) -> Self {
        value
    }

    fn wide(self) -> f64 {
        self
    }
}

/// Uid and share of each weight that is sent.
pub(super) fn shares(
    raw: &[(u16, f64)],
    limits: &WeightLimits,
) -> Result<Vec<(u16, f64)>, VectorError> {
    let (neurons, min_allowed) = (usize::from(limits.neurons), usize::from(limits.min_allowed));
    let limit = f64::from(limits.max_limit) / f64::from(WEIGHT_MAX);
    let narrow = raw.iter().map(|(uid, value)| (*uid, *value as f32));
    let above: Vec<(usize, u16, f32)> = (0..)
        .zip(narrow)
        .map(|(place, (uid, value))| (place, uid, value))
        .filter(|(_, _, value)| *value > 0.0)
        .collect();
    if above.is_empty() || neurons < min_allowed {
        let share = 1.0 / neurons as f64;
        return Ok((0..limits.neurons).map(|uid| (uid, share)).collect());
    }
    if above.len() < min_allowed {
        let mut all = vec![LEAST; neurons];
        for (place, uid, value) in above {
            // The original takes positions for uids here.
            let neurons = limits.neurons;
            let share = all.get_mut(place).ok_or(VectorError::Place { place, uid, neurons })?;
            *share += f64::from(value);
        }
        return Ok((0..limits.neurons).zip(capped(&all, limit)?).collect());
    }
    let values: Vec<f32> = above.iter().map(|(_, _, value)| *value).collect();
    let shares = capped(&values, limit)?.into_iter().map(f64::from);
    Ok(above.iter().map(|(_, uid, _)| *uid).zip(shares).collect())
}

/// `normalize_max_weight`: shares whose sum is 1, none above `limit`.
fn capped<T: Float>(weights: &[T], limit: f64) -> Result<Vec<T>, VectorError> {
    let count = weights.len();
    let total = sum(weights);
    if !total.wide().is_finite() {
        return Err(VectorError::Sum);
    }
    if total.wide() == 0.0 || count as f64 * limit <= 1.0 {
        return Ok(vec![T::of(1.0) / T::of(count as f64); count]);
    }
    let mut values = weights.to_vec();
    values.sort_by(|a, b| a.wide().total_cmp(&b.wide()));
    let whole = sum(&values);
    let estimation: Vec<T> = values.iter().map(|value| *value / whole).collect();
    if estimation[count - 1] <= T::of(limit) {
        return Ok(weights.iter().map(|value| *value / total).collect());
    }
    let mut running = T::of(0.0);
    let cumulated: Vec<T> = estimation
        .iter()
        .map(|share| {
            running = running + *share;
            running
        })
        .collect();
    let kept = (0..count).filter(|i| {
        let rest = T::of((count - i - 1) as f64) * estimation[*i];
        estimation[*i] / (rest + cumulated[*i] + T::of(EPSILON)) < T::of(limit)
    });
    let kept = kept.count();
    // Python's index -1 is the last one.
    let last = cumulated[kept.checked_sub(1).unwrap_or(count - 1)];
    let above = T::of(limit) * last - T::of(EPSILON);
    let cutoff = above.wide() / (1.0 - limit * (count - kept) as f64) * whole.wide();
    let cut = |value: &T| if value.wide() > cutoff { T::of(cutoff) } else { *value };
    let cut: Vec<T> = weights.iter().map(cut).collect();
    let total = sum(&cut);
    Ok(cut.into_iter().map(|value| value / total).collect())
}

/// NumPy's pairwise sum.
fn sum<T: Float>(values: &[T]) -> T {
    let count = values.len();
    if count < LANES {
        return values.iter().fold(T::of(0.0), |sum, value| sum + *value);
    }
    if count > BLOCK {
        let half = count / 2 / LANES * LANES;
        return sum(&values[..half]) + sum(&values[half..]);
    }
    let mut lanes = [T::of(0.0); LANES];
    let (whole, rest) = values.split_at(count / LANES * LANES);
    for (at, part) in whole.chunks_exact(LANES).enumerate() {
        for (lane, value) in lanes.iter_mut().zip(part) {
            *lane = if at == 0 { *value } else { *lane + *value };
        }
    }
    let pair = |i: usize| lanes[i] + lanes[i + 1];
    let joined = (pair(0) + pair(2)) + (pair(4) + pair(6));
    rest.iter().fold(joined, |sum, value| sum + *value)
}
