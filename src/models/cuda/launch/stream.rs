//! Runs work on a card: launches, waits, captures.

use super::super::error::CudaError;
use super::card::{Card, KernelHandle};
use super::plain::Arg;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaGraph, CudaStream, sys};
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Thread blocks in the second and third dimension of a grid.
pub const GRID_MAX: usize = 65_535;

/// Work on a card, in order.
#[derive(Clone)]
pub struct Stream {
    pub(super) card: Arc<Card>,
    pub(super) stream: Arc<CudaStream>,
    /// How often it was waited for.
    pub(super) waits: Arc<AtomicU64>,
}

impl Stream {
    /// A new one.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn new(card: &Arc<Card>) -> Result<Self, CudaError> {
        card.check()?;
        let stream = card.context.new_stream().map_err(|e| card.failed("cuStreamCreate", e))?;
        Ok(Self { card: Arc::clone(card), stream, waits: Arc::default() })
    }

    /// The card that its work runs on.
    pub fn card(&self) -> &Arc<Card> {
        &self.card
    }

    /// Puts launches on the stream.
    ///
    /// # Errors
    /// When the driver refuses one, or the card is lost.
    pub fn run(&self, launches: &[Launch]) -> Result<(), CudaError> {
        self.card.bind()?;
        launches.iter().try_for_each(|launch| self.put(launch))
    }

    fn put(&self, launch: &Launch) -> Result<(), CudaError> {
        let Launch { kernel, grid, threads, shared, args } = launch;
        let failed = |e: DriverError| self.card.failed(kernel, e);
        let function = launch.function(&self.card)?;
        let mut pointers: Vec<*mut c_void> =
            args.iter().map(|arg| arg.words.as_ptr().cast_mut().cast()).collect();
        // SAFETY: there is a pointer for each parameter, to at least as many bytes as it has, which
        // `Launch::function` checked; the driver reads them before it returns. Addresses among them
        // are of device memory.
        unsafe {
            result::launch_kernel(
                function.handle,
                (grid[0] as u32, grid[1] as u32, grid[2] as u32),
                (*threads, 1, 1),
                *shared as u32,
                self.stream.cu_stream(),
                &mut pointers,
            )
        }
        .map_err(failed)
    }

    /// Waits for everything that was put on it.
    ///
    /// # Errors
    /// When something of it failed.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.card.bind()?;
        self.stream.synchronize().map_err(|e| self.card.failed("cuStreamSynchronize", e))?;
        self.waits.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Records launches, to be run again and again.
    ///
    /// # Errors
    /// When one of them fails or does what a capture forbids.
    pub fn capture(&self, launches: &[Launch]) -> Result<Graph, CudaError> {
        self.card.bind()?;
        let failed = |call| move |e: DriverError| self.card.failed(call, e);
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(failed("cuStreamBeginCapture"))?;
        let outcome = self.run(launches);
        // The capture ends whatever happened in it.
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0));
        outcome?;
        match graph.map_err(failed("cuStreamEndCapture"))? {
            Some(graph) => Ok(Graph { graph, card: Arc::clone(&self.card) }),
            None => Err(CudaError::Shape("an empty capture".into())),
        }
    }
}

/// One launch of a kernel.
#[derive(Clone, PartialEq)]
pub struct Launch {
    /// Name of the kernel in its module.
    pub kernel: &'static str,
    /// Thread blocks in x, y and z.
    pub grid: [usize; 3],
    /// Threads of each thread block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: usize,
    /// The kernel's arguments, in its order.
    pub args: Vec<Arg>,
}

impl Launch {
    /// Its kernel on a card.
    ///
    /// # Errors
    /// When there is none, its parameters have other sizes, or the grid is none.
    fn function<'a>(&self, card: &'a Card) -> Result<&'a KernelHandle, CudaError> {
        let Self { kernel, grid, args, .. } = self;
        let Some(function) = card.functions.get(kernel) else {
            return Err(CudaError::Shape(format!("no kernel {kernel}")));
        };
        if !function.sizes.iter().eq(args.iter().map(|arg| &arg.size)) {
            return Err(CudaError::Shape(format!("{kernel}: arguments of other sizes")));
        }
        if grid.contains(&0) || grid[0] > i32::MAX as usize || grid[1].max(grid[2]) > GRID_MAX {
            return Err(CudaError::Shape(format!("{kernel}: a grid of {grid:?}")));
        }
        Ok(function)
    }
}

/// Launches that were recorded, with their arguments and all addresses in them.
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
