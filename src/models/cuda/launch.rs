//! The driver's side of the engine: a card, its kernels, memory, streams and graphs. All `unsafe` of
//! this path is in this file.
//!
//! Rust never refers to device memory: it is known by addresses, and only kernels and copies touch
//! it. So a launch cannot break Rust's rules as long as the driver reads as many bytes of each
//! argument as it was given, which [`Stream::launch`] checks against the PTX. A kernel that gets a
//! wrong address damages the card's own data, or ends the context with a named error.

use super::error::CudaError;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaContext, CudaGraph, CudaStream, sys};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// The kernels: PTX 9.0 for sm_80, which drivers from 580 on compile for the card at hand.
const PTX: [&str; 9] = [
    include_str!("../../../kernels/attend.sm_80.ptx"),
    include_str!("../../../kernels/draw.sm_80.ptx"),
    include_str!("../../../kernels/embed.sm_80.ptx"),
    include_str!("../../../kernels/experts.sm_80.ptx"),
    include_str!("../../../kernels/gate.sm_80.ptx"),
    include_str!("../../../kernels/matmul_portable.sm_80.ptx"),
    include_str!("../../../kernels/norm.sm_80.ptx"),
    include_str!("../../../kernels/proof.sm_80.ptx"),
    include_str!("../../../kernels/qkv_finish.sm_80.ptx"),
];
/// The CUDA version of that PTX, as a driver counts.
const CUDA_MIN: u32 = 13_000;
/// Compute capability that the PTX is for.
const CAPABILITY_MIN: (i32, i32) = (8, 0);
/// Dynamic shared memory that a kernel has without asking.
const SHARED_DEFAULT: usize = 48 << 10;
/// Thread blocks in the second and third dimension of a grid.
pub const GRID_MAX: usize = 65_535;
/// Words of the largest argument.
const ARG_WORDS: usize = 3;

/// One card with the kernels loaded. All passes on a card share it.
pub struct Card {
    ordinal: usize,
    name: String,
    context: Arc<CudaContext>,
    functions: HashMap<&'static str, Function>,
    lost: Mutex<Option<CudaError>>,
}

/// A kernel: its handle, and the bytes of each of its parameters.
struct Function {
    handle: sys::CUfunction,
    sizes: Vec<usize>,
}

// SAFETY: a function's handle may be used from any thread while its module is loaded, which is as
// long as the program runs; nothing here is written after it is made.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// How many cards there are.
///
/// # Errors
/// When there is no driver, or it is too old for the kernels.
pub fn cards() -> Result<usize, CudaError> {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: the library's constructors run, as they would for any program that links it.
    if !*PRESENT.get_or_init(|| unsafe { sys::is_culib_present() }) {
        return Err(CudaError::NoDriver);
    }
    let mut have = 0;
    // SAFETY: the library is there, and writes one number.
    let code = unsafe { sys::cuDriverGetVersion(&raw mut have) };
    let have = if code == sys::CUresult::CUDA_SUCCESS { have as u32 } else { 0 };
    if have < CUDA_MIN {
        return Err(CudaError::OldDriver { have, need: CUDA_MIN });
    }
    // A driver without a card answers with an error of its own.
    Ok(CudaContext::device_count().map_or(0, |count| count.max(0) as usize))
}

impl Card {
    /// The card of this number, opened once and for as long as the program runs.
    ///
    /// # Errors
    /// When there is none, or it cannot run the kernels.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, CudaError> {
        static OPEN: Mutex<Vec<Arc<Card>>> = Mutex::new(Vec::new());
        let count = cards()?;
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        let mut open = OPEN.lock();
        if let Some(card) = open.iter().find(|card| card.ordinal == ordinal) {
            return Ok(Arc::clone(card));
        }
        let card = Arc::new(Self::load(ordinal)?);
        open.push(Arc::clone(&card));
        Ok(card)
    }

    fn load(ordinal: usize) -> Result<Self, CudaError> {
        let refused = |call| move |e: DriverError| failure(ordinal, call, e);
        let context = CudaContext::new(ordinal).map_err(refused("cuDevicePrimaryCtxRetain"))?;
        let name = context.name().map_err(refused("cuDeviceGetName"))?;
        let capability = context.compute_capability().map_err(refused("cuDeviceGetAttribute"))?;
        if capability < CAPABILITY_MIN {
            return Err(CudaError::Architecture { ordinal, name, capability });
        }
        let mut card =
            Self { ordinal, name, context, functions: HashMap::new(), lost: Mutex::new(None) };
        for text in PTX {
            card.load_module(text)?;
        }
        Ok(card)
    }

    fn load_module(&mut self, text: &'static str) -> Result<(), CudaError> {
        let ordinal = self.ordinal;
        let failed = |call| move |e: DriverError| failure(ordinal, call, e);
        let image = CString::new(text).map_err(|_| CudaError::Shape("PTX has a zero".into()))?;
        // SAFETY: the image is PTX that ends with a zero, and outlives the call.
        let module = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) }
            .map_err(failed("cuModuleLoadData"))?;
        for (name, sizes) in entries(text) {
            let c_name = CString::new(name).map_err(|_| CudaError::Shape(name.into()))?;
            // SAFETY: the module was loaded above and is never unloaded.
            let handle = unsafe { result::module::get_function(module, c_name) }
                .map_err(failed("cuModuleGetFunction"))?;
            self.functions.insert(name, Function { handle, sizes });
        }
        Ok(())
    }

    /// Its number.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// The maker's name of it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of memory: free, and all.
    ///
    /// # Errors
    /// When the card is lost.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        self.check()?;
        self.context.mem_get_info().map_err(|e| self.failed("cuMemGetInfo", e))
    }

    /// A stream: what is put on it happens in order.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn stream(self: &Arc<Self>) -> Result<Stream, CudaError> {
        self.check()?;
        let stream = self.context.new_stream().map_err(|e| self.failed("cuStreamCreate", e))?;
        Ok(Stream { card: Arc::clone(self), stream })
    }

    /// Memory on the card, not zeroed; `what` is for the error.
    ///
    /// # Errors
    /// When so much is not free.
    pub fn allocate(
        self: &Arc<Self>,
        bytes: usize,
        what: &'static str,
    ) -> Result<Memory, CudaError> {
        self.bind()?;
        let bytes = bytes.max(1);
        // SAFETY: the context is current; the address is only given to kernels and copies.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(at) => Ok(Memory { at, bytes, card: Arc::clone(self) }),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let free = result::mem_get_info().map_or(0, |(free, _)| free);
                Err(CudaError::OutOfMemory { ordinal: self.ordinal, what, needed: bytes, free })
            }
            Err(error) => Err(self.failed("cuMemAlloc", error)),
        }
    }

    /// Waits for all that was put on the card.
    ///
    /// # Errors
    /// When something of it failed.
    pub fn settle(&self) -> Result<(), CudaError> {
        self.check()?;
        self.context.synchronize().map_err(|e| self.failed("cuCtxSynchronize", e))
    }

    /// Whether it still works for this process.
    fn check(&self) -> Result<(), CudaError> {
        self.lost.lock().clone().map_or(Ok(()), Err)
    }

    fn bind(&self) -> Result<(), CudaError> {
        self.check()?;
        self.context.bind_to_thread().map_err(|e| self.failed("cuCtxSetCurrent", e))
    }

    /// The error of a call; remembers what the card cannot recover from.
    fn failed(&self, call: &'static str, error: DriverError) -> CudaError {
        let error = failure(self.ordinal, call, error);
        if let CudaError::Lost { .. } = error {
            self.lost.lock().get_or_insert(error.clone());
        }
        error
    }
}

/// The error of a call on a card.
fn failure(ordinal: usize, call: &'static str, error: DriverError) -> CudaError {
    let code = error.0 as u32;
    let text = error.error_string().map_or("?".into(), |t| t.to_string_lossy().into_owned());
    match code {
        // Values, images, handles, names, resources of one launch, unsupported, captures.
        1
        | 2
        | 200
        | 209
        | 218
        | 222
        | 223
        | 301
        | 400
        | 401
        | 500
        | 600
        | 701
        | 801
        | 900..=907 => CudaError::Refused { ordinal, call, code, text },
        // Everything else breaks the context.
        _ => CudaError::Lost { ordinal, call, code, text },
    }
}

/// The kernels of a PTX text, with the bytes of their parameters.
fn entries(ptx: &'static str) -> Vec<(&'static str, Vec<usize>)> {
    // `.param .align 8 .b8 name[24]`, or `.param .u64 name`.
    let size = |parameter: &str| match parameter.split_once('[') {
        Some((_, len)) => len.trim_end_matches(']').parse().unwrap_or(0),
        None => {
            let digits = parameter.trim_start_matches(|c: char| !c.is_ascii_digit());
            let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
            digits[..end].parse::<usize>().unwrap_or(0) / 8
        }
    };
    let entry = |text: &'static str| {
        let (name, rest) = text.split_once('(')?;
        let (parameters, _) = rest.split_once(')')?;
        let parameters = parameters.split(',').map(str::trim).filter(|p| !p.is_empty());
        Some((name.trim(), parameters.map(size).collect()))
    };
    ptx.split(".entry ").skip(1).filter_map(entry).collect()
}

/// A place on a card.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pointer(u64);

impl Pointer {
    /// Nothing.
    pub const NULL: Self = Self(0);

    /// So many bytes further.
    pub fn plus(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// Memory on a card; freed when it is dropped, after all work that was put on the card.
pub struct Memory {
    at: sys::CUdeviceptr,
    bytes: usize,
    card: Arc<Card>,
}

impl Memory {
    /// Where it begins.
    pub fn pointer(&self) -> Pointer {
        Pointer(self.at)
    }

    /// Its length.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies `from` to `offset` bytes behind the beginning. Done when the card has
    /// [settled](Card::settle).
    ///
    /// # Errors
    /// When it does not fit, or the card is lost.
    pub fn write<T: Plain>(&self, offset: usize, from: &[T]) -> Result<(), CudaError> {
        let len = size_of_val(from);
        if offset.checked_add(len).is_none_or(|end| end > self.bytes) {
            return Err(CudaError::Shape(format!("{len} bytes at {offset} of {}", self.bytes)));
        }
        if len == 0 {
            return Ok(());
        }
        self.card.bind()?;
        // SAFETY: the range lies in this allocation; the driver has read `from` when it returns.
        unsafe { result::memcpy_htod_sync(self.at + offset as u64, from) }
            .map_err(|e| self.card.failed("cuMemcpyHtoD", e))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A context that is broken has freed it.
        if self.card.bind().is_ok() {
            // SAFETY: allocated by `allocate`, freed once; the driver waits for work that uses it.
            let _ =
                unsafe { result::free_sync(self.at) }.map_err(|e| self.card.failed("cuMemFree", e));
        }
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
plain!(u8, i8, u16, i16, u32, i32, u64, f32, f64, Tile, Rule, Entry, Query);

/// Queries of one sequence that one thread block attends (`attend.cu`): query i is row `first_row`
/// + i / group of the batch, which is at position `start` + i / group.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Tile {
    /// The sequence's first row in the batch.
    pub row_zero: i32,
    /// Position of that row.
    pub start: i32,
    /// First query.
    pub first_query: i32,
    /// How many.
    pub queries: i32,
    /// Where the sequence's block table begins.
    pub table: i32,
    /// Fills up.
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
    /// Fills up.
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
    /// Position.
    pub position: u32,
    /// Place among the results; negative skips the row.
    pub slot: i32,
}

/// A token of a row of logits (`draw.cu`); `u32::MAX` is the one that was drawn.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// The row.
    pub row: u32,
    /// The token.
    pub token: u32,
}

/// Shape of an attention layer (`attend.cu`).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Query heads.
    pub heads: i32,
    /// Key/value heads.
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
#[derive(Clone, Copy)]
pub struct Arg {
    words: [u64; ARG_WORDS],
    size: usize,
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

impl From<&Memory> for Arg {
    fn from(memory: &Memory) -> Self {
        Self::one(memory.at, 8)
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

impl From<Shape> for Arg {
    fn from(shape: Shape) -> Self {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let words = [
            pair(shape.heads as u32, shape.kv_heads as u32),
            pair(shape.head_dim as u32, shape.window as u32),
            pair(shape.scale.to_bits(), shape.cap.to_bits()),
        ];
        Self { words, size: size_of::<Shape>() }
    }
}

/// The arguments of a launch, in the kernel's order.
macro_rules! args {
    ($($value:expr),* $(,)?) => { &[$($crate::models::cuda::launch::Arg::from($value)),*] };
}
pub(super) use args;

/// Work on a card, in order.
pub struct Stream {
    card: Arc<Card>,
    stream: Arc<CudaStream>,
}

impl Stream {
    /// The card.
    pub fn card(&self) -> &Arc<Card> {
        &self.card
    }

    /// Puts a kernel on the stream: thread blocks, threads of each, bytes of dynamic shared memory.
    ///
    /// # Errors
    /// When the arguments are not the kernel's, the driver refuses, or the card is lost.
    pub fn launch(
        &self,
        kernel: &'static str,
        grid: [usize; 3],
        threads: u32,
        shared: usize,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        let Some(function) = self.card.functions.get(kernel) else {
            return Err(CudaError::Shape(format!("no kernel {kernel}")));
        };
        if !function.sizes.iter().eq(args.iter().map(|arg| &arg.size)) {
            return Err(CudaError::Shape(format!("{kernel}: arguments of other sizes")));
        }
        if grid.contains(&0) || grid[0] > i32::MAX as usize || grid[1].max(grid[2]) > GRID_MAX {
            return Err(CudaError::Shape(format!("{kernel}: a grid of {grid:?}")));
        }
        self.card.bind()?;
        if shared > SHARED_DEFAULT {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function lives as long as its card.
            unsafe {
                result::function::set_function_attribute(function.handle, attribute, shared as i32)
            }
            .map_err(|e| self.card.failed(kernel, e))?;
        }
        let mut pointers: Vec<*mut c_void> =
            args.iter().map(|arg| arg.words.as_ptr().cast_mut().cast()).collect();
        // SAFETY: there is a pointer for each parameter, to at least as many bytes as it has; the
        // driver reads them before it returns. Addresses among them are of device memory.
        unsafe {
            result::launch_kernel(
                function.handle,
                (grid[0] as u32, grid[1] as u32, grid[2] as u32),
                (threads, 1, 1),
                shared as u32,
                self.stream.cu_stream(),
                &mut pointers,
            )
        }
        .map_err(|e| self.card.failed(kernel, e))
    }

    /// Fills memory with zeros.
    ///
    /// # Errors
    /// When the card is lost.
    pub fn zero(&self, memory: &Memory) -> Result<(), CudaError> {
        self.card.bind()?;
        // SAFETY: the range is one allocation.
        unsafe { result::memset_d8_async(memory.at, 0, memory.bytes, self.stream.cu_stream()) }
            .map_err(|e| self.card.failed("cuMemsetD8Async", e))
    }

    /// Waits for everything that was put on it.
    ///
    /// # Errors
    /// When something of it failed.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.card.bind()?;
        self.stream.synchronize().map_err(|e| self.card.failed("cuStreamSynchronize", e))
    }

    /// Host memory that copies of this stream go through.
    ///
    /// # Errors
    /// When the system refuses it.
    pub fn pinned(&self, bytes: usize) -> Result<Pinned, CudaError> {
        self.card.bind()?;
        let bytes = bytes.max(1);
        // SAFETY: freed once, by `Pinned`.
        let at = unsafe { result::malloc_host(bytes, 0) }
            .map_err(|e| self.card.failed("cuMemHostAlloc", e))?;
        // SAFETY: so many bytes were allocated.
        unsafe { at.cast::<u8>().write_bytes(0, bytes) };
        let stream = Stream { card: Arc::clone(&self.card), stream: Arc::clone(&self.stream) };
        Ok(Pinned { at: at.cast(), bytes, stream, is_busy: false })
    }

    /// Records what `work` puts on the stream, to be run again and again.
    ///
    /// # Errors
    /// When `work` fails or does what a capture forbids.
    pub fn capture(
        &self,
        work: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<Graph, CudaError> {
        self.card.bind()?;
        let failed = |call| move |e: DriverError| self.card.failed(call, e);
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(failed("cuStreamBeginCapture"))?;
        let outcome = work();
        // The capture ends whatever happened in it.
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0));
        outcome?;
        match graph.map_err(failed("cuStreamEndCapture"))? {
            Some(graph) => Ok(Graph { graph, card: Arc::clone(&self.card) }),
            None => Err(CudaError::Shape("an empty capture".into())),
        }
    }
}

/// Launches that were recorded, with their arguments.
pub struct Graph {
    graph: CudaGraph,
    card: Arc<Card>,
}

// SAFETY: a graph may be used from any thread, by one at a time; `launch` wants it exclusively.
unsafe impl Send for Graph {}

impl Graph {
    /// Puts all of it on its stream.
    ///
    /// # Errors
    /// When the driver refuses, or the card is lost.
    pub fn launch(&mut self) -> Result<(), CudaError> {
        self.card.bind()?;
        self.graph.launch().map_err(|e| self.card.failed("cuGraphLaunch", e))
    }
}

/// Host memory that the card copies to and from by itself. Whoever looks at it waits for the copies.
pub struct Pinned {
    at: *mut u8,
    bytes: usize,
    stream: Stream,
    is_busy: bool,
}

// SAFETY: it owns its memory, which any thread may use.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Its length.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// The bytes, when all copies are done.
    ///
    /// # Errors
    /// When work of the stream failed.
    pub fn bytes(&mut self) -> Result<&mut [u8], CudaError> {
        if self.is_busy {
            self.stream.wait()?;
            self.is_busy = false;
        }
        // SAFETY: so many bytes were allocated and written, and no copy is under way.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.at, self.bytes) })
    }

    /// Starts a copy of the first `bytes` to the card.
    ///
    /// # Errors
    /// When it does not fit, or the card is lost.
    pub fn send(&mut self, to: &Memory, bytes: usize) -> Result<(), CudaError> {
        self.check(to, bytes)?;
        self.is_busy = true;
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
        self.is_busy = true;
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
        if self.is_busy {
            let _ = self.stream.wait();
        }
        // SAFETY: allocated by `Stream::pinned`, freed once; no copy is under way, or none can be
        // any more because the context is broken.
        let _ = unsafe { result::free_host(self.at.cast()) };
    }
}

/// The bytes of values.
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
    fn parameters_of_the_ptx_are_read() {
        let all: HashMap<_, _> = PTX.iter().flat_map(|text| entries(text)).collect();
        assert_eq!(all["embed"], [8, 8, 8, 4, 4, 4, 4]);
        assert_eq!(all["attend_bf16_4"], [8, 8, 8, 8, 8, 8, 8, size_of::<Shape>(), 4, 4]);
        assert_eq!(all["softcap"], [8, 8, 4]);
        assert!(all.len() >= 31, "{}", all.len());
    }

    #[test]
    fn structures_have_the_sizes_of_the_kernels() {
        assert_eq!([size_of::<Tile>(), size_of::<Shape>()], [24, 24]);
        assert_eq!([size_of::<Rule>(), size_of::<Entry>(), size_of::<Query>()], [32, 24, 8]);
        let shape = Shape { heads: 1, kv_heads: 2, head_dim: 3, window: 4, scale: 5.0, cap: 6.0 };
        let arg = Arg::from(shape);
        assert_eq!(arg.words[1], 3 | 4 << 32);
        assert_eq!(arg.words[2] >> 32, u64::from(6.0_f32.to_bits()));
    }
}
