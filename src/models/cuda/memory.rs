//! Manages the memory of a pass: KV blocks, buffers that grow with the steps, and the one host
//! buffer in each direction that a step's numbers go through.

use super::error::CudaError;
use super::launch::{Card, Memory, Pinned, Plain, Pointer, Stream, bytes_of, values_of};
use crate::models::spec::Spec;
use crate::ops::attention::BLOCK_TOKENS;
use std::sync::Arc;

/// Every part of a host buffer begins at a multiple of this.
const ALIGNMENT: usize = 16;
/// Buffers grow in steps of this.
const GRAIN: usize = 64 << 10;
/// Bytes from which on an allocation is large, the pages of such, and the grain of others.
const LARGE_BYTES: u64 = 1 << 20;
const PAGE_BYTES: u64 = 2 << 20;
const SMALL_GRAIN: u64 = 512;
/// Columns of a tile of a packed matrix; keys of a head are one.
pub(super) const TILE: usize = 32;

/// Keys and values of all blocks, layer by layer, in one allocation: each would be rounded up.
pub(super) struct KvBlocks {
    pub(super) blocks: usize,
    /// Bytes of a layer's keys, and of its values.
    half: usize,
    memory: Memory,
}

impl KvBlocks {
    /// Zeroed, because what fills up a tile of keys or values is never written. Values need whole
    /// tiles in tensor arithmetic alone; a cache has room for either.
    pub(super) fn new(stream: &Stream, spec: &Spec, blocks: usize) -> Result<Self, CudaError> {
        let bytes = blocks * block_bytes(spec);
        let memory = Memory::new(stream.card(), bytes, "the KV cache")?;
        memory.zero(stream)?;
        Ok(Self { blocks, half: bytes / (2 * spec.layers), memory })
    }

    /// Keys and values of a layer.
    pub(super) fn layer(&self, index: usize) -> [Pointer; 2] {
        [2 * index, 2 * index + 1].map(|half| self.memory.pointer().plus(half * self.half))
    }
}

/// What an allocation of so many bytes takes of a card: a large one has pages of its own, small
/// ones share some. That is how drivers are known to do it; on no card was it measured.
pub(super) fn held(bytes: u64) -> u64 {
    bytes.next_multiple_of(if bytes < LARGE_BYTES { SMALL_GRAIN } else { PAGE_BYTES })
}

/// Columns rounded up to whole tiles.
pub(super) fn padded(cols: usize) -> usize {
    cols.next_multiple_of(TILE)
}

/// Bytes of one KV block over all layers, with what fills up the tiles.
pub(super) fn block_bytes(spec: &Spec) -> usize {
    let a = &spec.attention;
    spec.layers * a.kv_heads * BLOCK_TOKENS * 2 * 2 * padded(a.head_dim)
}

/// The size of a buffer that holds so many bytes.
pub(super) fn grained(bytes: usize) -> usize {
    bytes.next_multiple_of(GRAIN)
}

/// A buffer that is as large as the largest step so far needed.
pub(super) struct GrowingBuffer {
    what: &'static str,
    memory: Option<Memory>,
}

impl GrowingBuffer {
    pub(super) fn new(what: &'static str) -> Self {
        Self { what, memory: None }
    }

    /// At least so many bytes; what was in it is lost where it grows. Nothing may be under way.
    pub(super) fn fit(&mut self, card: &Arc<Card>, bytes: usize) -> Result<Pointer, CudaError> {
        let bytes = grained(bytes);
        match &self.memory {
            Some(memory) if memory.bytes() >= bytes => Ok(memory.pointer()),
            _ => {
                // The old one goes first: both may not fit.
                self.memory = None;
                let memory = Memory::new(card, bytes, self.what)?;
                Ok(self.memory.insert(memory).pointer())
            }
        }
    }
}

/// A place in a host buffer and in its copy on the card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Offset(usize);

/// What the host tells the card of one step, in one copy.
pub(super) struct Inputs {
    bytes: Vec<u8>,
    both: Option<(Pinned, Memory)>,
}

impl Inputs {
    pub(super) fn new() -> Self {
        Self { bytes: Vec::new(), both: None }
    }

    /// Forgets what was pushed.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
    }

    pub(super) fn push<T: Plain>(&mut self, values: &[T]) -> Offset {
        let at = self.bytes.len().next_multiple_of(ALIGNMENT);
        self.bytes.resize(at, 0);
        self.bytes.extend_from_slice(bytes_of(values));
        Offset(at)
    }

    /// Starts the copy of all that was pushed.
    pub(super) fn send(&mut self, stream: &Stream) -> Result<(), CudaError> {
        let len = self.bytes.len();
        let (pinned, memory) = sized(&mut self.both, stream, len, "a step's inputs")?;
        pinned.bytes()?[..len].copy_from_slice(&self.bytes);
        pinned.send(memory, len)
    }

    /// Where it is on the card, once it was sent.
    pub(super) fn pointer(&self, Offset(at): Offset) -> Pointer {
        self.both.as_ref().map_or(Pointer::NULL, |(_, memory)| memory.pointer().plus(at))
    }
}

/// What the card answers, in one copy.
pub(super) struct Outputs {
    len: usize,
    both: Option<(Pinned, Memory)>,
}

impl Outputs {
    pub(super) fn new() -> Self {
        Self { len: 0, both: None }
    }

    /// Forgets what was reserved.
    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    /// Room for `count` values behind what was reserved before.
    pub(super) fn reserve<T: Plain>(&mut self, count: usize) -> Offset {
        let at = self.len.next_multiple_of(ALIGNMENT);
        self.len = at + count * size_of::<T>();
        Offset(at)
    }

    /// Makes the room on the card.
    pub(super) fn fit(&mut self, stream: &Stream) -> Result<(), CudaError> {
        sized(&mut self.both, stream, self.len, "logits and results").map(drop)
    }

    /// Where it is on the card, once it fits.
    pub(super) fn pointer(&self, Offset(at): Offset) -> Pointer {
        self.both.as_ref().map_or(Pointer::NULL, |(_, memory)| memory.pointer().plus(at))
    }

    /// Starts the copy of `len` bytes from `from` on to the host.
    pub(super) fn fetch(&mut self, Offset(from): Offset, len: usize) -> Result<(), CudaError> {
        match &mut self.both {
            Some((pinned, memory)) => pinned.fetch(memory, from..from + len),
            None => Ok(()),
        }
    }

    /// Waits for copies, and reads.
    pub(super) fn read<T: Plain>(
        &mut self,
        Offset(at): Offset,
        count: usize,
    ) -> Result<Vec<T>, CudaError> {
        match &mut self.both {
            Some((pinned, _)) => Ok(values_of(&pinned.bytes()?[at..], count)),
            None => Ok(Vec::new()),
        }
    }
}

impl Offset {
    /// Bytes before this place.
    pub(super) fn bytes(self) -> usize {
        self.0
    }

    /// So many bytes further.
    pub(super) fn plus(self, bytes: usize) -> Self {
        Self(self.0 + bytes)
    }
}

/// Both buffers with at least `len` bytes.
fn sized<'a>(
    both: &'a mut Option<(Pinned, Memory)>,
    stream: &Stream,
    len: usize,
    what: &'static str,
) -> Result<&'a mut (Pinned, Memory), CudaError> {
    let bytes = grained(len).max(GRAIN);
    if both.as_ref().is_none_or(|(pinned, _)| pinned.size() < bytes) {
        *both = None;
        let memory = Memory::new(stream.card(), bytes, what)?;
        *both = Some((Pinned::new(stream, bytes)?, memory));
    }
    both.as_mut().ok_or_else(|| CudaError::Shape("a buffer that was just made".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_allocations_are_whole_pages() {
        const MIB: u64 = 1 << 20;
        assert_eq!([1, 512, 513].map(held), [512, 512, 1024]);
        assert_eq!(
            [MIB - 1, MIB, 2 * MIB, 2 * MIB + 1].map(held),
            [MIB, 2 * MIB, 2 * MIB, 4 * MIB]
        );
    }
}
