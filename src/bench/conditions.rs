//! Checks whether a machine is fit for a measurement: load of other programs, swapping, throttling,
//! changes of the wall clock.
//!
//! Counters of the kernel are read before and after a measurement. A counter that changed and
//! should not have becomes a [`Mark`].

use super::host::cpu_seconds;
use crate::clock::Clock;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::Duration;

/// Ticks a second of /proc/stat, the same on every architecture that Linux reports to programs.
const TICKS: f64 = 100.0;
/// Share of all cores that other processes may use.
const OTHERS_MAX: f64 = 0.05;
/// Share of all cores that a hypervisor may take.
const STEAL_MAX: f64 = 0.01;
/// Pages that may be swapped: the kernel moves a few of long idle processes.
const SWAPPED_MAX: u64 = 256;
/// How far the two clocks of a machine may drift apart.
const JUMP_MAX: f64 = 1.0;
/// The share of its former speed that a ceiling must still have at the end.
const DRIFT_MIN: f64 = 0.9;
/// How long the machine is watched before a measurement.
const WATCH: Duration = Duration::from_millis(500);

/// Why a measurement is to be doubted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MarkKind {
    /// Others used the machine.
    Busy,
    /// A hypervisor took time from it.
    Stolen,
    /// Memory went to the disk and back.
    Swapping,
    /// The processor was slowed down.
    Throttled,
    /// The ceilings were lower at the end than at the start.
    Drift,
    /// Prompts were found in a prefix cache, unasked.
    WarmCache,
    /// The load generator was the bottleneck.
    ClientBound,
    /// The wall clock was set.
    ClockJump,
    /// It ended before its end.
    Interrupted,
    /// The server failed or refused requests.
    ServerFailed,
    /// The program was compiled without optimisation.
    Unoptimized,
    /// The answers were longer or shorter than was asked for.
    Length,
    /// There was no time at which the load was steady.
    Unsteady,
}

impl MarkKind {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Busy => "busy",
            Self::Stolen => "stolen",
            Self::Swapping => "swapping",
            Self::Throttled => "throttled",
            Self::Drift => "drift",
            Self::WarmCache => "warm-cache",
            Self::ClientBound => "client-bound",
            Self::ClockJump => "clock-jump",
            Self::Interrupted => "interrupted",
            Self::ServerFailed => "server-failed",
            Self::Unoptimized => "unoptimized",
            Self::Length => "length",
            Self::Unsteady => "unsteady",
        }
    }
}

/// One reason to doubt a measurement.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mark {
    /// The kind of doubt.
    pub kind: MarkKind,
    /// The fact and the rule.
    pub what: String,
}

impl Mark {
    /// A doubt about a measurement: of which kind, and the fact.
    pub fn new(kind: MarkKind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into() }
    }
}

/// The kernel's counters at one moment; what it does not have is absent.
#[derive(Clone, Copy, PartialEq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Moment {
    /// Processes that want to run, over the last minute.
    pub load: Option<f64>,
    /// Ticks of all cores since the start.
    pub all: Option<u64>,
    /// Of those, spent idle or waiting for disks.
    pub idle: Option<u64>,
    /// Of those, taken by a hypervisor.
    pub steal: Option<u64>,
    /// Pages swapped in and out.
    pub swapped: Option<u64>,
    /// Times that cores and packages were too hot.
    pub throttles: Option<u64>,
    /// Mean frequency of the cores.
    pub mhz: Option<f64>,
    /// CPU seconds of this process.
    pub own_seconds: f64,
    /// Seconds by the clock that never goes back.
    pub elapsed: f64,
    /// Seconds since 1970 by the clock on the wall.
    pub unix: f64,
}

impl Moment {
    /// Now, by the files below `root`, which is `/` but in tests.
    pub fn now(root: &Path, clock: &Clock) -> Self {
        let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_default();
        let ticks = cpu_ticks(&read("proc/stat"));
        Self {
            load: read("proc/loadavg").split_whitespace().next().and_then(|w| w.parse().ok()),
            all: ticks.map(|t| t[..8].iter().sum()),
            idle: ticks.map(|t| t[3] + t[4]),
            steal: ticks.map(|t| t[7]),
            swapped: swapped(&read("proc/vmstat")),
            throttles: throttles(root),
            mhz: mhz(&read("proc/cpuinfo")),
            own_seconds: cpu_seconds(),
            elapsed: clock.elapsed().as_secs_f64(),
            unix: clock.unix_ms() as f64 / 1e3,
        }
    }
}

/// The first line of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal.
fn cpu_ticks(text: &str) -> Option<[u64; 8]> {
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let numbers: Vec<u64> = line.split_whitespace().filter_map(|w| w.parse().ok()).collect();
    numbers.get(..8)?.try_into().ok()
}

fn swapped(text: &str) -> Option<u64> {
    let value = |name: &str| {
        let line = text.lines().find(|l| l.split(' ').next() == Some(name))?;
        line.split(' ').nth(1)?.parse::<u64>().ok()
    };
    Some(value("pswpin")? + value("pswpout")?)
}

fn throttles(root: &Path) -> Option<u64> {
    let directory = std::fs::read_dir(root.join("sys/devices/system/cpu")).ok()?;
    let counts = directory.filter_map(|entry| {
        let base = entry.ok()?.path().join("thermal_throttle");
        let count =
            |name: &str| std::fs::read_to_string(base.join(name)).ok()?.trim().parse::<u64>().ok();
        let (core, package) = (count("core_throttle_count"), count("package_throttle_count"));
        core.or(package).map(|_| core.unwrap_or(0) + package.unwrap_or(0))
    });
    counts.reduce(|a, b| a + b)
}

fn mhz(text: &str) -> Option<f64> {
    let lines = text.lines().filter(|l| l.starts_with("cpu MHz"));
    let all: Vec<f64> = lines.filter_map(|l| l.split(':').nth(1)?.trim().parse().ok()).collect();
    (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
}

/// The counters around a measurement.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conditions {
    /// The machine before the measurement.
    pub before: Moment,
    /// The machine after the measurement.
    pub after: Moment,
}

impl Conditions {
    /// Watches a machine that should be idle for half a second.
    pub fn watch(root: &Path, clock: &Clock) -> Self {
        let before = Moment::now(root, clock);
        std::thread::sleep(WATCH);
        Self { before, after: Moment::now(root, clock) }
    }

    /// Share of all cores that other processes used.
    pub fn others(&self) -> Option<f64> {
        let all = self.delta(|m| m.all)?;
        let idle = self.delta(|m| m.idle)? + self.delta(|m| m.steal)?;
        let own = (self.after.own_seconds - self.before.own_seconds) * TICKS;
        (all > 0.0).then(|| ((all - idle - own) / all).max(0.0))
    }

    /// Share of all cores that a hypervisor took.
    pub fn stolen(&self) -> Option<f64> {
        let all = self.delta(|m| m.all)?;
        (all > 0.0).then_some(self.delta(|m| m.steal)? / all)
    }

    fn delta(&self, of: impl Fn(&Moment) -> Option<u64>) -> Option<f64> {
        Some(of(&self.after)?.saturating_sub(of(&self.before)?) as f64)
    }

    /// The marks of a measurement between the two moments.
    pub fn marks(&self) -> Vec<Mark> {
        let mut marks = Vec::new();
        let percent = |share: f64| format!("{:.1} % of all cores", 100.0 * share);
        if let Some(share) = self.others().filter(|s| *s > OTHERS_MAX) {
            let what = format!("other processes used {}, at most 5 % may be", percent(share));
            marks.push(Mark::new(MarkKind::Busy, what));
        }
        if let Some(share) = self.stolen().filter(|s| *s > STEAL_MAX) {
            let what = format!("the hypervisor took {}, at most 1 % may be", percent(share));
            marks.push(Mark::new(MarkKind::Stolen, what));
        }
        if let Some(pages) = self.delta(|m| m.swapped).filter(|p| *p > SWAPPED_MAX as f64) {
            let what = format!("{pages} pages were swapped, at most {SWAPPED_MAX} may be");
            marks.push(Mark::new(MarkKind::Swapping, what));
        }
        if let Some(times) = self.delta(|m| m.throttles).filter(|t| *t > 0.0) {
            let what = format!("the processor was too hot {times} times and slowed down");
            marks.push(Mark::new(MarkKind::Throttled, what));
        }
        marks.extend(self.jump());
        marks
    }

    /// A wall clock that was set while the other went on: results go by the other.
    fn jump(&self) -> Option<Mark> {
        let (before, after) = (&self.before, &self.after);
        let jump = (after.unix - before.unix) - (after.elapsed - before.elapsed);
        (jump.abs() > JUMP_MAX).then(|| {
            let what = format!("the wall clock moved by {jump:.1} s; times are another clock's");
            Mark::new(MarkKind::ClockJump, what)
        })
    }
}

/// Drivers whose governor `powersave` raises the frequency under load, as any but theirs does not.
const DYNAMIC_DRIVERS: [&str; 2] = ["intel_pstate", "amd-pstate-epp"];

/// Whether a processor's governor keeps it slow, by the files below `root`.
pub fn governor(root: &Path) -> Option<Mark> {
    let read = |file: &str| {
        let path = root.join("sys/devices/system/cpu/cpu0/cpufreq").join(file);
        std::fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
    };
    let driver = read("scaling_driver");
    let is_slow =
        read("scaling_governor") == "powersave" && !DYNAMIC_DRIVERS.contains(&driver.as_str());
    let what = format!("the frequency governor of {driver} is `powersave`");
    is_slow.then(|| Mark::new(MarkKind::Throttled, what))
}

/// Whether a ceiling fell from `before` to `after`.
pub fn drift(name: &str, before: f64, after: f64) -> Option<Mark> {
    (after < DRIFT_MIN * before).then(|| {
        let what = format!(
            "{name} fell to {:.0} % of what it was at the start, at least 90 % should stay",
            100.0 * after / before
        );
        Mark::new(MarkKind::Drift, what)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(stat: &str, swap: u64, hot: u64) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: String| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("proc/stat", format!("cpu  {stat} 0 0\ncpu0 1\n"));
        write("proc/loadavg", "1.5 1 1 1/2 3\n".into());
        write("proc/vmstat", format!("nr_free 1\npswpin {swap}\npswpout 0\n"));
        write("proc/cpuinfo", "cpu MHz\t\t: 2000.0\ncpu MHz : 3000.0\n".into());
        let base = "sys/devices/system/cpu/cpu0/thermal_throttle";
        write(&format!("{base}/core_throttle_count"), hot.to_string());
        root
    }

    fn kinds(marks: &[Mark]) -> Vec<MarkKind> {
        marks.iter().map(|m| m.kind).collect()
    }

    #[test]
    fn a_quiet_machine_has_no_marks_and_a_troubled_one_has_all() {
        let clock = Clock::manual(1_000);
        let quiet = root("100 0 0 1000 0 0 0 0", 0, 3);
        let before = Moment { own_seconds: 0.0, ..Moment::now(quiet.path(), &clock) };
        assert_eq!((before.load, before.mhz, before.throttles), (Some(1.5), Some(2500.0), Some(3)));
        // 100 ticks of ours of 1000, and 10 of others.
        let after = root("210 0 0 1890 0 0 0 0", 0, 3);
        let after = Moment { own_seconds: 1.0, ..Moment::now(after.path(), &clock) };
        let fine = Conditions { before, after };
        assert!((fine.others().unwrap() - 0.01).abs() < 1e-9, "{fine:?}");
        assert_eq!(fine.marks(), []);

        let after = root("400 0 0 1680 0 0 0 20", 1000, 4);
        let after = Moment { own_seconds: 1.0, unix: 60.0, ..Moment::now(after.path(), &clock) };
        let marks = Conditions { before, after }.marks();
        use MarkKind::{Busy, ClockJump, Stolen, Swapping, Throttled};
        assert_eq!(kinds(&marks), [Busy, Stolen, Swapping, Throttled, ClockJump], "{marks:?}");
        assert!(marks[0].what.contains("20.0 % of all cores"), "{marks:?}");
    }

    #[test]
    fn a_kernel_without_these_files_is_no_reason_to_doubt() {
        let empty = tempfile::tempdir().unwrap();
        let moment = Moment::now(empty.path(), &Clock::manual(0));
        let both = Conditions { before: moment, after: moment };
        assert_eq!((both.others(), both.stolen(), both.marks()), (None, None, Vec::new()));
    }

    #[test]
    fn slow_governors_and_falling_ceilings_are_marked() {
        for (name, driver, is_slow) in [
            ("powersave", "acpi-cpufreq", true),
            ("powersave", "intel_pstate", false),
            ("powersave", "amd-pstate-epp", false),
            ("powersave", "amd-pstate", true),
            ("performance", "acpi-cpufreq", false),
        ] {
            let root = tempfile::tempdir().unwrap();
            let files = root.path().join("sys/devices/system/cpu/cpu0/cpufreq");
            std::fs::create_dir_all(&files).unwrap();
            std::fs::write(files.join("scaling_governor"), format!("{name}\n")).unwrap();
            std::fs::write(files.join("scaling_driver"), format!("{driver}\n")).unwrap();
            assert_eq!(governor(root.path()).is_some(), is_slow, "{name} {driver}");
        }
        assert_eq!(governor(tempfile::tempdir().unwrap().path()), None);
        assert_eq!(drift("x", 100.0, 91.0), None);
        assert!(drift("x", 100.0, 80.0).unwrap().what.contains("80 %"));
    }
}
