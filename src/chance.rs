//! Draws numbers, elements and orders from random bits, so that the same bits give the same draws.
//!
//! [`Chance::of`] takes them from an [`Entropy`]: from the operating system, so that nobody can
//! predict them, or in a test from a seed. [`Chance::seeded`] gives the same sequence every time.

use crate::entropy::Entropy;
use crate::ops::philox::philox;
use crate::proof::codec::to_hex;

/// Separates this sequence from others with the same key.
const DOMAIN: u32 = 0x7661_6c69;

/// A sequence of random numbers.
#[derive(Clone, Debug)]
pub struct Chance(Source);

#[derive(Clone, Debug)]
enum Source {
    Drawn(Entropy),
    Seeded { key: u64, count: u64 },
}

impl Chance {
    /// The bits of a source, which others draw from as well.
    pub fn of(entropy: &Entropy) -> Self {
        Self(Source::Drawn(entropy.clone()))
    }

    /// A sequence that `key` decides.
    pub fn seeded(key: u64) -> Self {
        Self(Source::Seeded { key, count: 0 })
    }

    /// A sequence for somebody else. One of a source draws from it as well: a key of 64 bits in its
    /// place could be searched for.
    pub fn fork(&mut self) -> Self {
        match &self.0 {
            Source::Drawn(entropy) => Self::of(entropy),
            Source::Seeded { .. } => Self::seeded(self.bits()),
        }
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        match &mut self.0 {
            Source::Drawn(entropy) => entropy.word(),
            Source::Seeded { key, count } => {
                let words = philox(*key, [*count as u32, (*count >> 32) as u32, 0, DOMAIN]);
                *count += 1;
                u64::from(words[0]) << 32 | u64::from(words[1])
            }
        }
    }

    /// Uniform over `0..limit`; 0 where the limit is 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(limit)) >> 64) as u64
    }

    /// Uniform over [0, 1), a multiple of 2^-16: equal in every float type and after every printer.
    pub fn share(&mut self) -> f64 {
        self.below(1 << 16) as f64 / f64::from(1_u32 << 16)
    }

    /// Draws an element; all are equally likely. An empty list has none.
    pub fn pick<'a, T>(&mut self, list: &'a [T]) -> Option<&'a T> {
        list.get(self.below(list.len() as u64) as usize)
    }

    /// Draws a line of a text; an empty text has an empty one.
    pub fn line(&mut self, text: &'static str) -> &'static str {
        text.lines().nth(self.below(text.lines().count() as u64) as usize).unwrap_or_default()
    }

    /// Puts a list into random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            list.swap(last, self.below(last as u64 + 1) as usize);
        }
    }

    /// `N` random bytes in hexadecimal.
    pub fn hex<const N: usize>(&mut self) -> String {
        let bytes: [u8; N] = std::array::from_fn(|_| self.bits() as u8);
        to_hex(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_decides_and_every_place_is_reached() {
        let draw = |seed| {
            let mut chance = Chance::seeded(seed);
            let mut list: Vec<u8> = (0..5).collect();
            let mut seen = [[0_u32; 5]; 5];
            for _ in 0..2_000 {
                chance.shuffle(&mut list);
                for (place, value) in list.iter().enumerate() {
                    seen[place][usize::from(*value)] += 1;
                }
            }
            assert!(seen.iter().flatten().all(|n| (300..500).contains(n)), "{seen:?}");
            (list, chance.hex::<16>())
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn forks_draw_from_the_source_or_from_a_key_of_their_own() {
        let same = Entropy::seeded(1);
        let mut chance = Chance::of(&Entropy::seeded(1));
        let mut fork = chance.fork();
        let got = [fork.bits(), chance.bits(), fork.bits()];
        assert_eq!(got, [same.word(), same.word(), same.word()]);

        let (mut one, mut two) = (Chance::seeded(7), Chance::seeded(7));
        assert_eq!(one.fork().bits(), two.fork().bits());
        assert_ne!(one.fork().bits(), two.bits());
    }

    #[test]
    fn all_bits_of_a_source_are_random() {
        let mut chance = Chance::of(&Entropy::seeded(1));
        let (mut ones, mut zeros) = (0, 0);
        for _ in 0..100 {
            let bits = chance.bits();
            (ones, zeros) = (ones | bits, zeros | !bits);
            assert!((0.0..1.0).contains(&chance.share()) && chance.below(3) < 3);
        }
        assert_eq!((ones, zeros), (u64::MAX, u64::MAX));
        assert_eq!((chance.below(0), chance.pick::<u8>(&[])), (0, None));
        assert_eq!(chance.line(""), "");
    }
}
