//! Reads the energy of processors and their memory in joules, where the kernel counts it (RAPL).

use std::collections::BTreeMap;
use std::path::Path;

/// Counters below /sys/class/powercap, by name: microjoules, and where each begins anew.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Counters(BTreeMap<String, (u64, u64)>);

impl Counters {
    /// Now, by the files below `root`; `None` where there is no counter that may be read.
    pub(super) fn now(root: &Path) -> Option<Self> {
        let zones = std::fs::read_dir(root.join("sys/class/powercap")).ok()?;
        let counters = zones.filter_map(|zone| {
            let zone = zone.ok()?;
            let name = zone.file_name().into_string().ok()?;
            let read = |file: &str| std::fs::read_to_string(zone.path().join(file)).ok();
            let number = |file: &str| read(file)?.trim().parse::<u64>().ok();
            // Parts of a package count in it, but for its memory; `psys` is the platform, packages
            // and all.
            let (is_part, label) = (name.matches(':').count() > 1, read("name")?);
            let is_counted = match is_part {
                true => label.trim() == "dram",
                false => label.starts_with("package-"),
            };
            let is_rapl = name.starts_with("intel-rapl:") && is_counted;
            let value = (number("energy_uj")?, number("max_energy_range_uj")?);
            is_rapl.then_some((name, value))
        });
        let counters: BTreeMap<_, _> = counters.collect();
        (!counters.is_empty()).then_some(Self(counters))
    }

    /// Joules since `earlier`; a counter may have begun anew once.
    pub(super) fn since(&self, earlier: &Self) -> f64 {
        let used = self.0.iter().filter_map(|(name, (now, range))| {
            let (before, _) = earlier.0.get(name)?;
            let wrapped = if now < before { *range } else { 0 };
            Some((now + wrapped).saturating_sub(*before) as f64)
        });
        used.sum::<f64>() / 1e6
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_and_memory_count_and_begin_anew() {
        let at = |package: u64, core: u64, memory: u64| {
            let root = tempfile::tempdir().unwrap();
            for (zone, name, value) in [
                ("intel-rapl:0", "package-0", package),
                ("intel-rapl:0:0", "core", core),
                ("intel-rapl:0:1", "dram", memory),
                ("intel-rapl:1", "psys", 3 * package + memory),
            ] {
                let zone = root.path().join("sys/class/powercap").join(zone);
                std::fs::create_dir_all(&zone).unwrap();
                std::fs::write(zone.join("name"), format!("{name}\n")).unwrap();
                std::fs::write(zone.join("energy_uj"), format!("{value}\n")).unwrap();
                std::fs::write(zone.join("max_energy_range_uj"), "1000000000\n").unwrap();
            }
            Counters::now(root.path()).unwrap()
        };
        let (before, after) =
            (at(999_000_000, 5, 1_000_000), at(1_000_000, 900_000_000, 3_000_000));
        assert_eq!(after.since(&before), 4.0);
        assert_eq!(Counters::now(tempfile::tempdir().unwrap().path()), None);
    }
}
