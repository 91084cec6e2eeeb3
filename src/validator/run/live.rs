//! Executes the actions of running rounds, and gives the results back to them as events.

use super::inbox::{BROKE, DriverMessage};
use super::ports::{AnswerToCheck, MinerQuery, Ports};
use super::view::View;
use super::{Driver, PAUSE, RunError, SAVE_AGAIN, SAVE_TIME, spill};
use crate::store::Removed;
use crate::store::record::{Outcome, Round};
use crate::validator::round::{Action, AnswerReport, AnswerVerdict, Answered, Ending, RoundEvent};
use anyhow::anyhow;
use futures_util::FutureExt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

impl<P: Ports> Driver<P> {
    pub(super) fn take(&mut self, message: DriverMessage) -> Result<(), RunError> {
        match message {
            DriverMessage::Round(key, event) => self.tell(key, event),
            DriverMessage::Subnet(read) => self.take_subnet(read)?,
            DriverMessage::Weights(epoch, settled) => self.take_weights(epoch, settled),
            DriverMessage::Confirmed(block) => self.progress.set_confirmed(block),
            DriverMessage::Tidied(tidied) => self.take_tidied(tidied),
            DriverMessage::ToCome(values) => self.publisher.set_to_come(values),
            DriverMessage::Pulled(pulled) => {
                self.is_pulling = false;
                match pulled {
                    Ok(0) => {}
                    Ok(records) => tracing::info!(records, "requests of users are scored"),
                    Err(why) => tracing::warn!("requests of users are not scored: {why}"),
                }
            }
            DriverMessage::Rotated(rotated) => {
                self.is_rotating = false;
                if let Err(why) = rotated {
                    tracing::error!("models could not be swapped: {why}");
                }
            }
        }
        Ok(())
    }

    fn take_tidied(&mut self, tidied: anyhow::Result<Removed>) {
        self.is_tidying = false;
        match tidied {
            Ok(removed) if removed == Removed::default() => {}
            Ok(Removed { rounds, captures, reports, samples }) => {
                tracing::info!(rounds, captures, reports, samples, "old records were deleted");
            }
            Err(e) => {
                tracing::warn!("old records were not deleted; the next epoch tries again: {e}")
            }
        }
    }

    pub(super) fn tell_all(&mut self, keys: Vec<u64>, event: fn() -> RoundEvent) {
        keys.into_iter().for_each(|key| self.tell(key, event()));
    }

    fn tell(&mut self, key: u64, event: RoundEvent) {
        // Results for a round that is over are dropped.
        let Some(live) = self.live.get_mut(&key) else { return };
        let actions = live.machine.handle(event);
        self.perform(key, actions);
    }

    /// Executes the actions of a round.
    pub(super) fn perform(&mut self, key: u64, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::End(round) => self.end(key, *round),
                other => self.spawn(key, other),
            }
        }
    }

    fn end(&mut self, key: u64, round: Round) {
        self.live.remove(&key);
        let count = |outcome| round.responses.iter().filter(|r| r.outcome == outcome).count();
        tracing::info!(
            round = round.id,
            model = round.model,
            verified = count(Outcome::Verified),
            rejected = count(Outcome::Rejected),
            failed = count(Outcome::Failed),
            not_served = count(Outcome::NotServed),
            unscored = count(Outcome::Unscored),
            "a round is over"
        );
        if count(Outcome::Verified) + count(Outcome::Rejected) == 0 {
            self.not_before = self.clock.elapsed() + PAUSE;
        }
        self.progress.end_round(&round);
        self.publisher.end_round(&round);
        self.unsaved.push_back(round);
    }

    fn spawn(&mut self, key: u64, action: Action) {
        let Some(live) = self.live.get_mut(&key) else { return };
        let (ports, sender) = (Arc::clone(&self.ports), self.inbox.0.clone());
        match action {
            Action::Prompt { model, endpoint } => {
                live.tasks.spawn(async move {
                    let made = AssertUnwindSafe(ports.prompt(&model, endpoint));
                    let made = made.catch_unwind().await.unwrap_or_else(|_| Err(anyhow!(BROKE)));
                    let _ =
                        sender.send(DriverMessage::Round(key, RoundEvent::Prompted(made))).await;
                });
            }
            Action::Ask { uid, path, body, max_tokens } => {
                let Some(member) = live.members.get(&uid).copied() else { return };
                live.tasks.spawn(async move {
                    let query = MinerQuery { member, path, body, max_tokens };
                    let asked = AssertUnwindSafe(ports.ask(query)).catch_unwind().await;
                    let answer = asked.unwrap_or_else(|_| Answered {
                        arrivals: Vec::new(),
                        ended: Duration::ZERO,
                        ending: Ending::Ours(BROKE.to_owned()),
                    });
                    let event = RoundEvent::Answered { uid, answer };
                    let _ = sender.send(DriverMessage::Round(key, event)).await;
                });
            }
            Action::Check { uid, capture, is_slow } => {
                let Some(member) = live.members.get(&uid).copied() else { return };
                let (round, model) = live.machine.name();
                let case =
                    AnswerToCheck { model, member, round, block: live.block, capture, is_slow };
                let checks = Arc::clone(&self.checks);
                live.tasks.spawn(async move {
                    // Never closed.
                    let _permit = checks.acquire_owned().await;
                    let checked = AssertUnwindSafe(ports.verify(case)).catch_unwind().await;
                    let checked_answer = checked.unwrap_or_else(|_| {
                        AnswerReport::bare(AnswerVerdict::Unscored(BROKE.to_owned()))
                    });
                    let event = RoundEvent::Checked { uid, checked_answer };
                    let _ = sender.send(DriverMessage::Round(key, event)).await;
                });
            }
            Action::End(_) => {}
        }
    }

    /// Stores finished rounds. If the records cannot be written, it is tried again later.
    pub(super) async fn save(&mut self, on_round: &(dyn Fn(&Round) + Sync)) {
        while self.clock.elapsed() >= self.save_at.0
            && let Some(round) = self.unsaved.front()
        {
            match save_one(&*self.ports, round).await {
                Ok(()) => {
                    on_round(round);
                    if let Some(round) = self.unsaved.pop_front() {
                        self.report(round);
                    }
                    self.save_at = (Duration::ZERO, SAVE_AGAIN.0);
                }
                Err(e) => {
                    let (count, wait) = (self.unsaved.len(), self.save_at.1);
                    tracing::error!(
                        unsaved = count,
                        seconds = wait.as_secs(),
                        "a round cannot be stored yet: {e}"
                    );
                    self.progress.set_unsaved(count);
                    let next = (wait * 2).min(SAVE_AGAIN.1);
                    self.save_at = (self.clock.elapsed() + wait, next);
                    return;
                }
            }
        }
        self.progress.set_unsaved(self.unsaved.len());
    }

    /// Reports a stored round, if reports are configured.
    fn report(&self, round: Round) {
        if !self.ports.wants_reports() {
            return;
        }
        let Ok(permit) = Arc::clone(&self.reports).try_acquire_owned() else {
            tracing::warn!(
                round = round.id,
                "not reported, because earlier reports are still being sent"
            );
            return;
        };
        let ports = Arc::clone(&self.ports);
        tokio::spawn(async move {
            if let Err(e) = ports.report(&round).await {
                tracing::warn!(round = round.id, "not reported: {e}");
            }
            drop(permit);
        });
    }

    /// Stores all finished rounds before the program ends; those that fail are written to a file.
    pub(super) async fn save_all(
        &mut self,
        on_round: &(dyn Fn(&Round) + Sync),
    ) -> Result<(), RunError> {
        let until = self.clock.elapsed() + self.options.stop_time;
        while !self.unsaved.is_empty() {
            self.save_at.0 = self.clock.elapsed();
            self.save(on_round).await;
            if self.unsaved.is_empty() || self.clock.elapsed() >= until {
                break;
            }
            tokio::time::sleep(SAVE_AGAIN.0).await;
        }
        if self.unsaved.is_empty() {
            return Ok(());
        }
        let count = self.unsaved.len();
        let Some(path) = &self.options.spill else {
            let what = anyhow!("{count} rounds could not be remembered, and there is no file");
            return Err(RunError::Records(what));
        };
        spill::write(path, self.unsaved.make_contiguous()).map_err(RunError::Records)?;
        let place = path.display();
        Err(RunError::Records(anyhow!(
            "{count} rounds could not be remembered; they are in {place}, and the next start takes \
             them from there"
        )))
    }

    /// The state for a live view; it is made only while somebody subscribes.
    pub fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.publisher.subscribe()
    }

    /// Publishes the current state, if somebody subscribes.
    pub(super) fn publish(&mut self) {
        if !self.publisher.is_watched() {
            return;
        }
        let view = View {
            netuid: self.settings.netuid,
            block: self.heads.borrow().block,
            epoch: (self.epoch.began, self.epoch.blocks(self.options.epochs)),
            ended: self.progress.rounds(),
            unsaved: self.unsaved.len(),
            is_stopping: self.stopping.is_some(),
            ..View::default()
        };
        self.publisher.publish(view, &self.subnet, self.live.values());
        if self.publisher.is_outdated && !self.publisher.is_deciding && self.unsaved.is_empty() {
            (self.publisher.is_outdated, self.publisher.is_deciding) = (false, true);
            let (ports, subnet) = (Arc::clone(&self.ports), Arc::clone(&self.subnet));
            self.beside(DriverMessage::ToCome(None), async move {
                let values = ports.decide(&subnet).await.map(|decided| decided.values);
                let values = values
                    .map_err(|why| tracing::warn!("the weights to come are not known: {why}"));
                DriverMessage::ToCome(values.ok())
            });
        }
    }

    /// Stores the rounds that an earlier run could not store.
    pub(super) async fn recover(&mut self) -> Result<(), RunError> {
        let Some(path) = self.options.spill.clone() else { return Ok(()) };
        let rounds = spill::read(&path).map_err(RunError::Records)?;
        for round in &rounds {
            save_one(&*self.ports, round).await.map_err(RunError::Records)?;
        }
        if !rounds.is_empty() {
            let file = path.display();
            tracing::info!(rounds = rounds.len(), %file, "rounds of an earlier run were stored");
            spill::remove(&path).map_err(RunError::Records)?;
        }
        Ok(())
    }
}

async fn save_one<P: Ports>(ports: &P, round: &Round) -> anyhow::Result<()> {
    let saved = tokio::time::timeout(SAVE_TIME, ports.save(round)).await;
    saved.unwrap_or_else(|_| Err(anyhow!("the records do not answer within {SAVE_TIME:?}")))
}
