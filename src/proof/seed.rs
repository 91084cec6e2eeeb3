//! Derives the key of the sampler's noise from a seed.
//!
//! `key = first 8 bytes, little endian, of BLAKE3("targon-engine/sampler/1" || source || choice)`,
//! where source is `"seed" || seed as i64 little endian` and choice is the number of the sequence
//! within its request as u32 little endian.

const CONTEXT: &[u8] = b"targon-engine/sampler/1";

/// The key for sequence `choice` of a request with `seed`.
pub fn noise_key(seed: i64, choice: u32) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(CONTEXT).update(b"seed").update(&seed.to_le_bytes());
    hasher.update(&choice.to_le_bytes());
    let mut key = [0; 8];
    key.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_and_choices_have_their_own_keys() {
        let keys = [noise_key(0, 0), noise_key(0, 1), noise_key(1, 0), noise_key(-1, 0)];
        for (i, a) in keys.iter().enumerate() {
            assert!(keys[i + 1..].iter().all(|b| a != b));
        }
        assert_eq!(noise_key(42, 0), noise_key(42, 0));
    }
}
