//! Names how a device multiplies matrices, which decides the canon of the rows.

use std::fmt;
use std::str::FromStr;

/// A way to multiply matrices. Both read the same packed weights.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arithmetic {
    /// By fused multiply-adds, in the order of [`CANON`](crate::ops::CANON): rows have the same
    /// bits on every processor and card.
    Portable,
    /// By the tensor cores of a card, in an order of its own: rows have the same bits in every
    /// batch and chunk on cards of one architecture, and others elsewhere.
    Tensor,
}

/// There is none of this name.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("must be portable or tensor, got {0}")]
pub struct ArithmeticError(String);

impl FromStr for Arithmetic {
    type Err = ArithmeticError;

    fn from_str(name: &str) -> Result<Self, ArithmeticError> {
        match name {
            "portable" => Ok(Self::Portable),
            "tensor" => Ok(Self::Tensor),
            other => Err(ArithmeticError(other.to_owned())),
        }
    }
}

impl fmt::Display for Arithmetic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Tensor => "tensor",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for name in ["portable", "tensor"] {
            assert_eq!(name.parse::<Arithmetic>().unwrap().to_string(), name);
        }
        let error = "fast".parse::<Arithmetic>().unwrap_err().to_string();
        assert_eq!(error, "must be portable or tensor, got fast");
    }
}
