//! Computes elementary functions without libm, so that every platform gives the same bits.
//!
//! The lane-wise ones (f32) carry the hot path; the f64 ones serve RoPE angles, the sampler's noise
//! and the final step of a log-sum-exp. Coefficients of [`exp`] are those of Cephes `expf`; the f64
//! functions use plain Taylor and atanh series after range reduction, good to about 1e-16.

use super::lanes::Lanes;

/// `1.5 * 2^23`: adding it leaves an integer in the low bits of the sum.
const MAGIC: f32 = 12_582_912.0;
const EXP_MIN: f32 = -86.0;
const EXP_MAX: f32 = 88.0;
#[expect(clippy::excessive_precision, reason = "the published digits")]
const EXP_POLY: [f32; 6] = [
    1.987_569_15e-4,
    1.398_199_950_7e-3,
    8.333_451_907_3e-3,
    4.166_579_589_4e-2,
    1.666_666_545_9e-1,
    5.000_000_120_1e-1,
];
/// ln 2 in two parts, the first exact in few bits.
#[expect(clippy::excessive_precision, reason = "the published digits")]
const LN2_F32: [f32; 2] = [0.693_359_375, -2.121_944_40e-4];

/// `e^x`; zero below -86, clamped above 88, NaN stays NaN. Relative error about 1e-7.
#[inline(always)]
pub fn exp<L: Lanes>(x: L) -> L {
    let clamped = L::splat(EXP_MIN).max(L::splat(EXP_MAX).min(x));
    let magic = clamped.mul_add(L::splat(std::f32::consts::LOG2_E), L::splat(MAGIC));
    let n = magic.sub(L::splat(MAGIC));
    let r = n.mul_add(L::splat(-LN2_F32[0]), clamped);
    let r = n.mul_add(L::splat(-LN2_F32[1]), r);
    let mut poly = L::splat(EXP_POLY[0]);
    for c in &EXP_POLY[1..] {
        poly = poly.mul_add(r, L::splat(*c));
    }
    let y = poly.mul_add(r.mul(r), r).add(L::splat(1.0)).scale_by_power(magic);
    // 0 * x keeps a NaN that the integer step above may have hidden.
    clamped.mul_add(L::splat(0.0), y).zero_where_lt(x, L::splat(EXP_MIN))
}

/// `tanh(x)`, absolute error about 1e-7.
#[inline(always)]
pub fn tanh<L: Lanes>(x: L) -> L {
    let one = L::splat(1.0);
    let e = exp(x.add(x));
    one.sub(L::splat(2.0).div(e.add(one)))
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub fn silu<L: Lanes>(x: L) -> L {
    x.div(exp(L::splat(0.0).sub(x)).add(L::splat(1.0)))
}

/// The tanh form of GELU.
#[inline(always)]
pub fn gelu_tanh<L: Lanes>(x: L) -> L {
    let cubic = x.mul(x).mul(x).mul_add(L::splat(0.044_715), x);
    let inner = cubic.mul(L::splat(0.797_884_6));
    x.mul(L::splat(0.5)).mul(tanh(inner).add(L::splat(1.0)))
}

const LN2_HI: f64 = 6.931_471_803_691_238e-1;
const LN2_LO: f64 = 1.908_214_929_270_587_7e-10;

/// `e^x` in f64 for |x| < 700, else 0 or infinity.
pub fn exp64(x: f64) -> f64 {
    if x.is_nan() || x.abs() >= 700.0 {
        return if x < 0.0 { 0.0 } else { x + f64::INFINITY };
    }
    let n = (x * std::f64::consts::LOG2_E).round_ties_even();
    let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, x));
    let mut sum = 1.0;
    for k in (1..=14).rev() {
        sum = (r / f64::from(k)).mul_add(sum, 1.0);
    }
    sum * f64::from_bits(((1023 + n as i64) as u64) << 52)
}

/// Natural logarithm of a positive, finite, normal `x`; NaN for anything else but 0 (-infinity).
pub fn ln64(x: f64) -> f64 {
    if x == 0.0 {
        return f64::NEG_INFINITY;
    }
    if !(x.is_normal() && x > 0.0) {
        return f64::NAN;
    }
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i64 - 1023;
    let mut mantissa = f64::from_bits((bits & 0x000f_ffff_ffff_ffff) | (1023 << 52));
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let s2 = s * s;
    let mut sum = 0.0;
    for k in (0..12).rev() {
        sum = s2.mul_add(sum, 1.0 / f64::from(2 * k + 1));
    }
    let n = exponent as f64;
    n.mul_add(LN2_HI, (2.0 * s).mul_add(sum, n * LN2_LO))
}

/// pi/2 in three parts (Cody and Waite), enough for |x| below 2^20 * pi/2.
const HALF_PI: [f64; 3] =
    [1.570_796_326_734_125_6, 6.077_100_506_303_966e-11, 2.022_266_248_795_950_6e-21];

/// `(sin x, cos x)` for |x| up to about 1.6 million.
pub fn sin_cos64(x: f64) -> (f64, f64) {
    let n = (x * std::f64::consts::FRAC_2_PI).round_ties_even();
    let r = n.mul_add(-HALF_PI[2], n.mul_add(-HALF_PI[1], n.mul_add(-HALF_PI[0], x)));
    let r2 = r * r;
    let (mut sin, mut cos) = (1.0, 1.0);
    for k in (1..=9).rev() {
        let k = f64::from(k);
        sin = (-r2 / (2.0 * k * (2.0 * k + 1.0))).mul_add(sin, 1.0);
        cos = (-r2 / (2.0 * k * (2.0 * k - 1.0))).mul_add(cos, 1.0);
    }
    let sin = r * sin;
    match (n as i64) & 3 {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

/// `base^exponent` for a positive base.
pub fn pow64(base: f64, exponent: f64) -> f64 {
    exp64(exponent * ln64(base))
}

#[cfg(test)]
mod tests {
    use super::super::lanes::{Isa, Kernel, dispatch};
    use super::*;

    struct Exp<'a>(&'a [f32]);

    impl Kernel for Exp<'_> {
        type Out = Vec<f32>;
        #[inline(always)]
        fn run<L: Lanes>(self) -> Vec<f32> {
            // SAFETY: chunks hold 16 values.
            self.0
                .chunks_exact(16)
                .flat_map(|c| exp(unsafe { L::load(c.as_ptr()) }).to_array())
                .collect()
        }
    }

    fn sweep() -> Vec<f32> {
        let mut xs: Vec<f32> = (0..160_000).map(|i| -100.0 + i as f32 * 0.0012).collect();
        let specials =
            [f32::NEG_INFINITY, f32::INFINITY, f32::NAN, 0.0, -0.0, -86.0, 88.0, f32::MIN_POSITIVE];
        xs[..specials.len()].copy_from_slice(&specials);
        xs
    }

    #[test]
    fn exp_is_close_to_the_true_value_and_equal_on_every_instruction_set() {
        let xs = sweep();
        let reference = dispatch(Isa::SCALAR, Exp(&xs));
        for (x, y) in xs.iter().zip(&reference) {
            let want = f64::from(*x).clamp(-1e3, 88.0).exp();
            let want = if *x < EXP_MIN { 0.0 } else { want };
            let close = (f64::from(*y) - want).abs() <= 3e-7 * want;
            assert!(close || (x.is_nan() && y.is_nan()), "exp({x}) = {y}, want {want}");
        }
        for isa in Isa::available() {
            let got = dispatch(isa, Exp(&xs));
            let same = got
                .iter()
                .zip(&reference)
                .all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()));
            assert!(same, "{isa} differs from scalar");
        }
    }

    #[test]
    fn f64_functions_agree_with_the_standard_library() {
        for i in 1..20_000 {
            let x = f64::from(i) * 0.37 - 3_000.0;
            let (sin, cos) = sin_cos64(x);
            assert!((sin - x.sin()).abs() < 1e-12 && (cos - x.cos()).abs() < 1e-12, "{x}");
            let y = f64::from(i) * 1e-4;
            assert!((ln64(y) - y.ln()).abs() <= 4e-16 * y.ln().abs().max(1.0), "ln({y})");
            let z = f64::from(i) * 0.05 - 500.0;
            assert!((exp64(z) / z.exp() - 1.0).abs() < 1e-14, "exp({z})");
        }
        assert!((pow64(100_000.0, -0.5) - 0.003_162_277_660_168_379_5).abs() < 1e-17);
        assert!(ln64(-1.0).is_nan() && ln64(0.0) == f64::NEG_INFINITY && exp64(-800.0) == 0.0);
    }
}
