//! Does the work of an epoch: the subnet is read, models are swapped, weights are settled, old
//! records are deleted. Each part runs in a task of its own and reports to the owner.

use super::emission::{self, Settled};
use super::inbox::{BROKE, DriverMessage};
use super::ports::Ports;
use super::reading::{self, SubnetError};
use super::subnet::Subnet;
use super::{Driver, Epoch, IDLE_BLOCKS, RunError};
use anyhow::anyhow;
use std::fmt::Display;
use std::sync::Arc;

impl<P: Ports> Driver<P> {
    pub(super) fn begin_epoch_work(&mut self) {
        let block = self.heads.borrow().block;
        if self.stopping.is_some() || block < self.epoch.again_at {
            return;
        }
        let is_idle = self.subnet.is_idle() && block >= self.epoch.look_at;
        if (is_idle || !self.epoch.is_read) && !self.epoch.is_reading {
            self.epoch.is_reading = true;
            self.read_subnet();
        }
        let is_due = self.epoch.is_read && !self.epoch.is_settled;
        if is_due && !self.epoch.is_settling && self.options.rounds.is_none() {
            self.epoch.is_settling = true;
            self.settle_weights(block);
        }
        if !self.epoch.is_tidied && !self.is_tidying && self.options.rounds.is_none() {
            (self.epoch.is_tidied, self.is_tidying) = (true, true);
            self.tidy();
        }
    }

    /// Loads other models, in a task of its own.
    fn rotate(&mut self) {
        if std::mem::replace(&mut self.is_rotating, true) {
            return;
        }
        let ports = Arc::clone(&self.ports);
        let broke = DriverMessage::Rotated(Err(anyhow!(BROKE)));
        self.beside(broke, async move { DriverMessage::Rotated(ports.rotate().await) });
    }

    /// Deletes old records, in a task of its own.
    fn tidy(&self) {
        let ports = Arc::clone(&self.ports);
        let broke = DriverMessage::Tidied(Err(anyhow!(BROKE)));
        self.beside(broke, async move { DriverMessage::Tidied(ports.tidy().await) });
    }

    fn read_subnet(&self) {
        let (ports, pace) = (Arc::clone(&self.ports), Arc::clone(&self.pace));
        let (clock, before) = (self.clock.clone(), Arc::clone(&self.subnet));
        let (how, epochs, began) = (self.options.reading, self.options.epochs, self.epoch.began);
        let broke = DriverMessage::Subnet(Err(SubnetError::Broke(BROKE)));
        self.beside(broke, async move {
            let read = async {
                let known = before.metagraph.block;
                let metagraph = reading::read_metagraph(&*ports, known, &pace, &clock).await?;
                match epochs.is_news(&metagraph, began) || before.is_idle() {
                    true => reading::read(&*ports, how, metagraph, &before).await.map(Some),
                    false => Ok(None),
                }
            };
            let read = read.await.map(|read| read.map(Box::new));
            // What would end this validator must be said by another endpoint as well.
            if read.as_ref().is_err_and(|e| !e.is_passing()) {
                ports.doubt().await;
            }
            DriverMessage::Subnet(read)
        });
    }

    fn settle_weights(&self, block: u64) {
        let (ports, subnet) = (Arc::clone(&self.ports), Arc::clone(&self.subnet));
        let (when, sender) = (self.when(block), self.inbox.0.clone());
        let broke = DriverMessage::Weights(when.epoch, Err(anyhow!(BROKE)));
        self.beside(broke, async move {
            let settled = emission::settle_in_time(&*ports, &subnet, when).await;
            if let Some(block) = emission::confirmed_at(&*ports).await {
                let _ = sender.send(DriverMessage::Confirmed(block)).await;
            }
            DriverMessage::Weights(when.epoch, settled)
        });
    }

    pub(super) fn take_subnet(
        &mut self,
        read: Result<Option<Box<Subnet>>, SubnetError>,
    ) -> Result<(), RunError> {
        self.epoch.is_reading = false;
        match read {
            Ok(None) => {
                let head = self.heads.borrow().block;
                self.epoch.not_yet(self.options.epochs, head);
                self.is_doubted = false;
                Ok(())
            }
            Ok(Some(subnet)) => {
                let (epochs, head) = (self.options.epochs, self.heads.borrow().block);
                let is_new = self.epoch.take(epochs, Epoch::of(epochs, &subnet.metagraph), head);
                self.progress.set_members(subnet.members.len());
                self.epoch.look_at = head + IDLE_BLOCKS;
                self.subnet = Arc::new(*subnet);
                self.is_doubted = false;
                if is_new && self.options.rounds.is_none() {
                    self.rotate();
                }
                Ok(())
            }
            // The members of a while ago are better than none; and one node's word is not enough to
            // give up: another endpoint is asked at the next block.
            Err(e) if e.is_passing() || !self.is_doubted => {
                tracing::warn!("the subnet could not be read again: {e}");
                self.is_doubted |= !e.is_passing();
                self.epoch.again_at = self.heads.borrow().block + 1;
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }

    pub(super) fn take_weights(&mut self, epoch: u64, settled: anyhow::Result<Settled>) {
        self.epoch.is_settling = false;
        let is_current = epoch == self.epoch.began;
        match settled {
            Ok(Settled::Weights(weights)) => {
                self.progress.set_weights(&weights);
                self.publisher.set_weights(&weights);
                tracing::info!(epoch, state = ?weights.state, "weights");
                self.epoch.is_settled |= is_current;
            }
            Ok(Settled::None(why)) => {
                tracing::warn!(epoch, "no weights: {why}");
                self.epoch.is_settled |= is_current;
            }
            Ok(Settled::Later(why)) => self.settle_later(epoch, &why),
            Err(why) => self.settle_later(epoch, &why),
        }
    }

    fn settle_later(&mut self, epoch: u64, why: &dyn Display) {
        tracing::warn!(epoch, "weights are not set yet: {why}");
        self.epoch.again_at = self.heads.borrow().block + 1;
    }
}
