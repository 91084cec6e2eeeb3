//! Summarises repeats: means with their intervals, and distributions by their quantiles.

use serde::{Deserialize, Serialize};

/// Places of the curve of a distribution: shares 0, 0.02, ... 1.
const CURVE: usize = 51;

/// The mean of repeated runs.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spread {
    /// How many runs there were.
    pub runs: usize,
    /// The arithmetic mean of the runs.
    pub mean: f64,
    /// Their standard deviation (with n - 1); one run has none.
    pub sd: Option<f64>,
    /// The mean's interval of 95 % by Student's t, from 0 on, because what is measured is never
    /// below; one run has none.
    pub interval: Option<[f64; 2]>,
}

impl Spread {
    /// Of these runs; `None` where there is none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let runs = values.len();
        if runs == 0 {
            return None;
        }
        let mean = mean(values);
        let sd = sd(values, mean);
        let half = sd.map(|sd| student(runs - 1) * sd / (runs as f64).sqrt());
        Some(Self { runs, mean, sd, interval: half.map(|h| [(mean - h).max(0.0), mean + h]) })
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn sd(values: &[f64], mean: f64) -> Option<f64> {
    let freedom = values.len().checked_sub(1).filter(|n| *n > 0)?;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    Some((squares / freedom as f64).sqrt())
}

/// The 97.5 % quantile of Student's t; above the table within 0.002 of it.
fn student(freedom: usize) -> f64 {
    const TABLE: [f64; 30] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
        2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
        2.052, 2.048, 2.045, 2.042,
    ];
    let known = freedom.checked_sub(1).and_then(|place| TABLE.get(place));
    known.copied().unwrap_or_else(|| 1.96 + 2.45 / freedom.max(1) as f64)
}

/// How values are distributed.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantiles {
    /// How many values there were.
    pub count: usize,
    /// The arithmetic mean of the values.
    pub mean: f64,
    /// Their standard deviation; one value has none.
    pub sd: Option<f64>,
    /// Half lie below.
    pub p50: f64,
    /// 90 % lie below.
    pub p90: f64,
    /// 95 % lie below.
    pub p95: f64,
    /// 99 % lie below.
    pub p99: f64,
    /// The largest value.
    pub max: f64,
    /// The quantiles at the shares 0, 0.02, ... 1.
    pub curve: Vec<f64>,
}

impl Quantiles {
    /// Of these values, in any order; `None` where there is none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |q: f64| between(&sorted, q);
        let mean = mean(&sorted);
        Some(Self {
            count: sorted.len(),
            mean,
            sd: sd(&sorted, mean),
            p50: at(0.5)?,
            p90: at(0.9)?,
            p95: at(0.95)?,
            p99: at(0.99)?,
            max: *sorted.last()?,
            curve: (0..CURVE).filter_map(|i| at(i as f64 / (CURVE - 1) as f64)).collect(),
        })
    }
}

/// The value below which a share `q` of the sorted values lies, in a straight line between the two
/// at that place, as NumPy's `percentile` has it and so vLLM's figures; `None` where there are
/// none.
fn between(sorted: &[f64], q: f64) -> Option<f64> {
    let place = sorted.len().checked_sub(1)? as f64 * q;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    Some(low + (high - low) * place.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_students() {
        let spread = Spread::of(&[10.0, 12.0, 14.0]).unwrap();
        assert_eq!((spread.runs, spread.mean, spread.sd), (3, 12.0, Some(2.0)));
        let [low, high] = spread.interval.unwrap();
        // 4.303 * 2 / sqrt(3)
        assert!((low - (12.0 - 4.9687)).abs() < 1e-3 && (high - 16.9687).abs() < 1e-3, "{low}");
        assert_eq!(Spread::of(&[1.0, 9.0]).unwrap().interval.map(|i| i[0]), Some(0.0));
        let one = Spread::of(&[5.0]).unwrap();
        assert_eq!((one.mean, one.sd, one.interval), (5.0, None, None));
        assert_eq!(Spread::of(&[]), None);
        // 2.021 at 40, 2.000 at 60, 1.980 at 120.
        for (freedom, want) in [(40, 2.021), (60, 2.000), (120, 1.980)] {
            assert!((student(freedom) - want).abs() < 2e-3, "{freedom}");
        }
    }

    #[test]
    fn a_distribution_is_its_quantiles() {
        let values: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        let q = Quantiles::of(&values).unwrap();
        assert_eq!((q.p50, q.p90, q.p95, q.p99, q.max), (50.0, 90.0, 95.0, 99.0, 100.0));
        assert_eq!((q.curve.len(), q.curve[0], q.curve[50]), (51, 0.0, 100.0));
        assert!(q.curve.is_sorted());
        assert_eq!(Quantiles::of(&[1.0, 4.0]).unwrap().p50, 2.5);
        assert_eq!(Quantiles::of(&[3.0]).unwrap().p99, 3.0);
        assert_eq!(Quantiles::of(&[]), None);
    }
}
