//! Records what a measurement was made on: program, machine and model. A figure without them cannot
//! be compared.

use crate::engine::memory::memory;
use crate::ops::CANON;
use serde::{Deserialize, Serialize};
use std::path::Path;
use sysinfo::{CpuRefreshKind, System};

/// The program that measured.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// The version of this program.
    pub version: String,
    /// The commit that it was built from, where `build.rs` knew it.
    pub commit: Option<String>,
    /// The canon of its arithmetic.
    pub canon: String,
    /// Whether the compiler optimised it.
    pub is_optimized: bool,
}

impl Program {
    /// The program that runs.
    pub fn this() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            commit: option_env!("TARGON_COMMIT").map(str::to_owned),
            canon: CANON.into(),
            is_optimized: !cfg!(debug_assertions),
        }
    }
}

/// The machine that a program ran on.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// What the processor calls itself.
    pub cpu: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// Compute threads; a load generator has none.
    pub threads: Option<usize>,
    /// Instruction set of the kernels; a load generator has none.
    pub isa: Option<String>,
    /// Memory of the machine, in bytes.
    pub memory_bytes: u64,
    /// Version of the kernel.
    pub kernel: Option<String>,
    /// The graphics driver, where there is one.
    pub driver: Option<String>,
    /// Who chooses the processor's frequency.
    pub governor: Option<String>,
    /// The card that computed, where one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub card: Option<CardFacts>,
}

/// A card that a model was measured on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CardFacts {
    /// What its driver calls it.
    pub name: String,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// Its place on the PCI bus.
    pub bus: Option<String>,
}

impl Machine {
    /// The name of what computes: the card where one did, else the processor.
    pub fn computes(&self) -> &str {
        self.card.as_ref().map_or(&self.cpu, |card| &card.name)
    }

    /// This one; `root` is `/` but in tests.
    pub fn this(root: &Path) -> Self {
        let mut system = System::new();
        system.refresh_cpu_list(CpuRefreshKind::nothing());
        let brand = system.cpus().first().map(|cpu| cpu.brand().trim().to_owned());
        let line = |path: &str| {
            let text = std::fs::read_to_string(root.join(path)).ok()?;
            text.lines().next().map(|line| line.trim().to_owned())
        };
        let driver = line("proc/driver/nvidia/version");
        Self {
            cpu: brand.filter(|b| !b.is_empty()).unwrap_or_else(|| "unnamed".into()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            threads: None,
            isa: None,
            memory_bytes: memory().total,
            kernel: System::kernel_version(),
            driver: driver.map(|d| d.trim_start_matches("NVRM version: ").to_owned()),
            governor: line("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            card: None,
        }
    }
}

/// The model that was measured.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelFacts {
    /// Its name: of requests, or of its files.
    pub name: String,
    /// Root of its weights, where the measurement holds them.
    pub weights_root: Option<String>,
    /// Type of weights and arithmetic, where known.
    pub dtype: Option<String>,
    /// Bytes of weights, where known.
    pub weights_bytes: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_and_program_have_names() {
        let machine = Machine::this(Path::new("/"));
        assert!(!machine.cpu.is_empty() && machine.cores > 0 && machine.memory_bytes > 0);
        let program = Program::this();
        assert_eq!((program.version.as_str(), program.canon.as_str()), ("0.1.0", CANON));
    }

    #[test]
    fn drivers_and_governors_are_read_where_the_kernel_has_them() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("proc/driver/nvidia/version", "NVRM version: Module 580.1\nGCC\n");
        write("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "powersave\n");
        let machine = Machine::this(root.path());
        assert_eq!(machine.driver.as_deref(), Some("Module 580.1"));
        assert_eq!(machine.governor.as_deref(), Some("powersave"));
    }
}
