//! Draws from given random bits, so that the same bits give the same prompt.

/// Where random bits come from: each call gives 64 of them.
pub type Bits<'a> = dyn FnMut() -> u64 + 'a;

/// Uniform over `0..limit`; 0 where the limit is 0.
pub(super) fn below(bits: &mut Bits<'_>, limit: usize) -> usize {
    ((u128::from(bits()) * limit as u128) >> 64) as usize
}

/// Draws an element; all are equally likely. The list must not be empty.
pub(super) fn pick<'a, T: ?Sized>(bits: &mut Bits<'_>, list: &[&'a T]) -> &'a T {
    list[below(bits, list.len())]
}

/// A line of an embedded list; the lists have no empty lines.
pub(super) fn line(bits: &mut Bits<'_>, list: &'static str) -> &'static str {
    list.lines().nth(below(bits, list.lines().count())).unwrap_or_default()
}
