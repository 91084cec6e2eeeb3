//! Defines the values that the host and a card exchange, and the arguments of kernels.

/// Words of the largest argument.
const ARG_WORDS: usize = 3;

/// A place on a card.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pointer(pub(super) u64);

impl Pointer {
    /// Nothing.
    pub const NULL: Self = Self(0);

    /// So many bytes further.
    pub fn plus(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// Values without padding and pointers, any bytes of which are a value.
///
/// # Safety
/// Implementers are such types.
pub unsafe trait Plain: Copy + 'static {}

macro_rules! plain {
    ($($name:ty),*) => {
        $(
            // SAFETY: a number, or numbers that leave no gap.
            unsafe impl Plain for $name {}
        )*
    };
}
plain!(u8, i8, u16, i16, u32, i32, u64, f32, f64, QueryTile, Rule, Entry, Query);

/// Queries of one sequence that one thread block attends (`attend.cu`): query i is row `first_row`
/// + i / group of the batch, which is at position `start` + i / group.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct QueryTile {
    /// The sequence's first row in the batch.
    pub row_zero: i32,
    /// Position of that row.
    pub start: i32,
    /// First query.
    pub first_query: i32,
    /// How many queries it has.
    pub queries: i32,
    /// Where the sequence's block table begins.
    pub table: i32,
    /// Padding, which kernels do not read.
    pub unused: i32,
}

/// How a row's token is drawn (`draw.cu`).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Key of the noise.
    pub key: u64,
    /// Position that the noise is for.
    pub position: u32,
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: i32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
    /// Padding, which kernels do not read.
    pub unused: i32,
}

/// Keys and place of a row's part of a proof (`proof.cu`).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Key of the signs.
    pub sketch_key: u64,
    /// Key of the exact hash.
    pub exact_key: u64,
    /// Position of the row in its sequence.
    pub position: u32,
    /// Place among the results; negative skips the row.
    pub slot: i32,
}

/// A token of a row of logits (`draw.cu`); `u32::MAX` is the one that was drawn.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// Index of the row of logits.
    pub row: u32,
    /// Id of the token, or `u32::MAX`.
    pub token: u32,
}

/// Shape of an attention layer (`attend.cu`).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Heads that queries have.
    pub heads: i32,
    /// Heads that keys and values have.
    pub kv_heads: i32,
    /// Elements of a head.
    pub head_dim: i32,
    /// Positions that a query sees; 0 for all.
    pub window: i32,
    /// Factor on the scores.
    pub scale: f32,
    /// Soft cap on the scores; 0 for none.
    pub cap: f32,
}

/// One argument of a launch: its bytes.
#[derive(Clone, Copy, PartialEq)]
pub struct Arg {
    pub(super) words: [u64; ARG_WORDS],
    pub(super) size: usize,
}

impl Arg {
    fn one(word: u64, size: usize) -> Self {
        Self { words: [word, 0, 0], size }
    }
}

impl From<Pointer> for Arg {
    fn from(pointer: Pointer) -> Self {
        Self::one(pointer.0, 8)
    }
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Self::one(value, 8)
    }
}

impl From<i32> for Arg {
    fn from(value: i32) -> Self {
        Self::one(u64::from(value as u32), 4)
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Self::one(u64::from(value.to_bits()), 4)
    }
}

impl From<AttentionShape> for Arg {
    fn from(shape: AttentionShape) -> Self {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let words = [
            pair(shape.heads as u32, shape.kv_heads as u32),
            pair(shape.head_dim as u32, shape.window as u32),
            pair(shape.scale.to_bits(), shape.cap.to_bits()),
        ];
        Self { words, size: size_of::<AttentionShape>() }
    }
}

/// The arguments of a launch, in the kernel's order.
macro_rules! args {
    ($($value:expr),* $(,)?) => { &[$($crate::models::cuda::launch::Arg::from($value)),*] };
}
pub(crate) use args;

/// Values as they are copied to a card.
pub fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: `Plain` values are bytes without gaps, and live as long as the borrow.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The first `count` values of `bytes`.
pub fn values_of<T: Plain>(bytes: &[u8], count: usize) -> Vec<T> {
    assert!(count * size_of::<T>() <= bytes.len(), "results are shorter than what was asked");
    // SAFETY: there are so many bytes, read without regard to alignment, and any are a value.
    (0..count).map(|i| unsafe { bytes.as_ptr().cast::<T>().add(i).read_unaligned() }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_of_the_kernels() {
        assert_eq!([size_of::<QueryTile>(), size_of::<AttentionShape>()], [24, 24]);
        assert_eq!([size_of::<Rule>(), size_of::<Entry>(), size_of::<Query>()], [32, 24, 8]);
        let shape =
            AttentionShape { heads: 1, kv_heads: 2, head_dim: 3, window: 4, scale: 5.0, cap: 6.0 };
        let arg = Arg::from(shape);
        assert_eq!(arg.words[1], 3 | 4 << 32);
        assert_eq!(arg.words[2] >> 32, u64::from(6.0_f32.to_bits()));
    }
}
