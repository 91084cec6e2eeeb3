//! Describes the machine that is measured: its compute threads, and the CPU time and memory of the
//! process.

use crate::ops::lanes::Isa;
use crate::ops::pool::Pool;
use anyhow::{Context, ensure};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Takes the lines of a measurement's text, as they come.
pub type Say<'a> = &'a mut dyn FnMut(String);

/// Compute threads for every core, with the instruction set that `TARGON_ISA` names or the fastest.
///
/// # Errors
/// When this CPU has no such set, or threads cannot be started.
pub fn pool() -> anyhow::Result<Pool> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let named = std::env::var("TARGON_ISA").ok().map(|name| name.parse());
    let isa = named.transpose().context("TARGON_ISA")?.unwrap_or_else(Isa::best);
    Pool::new(threads, isa).context("threads cannot be started")
}

/// The model to measure: the one that is named, else what `scripts/fetch-model` fetched.
///
/// # Errors
/// When it is not there.
pub fn model_or_fetched(named: Option<String>) -> anyhow::Result<PathBuf> {
    let fetched = || {
        let var = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let home = || var("HOME").unwrap_or_default().join(".cache/targon-engine/models");
        let models = var("TARGON_ENGINE_MODELS").unwrap_or_else(home);
        models.join("SmolLM2-135M-Instruct.Q4_1.gguf")
    };
    let path = named.map_or_else(fetched, PathBuf::from);
    ensure!(path.exists(), "{} is missing: run scripts/fetch-model, or name one", path.display());
    Ok(path)
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

/// Bytes of the last-level caches of all processors, by the files below `root`; 0 where the kernel
/// does not say.
pub(super) fn caches_bytes(root: &Path) -> usize {
    let Ok(cpus) = std::fs::read_dir(root.join("sys/devices/system/cpu")) else { return 0 };
    let mut caches: BTreeMap<(usize, String), usize> = BTreeMap::new();
    for cpu in cpus.flatten() {
        let Ok(levels) = std::fs::read_dir(cpu.path().join("cache")) else { continue };
        for level in levels.flatten() {
            let read = |file: &str| std::fs::read_to_string(level.path().join(file)).ok();
            let number = |file: &str| read(file)?.trim().parse::<usize>().ok();
            // "32768K"; cores that share a cache list the same cores.
            let kib = read("size").and_then(|s| s.trim().strip_suffix('K')?.parse::<usize>().ok());
            if let (Some(level), Some(kib), Some(cores)) =
                (number("level"), kib, read("shared_cpu_list"))
            {
                caches.insert((level, cores), kib << 10);
            }
        }
    }
    let last = caches.keys().map(|(level, _)| *level).max();
    caches.iter().filter(|((level, _), _)| Some(*level) == last).map(|(_, bytes)| bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caches_that_cores_share_count_once() {
        let root = tempfile::tempdir().unwrap();
        for (cpu, cores) in [(0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3")] {
            for (index, level, kib) in [(0, 1, 32), (3, 3, 32_768)] {
                let path = format!("sys/devices/system/cpu/cpu{cpu}/cache/index{index}");
                let path = root.path().join(path);
                std::fs::create_dir_all(&path).unwrap();
                std::fs::write(path.join("level"), format!("{level}\n")).unwrap();
                std::fs::write(path.join("size"), format!("{kib}K\n")).unwrap();
                std::fs::write(path.join("shared_cpu_list"), format!("{cores}\n")).unwrap();
            }
        }
        assert_eq!(caches_bytes(root.path()), 64 << 20);
        assert_eq!(caches_bytes(tempfile::tempdir().unwrap().path()), 0);
    }
}
