//! The fake chain's clock, and a drand of which the secret is known.

/// When block 0 was made, in seconds since 1970.
const BORN: u64 = 1_795_000_000;
/// Between two blocks, as the metadata says.
const BLOCK_SECONDS: u64 = 12;
/// When drand's round 1 was, and how often there is one: those of quicknet.
const DRAND: (u64, u64) = (1_692_803_367, 3);

/// A block's time, in milliseconds since 1970.
pub fn time_ms(block: u64) -> u64 {
    (BORN + block * BLOCK_SECONDS) * 1000
}

/// The newest round that the chain has at a block.
pub fn stored_round(block: u64) -> u64 {
    (time_ms(block) / 1000 - DRAND.0) / DRAND.1
}

/// What the network signs a round with. Not built yet.
pub fn signature(_: u64) -> Vec<u8> {
    Vec::new()
}

/// What was encrypted for the round of a signature.
pub fn decrypt(_: &[u8], _: &[u8]) -> Option<Vec<u8>> {
    None
}
