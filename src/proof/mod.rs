//! Commits an answer to the model that computed it. This is pure arithmetic on bytes, without a
//! clock, I/O or tensors, so one code proves, verifies, is fuzzed and pins vectors.
//!
//! [`residue`] sketches a hidden row into four bytes and an exact hash, [`commit`] binds rows to a
//! request and chains the chunks, [`toploc`] is the published scheme of that name, [`powv`] is
//! Targon's proof-of-weights value. `docs/proofs.md` gives every format byte by byte.

pub mod apart;
pub mod codec;
pub mod commit;
pub mod powv;
pub mod residue;
pub mod seed;
pub mod toploc;

use std::fmt;
use std::str::FromStr;

/// Output rows that one chunk of a proof covers.
pub const CHUNK_ROWS: usize = 32;

/// How an answer is proved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scheme {
    /// Four projections of eight bits a row, an exact hash a chunk.
    Residue,
    /// Eight projections of four bits a row, an exact hash a chunk.
    ResidueU4,
    /// The 128 largest activations of a chunk as a polynomial (arXiv 2501.16007).
    Toploc,
}

impl Scheme {
    /// Every scheme that can be asked for.
    pub const ALL: [Scheme; 3] = [Scheme::Residue, Scheme::ResidueU4, Scheme::Toploc];

    /// The name in requests.
    pub fn name(self) -> &'static str {
        match self {
            Scheme::Residue => "residue-v1",
            Scheme::ResidueU4 => "residue-v1-u4",
            Scheme::Toploc => "toploc",
        }
    }

    /// The tag in hashed structures.
    pub fn tag(self) -> u8 {
        match self {
            Scheme::Residue => 1,
            Scheme::ResidueU4 => 2,
            Scheme::Toploc => 3,
        }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that no scheme has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("must be one of {}", Scheme::ALL.map(Scheme::name).join(", "))]
pub struct UnknownScheme;

impl FromStr for Scheme {
    type Err = UnknownScheme;

    fn from_str(name: &str) -> Result<Self, UnknownScheme> {
        Scheme::ALL.into_iter().find(|s| s.name() == name).ok_or(UnknownScheme)
    }
}
