//! Computes weights as the chain takes them: `u16` by uid, the largest 65,535 (protocol 5.6).

use crate::chain::weights::{VectorError, VectorRule, WeightLimits, clipped};

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
}

/// The least weight that is one: it keeps a uid in the vector, and is next to no pay.
const LEAST: u16 = 1;

/// As the SDK that Targon 4.4 uses: where fewer uids have earned something than the chain wants,
/// all of the subnet get a little; where the subnet has fewer uids than that, all get the same.
/// `raw` holds every uid of the subnet.
///
/// # Errors
/// When that arithmetic has no weights for these numbers.
pub fn targon(raw: &[(u16, f64)], limits: ChainLimits) -> Result<Vec<(u16, u16)>, VectorError> {
    let neurons = u16::try_from(raw.len()).unwrap_or(u16::MAX);
    let ChainLimits { min_allowed, max_weight: max_limit } = limits;
    let limits = WeightLimits { neurons, min_allowed, max_limit, own: None };
    Ok(VectorRule::Targon44.vector(raw, &limits)?.values().to_vec())
}

/// Uids that may be named beside those that have earned something, each group in its order.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Spare {
    /// Those that nothing speaks against.
    pub fine: Vec<u16>,
    /// Those behind an alarm.
    pub shut: Vec<u16>,
}

/// Ours: where too few have earned something for the chain, spare uids get `LEAST`, in their order.
/// Targon's way would pay all of the subnet in earnest where the subnet is small. Where so few have
/// earned something that each would get more than the chain's largest share, spare uids get as
/// little as that share demands, all the same.
///
/// # Errors
/// When nobody has earned anything.
pub fn ours(
    raw: &[(u16, f64)],
    spare: Spare,
    limits: ChainLimits,
) -> Result<Vec<(u16, u16)>, VectorError> {
    let paid = raw.iter().copied().filter(|(_, weight)| *weight > 0.0);
    let (uids, weights): (Vec<u16>, Vec<f64>) = paid.unzip();
    let max_share = f64::from(limits.max_weight) / f64::from(u16::MAX);
    let shares = clipped(&weights, max_share)?;
    let best = shares.iter().copied().fold(0.0, f64::max);
    // The chain takes shares of the sum after rounding: if small ones were rounded down, one at the
    // limit would come to lie above it. It also keeps miners that have earned something above 0.
    let value = |share: &f64| (share / best * f64::from(u16::MAX)).ceil() as u16;
    let mut values: Vec<(u16, u16)> = uids.iter().copied().zip(shares.iter().map(value)).collect();
    let is_spare = |uid: &u16| uids.binary_search(uid).is_err();
    let Spare { mut fine, mut shut } = spare;
    fine.retain(is_spare);
    shut.retain(is_spare);
    let missing = usize::from(limits.min_allowed).saturating_sub(values.len());
    let short = short_of(&values, limits.max_weight);
    if short > 0 {
        let all = fine.len() as u64 * u64::from(u16::MAX) < short;
        let count = if all { fine.len() + shut.len() } else { fine.len() };
        let count = count.max(missing);
        let each = short.div_ceil(count.max(1) as u64).clamp(LEAST.into(), u16::MAX.into());
        values.extend(fine.into_iter().chain(shut).take(count).map(|uid| (uid, each as u16)));
    } else {
        values.extend(fine.into_iter().chain(shut).take(missing).map(|uid| (uid, LEAST)));
    }
    values.sort_unstable();
    Ok(values)
}

/// What is missing in the sum of these weights, so that the largest has no larger share of it than
/// `max_weight` of 65,535.
fn short_of(values: &[(u16, u16)], max_weight: u16) -> u64 {
    let largest = values.iter().map(|(_, value)| u64::from(*value)).max().unwrap_or(0);
    let sum: u64 = values.iter().map(|(_, value)| u64::from(*value)).sum();
    (largest * u64::from(u16::MAX)).div_ceil(u64::from(max_weight).max(1)).saturating_sub(sum)
}
