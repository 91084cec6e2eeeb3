//! Weights as the chain takes them: `u16` by uid, the largest 65,535 (protocol 5.6).

/// What the chain demands of a vector of weights.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChainLimits {
    /// At least so many uids, or as many as there are (`MinAllowedWeights`).
    pub min_allowed: u16,
    /// The largest share that one uid may have, in units of 1/65,535 (`MaxWeightsLimit`).
    pub max_weight: u16,
}

impl ChainLimits {
    /// A chain that takes any vector.
    pub const NONE: Self = Self { min_allowed: 0, max_weight: u16::MAX };

    fn max_share(self) -> f64 {
        f64::from(self.max_weight) / f64::from(u16::MAX)
    }
}

/// What Targon gives everybody where too few have earned something.
const FILLER: f64 = 1e-5;
/// By how much the SDK's cut stays below the limit.
const EPSILON: f64 = 1e-7;

/// As the SDK that Targon 4.4 uses (bittensor 8.5.1): where fewer uids have earned something than
/// the chain wants, all of the subnet get a little; where the subnet has fewer uids than that, all
/// get the same. `raw` holds every uid of the subnet.
pub fn targon(raw: &[(u16, f64)], limits: ChainLimits) -> Vec<(u16, u16)> {
    // The SDK takes single precision, which decides on which side of a half a weight comes to lie.
    let raw: Vec<(u16, f64)> = raw.iter().map(|(uid, w)| (*uid, f64::from(*w as f32))).collect();
    let min_allowed = usize::from(limits.min_allowed);
    let paid: Vec<(u16, f64)> = raw.iter().copied().filter(|(_, w)| *w > 0.0).collect();
    let (chosen, weights): (Vec<u16>, Vec<f64>) = if paid.is_empty() || raw.len() < min_allowed {
        return encode(raw.iter().map(|(uid, _)| (*uid, 1.0)), f64::round_ties_even);
    } else if paid.len() < min_allowed {
        raw.iter().map(|(uid, w)| (*uid, w + FILLER)).unzip()
    } else {
        paid.into_iter().unzip()
    };
    let capped = cap(&weights, limits.max_share());
    encode(chosen.into_iter().zip(capped), f64::round_ties_even)
}

/// Ours: where too few have earned something for the chain, other uids are named with weight 0,
/// which the chain counts too. A filler would pay miners that cheat or do not answer.
pub fn ours(raw: &[(u16, f64)], limits: ChainLimits) -> Vec<(u16, u16)> {
    let (paid, unpaid): (Vec<(u16, f64)>, Vec<_>) = raw.iter().partition(|(_, w)| *w > 0.0);
    let (uids, weights): (Vec<u16>, Vec<f64>) = paid.into_iter().unzip();
    let capped = cap(&weights, limits.max_share());
    // Shares are of the sum after rounding: if small ones were rounded down, a share at the limit
    // would come to lie above it. It also keeps whoever has earned something above 0.
    let mut values = encode(uids.into_iter().zip(capped), f64::ceil);
    let missing = usize::from(limits.min_allowed).saturating_sub(values.len());
    values.extend(unpaid.into_iter().take(missing).map(|(uid, _)| (uid, 0)));
    values.sort_unstable();
    values
}

/// Scales to the largest, rounds, and leaves out zeros.
fn encode(weights: impl Iterator<Item = (u16, f64)>, round: fn(f64) -> f64) -> Vec<(u16, u16)> {
    let weights: Vec<(u16, f64)> = weights.collect();
    let best = weights.iter().map(|(_, w)| *w).fold(0.0, f64::max);
    // No larger than 65,535: `as` saturates, and makes 0 of what is no number.
    let scaled = |w: f64| round(w / best * f64::from(u16::MAX)) as u16;
    weights.into_iter().map(|(uid, w)| (uid, scaled(w))).filter(|(_, w)| *w > 0).collect()
}

/// Shares of the sum, none above `limit` (the SDK's `normalize_max_weight`): what is above a cutoff
/// is lowered to it, and the cutoff is where the largest share is the limit afterwards.
fn cap(weights: &[f64], limit: f64) -> Vec<f64> {
    let (count, sum) = (weights.len(), weights.iter().sum::<f64>());
    if sum == 0.0 || count as f64 * limit <= 1.0 {
        return vec![1.0 / count.max(1) as f64; count];
    }
    let mut shares: Vec<f64> = weights.iter().map(|w| w / sum).collect();
    shares.sort_by(f64::total_cmp);
    if shares.last().is_none_or(|largest| *largest <= limit) {
        return weights.iter().map(|w| w / sum).collect();
    }
    let mut below = Vec::with_capacity(count);
    let mut total = 0.0;
    for share in &shares {
        total += share;
        below.push(total);
    }
    // How many stay as they are: were all above the i-th lowered to it, its share would fit.
    let fits = |i: &usize| {
        let above = (count - i - 1) as f64 * shares[*i];
        shares[*i] / (above + below[*i] + EPSILON) < limit
    };
    let kept = (0..count).filter(fits).count();
    let kept_sum = kept.checked_sub(1).map_or(0.0, |last| below[last]);
    let cutoff = (limit * kept_sum - EPSILON) / (1.0 - limit * (count - kept) as f64);
    let lowered: Vec<f64> = weights.iter().map(|w| w.min(cutoff * sum)).collect();
    let sum = lowered.iter().sum::<f64>();
    lowered.into_iter().map(|w| w / sum).collect()
}
