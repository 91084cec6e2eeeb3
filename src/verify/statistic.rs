//! Computes one number for the rows of an answer: their trimmed mean, and its limit by how many
//! rows there are.
//!
//! Honest noise varies from row to row by a factor of ten, and a few rows of an honest answer lie
//! far out, so the largest chunk says little about mild cheats. Without a tenth of the rows at
//! either end, honest answers lie close together, the closer the more rows they have. What a cheat
//! hides in less than a tenth of its rows is left to the limit on a single chunk.

use serde::{Deserialize, Serialize};

/// Rows that are left out at each end: one in so many.
const TRIMMED: usize = 10;
/// Numbers of rows from which on a limit holds: a quarter of a chunk, and 1, 2, 4 and 8 of them.
pub const ROWS: [usize; 5] = [8, 32, 64, 128, 256];

/// The mean of `values` without the tenth that is smallest and the tenth that is largest, each
/// rounded down; nothing of nothing. One that is not a number makes the mean none.
pub fn trimmed_mean(values: &[f64]) -> Option<f64> {
    if values.iter().any(|value| value.is_nan()) {
        return Some(f64::NAN);
    }
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let left_out = sorted.len() / TRIMMED;
    let kept = &sorted[left_out..sorted.len() - left_out];
    (!kept.is_empty()).then(|| kept.iter().sum::<f64>() / kept.len() as f64)
}

/// Limits for answers of at least as many rows as [`ROWS`] says, in its order.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByRows(pub [f64; ROWS.len()]);

impl ByRows {
    /// The same limit for every number of rows.
    pub const fn all(limit: f64) -> Self {
        Self([limit; ROWS.len()])
    }

    /// The limit for so many rows; there is none for fewer than the least of [`ROWS`].
    pub fn of(&self, rows: usize) -> Option<f64> {
        ROWS.iter().zip(self.0).rev().find(|(least, _)| rows >= **least).map(|(_, limit)| limit)
    }

    /// Limits that `factor` times the largest statistic of honest answers gives: each is measured
    /// on the first rows of all answers that have as many. Where none has, the limit of fewer rows
    /// holds, which is larger; `otherwise` where there is nothing at all.
    pub fn measured<'a>(
        answers: impl Iterator<Item = &'a [f64]> + Clone,
        (factor, least): (f64, f64),
        otherwise: Self,
    ) -> Self {
        let mut limits = otherwise;
        let mut last = None;
        for (rows, limit) in ROWS.iter().zip(&mut limits.0) {
            let long = answers.clone().filter_map(|values| values.get(..*rows));
            let largest = long.filter_map(trimmed_mean).reduce(f64::max);
            last = largest.map(|largest| (largest * factor).max(least)).or(last);
            *limit = last.unwrap_or(*limit);
        }
        limits
    }
}

/// What the rows of an answer say together.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Statistic {
    /// Their trimmed mean.
    pub value: f64,
    /// How many they are.
    pub rows: usize,
    /// The most that an honest answer of so many rows is expected to have.
    pub limit: f64,
}

impl Statistic {
    /// Of the rows' values; too few of them have none.
    pub fn of(values: &[f64], limits: &ByRows) -> Option<Self> {
        let limit = limits.of(values.len())?;
        Some(Self { value: trimmed_mean(values)?, rows: values.len(), limit })
    }

    /// Whether it is more than an honest answer is expected to have; NaN is more.
    pub fn is_over(&self) -> bool {
        self.value.is_nan() || self.value > self.limit
    }

    /// In units of its limit.
    pub fn share(&self) -> f64 {
        self.value / self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_is_left_out_at_either_end() {
        let mut values: Vec<f64> = (1..=20).map(f64::from).collect();
        assert_eq!(trimmed_mean(&values), Some(10.5));
        // Two of twenty may be anything.
        (values[0], values[19]) = (-1e9, 1e12);
        assert_eq!(trimmed_mean(&values), Some(10.5));
        (values[10], values[11]) = (1e12, 1e12);
        assert!(trimmed_mean(&values) > Some(11.0), "the control: a third one counts");
        assert_eq!(trimmed_mean(&[7.0]), Some(7.0));
        assert_eq!(trimmed_mean(&[]), None);
        assert!(trimmed_mean(&[1.0, f64::NAN, 2.0]).is_some_and(f64::is_nan));
    }

    #[test]
    fn limits_follow_the_number_of_rows() {
        let limits = ByRows([5.0, 4.0, 3.0, 2.0, 1.0]);
        let cases = [(0, None), (7, None), (8, Some(5.0)), (31, Some(5.0)), (32, Some(4.0))];
        for (rows, want) in cases.into_iter().chain([(255, Some(2.0)), (9999, Some(1.0))]) {
            assert_eq!(limits.of(rows), want, "{rows} rows");
        }
        let over = |value: f64, rows: usize| {
            Statistic::of(&vec![value; rows], &limits).is_some_and(|s| s.is_over())
        };
        assert!(over(2.5, 128) && !over(2.5, 64), "the same rows say more where they are more");
        assert!(over(f64::NAN, 8) && !over(f64::NAN, 1), "one row has no statistic");
    }

    #[test]
    fn limits_are_measured_on_as_many_rows_as_they_hold_for() {
        // Falls from row to row, so that longer answers have smaller means.
        let falling: Vec<f64> = (0..100).map(|i| 100.0 - f64::from(i)).collect();
        let answers = [falling.as_slice(), &[1.0; 40], &[]];
        let otherwise = ByRows::all(7.0);
        let limits = ByRows::measured(answers.into_iter(), (2.0, 0.5), otherwise).0;
        assert_eq!(limits[0], 2.0 * 96.5);
        assert_eq!(limits[1], 2.0 * 84.5);
        assert_eq!(limits[2], 2.0 * 68.5);
        assert_eq!(limits[3..], [limits[2]; 2], "nothing as long was measured");
        assert_eq!(ByRows::measured([].into_iter(), (2.0, 0.5), otherwise), otherwise);
        let zero = [[0.0; 300].as_slice()];
        assert_eq!(ByRows::measured(zero.into_iter(), (2.0, 0.5), otherwise), ByRows::all(0.5));
    }
}
