//! Allocates zeroed 16-bit memory for weights and KV blocks, on huge pages where the system grants
//! them.
//!
//! A huge page is granted for 2 MiB at an address that 2 MiB divide. Matrices of small models are
//! smaller, so buffers share memory that begins at such an address.

use memmap2::{MmapMut, MmapRaw};
use parking_lot::Mutex;
use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Weak};

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;
/// Bytes that buffers share, and of a buffer from which on it has memory of its own.
const SHARED: usize = 64 << 20;
const ALONE: usize = 16 << 20;
/// Buffers begin at multiples of this: a line of the cache.
const LINE: usize = 64;

/// Memory that buffers have pieces of. It is given back when the last of them is gone.
struct Memory {
    map: MmapRaw,
    /// Bytes before the first address that `HUGE` divides.
    skipped: usize,
    len: usize,
    /// Bytes that were given out. None is given out twice, so all that is given out is zero.
    used: Mutex<usize>,
}

/// The memory that the newest small buffers share, while one of them is there.
static NEWEST: Mutex<Weak<Memory>> = Mutex::new(Weak::new());

impl Memory {
    fn new(len: usize) -> io::Result<Arc<Self>> {
        let map = MmapMut::map_anon(len + HUGE)?;
        #[cfg(target_os = "linux")]
        {
            // Fewer TLB misses when weights stream; a kernel without huge pages works as well.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        let map = MmapRaw::from(map);
        let skipped = map.as_ptr().align_offset(HUGE);
        Ok(Arc::new(Self { map, skipped, len, used: Mutex::new(0) }))
    }

    /// The next `len` values; `None` where there are not so many left.
    fn take(self: &Arc<Self>, len: usize) -> Option<Buffer> {
        let mut used = self.used.lock();
        let at = *used;
        *used = at.checked_add(len.checked_mul(2)?)?.checked_next_multiple_of(LINE)?;
        if *used > self.len.next_multiple_of(LINE) {
            *used = at;
            return None;
        }
        Some(Buffer { memory: Arc::clone(self), at: self.skipped + at, len })
    }
}

/// A fixed number of u16, zeroed, at a multiple of 64 bytes; pages are only backed once they are
/// touched.
pub struct Buffer {
    memory: Arc<Memory>,
    /// Bytes before it.
    at: usize,
    len: usize,
}

impl Buffer {
    /// `len` zeros.
    ///
    /// # Errors
    /// When the system refuses the address space.
    pub fn zeroed(len: usize) -> io::Result<Self> {
        if len >= ALONE / 2 {
            return Ok(Self::all_zeroed(len, 1)?.remove(0));
        }
        let mut newest = NEWEST.lock();
        if let Some(buffer) = newest.upgrade().and_then(|memory| memory.take(len)) {
            return Ok(buffer);
        }
        let memory = Memory::new(SHARED)?;
        *newest = Arc::downgrade(&memory);
        memory.take(len).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// `count` buffers of `len` zeros each, which have memory of their own.
    ///
    /// # Errors
    /// When the system refuses the address space.
    pub fn all_zeroed(len: usize, count: usize) -> io::Result<Vec<Self>> {
        let refused = || io::Error::from(io::ErrorKind::OutOfMemory);
        let each = len.checked_mul(2).and_then(|bytes| bytes.checked_next_multiple_of(LINE));
        let bytes = each.and_then(|each| each.checked_mul(count)).ok_or_else(refused)?;
        // What is added for huge pages must not overflow either.
        let memory = Memory::new(bytes.min(isize::MAX as usize - 2 * HUGE))?;
        (0..count).map(|_| memory.take(len).ok_or_else(refused)).collect()
    }
}

impl Deref for Buffer {
    type Target = [u16];

    fn deref(&self) -> &[u16] {
        // SAFETY: the map has `len` values from `at` on, which no other buffer has; `at` is even,
        // and any bit pattern is a valid u16. They are borrowed for as long as the slice lives.
        unsafe {
            let first = self.memory.map.as_ptr().add(self.at);
            std::slice::from_raw_parts(first.cast(), self.len)
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u16] {
        // SAFETY: as in `deref`, and `&mut self` makes the borrow exclusive.
        unsafe {
            let first = self.memory.map.as_mut_ptr().add(self.at);
            std::slice::from_raw_parts_mut(first.cast(), self.len)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(buffer: &Buffer) -> usize {
        buffer.as_ptr() as usize
    }

    #[test]
    fn small_buffers_share_memory_and_keep_apart() {
        let mut all: Vec<Buffer> = (0..40).map(|i| Buffer::zeroed(1000 + i).unwrap()).collect();
        for (i, buffer) in all.iter_mut().enumerate() {
            assert!(buffer.len() == 1000 + i && buffer.iter().all(|v| *v == 0));
            assert_eq!(place(buffer) % LINE, 0);
            buffer.fill(i as u16 + 1);
        }
        for (i, buffer) in all.iter().enumerate() {
            assert!(buffer.iter().all(|v| *v == i as u16 + 1));
        }
        let mut places: Vec<usize> = all.iter().map(place).collect();
        places.sort_unstable();
        assert!(places.windows(2).all(|w| w[1] - w[0] >= 2000), "{places:?}");
        // Memory that was used is not given out again while it has other buffers.
        drop(all.split_off(1));
        assert!(Buffer::zeroed(50_000).unwrap().iter().all(|v| *v == 0));
        assert!(all[0].iter().all(|v| *v == 1));
    }

    #[test]
    fn large_buffers_and_families_begin_at_a_huge_page() {
        let large = Buffer::zeroed(ALONE).unwrap();
        assert_eq!(place(&large) % HUGE, 0);
        let family = Buffer::all_zeroed(100_001, 3).unwrap();
        assert_eq!(place(&family[0]) % HUGE, 0);
        assert!(family.iter().all(|b| b.len() == 100_001 && b.iter().all(|v| *v == 0)));
        assert_eq!(place(&family[1]) - place(&family[0]), 200_002_usize.next_multiple_of(LINE));
        assert_eq!(Buffer::zeroed(0).unwrap().len(), 0);
        assert!(Buffer::all_zeroed(0, 2).unwrap().iter().all(|b| b.is_empty()));
        assert!(Buffer::zeroed(usize::MAX / 4).is_err());
        assert!(Buffer::all_zeroed(1 << 20, usize::MAX / 8).is_err());
    }
}
