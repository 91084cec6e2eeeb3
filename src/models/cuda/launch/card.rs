//! Opens a card: its driver, its kernels, its errors.

use super::super::error::CudaError;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaContext, sys};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::Arc;

/// The kernels: PTX 9.0 for sm_80, which drivers from 580 on compile for the card at hand.
const PTX: [&str; 12] = [
    include_str!("../../../../kernels/attend.sm_80.ptx"),
    include_str!("../../../../kernels/attend_tensor.sm_80.ptx"),
    include_str!("../../../../kernels/ceiling.sm_80.ptx"),
    include_str!("../../../../kernels/draw.sm_80.ptx"),
    include_str!("../../../../kernels/embed.sm_80.ptx"),
    include_str!("../../../../kernels/experts.sm_80.ptx"),
    include_str!("../../../../kernels/gate.sm_80.ptx"),
    include_str!("../../../../kernels/matmul_portable.sm_80.ptx"),
    include_str!("../../../../kernels/matmul_tensor.sm_80.ptx"),
    include_str!("../../../../kernels/norm.sm_80.ptx"),
    include_str!("../../../../kernels/proof.sm_80.ptx"),
    include_str!("../../../../kernels/qkv_finish.sm_80.ptx"),
];
/// The CUDA version of that PTX, as a driver counts.
const CUDA_MIN: u32 = 13_000;
/// Compute capability that the PTX is for.
const CAPABILITY_MIN: (i32, i32) = (8, 0);
/// Bytes that the driver's compiler may say of an error.
const LOG_BYTES: usize = 4096;
/// How PTX declares shared memory whose size each launch says.
const DYNAMIC_SHARED: &str = ".extern .shared";
/// Bytes of a place on the PCI bus, with the zero at its end.
const BUS_BYTES: usize = 32;

/// One card with the kernels loaded. All passes on a card share it.
pub struct Card {
    ordinal: usize,
    name: String,
    capability: (i32, i32),
    pub(super) context: Arc<CudaContext>,
    pub(super) functions: HashMap<&'static str, KernelHandle>,
    lost: Mutex<Option<CudaError>>,
}

/// A kernel: its handle, and the bytes of each of its parameters.
pub(super) struct KernelHandle {
    pub(super) handle: sys::CUfunction,
    pub(super) sizes: Vec<usize>,
}

// SAFETY: a function's handle may be used from any thread while its module is loaded, which is as
// long as the program runs; nothing here is written after it is made.
unsafe impl Send for KernelHandle {}
// SAFETY: as above.
unsafe impl Sync for KernelHandle {}

/// How many cards there are.
///
/// # Errors
/// When there is no driver, it does not work, or it is too old for the kernels.
pub fn cards() -> Result<usize, CudaError> {
    if !has_driver() {
        return Err(CudaError::NoDriver);
    }
    let failed = |call| {
        move |error: DriverError| {
            let (code, text) = said(error);
            CudaError::Driver { call, code, text }
        }
    };
    let mut have = 0;
    // SAFETY: the library is there, and writes one number.
    let code = unsafe { sys::cuDriverGetVersion(&raw mut have) };
    code.result().map_err(failed("cuDriverGetVersion"))?;
    let have = have as u32;
    if have < CUDA_MIN {
        return Err(CudaError::OldDriver { have, need: CUDA_MIN });
    }
    match result::init() {
        Ok(()) => {}
        // A driver that works, on a machine without a card.
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(0),
        Err(error) => return Err(failed("cuInit")(error)),
    }
    let count = result::device::get_count().map_err(failed("cuDeviceGetCount"))?;
    Ok(count.max(0) as usize)
}

/// Whether the driver's library can be loaded.
#[cfg(not(feature = "mistralrs-cuda"))]
fn has_driver() -> bool {
    static PRESENT: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    // SAFETY: the library's constructors run, as they would for any program that links it.
    *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() })
}

/// A program that has mistral.rs for cards is linked with the library, and does not start without.
#[cfg(feature = "mistralrs-cuda")]
fn has_driver() -> bool {
    true
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
        let refused = |call| move |e: DriverError| refusal(ordinal, call, e);
        let context = CudaContext::new(ordinal).map_err(refused("cuDevicePrimaryCtxRetain"))?;
        // SAFETY: that tracks only memory that the library holds itself, and it holds none here.
        // With it, the first stream would wait for the whole context.
        unsafe { context.disable_event_tracking() };
        let name = context.name().map_err(refused("cuDeviceGetName"))?;
        let capability = context.compute_capability().map_err(refused("cuDeviceGetAttribute"))?;
        if capability < CAPABILITY_MIN {
            return Err(CudaError::Architecture { ordinal, name, capability });
        }
        let mut card = Self {
            ordinal,
            name,
            capability,
            context,
            functions: HashMap::new(),
            lost: Mutex::new(None),
        };
        for text in PTX {
            card.load_module(text)?;
        }
        Ok(card)
    }

    fn load_module(&mut self, text: &'static str) -> Result<(), CudaError> {
        let ordinal = self.ordinal;
        let failed = |call| move |e: DriverError| refusal(ordinal, call, e);
        let module = compiled(ordinal, text)?;
        for (name, sizes) in entries(text) {
            let c_name = CString::new(name).map_err(|_| CudaError::Shape(name.into()))?;
            // SAFETY: the module was loaded above and is never unloaded.
            let handle = unsafe { result::module::get_function(module, c_name) }
                .map_err(failed("cuModuleGetFunction"))?;
            if text.contains(DYNAMIC_SHARED) {
                self.allow_shared(handle).map_err(failed("cuFuncSetAttribute"))?;
            }
            self.functions.insert(name, KernelHandle { handle, sizes });
        }
        Ok(())
    }

    /// Lets a kernel take all the shared memory that a block may have. All passes of the card share
    /// the kernel, so what one of them allowed before its launch, another would take back.
    fn allow_shared(&self, function: sys::CUfunction) -> Result<(), DriverError> {
        use sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as MOST;
        use sys::CUfunction_attribute::{
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as DYNAMIC,
            CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES as STATIC,
        };
        let most = self.context.attribute(MOST)?;
        // SAFETY: the function's module was loaded before, and is never unloaded.
        unsafe {
            let taken = result::function::get_function_attribute(function, STATIC)?;
            result::function::set_function_attribute(function, DYNAMIC, most - taken)
        }
    }

    /// The number that the driver gives the card, from 0.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// The maker's name of it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its place on the PCI bus, such as `0000:1b:00.0`, by which other tools of the driver know it
    /// too.
    ///
    /// # Errors
    /// When the driver does not say.
    pub fn bus(&self) -> Result<String, CudaError> {
        let mut text = [0_u8; BUS_BYTES];
        // SAFETY: the driver writes at most as many bytes as it is told, with a zero at the end.
        let code = unsafe {
            sys::cuDeviceGetPCIBusId(
                text.as_mut_ptr().cast::<c_char>(),
                BUS_BYTES as i32,
                self.context.cu_device(),
            )
        };
        code.result().map_err(|e| self.failed("cuDeviceGetPCIBusId", e))?;
        let end = text.iter().position(|byte| *byte == 0).unwrap_or(BUS_BYTES);
        Ok(String::from_utf8_lossy(&text[..end]).into_owned())
    }

    /// How many multiprocessors it has.
    ///
    /// # Errors
    /// When the driver does not say.
    pub fn multiprocessors(&self) -> Result<usize, CudaError> {
        self.count(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
    }

    /// How many threads one of them holds at once.
    ///
    /// # Errors
    /// When the driver does not say.
    pub fn multiprocessor_threads(&self) -> Result<usize, CudaError> {
        self.count(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR)
    }

    fn count(&self, attribute: sys::CUdevice_attribute) -> Result<usize, CudaError> {
        let count = self.context.attribute(attribute);
        count.map(|n| n.max(1) as usize).map_err(|e| self.failed("cuDeviceGetAttribute", e))
    }

    /// The canon of rows that its tensor cores compute. How these add within one instruction is a
    /// matter of the architecture, so its number is in the name; the last number counts our orders.
    pub fn tensor_canon(&self) -> String {
        let (major, minor) = self.capability;
        format!("mma-sm{major}{minor}-2")
    }

    /// Bytes of memory: free, and all.
    ///
    /// # Errors
    /// When the card is lost.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        self.check()?;
        self.context.mem_get_info().map_err(|e| self.failed("cuMemGetInfo", e))
    }

    /// Whether it still works for this process.
    pub(super) fn check(&self) -> Result<(), CudaError> {
        self.lost.lock().clone().map_or(Ok(()), Err)
    }

    /// Makes its context this thread's.
    pub(super) fn bind(&self) -> Result<(), CudaError> {
        self.check()?;
        self.context.bind_to_thread().map_err(|e| self.failed("cuCtxSetCurrent", e))
    }

    /// The error of a call; remembers what the card cannot recover from.
    pub(super) fn failed(&self, call: &'static str, error: DriverError) -> CudaError {
        let error = failure(self.ordinal, call, error);
        if let CudaError::Lost { .. } = error {
            self.lost.lock().get_or_insert(error.clone());
        }
        error
    }
}

/// Has the driver compile PTX for the current card. What its compiler says of an error is part of
/// the error.
fn compiled(ordinal: usize, text: &str) -> Result<sys::CUmodule, CudaError> {
    use sys::CUjit_option::{CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
    let image = CString::new(text).map_err(|_| CudaError::Shape("PTX has a zero".into()))?;
    // Zeroed, and one byte larger than the driver knows: what it writes ends with a zero.
    let mut log = [0_u8; LOG_BYTES + 1];
    let mut options = [CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // The second value is a number in the place of an address.
    let mut values =
        [log.as_mut_ptr().cast::<c_void>(), std::ptr::without_provenance_mut(LOG_BYTES)];
    let mut module = std::ptr::null_mut();
    // SAFETY: the image is PTX that ends with a zero; there is a value for each option, and the
    // log has as many bytes as the driver is told. All of them outlive the call.
    let code = unsafe {
        sys::cuModuleLoadDataEx(
            &raw mut module,
            image.as_ptr().cast::<c_void>(),
            options.len() as u32,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    let Err(error) = code.result() else { return Ok(module) };
    let (code, mut text) = said(error);
    let log = CStr::from_bytes_until_nul(&log).map(CStr::to_string_lossy).unwrap_or_default();
    if !log.trim().is_empty() {
        text = format!("{text}: {}", log.trim());
    }
    Err(CudaError::Refused { ordinal, call: "cuModuleLoadDataEx", code, text })
}

/// The driver's number of an error, and its words for it.
fn said(error: DriverError) -> (u32, String) {
    let text = error.error_string().map_or("?".into(), |t| t.to_string_lossy().into_owned());
    (error.0 as u32, text)
}

/// The error of a call while a card is opened: nothing was there yet that could be lost.
fn refusal(ordinal: usize, call: &'static str, error: DriverError) -> CudaError {
    let (code, text) = said(error);
    CudaError::Refused { ordinal, call, code, text }
}

/// The error of a call on an open card.
fn failure(ordinal: usize, call: &'static str, error: DriverError) -> CudaError {
    let (code, text) = said(error);
    match code {
        // Values, images, their compiler, handles, names, resources of one launch, what is not
        // supported, captures.
        1
        | 2
        | 200
        | 209
        | 218
        | 221
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_of_the_ptx_are_read() {
        let all: HashMap<_, _> = PTX.iter().flat_map(|text| entries(text)).collect();
        assert_eq!(all["embed"], [8, 8, 8, 4, 4, 4, 4]);
        assert_eq!(all["attend_bf16_4"], [8, 8, 8, 8, 8, 8, 8, 24, 4, 4]);
        assert_eq!(all["softcap"], [8, 8, 4]);
        assert!(all.len() >= 56, "{}", all.len());
    }
}
