//! Computes how much memory this process may still take.
//!
//! A control group counts the page cache of its files as used, although the kernel gives it back
//! for the asking: after a download of 16 GiB a container would seem full. So cached pages count as
//! free here, as they do in the machine's own `MemAvailable`.

use std::path::Path;
use sysinfo::System;

/// Where control groups are mounted.
const GROUPS: &str = "/sys/fs/cgroup";
/// Which groups this process is in.
const OWN_GROUPS: &str = "/proc/self/cgroup";

/// The memory of this machine, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostMemory {
    /// The machine's, or the smallest limit of a control group around this process.
    pub total: u64,
    /// What may still be taken: free, or cached and given back when needed.
    pub available: u64,
}

/// The machine's memory, within the limits of the control groups around this process.
pub fn memory() -> HostMemory {
    let mut system = System::new();
    system.refresh_memory();
    let machine = HostMemory { total: system.total_memory(), available: system.available_memory() };
    let own = std::fs::read_to_string(OWN_GROUPS).unwrap_or_default();
    within(machine, Path::new(GROUPS), &own)
}

/// `machine`, within the groups below `root` that `own` lists: `number:controllers:path` a line.
fn within(machine: HostMemory, root: &Path, own: &str) -> HostMemory {
    let groups = own.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let path = Path::new(path).strip_prefix("/").ok()?;
        match controllers {
            "" => Some((root.to_owned(), path, &VERSION_2)),
            _ if controllers.split(',').any(|c| c == "memory") => {
                Some((root.join("memory"), path, &VERSION_1))
            }
            _ => None,
        }
    });
    let limits = groups.flat_map(|(root, path, names)| {
        // A limit holds for all groups below it. In a container the path may name a place that only
        // its host sees; the mounted root is then the group itself.
        path.ancestors().map(|p| names.read(&root.join(p))).collect::<Vec<_>>()
    });
    limits.flatten().fold(machine, |least, group| HostMemory {
        total: least.total.min(group.total),
        available: least.available.min(group.available),
    })
}

/// The names of a version's files and of their fields.
struct Names {
    limit: &'static str,
    usage: &'static str,
    cached: [&'static str; 2],
}

static VERSION_1: Names = Names {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    cached: ["total_inactive_file", "total_active_file"],
};
static VERSION_2: Names = Names {
    limit: "memory.max",
    usage: "memory.current",
    cached: ["inactive_file", "active_file"],
};

impl Names {
    /// The group of a directory; none where it has no limit (`max`) or is no group.
    fn read(&self, group: &Path) -> Option<HostMemory> {
        let text = |name: &str| std::fs::read_to_string(group.join(name)).ok();
        let number = |name: &str| text(name)?.trim().parse::<u64>().ok();
        let (total, usage) = (number(self.limit)?, number(self.usage)?);
        let stat = text("memory.stat").unwrap_or_default();
        let fields = stat.lines().filter_map(|line| line.split_once(' '));
        let cached: u64 = fields
            .filter(|(name, _)| self.cached.contains(name))
            .filter_map(|(_, value)| value.trim().parse::<u64>().ok())
            .sum();
        let available = total.saturating_sub(usage.saturating_sub(cached));
        Some(HostMemory { total, available })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const MACHINE: HostMemory = HostMemory { total: 64 * GIB, available: 50 * GIB };

    fn group(directory: &Path, files: &[(&str, String)]) {
        std::fs::create_dir_all(directory).unwrap();
        for (name, text) in files {
            std::fs::write(directory.join(name), text).unwrap();
        }
    }

    #[test]
    fn cached_pages_of_a_container_count_as_free() {
        let dir = tempfile::tempdir().unwrap();
        let stat = format!("anon 1\nactive_file {}\ninactive_file {}\n", 2 * GIB, 12 * GIB);
        group(
            dir.path(),
            &[
                ("memory.max", format!("{}\n", 20 * GIB)),
                ("memory.current", format!("{}\n", 17 * GIB)),
                ("memory.stat", stat),
            ],
        );
        let memory = within(MACHINE, dir.path(), "0::/\n");
        assert_eq!(memory, HostMemory { total: 20 * GIB, available: 17 * GIB });
    }

    #[test]
    fn the_smallest_limit_of_all_groups_above_holds() {
        let dir = tempfile::tempdir().unwrap();
        let limit = |n: u64, used: u64| {
            [("memory.max", (n * GIB).to_string()), ("memory.current", (used * GIB).to_string())]
        };
        group(&dir.path().join("a.slice"), &limit(8, 3));
        group(&dir.path().join("a.slice/b.service"), &[("memory.max", "max\n".into())]);
        let memory = within(MACHINE, dir.path(), "0::/a.slice/b.service\n");
        assert_eq!(memory, HostMemory { total: 8 * GIB, available: 5 * GIB });
    }

    #[test]
    fn the_first_version_is_read_too_and_no_limit_is_the_machines() {
        let dir = tempfile::tempdir().unwrap();
        let files = |limit: u64| {
            [
                ("memory.limit_in_bytes", limit.to_string()),
                ("memory.usage_in_bytes", (30 * GIB).to_string()),
                ("memory.stat", format!("total_inactive_file {}\n", 28 * GIB)),
            ]
        };
        let own = "4:memory:/x/y\n1:cpu:/x\n";
        group(&dir.path().join("memory/x/y"), &files(9_223_372_036_854_771_712));
        assert_eq!(within(MACHINE, dir.path(), own), MACHINE);
        group(&dir.path().join("memory/x/y"), &files(32 * GIB));
        let memory = within(MACHINE, dir.path(), own);
        assert_eq!(memory, HostMemory { total: 32 * GIB, available: 30 * GIB });
        // No groups at all, and nonsense.
        assert_eq!(within(MACHINE, dir.path(), ""), MACHINE);
        assert_eq!(within(MACHINE, dir.path(), "x\n::\n0::\n"), MACHINE);
    }
}
