//! Keeps account of the memory that is reserved for models on each device.
//!
//! A KV cache takes its pages when it is written, so what a device has free says nothing of what
//! is reserved and not yet used. A reservation counts until its model is gone: one that the models
//! file no longer names keeps its memory while requests run on it.

use super::located::{Located, shape_within};
use crate::config::models_toml::ModelConfig;
use crate::engine::memory::memory;
use crate::engine::plan::{MemoryPlan, Part};
use crate::models::Model;
use crate::models::device::{Device, DeviceError};
use crate::models::spec::Spec;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

/// Says how many bytes a device has free.
type Measure = dyn Fn(Device) -> Result<u64, DeviceError> + Send + Sync;

/// The accounts of all devices, shared by all who load models.
#[derive(Clone)]
pub struct MemoryAccounts {
    accounts: Arc<Mutex<BTreeMap<Device, Account>>>,
    measure: Arc<Measure>,
}

#[derive(Default)]
struct Account {
    /// Bytes that were free when nothing was reserved.
    free: u64,
    reservations: Vec<Reservation>,
}

struct Reservation {
    model: String,
    bytes: u64,
    holder: Holder,
    is_leaving: bool,
}

/// Who has the memory of a reservation.
enum Holder {
    /// A load that has not ended.
    Load(Weak<()>),
    /// A model, and the engine that runs it.
    Model(Weak<Model>),
}

impl Reservation {
    fn is_held(&self) -> bool {
        match &self.holder {
            Holder::Load(load) => load.strong_count() > 0,
            Holder::Model(model) => model.strong_count() > 0,
        }
    }
}

impl Account {
    /// Forgets what is held no more; bytes that are reserved.
    fn reserved(&mut self) -> u64 {
        self.reservations.retain(Reservation::is_held);
        self.reservations.iter().map(|reservation| reservation.bytes).sum()
    }

    /// Bytes that another model may have, where the device has `now` free: what it had free when
    /// nothing was reserved, less what is reserved, and no more than that.
    fn left(&mut self, now: u64) -> u64 {
        let reserved = self.reserved();
        if self.reservations.is_empty() {
            self.free = now;
        }
        self.free.saturating_sub(reserved).min(now)
    }
}

/// Memory that is reserved for a model while it is loaded; given back when this is dropped.
pub struct Lease {
    memory: MemoryAccounts,
    parts: Vec<Part>,
    load: Arc<()>,
}

impl Lease {
    /// What each device has of the model.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The devices that it is on.
    pub fn devices(&self) -> impl Iterator<Item = Device> {
        self.parts.iter().map(|part| part.device)
    }

    /// From now on the reservation is held by `model`, until it and its engine are gone.
    pub fn hand_over(self, model: &Arc<Model>) {
        let mut accounts = self.memory.accounts.lock();
        let reservations = accounts.values_mut().flat_map(|account| &mut account.reservations);
        let own = |holder: &Holder| match holder {
            Holder::Load(load) => load.ptr_eq(&Arc::downgrade(&self.load)),
            Holder::Model(_) => false,
        };
        for reservation in reservations.filter(|r| own(&r.holder)) {
            reservation.holder = Holder::Model(Arc::downgrade(model));
        }
    }
}

impl Default for MemoryAccounts {
    fn default() -> Self {
        let free = |device: Device| Ok(device.free_memory()?.unwrap_or_else(|| memory().available));
        Self::measured_by(free)
    }
}

impl MemoryAccounts {
    /// Accounts of devices of which `measure` says what they have free.
    pub fn measured_by(
        measure: impl Fn(Device) -> Result<u64, DeviceError> + Send + Sync + 'static,
    ) -> Self {
        Self { accounts: Arc::default(), measure: Arc::new(measure) }
    }

    /// Plans one model into what its devices have left, and reserves that, from its headers alone.
    ///
    /// # Errors
    /// Why it does not fit or cannot be planned, in words.
    pub fn plan(&self, located: &Located) -> anyhow::Result<(MemoryPlan, Lease)> {
        self.plan_shape(&located.config, &located.spec()?)
    }

    /// The same for a model of which only the shape is known.
    ///
    /// # Errors
    /// Why it does not fit, or that there is no such device, in words.
    pub fn plan_shape(
        &self,
        config: &ModelConfig,
        spec: &Spec,
    ) -> anyhow::Result<(MemoryPlan, Lease)> {
        let devices = config.devices.iter().map(|device| device.resolved());
        let now = devices.map(|device| Ok((device, (self.measure)(device)?)));
        let now = now.collect::<anyhow::Result<BTreeMap<Device, u64>>>()?;
        // Nothing else is reserved between the question and the reservation.
        let mut accounts = self.accounts.lock();
        let left = |device: Device| accounts.entry(device).or_default().left(now[&device]);
        let (plan, parts) = shape_within(config, spec, left)?;
        let load = Arc::new(());
        for Part { device, bytes, .. } in &parts {
            let reservation = Reservation {
                model: config.name.clone(),
                bytes: *bytes,
                holder: Holder::Load(Arc::downgrade(&load)),
                is_leaving: false,
            };
            accounts.entry(*device).or_default().reservations.push(reservation);
        }
        drop(accounts);
        Ok((plan, Lease { memory: self.clone(), parts, load }))
    }

    /// Says that a model is no longer wanted: its memory will be free when its requests have ended.
    pub fn leave(&self, model: &str) {
        let mut accounts = self.accounts.lock();
        let reservations = accounts.values_mut().flat_map(|account| &mut account.reservations);
        reservations.filter(|r| r.model == model).for_each(|r| r.is_leaving = true);
    }

    /// The models that still have memory of these devices and are no longer wanted.
    pub fn leaving(&self, devices: &[Device]) -> Vec<String> {
        let mut accounts = self.accounts.lock();
        let mut models = Vec::new();
        for device in devices {
            let Some(account) = accounts.get_mut(&device.resolved()) else { continue };
            account.reserved();
            let leaving = account.reservations.iter().filter(|reservation| reservation.is_leaving);
            models.extend(leaving.map(|reservation| reservation.model.clone()));
        }
        models.sort();
        models.dedup();
        models
    }

    /// The processor and every card that a model asked for, with the bytes that each had free
    /// before any model took some.
    pub fn free(&self) -> Vec<(Device, u64)> {
        let accounts = self.accounts.lock();
        let mut free: Vec<(Device, u64)> =
            accounts.iter().map(|(device, account)| (*device, account.free)).collect();
        if !accounts.contains_key(&Device::Cpu) {
            free.extend((self.measure)(Device::Cpu).ok().map(|bytes| (Device::Cpu, bytes)));
        }
        free.sort();
        free
    }
}
