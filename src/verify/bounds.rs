//! Computes exact confidence bounds on the probability of an event that was counted (Clopper and
//! Pearson, 1934). They are never narrower than they claim.

/// How often a bound may miss.
const MISS: f64 = 0.05;
/// Halvings of a bisection: more than the digits of an f64.
const HALVINGS: usize = 60;

/// The upper 95 % bound on the probability of an event that was seen `seen` times in `of` trials:
/// under a larger one, so few would be seen less than once in twenty times. About `3 / of` where
/// none was seen.
pub fn upper(seen: usize, of: usize) -> f64 {
    upper_at(seen, of, MISS)
}

/// The 95 % interval, with half of what may be missed on each side.
pub fn interval(seen: usize, of: usize) -> (f64, f64) {
    (lower_at(seen, of, MISS / 2.0), upper_at(seen, of, MISS / 2.0))
}

fn upper_at(seen: usize, of: usize, miss: f64) -> f64 {
    if seen >= of {
        return 1.0;
    }
    bisect(|p| at_most(seen, of, p) > miss)
}

fn lower_at(seen: usize, of: usize, miss: f64) -> f64 {
    if seen == 0 {
        return 0.0;
    }
    bisect(|p| 1.0 - at_most(seen.min(of) - 1, of, p) < miss)
}

/// Where `is_below`, true for small probabilities and false for large ones, changes.
fn bisect(is_below: impl Fn(f64) -> bool) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..HALVINGS {
        let middle = (low + high) / 2.0;
        if is_below(middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    (low + high) / 2.0
}

/// Probability of at most `seen` events in `of` trials of probability `p`, which lies strictly
/// between 0 and 1. Terms are kept as logarithms: the first may be too small for a number.
fn at_most(seen: usize, of: usize, p: f64) -> f64 {
    let odds = p.ln() - (-p).ln_1p();
    let mut term = of as f64 * (-p).ln_1p();
    let mut sum = term.exp();
    for i in 0..seen.min(of) {
        term += ((of - i) as f64 / (i + 1) as f64).ln() + odds;
        sum += term.exp();
    }
    sum.min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_those_of_the_tables() {
        // R: qbeta(0.95, k + 1, n - k).
        let cases = [
            (0, 8, 0.312_344),
            (0, 100, 0.029_513),
            (0, 3_000, 0.000_998_08),
            (0, 10_000, 0.000_299_53),
            (1, 10, 0.394_163),
            (5, 100, 0.102_253),
            (10, 10, 1.0),
            (0, 0, 1.0),
        ];
        for (seen, of, want) in cases {
            let got = upper(seen, of);
            assert!((got - want).abs() < 1e-6, "{seen} of {of}: {got}, want {want}");
        }
        // R: binom.test(k, n)$conf.int.
        let cases = [
            (2, 20, (0.012_349, 0.316_983)),
            (5, 10, (0.187_086, 0.812_914)),
            (0, 8, (0.0, 0.369_417)),
            (8, 8, (0.630_583, 1.0)),
        ];
        for (seen, of, want) in cases {
            let got = interval(seen, of);
            let is_right = (got.0 - want.0).abs() < 1e-6 && (got.1 - want.1).abs() < 1e-6;
            assert!(is_right, "{seen} of {of}: {got:?}, want {want:?}");
        }
    }

    #[test]
    fn large_counts_do_not_underflow() {
        let got = upper(50_000, 100_000);
        assert!((got - 0.5026).abs() < 1e-4, "{got}");
        assert!(upper(0, 10_000_000) < 3.1e-7);
    }
}
