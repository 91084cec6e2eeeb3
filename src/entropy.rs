//! Provides randomness as a parameter: request ids, nonces and seeds come from it.
//!
//! [`Entropy::system`] uses the operating system; [`Entropy::seeded`] gives a test the same values
//! in every run. The engine's own draws do not use it: they follow from keys.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use uuid::{Builder, Uuid};

/// A cloneable source; clones go on where the others are.
#[derive(Clone, Debug)]
pub struct Entropy(Source);

#[derive(Clone, Debug)]
enum Source {
    System,
    Seeded { seed: u64, drawn: Arc<AtomicU64> },
}

impl Entropy {
    /// Randomness of the operating system.
    pub fn system() -> Self {
        Self(Source::System)
    }

    /// The same for the same seed. Whoever knows the seed knows all of it.
    pub fn seeded(seed: u64) -> Self {
        Self(Source::Seeded { seed, drawn: Arc::default() })
    }

    /// A random (version 4) uuid.
    pub fn uuid(&self) -> Uuid {
        match &self.0 {
            Source::System => Uuid::new_v4(),
            Source::Seeded { seed, drawn } => {
                let count = drawn.fetch_add(1, Ordering::SeqCst);
                let input = [seed.to_le_bytes(), count.to_le_bytes()].concat();
                let mut bytes = [0; 16];
                bytes.copy_from_slice(&blake3::hash(&input).as_bytes()[..16]);
                Builder::from_random_bytes(bytes).into_uuid()
            }
        }
    }

    /// 64 random bits.
    pub fn word(&self) -> u64 {
        // The form of a uuid fixes six bits, all between bit 62 and bit 80.
        let uuid = self.uuid().as_u128();
        ((uuid >> 80) as u64) << 16 | u64::from(uuid as u16)
    }

    /// Random bytes, such as a key or a nonce.
    pub fn bytes<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        for part in bytes.chunks_mut(8) {
            part.copy_from_slice(&self.word().to_le_bytes()[..part.len()]);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_and_clones_go_on() {
        let (one, two) = (Entropy::seeded(7), Entropy::seeded(7));
        let first = one.uuid();
        assert_eq!((first, first.get_version_num()), (two.uuid(), 4));
        let clone = one.clone();
        assert_eq!((clone.word(), one.bytes::<12>()), (two.word(), two.bytes()));
        assert_ne!(one.uuid(), first);
        assert_ne!(Entropy::seeded(8).uuid(), first);
        assert_ne!(Entropy::system().uuid(), Entropy::system().uuid());
    }

    #[test]
    fn all_bits_of_the_systems_words_are_random() {
        let (mut ones, mut zeros) = (0, 0);
        for _ in 0..100 {
            let word = Entropy::system().word();
            (ones, zeros) = (ones | word, zeros | !word);
        }
        assert_eq!((ones, zeros), (u64::MAX, u64::MAX));
    }
}
