//! Makes noise for the weights and inputs of measurements: the same values in every run, where
//! nothing depends on how random they are.

/// A linear congruential generator with the constants of Numerical Recipes.
#[derive(Clone, Copy, Debug)]
pub struct Lcg(u32);

impl Lcg {
    /// A sequence that `seed` decides.
    pub fn new(seed: u32) -> Self {
        Self(seed)
    }

    /// The next 32 bits; the lowest of them repeat soon.
    pub fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_decides() {
        let mut one = Lcg::new(7);
        assert_eq!([one.bits(), one.bits()], [1_025_555_898, 3_923_423_697]);
    }
}
