//! Measures on a card: its ceilings, its energy, and whether it was busy or slowed down. Energy and
//! doubts come from the driver's management library (NVML), where it is there and answers.
//!
//! None of this has run on a card; `scripts/cuda-check` runs it on a stand-in for the driver.

use super::ceilings::Peaks;
use super::conditions::{Mark, MarkKind};
use super::gpu::CardCeilings;
use super::report::facts::CardFacts;
use crate::engine::plan::Bytes;
use crate::models::arithmetic::Arithmetic;
use crate::models::cuda::{Card, Sizes};
use crate::models::spec::Spec;
use crate::ops::dtype::Dtype;
use crate::ops::pool::Pool;
use anyhow::ensure;
use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::PerformancePolicy;
use nvml_wrapper::error::NvmlError;
use std::ffi::OsStr;
use std::sync::Arc;
use std::time::Duration;

/// The library's name on machines without its development files.
const NVML: &str = "libnvidia-ml.so.1";
/// Per cent of the time that others may use a card.
const OTHERS_MAX: u32 = 5;
/// Rows of a step.
const STEP_TOKENS: usize = 512;
/// The share of a card's free memory that may be taken.
const ROOM: f64 = 0.9;
/// Why a card is slower than it could be. Its limits of power and voltage are not among them: full
/// load may well reach these.
const SLOWDOWNS: [(PerformancePolicy, &str); 2] =
    [(PerformancePolicy::Thermal, "heat"), (PerformancePolicy::BoardLimit, "a limit of the board")];

/// A card with what is known of it.
pub(super) struct CardSite {
    card: Arc<Card>,
    arithmetic: Arithmetic,
    dtype: Dtype,
    bus: Option<String>,
    nvml: Option<Nvml>,
    /// Time for which it had been slowed down at first, by reason.
    slowed_before: [Option<Duration>; SLOWDOWNS.len()],
}

impl CardSite {
    /// The card of this number, computing so.
    ///
    /// # Errors
    /// When there is none, or it does not work.
    pub(super) fn open(
        number: usize,
        (arithmetic, dtype): (Arithmetic, Dtype),
    ) -> anyhow::Result<Self> {
        let card = Card::open(number)?;
        let unknown = |what: &str, why: &dyn std::fmt::Display| {
            tracing::info!("{what} of cuda:{number} are unknown: {why}");
        };
        let bus = card.bus().map_err(|why| unknown("energy and load", &why)).ok();
        let nvml = Nvml::builder().lib_path(OsStr::new(NVML)).init();
        let nvml = nvml.map_err(|why| unknown("energy and load", &why)).ok();
        let slowed_before = [None; SLOWDOWNS.len()];
        let mut site = Self { card, arithmetic, dtype, bus, nvml, slowed_before };
        site.slowed_before = site.slowed_times();
        Ok(site)
    }

    pub(super) fn facts(&self) -> CardFacts {
        let memory_bytes = self.card.memory().map_or(0, |(_, total)| total as u64);
        CardFacts { name: self.card.name().to_owned(), memory_bytes, bus: self.bus.clone() }
    }

    pub(super) fn peaks(&self, pool: &Pool) -> anyhow::Result<Peaks> {
        let ceilings = CardCeilings::new(&self.card, pool, self.dtype, false)?;
        Ok(Peaks {
            read_bandwidth: ceilings.read_bandwidth()?,
            fma_peak: ceilings.peak(self.arithmetic)?,
        })
    }

    pub(super) fn peak(&self, pool: &Pool) -> anyhow::Result<f64> {
        CardCeilings::new(&self.card, pool, self.dtype, false)?.peak(self.arithmetic)
    }

    /// An engine of `blocks` KV blocks beside as many checks, each with buffers of its own.
    pub(super) fn check_room(
        &self,
        spec: &Spec,
        (batch, blocks): (usize, usize),
    ) -> anyhow::Result<()> {
        let sizes = Sizes::new(spec, STEP_TOKENS);
        let passes = batch as u64 + 1;
        let needed = 2 * blocks as u64 * sizes.block + passes * sizes.workspace;
        let free = self.card.memory()?.0 as u64;
        ensure!(
            needed as f64 <= ROOM * free as f64,
            "--batch {batch} needs {} for keys, values and buffers of sequences and of their \
             checks, of {} that the card has free",
            Bytes(needed),
            Bytes(free)
        );
        Ok(())
    }

    /// What the library says of this card.
    fn ask<T>(
        &self,
        what: impl FnOnce(&nvml_wrapper::Device<'_>) -> Result<T, NvmlError>,
    ) -> Option<T> {
        let (nvml, bus) = (self.nvml.as_ref()?, self.bus.as_deref()?);
        nvml.device_by_pci_bus_id(bus).and_then(|device| what(&device)).ok()
    }

    /// Joules since the driver was loaded.
    pub(super) fn joules(&self) -> Option<f64> {
        let millijoules = self.ask(|device| device.total_energy_consumption())?;
        Some(millijoules as f64 / 1e3)
    }

    /// Whether others use the card of this number, which must not be used by this process yet.
    pub(super) fn busy(number: usize) -> Option<Mark> {
        let bus = Card::open(number).ok()?.bus().ok()?;
        let nvml = Nvml::builder().lib_path(OsStr::new(NVML)).init().ok()?;
        let device = nvml.device_by_pci_bus_id(bus.as_str()).ok()?;
        let used = device.utilization_rates().ok()?.gpu;
        (used > OTHERS_MAX).then(|| {
            let what = format!(
                "the card was used for {used} % of the time before, at most {OTHERS_MAX} % may be"
            );
            Mark::new(MarkKind::Busy, what)
        })
    }

    fn slowed_times(&self) -> [Option<Duration>; SLOWDOWNS.len()] {
        SLOWDOWNS.map(|(policy, _)| {
            let times = self.ask(|device| device.violation_status(policy))?;
            Some(Duration::from_nanos(times.violation_time))
        })
    }

    /// Whether it was slowed down since it was opened.
    pub(super) fn slowed(&self) -> Vec<Mark> {
        let times = self.slowed_before.into_iter().zip(self.slowed_times());
        let marks = times.zip(SLOWDOWNS).filter_map(|((before, after), (_, reason))| {
            let time = after?.saturating_sub(before?);
            let what = format!("{reason} slowed the card down for {:.3} s", time.as_secs_f64());
            (!time.is_zero()).then(|| Mark::new(MarkKind::Throttled, what))
        });
        marks.collect()
    }
}
