//! Allocates zeroed 16-bit memory for weights and KV blocks, on huge pages where the system grants
//! them.

use memmap2::MmapMut;
use std::io;
use std::ops::{Deref, DerefMut};

/// A fixed number of u16, zeroed, page aligned; pages are only backed once they are touched.
pub struct Buffer {
    map: MmapMut,
    len: usize,
}

impl Buffer {
    /// `len` zeros.
    ///
    /// # Errors
    /// When the system refuses the address space.
    pub fn zeroed(len: usize) -> io::Result<Self> {
        let map = MmapMut::map_anon((len * 2).max(1))?;
        #[cfg(target_os = "linux")]
        {
            // Fewer TLB misses when weights stream; a kernel without huge pages works as well.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(Self { map, len })
    }
}

impl Deref for Buffer {
    type Target = [u16];

    fn deref(&self) -> &[u16] {
        // SAFETY: the map holds at least `len * 2` bytes, is page aligned, and any bit pattern is a
        // valid u16; it is borrowed for as long as the slice lives.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u16] {
        // SAFETY: as in `deref`, and `&mut self` makes the borrow exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().cast(), self.len) }
    }
}
