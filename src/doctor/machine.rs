//! Examines the processor, graphics cards, memory, disk, and the limits of the process.

use super::{Finding, Level};
use crate::engine::memory::{HostMemory, memory};
use crate::engine::plan::Bytes;
use crate::models::device::{CardMemory, Cards, Device, DeviceError, cards};
use crate::ops::amx::support::{TilesError, usable};
use crate::ops::lanes::Isa;
use crate::server::connections::CONNECTIONS_MAX;
use std::path::{Path, PathBuf};
use sysinfo::System;

/// Free bytes of a cache's disk below which nothing can be kept.
const DISK_FAULT: u64 = 1 << 30;
/// Free bytes below which a model of a few billion parameters does not fit.
const DISK_WARNING: u64 = 20 << 30;
/// Files that are open besides connections: weights, logs, the chain.
const FILES_BESIDES: u64 = 256;
/// Memory below which only the smallest models load.
const MEMORY_WARNING: u64 = 2 << 30;
/// Where the kernel driver of NVIDIA cards tells its version.
const NVIDIA_VERSION: &str = "/proc/driver/nvidia/version";
const CPU_INFO: &str = "/proc/cpuinfo";
const HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
const GOVERNOR: &str = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor";
const LOAD: &str = "/proc/loadavg";

/// Looks at the machine; `caches` are directories that files are kept in.
pub fn examine(caches: &[PathBuf]) -> Vec<Finding> {
    let mut system = System::new();
    system.refresh_memory();
    system.refresh_cpu_all();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut findings = vec![cpu(&system, cores)];
    findings.extend(amx(&read(CPU_INFO), usable));
    findings.extend(governor(&read(GOVERNOR)));
    findings.extend(load(&read(LOAD), cores));
    findings.extend(gpu(std::fs::read_to_string(NVIDIA_VERSION).ok().as_deref(), cards()));
    findings.push(memory_and_swap(&system));
    findings.extend(huge_pages(&read(HUGE_PAGES)));
    findings.extend(caches.iter().map(|cache| disk(cache)));
    findings.push(files());
    findings
}

/// The text of a file that a kernel may not have.
fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn cpu(system: &System, cores: usize) -> Finding {
    let brand = system.cpus().first().map_or("", |cpu| cpu.brand().trim());
    let best = Isa::best();
    let all: Vec<String> = Isa::available().iter().map(Isa::to_string).collect();
    let fact = format!("{brand}, {cores} cores; kernels use {best} (it has {})", all.join(", "));
    match best {
        Isa::SCALAR => Finding::new("cpu", Level::Warning, fact)
            .hint("this processor has no AVX2 or NEON: everything works, slowly"),
        _ => Finding::new("cpu", Level::Ok, fact),
    }
}

/// `usable` says whether the kernels use the tiles of a processor that has them.
fn amx(cpu_info: &str, usable: impl FnOnce() -> Result<(), TilesError>) -> Option<Finding> {
    let has = |flag: &str| cpu_info.split_whitespace().any(|word| word == flag);
    has("amx_bf16").then(|| match usable() {
        Ok(()) => Finding::new("amx", Level::Ok, "products of bf16 use its tiles"),
        Err(why) => {
            Finding::new("amx", Level::Warning, format!("the processor has AMX, not used: {why}"))
                .hint("bits are the same without it, and prompts take several times as long")
        }
    })
}

fn governor(text: &str) -> Option<Finding> {
    (text.trim() == "powersave").then(|| {
        Finding::new("cpu clock", Level::Note, "the frequency governor is `powersave`")
            .hint("if tokens come slowly, try: cpupower frequency-set -g performance")
    })
}

/// `text` is /proc/loadavg.
fn load(text: &str, cores: usize) -> Option<Finding> {
    let load: f64 = text.split_whitespace().next()?.parse().ok()?;
    (load > cores as f64).then(|| {
        let fact = format!("{load} processes want to run on {cores} cores");
        Finding::new("load", Level::Warning, fact)
            .hint("measure nothing now; a miner shares its cores with them")
    })
}

/// `version` is what the driver's file says, `cards` what this build can use.
fn gpu(version: Option<&str>, cards: Cards) -> Vec<Finding> {
    let first = version.and_then(|text| text.lines().next()).map(str::trim);
    let driver = first.map(|line| line.strip_prefix("NVRM version: ").unwrap_or(line));
    let one = |level, fact: String| vec![Finding::new("gpu", level, fact)];
    match (driver, cards) {
        (None, Cards::NotBuilt | Cards::Unusable(_)) => {
            one(Level::Ok, "no NVIDIA driver; models run on the processor".into())
        }
        (Some(driver), Cards::NotBuilt) => {
            let fact = format!("driver: {driver}; models run on the processor in this build");
            one(Level::Note, fact)
        }
        (Some(driver), Cards::Unusable(why)) => {
            let fact = format!("driver: {driver}; models run on the processor: {why}");
            vec![
                Finding::new("gpu", Level::Warning, fact)
                    .hint("models whose `device` names a card do not load until that is mended"),
            ]
        }
        (_, Cards::Known(known)) if known.is_empty() => {
            one(Level::Note, "the driver knows no card; models run on the processor".into())
        }
        (driver, Cards::Known(known)) => {
            let driver = driver.map(|driver| one(Level::Ok, format!("driver: {driver}")));
            driver.into_iter().flatten().chain(known.into_iter().map(card)).collect()
        }
    }
}

/// One card, and how much of its memory a model may have.
fn card((device, card): (Device, Result<CardMemory, DeviceError>)) -> Finding {
    match card {
        Err(why) => Finding::new("gpu", Level::Warning, why.to_string())
            .hint("models whose `device` names it do not load"),
        Ok(CardMemory { name, free, total }) => {
            let fact = format!("{device}, {name}: {} free of {}", Bytes(free), Bytes(total));
            match free < total / 2 {
                true => Finding::new("gpu", Level::Note, fact)
                    .hint("others use it: `nvidia-smi` says who"),
                false => Finding::new("gpu", Level::Ok, fact),
            }
        }
    }
}

fn memory_and_swap(system: &System) -> Finding {
    let HostMemory { total, available: free } = memory();
    let swap = system.used_swap();
    let fact = format!("{} free of {}, {} swapped out", Bytes(free), Bytes(total), Bytes(swap));
    if free < MEMORY_WARNING {
        return Finding::new("memory", Level::Warning, fact)
            .hint("only the smallest models fit; `targon-engine plan` says which");
    }
    match swap > total / 10 {
        true => Finding::new("memory", Level::Warning, fact)
            .hint("the machine swaps: an engine whose weights are swapped out stands still"),
        false => Finding::new("memory", Level::Ok, fact),
    }
}

/// `text` is the kernel's list of modes, the chosen one in brackets.
fn huge_pages(text: &str) -> Option<Finding> {
    text.contains("[never]").then(|| {
        Finding::new("huge pages", Level::Note, "transparent huge pages are off")
            .hint(format!("weights are read faster with: echo madvise > {HUGE_PAGES}"))
    })
}

/// The disk below `path`, or below the nearest directory above it that exists.
fn disk(path: &Path) -> Finding {
    let existing = path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    let free = match rustix::fs::statvfs(existing) {
        Ok(disk) => disk.f_bavail.saturating_mul(disk.f_frsize),
        Err(e) => {
            let fact = format!("the disk of {} cannot be read: {e}", path.display());
            return Finding::new("disk", Level::Warning, fact)
                .hint("may this user read it? HF_HOME and TARGON_CACHE name other directories");
        }
    };
    let fact = format!("{} free for {}", Bytes(free), path.display());
    match free {
        0..DISK_FAULT => Finding::new("disk", Level::Fault, fact)
            .hint("make room, or name another directory by HF_HOME or TARGON_CACHE"),
        DISK_FAULT..DISK_WARNING => Finding::new("disk", Level::Warning, fact)
            .hint("a model of 8 billion parameters takes 16 GiB"),
        _ => Finding::new("disk", Level::Ok, fact),
    }
}

fn files() -> Finding {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let wanted = CONNECTIONS_MAX as u64 + FILES_BESIDES;
    match limit.current {
        Some(soft) if soft < wanted => {
            let fact = format!("{soft} open files; {wanted} serve {CONNECTIONS_MAX} connections");
            Finding::new("file limit", Level::Note, fact)
                .hint(format!("fewer connections are taken; raise it by: ulimit -n {wanted}"))
        }
        Some(soft) => Finding::new("file limit", Level::Ok, format!("{soft} open files")),
        None => Finding::new("file limit", Level::Ok, "no limit of open files"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_files_are_read_and_may_be_missing() {
        let tiles = |usable| amx("flags : sse amx_bf16 avx2", || usable).unwrap();
        assert_eq!(tiles(Ok(())).level, Level::Ok);
        let refused = tiles(Err(TilesError::Refused(1)));
        assert!(refused.level == Level::Warning && refused.fact.contains("refuses"), "{refused:?}");
        let none = |text| amx(text, || unreachable!("there is no AMX")).is_none();
        assert!(none("flags : sse avx2") && none(""));
        assert!(governor("powersave\n").is_some() && governor("performance\n").is_none());
        assert!(huge_pages("always madvise [never]\n").is_some());
        assert!(huge_pages("always [madvise] never\n").is_none());
        let busy = load("7.25 3.1 2.0 3/812 4711\n", 2).unwrap();
        assert!(busy.level == Level::Warning && busy.fact.contains("7.25"), "{busy:?}");
        assert!(load("1.25 3.1 2.0 3/812 4711\n", 2).is_none() && load("", 2).is_none());
    }

    #[test]
    fn cards_are_told_with_their_memory() {
        let version = Some("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.1\nGCC");
        let one = |version, cards| {
            let [finding] = gpu(version, cards).try_into().unwrap();
            finding
        };
        assert!(one(None, Cards::NotBuilt).fact.contains("no NVIDIA driver"));
        let unused = one(version, Cards::NotBuilt);
        assert!(unused.level == Level::Note && unused.fact.contains("580.1; models run on the"));
        let old = one(version, Cards::Unusable("driver 580 or newer".into()));
        assert!(old.level == Level::Warning && old.fact.ends_with("580 or newer"), "{old:?}");
        assert_eq!(one(version, Cards::Known(Vec::new())).level, Level::Note);
        assert_eq!(one(None, Cards::Known(Vec::new())).level, Level::Note);
        let card =
            |free: u64| CardMemory { name: "H100".into(), free: free << 30, total: 80 << 30 };
        let known = vec![
            (Device::Cuda(0), Ok(card(79))),
            (Device::Cuda(1), Ok(card(3))),
            (Device::Cuda(2), Err(DeviceError::NotBuilt(Device::Cuda(2)))),
        ];
        let found = gpu(version, Cards::Known(known));
        assert!(found[0].fact.contains("580.1"), "{found:?}");
        assert_eq!(found[1].fact, "cuda:0, H100: 79.00 GiB free of 80.00 GiB");
        let levels: Vec<Level> = found.iter().map(|f| f.level).collect();
        assert_eq!(levels, [Level::Ok, Level::Ok, Level::Note, Level::Warning]);
        assert!(found[3].fact.contains("cuda:2") && found[3].hint.is_some());
    }

    #[test]
    fn the_disk_of_a_directory_that_does_not_exist_is_its_parents() {
        let dir = tempfile::tempdir().unwrap();
        let there = disk(&dir.path().join("a/b/c"));
        assert!(there.fact.contains("free for") && there.fact.ends_with("a/b/c"), "{there:?}");
    }

    #[test]
    fn this_machine_is_described() {
        let findings = examine(&[std::env::temp_dir()]);
        for topic in ["cpu", "gpu", "memory", "disk", "file limit"] {
            assert!(findings.iter().any(|f| f.topic == topic), "{topic} in {findings:?}");
        }
    }
}
