//! Describes the machine that is measured: its compute threads, and the CPU time and memory of the
//! process.

use crate::ops::lanes::Isa;
use crate::ops::pool::Pool;
use anyhow::Context;

/// Takes the lines of a measurement's text, as they come.
pub type Say<'a> = &'a mut dyn FnMut(String);

/// Compute threads for every core.
///
/// # Errors
/// When threads cannot be started.
pub fn pool() -> anyhow::Result<Pool> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    Pool::new(threads, Isa::best()).context("threads cannot be started")
}

/// CPU seconds of all threads of this process.
pub(super) fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` lives through the call, which writes one timespec.
    let code = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    assert_eq!(code, 0, "every process has this clock");
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Gives freed memory back, so that what is taken afterwards is seen.
pub(super) fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: it only returns to the system what is free.
        unsafe { libc::malloc_trim(0) };
    }
}

/// Bytes on a line of the process's status, such as `VmRSS:` (resident now) or `VmHWM:` (at most).
pub(super) fn resident_bytes(line: &str) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status");
    let status = status.context("/proc/self/status cannot be read")?;
    let found = status.lines().find(|l| l.starts_with(line)).unwrap_or_default();
    let kib = found.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok());
    kib.map(|kib| 1024.0 * kib).with_context(|| format!("/proc/self/status has no `{line}`"))
}

/// Sets the `VmHWM:` of [`resident_bytes`] to what is resident now.
pub(super) fn reset_peak() -> anyhow::Result<()> {
    std::fs::write("/proc/self/clear_refs", "5").context("the peak cannot be reset")
}
