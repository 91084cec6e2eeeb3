//! Manages memory of a card, and host memory that is copied to and from it.

use super::super::error::CudaError;
use super::card::Card;
use super::plain::{Arg, Plain, Pointer};
use super::stream::Stream;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Memory on a card; freed when it is dropped, after all work that was put on the card.
pub struct Memory {
    at: sys::CUdeviceptr,
    bytes: usize,
    card: Arc<Card>,
}

impl From<&Memory> for Arg {
    fn from(memory: &Memory) -> Self {
        memory.pointer().into()
    }
}

impl Memory {
    /// So much of a card, not zeroed; `what` is for the error.
    ///
    /// # Errors
    /// When so much is not free.
    pub fn new(card: &Arc<Card>, bytes: usize, what: &'static str) -> Result<Self, CudaError> {
        card.bind()?;
        let bytes = bytes.max(1);
        // SAFETY: the context is current; the address is only given to kernels and copies.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(at) => Ok(Self { at, bytes, card: Arc::clone(card) }),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let free = result::mem_get_info().map_or(0, |(free, _)| free);
                Err(CudaError::OutOfMemory { ordinal: card.ordinal(), what, needed: bytes, free })
            }
            Err(error) => Err(card.failed("cuMemAlloc", error)),
        }
    }

    /// The address of its first byte, on the card.
    pub fn pointer(&self) -> Pointer {
        Pointer(self.at)
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Fills it with zeros, in the order of a stream.
    ///
    /// # Errors
    /// When the card is lost.
    pub fn zero(&self, stream: &Stream) -> Result<(), CudaError> {
        stream.card.bind()?;
        // SAFETY: the range is one allocation.
        unsafe { result::memset_d8_async(self.at, 0, self.bytes, stream.stream.cu_stream()) }
            .map_err(|e| stream.card.failed("cuMemsetD8Async", e))
    }

    /// Copies all of it from another of the same length, in the order of a stream.
    ///
    /// # Errors
    /// When the lengths differ, or the card is lost.
    pub fn copy(&self, from: &Self, stream: &Stream) -> Result<(), CudaError> {
        if from.bytes != self.bytes {
            return Err(CudaError::Shape(format!("{} bytes into {}", from.bytes, self.bytes)));
        }
        stream.card.bind()?;
        let stream_of = stream.stream.cu_stream();
        // SAFETY: both are allocations of that length.
        unsafe { result::memcpy_dtod_async(self.at, from.at, self.bytes, stream_of) }
            .map_err(|e| stream.card.failed("cuMemcpyDtoDAsync", e))
    }

    /// Copies `from` to `offset` bytes behind the beginning, in the order of a stream, and waits
    /// for that stream alone: others of the card may be under way, or captured.
    ///
    /// # Errors
    /// When it does not fit, or the card is lost.
    pub fn write<T: Plain>(
        &self,
        stream: &Stream,
        offset: usize,
        from: &[T],
    ) -> Result<(), CudaError> {
        let len = size_of_val(from);
        if offset.checked_add(len).is_none_or(|end| end > self.bytes) {
            return Err(CudaError::Shape(format!("{len} bytes at {offset} of {}", self.bytes)));
        }
        if len == 0 {
            return Ok(());
        }
        stream.card.bind()?;
        // SAFETY: the range lies in this allocation, and `from` stays until it was waited for.
        unsafe {
            let at = self.at + offset as u64;
            result::memcpy_htod_async(at, from, stream.stream.cu_stream())
        }
        .map_err(|e| stream.card.failed("cuMemcpyHtoDAsync", e))?;
        stream.wait()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A context that is broken has freed it.
        if self.card.bind().is_ok() {
            // SAFETY: allocated by `new`, freed once; the driver waits for work that uses it.
            let _ =
                unsafe { result::free_sync(self.at) }.map_err(|e| self.card.failed("cuMemFree", e));
        }
    }
}

/// Host memory that the card copies to and from by itself. Who looks at it waits for the copies.
pub struct Pinned {
    at: *mut u8,
    bytes: usize,
    stream: Stream,
    /// How often the stream had been waited for when the last copy was started.
    copied: Option<u64>,
}

// SAFETY: it owns its memory, which any thread may use.
unsafe impl Send for Pinned {}

impl Pinned {
    /// So many bytes, zeroed, for copies in the order of a stream.
    ///
    /// # Errors
    /// When the system refuses them.
    pub fn new(stream: &Stream, bytes: usize) -> Result<Self, CudaError> {
        stream.card.bind()?;
        let bytes = bytes.max(1);
        // SAFETY: freed once, when it is dropped.
        let at = unsafe { result::malloc_host(bytes, 0) }
            .map_err(|e| stream.card.failed("cuMemHostAlloc", e))?;
        // SAFETY: so many bytes were allocated.
        unsafe { at.cast::<u8>().write_bytes(0, bytes) };
        Ok(Self { at: at.cast(), bytes, stream: stream.clone(), copied: None })
    }

    /// Its length in bytes.
    pub fn size(&self) -> usize {
        self.bytes
    }

    /// The bytes, when all copies are done.
    ///
    /// # Errors
    /// When work of the stream failed.
    pub fn bytes(&mut self) -> Result<&mut [u8], CudaError> {
        if self.is_busy() {
            self.stream.wait()?;
        }
        // SAFETY: so many bytes were allocated and written, and no copy is under way.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.at, self.bytes) })
    }

    /// Whether a copy may be under way: one was started, and the stream not waited for since.
    fn is_busy(&self) -> bool {
        self.copied == Some(self.stream.waits.load(Ordering::Relaxed))
    }

    /// Starts a copy of the first `bytes` to the card.
    ///
    /// # Errors
    /// When it does not fit, or the card is lost.
    pub fn send(&mut self, to: &Memory, bytes: usize) -> Result<(), CudaError> {
        self.check(to, bytes)?;
        self.copied = Some(self.stream.waits.load(Ordering::Relaxed));
        // SAFETY: both ranges are that long; `bytes` and `drop` wait before they let anybody write.
        unsafe {
            let from = std::slice::from_raw_parts(self.at, bytes);
            result::memcpy_htod_async(to.at, from, self.stream.stream.cu_stream())
        }
        .map_err(|e| self.stream.card.failed("cuMemcpyHtoDAsync", e))
    }

    /// Starts a copy of a range of `from` to the same place here.
    ///
    /// # Errors
    /// When it does not fit, or the card is lost.
    pub fn fetch(&mut self, from: &Memory, range: Range<usize>) -> Result<(), CudaError> {
        self.check(from, range.end)?;
        self.copied = Some(self.stream.waits.load(Ordering::Relaxed));
        // SAFETY: as for `send`; nobody reads before the copy is done.
        unsafe {
            let to = std::slice::from_raw_parts_mut(self.at.add(range.start), range.len());
            let from = from.at + range.start as u64;
            result::memcpy_dtoh_async(to, from, self.stream.stream.cu_stream())
        }
        .map_err(|e| self.stream.card.failed("cuMemcpyDtoHAsync", e))
    }

    fn check(&self, memory: &Memory, end: usize) -> Result<(), CudaError> {
        if end > self.bytes || end > memory.bytes {
            return Err(CudaError::Shape(format!("a copy of {end} bytes does not fit")));
        }
        self.stream.card.bind()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.is_busy() {
            let _ = self.stream.wait();
        }
        // SAFETY: allocated by `new`, freed once; no copy is under way, or none can be
        // any more because the context is broken.
        let _ = unsafe { result::free_host(self.at.cast()) };
    }
}
