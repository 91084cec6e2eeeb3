//! Encodes what is hashed in canonical bytes. Integers are little endian; a list is its length as
//! u32, then its elements; text is a list of UTF-8 bytes. Every structure begins with its own name
//! and version, so no two structures can share bytes.

use blake3::Hasher;

/// 32 bytes of BLAKE3.
pub type Hash = [u8; 32];

/// Feeds a hasher with canonical bytes.
pub struct Encoder(Hasher);

impl Encoder {
    /// Begins a structure.
    pub fn new(name: &str) -> Self {
        let mut encoder = Self(Hasher::new());
        encoder.bytes(name.as_bytes());
        encoder
    }

    /// Begins with a hash instead of a name (a link of a chain).
    pub fn after(hash: &Hash) -> Self {
        let mut hasher = Hasher::new();
        hasher.update(hash);
        Self(hasher)
    }

    /// Raw bytes of a length that the structure fixes.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.update(bytes);
        self
    }

    /// A list of bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.u32(bytes.len() as u32).raw(bytes)
    }

    /// One byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.raw(&[value])
    }

    /// Four bytes.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// The bits of an f32.
    pub fn f32(&mut self, value: f32) -> &mut Self {
        self.u32(value.to_bits())
    }

    /// Eight bytes.
    pub fn i64(&mut self, value: i64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// A list of u32.
    pub fn ids(&mut self, ids: &[u32]) -> &mut Self {
        self.u32(ids.len() as u32);
        ids.iter().for_each(|id| {
            self.u32(*id);
        });
        self
    }

    /// The hash of everything so far.
    pub fn finish(&self) -> Hash {
        *self.0.finalize().as_bytes()
    }
}

/// First eight bytes of a hash as a number.
pub fn first_u64(hash: &Hash) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash[..8]);
    u64::from_le_bytes(bytes)
}

/// Lower-case hexadecimal.
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A text that is not the bytes it should be, in hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("must be {bytes} bytes as {} hexadecimal digits", 2 * bytes)]
pub struct HexError {
    /// How many bytes it should be.
    pub bytes: usize,
}

/// Exactly `N` bytes of hexadecimal, with or without `0x`.
///
/// # Errors
/// The rule, when the text is anything else.
pub fn from_hex<const N: usize>(text: &str) -> Result<[u8; N], HexError> {
    let digits = text.strip_prefix("0x").unwrap_or(text).as_bytes();
    let rule = || HexError { bytes: N };
    if digits.len() != 2 * N {
        return Err(rule());
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |d: u8| char::from(d).to_digit(16).ok_or_else(rule);
        *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_is_strict() {
        assert_eq!(from_hex::<2>("0aFf"), Ok([10, 255]));
        assert_eq!(from_hex::<2>("0x0aff"), Ok([10, 255]));
        for bad in ["", "0af", "0aff0", "0ag0", "é0a", "+10f"] {
            assert!(from_hex::<2>(bad).is_err(), "{bad}");
        }
        assert_eq!(to_hex(&[0, 171]), "00ab");
    }

    #[test]
    fn lists_cannot_be_cut_differently() {
        let hash = |a: &[u32], b: &[u32]| Encoder::new("x").ids(a).ids(b).finish();
        assert_ne!(hash(&[1], &[2, 3]), hash(&[1, 2], &[3]));
        let named = |name: &str, text: &[u8]| Encoder::new(name).raw(text).finish();
        assert_ne!(named("a", b"bc"), named("ab", b"c"));
    }
}
