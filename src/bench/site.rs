//! Says what a model is measured on: the processor or a card. Ceilings, room, energy and doubts
//! are those of the device that computes.

#[cfg(feature = "cuda")]
use super::card::CardSite;
use super::ceilings::{Peaks, product_peak, read_bandwidth};
use super::conditions::Mark;
use super::energy::Counters;
use super::plan::devices::{DeviceSpec, of_card, of_cpu};
use super::plan::predict::Efficiency;
use super::report::facts::Machine;
use crate::engine::memory::memory;
use crate::engine::plan::Bytes;
use crate::models::Model;
use crate::models::device::Device;
use crate::ops::dtype::Dtype;
use crate::ops::pool::Pool;
use anyhow::ensure;
use std::path::Path;

/// The share of available memory of the machine that keys and values may take.
const KV_SHARE: f64 = 0.6;

/// What a model is measured on.
pub struct Site {
    pub(super) pool: Pool,
    dtype: Dtype,
    #[cfg(feature = "cuda")]
    card: Option<CardSite>,
}

/// Counters of energy at one moment.
pub(super) enum Energy {
    /// The processor's and its memory's.
    Processor(Counters),
    /// The card's, in joules.
    #[cfg(feature = "cuda")]
    Card(f64),
}

impl Energy {
    /// Joules since `earlier`.
    pub(super) fn since(&self, earlier: &Self) -> Option<f64> {
        match (self, earlier) {
            (Self::Processor(now), Self::Processor(before)) => Some(now.since(before)),
            #[cfg(feature = "cuda")]
            (Self::Card(now), Self::Card(before)) => Some((now - before).max(0.0)),
            #[cfg(feature = "cuda")]
            _ => None,
        }
    }
}

impl Site {
    /// The device that holds the weights of `model`.
    ///
    /// # Errors
    /// When it is a card that does not work.
    pub fn of(model: &Model, pool: &Pool) -> anyhow::Result<Self> {
        match model.weights.device() {
            #[cfg(feature = "cuda")]
            Device::Cuda(number) => {
                let card = CardSite::open(number, (model.arithmetic, model.dtype))?;
                Ok(Self { pool: pool.clone(), dtype: model.dtype, card: Some(card) })
            }
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(number) => anyhow::bail!("this build measures no card, got cuda:{number}"),
            Device::Auto | Device::Cpu => Ok(Self {
                pool: pool.clone(),
                dtype: model.dtype,
                #[cfg(feature = "cuda")]
                card: None,
            }),
        }
    }

    #[cfg(feature = "cuda")]
    fn card(&self) -> Option<&CardSite> {
        self.card.as_ref()
    }

    /// This machine, with what computes on it.
    pub fn machine(&self) -> Machine {
        let isa = self.pool.turn().isa().to_string();
        let this = Machine::this(Path::new("/"));
        let machine = Machine { threads: Some(self.pool.threads()), isa: Some(isa), ..this };
        #[cfg(feature = "cuda")]
        if let Some(card) = self.card() {
            return Machine { card: Some(card.facts()), ..machine };
        }
        machine
    }

    /// The row of the device table that computes on `machine`, where the table has it.
    pub fn table(machine: &Machine) -> Option<DeviceSpec> {
        match &machine.card {
            Some(card) => of_card(&card.name),
            None => of_cpu(&machine.cpu),
        }
    }

    /// Measures the ceilings.
    ///
    /// # Errors
    /// When a card fails.
    pub(super) fn peaks(&self) -> anyhow::Result<Peaks> {
        #[cfg(feature = "cuda")]
        if let Some(card) = self.card() {
            return card.peaks(&self.pool);
        }
        let turn = self.pool.turn();
        let fma_peak = product_peak(&turn, self.dtype);
        Ok(Peaks { read_bandwidth: read_bandwidth(&turn)?, fma_peak })
    }

    /// What this engine reaches of these ceilings.
    pub(super) fn efficiency(&self) -> Efficiency {
        let isa = self.pool.turn().isa();
        #[cfg(feature = "cuda")]
        if self.card.is_some() {
            return Efficiency::OF_CEILINGS;
        }
        match self.dtype == Dtype::Bf16 && isa.has_dot() && !isa.has_tiles() {
            true => Efficiency::OF_DOT_CEILINGS,
            false => Efficiency::OF_CEILINGS,
        }
    }

    /// Measures the peak of multiply-adds.
    ///
    /// # Errors
    /// When a card fails.
    pub(super) fn peak(&self) -> anyhow::Result<f64> {
        #[cfg(feature = "cuda")]
        if let Some(card) = self.card() {
            return card.peak(&self.pool);
        }
        Ok(product_peak(&self.pool.turn(), self.dtype))
    }

    /// Refuses sizes for which there is no room: `batch` sequences with `blocks` KV blocks in all.
    /// On a card the checks of as many answers at once count too.
    ///
    /// # Errors
    /// What is needed, and what there is.
    pub(super) fn check_room(
        &self,
        model: &Model,
        (batch, blocks): (usize, usize),
    ) -> anyhow::Result<()> {
        let needed = (blocks * model.spec.kv_dims().block_bytes()) as u64;
        #[cfg(feature = "cuda")]
        if let Some(card) = self.card() {
            return card.check_room(&model.spec, (batch, blocks));
        }
        let free = memory().available;
        ensure!(
            needed as f64 <= KV_SHARE * free as f64,
            "--batch {batch} needs {} for keys and values, of {} that are free",
            Bytes(needed),
            Bytes(free)
        );
        Ok(())
    }

    /// The counters of energy, where they can be read.
    pub(super) fn energy(&self) -> Option<Energy> {
        #[cfg(feature = "cuda")]
        if let Some(card) = self.card() {
            return card.joules().map(Energy::Card);
        }
        Counters::now(Path::new("/")).map(Energy::Processor)
    }

    /// What is to be doubted of a device before this process uses it: loading a model keeps a card
    /// busy.
    pub fn watch(device: Device) -> Vec<Mark> {
        match device.resolved() {
            #[cfg(feature = "cuda")]
            Device::Cuda(number) => CardSite::busy(number).into_iter().collect(),
            _ => Vec::new(),
        }
    }

    /// What is to be doubted of the device after a measurement.
    pub(super) fn doubts_after(&self) -> Vec<Mark> {
        #[cfg(feature = "cuda")]
        if let Some(card) = self.card() {
            return card.slowed();
        }
        Vec::new()
    }
}
