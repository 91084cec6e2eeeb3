//! Chooses the models in memory: all of them if they fit, otherwise some of them in turn, changing
//! each epoch.
//!
//! The choice is a pure function (`choose`). A model that is to be unloaded is no longer offered,
//! but stays in memory until the last round that asked for it is over ([`Residents::hold`]). Only
//! then is its memory used for the next model.

use super::resident::Resident;
use anyhow::anyhow;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// How long a model that leaves is waited for: longer than its rounds may take.
const LEAVE_TIME: Duration = Duration::from_secs(4 * 3600);
/// How often it is looked at.
const LEAVE_LOOK: Duration = Duration::from_millis(200);

/// Loads a model; this takes long and blocks.
pub type LoadModel = dyn Fn(&str) -> anyhow::Result<Resident> + Send + Sync;

/// Keeps a model in memory until it is dropped.
#[derive(Clone)]
pub struct Hold(#[allow(dead_code, reason = "its life is what counts")] Option<Arc<Resident>>);

impl Hold {
    /// Keeps nothing.
    pub const NOTHING: Self = Self(None);
}

/// A model and what it needs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sized {
    /// Name of the model's entry in the models file.
    pub name: String,
    /// Bytes of memory that the model takes while it is loaded.
    pub bytes: u64,
}

/// The models, those in memory and the others.
pub struct Residents {
    all: Vec<Sized>,
    budget: u64,
    load: Arc<LoadModel>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    here: BTreeMap<String, Arc<Resident>>,
    leaving: BTreeMap<String, Arc<Resident>>,
    /// When each was last in memory, in turns.
    seen: BTreeMap<String, u64>,
    turn: u64,
}

/// The models that are in memory next: of those that are wanted, the one that was in memory longest
/// ago comes first, as far as memory reaches.
fn choose(
    all: &[Sized],
    wanted: &BTreeSet<String>,
    seen: &BTreeMap<String, u64>,
    budget: u64,
) -> BTreeSet<String> {
    let mut queue: Vec<&Sized> = all.iter().filter(|m| wanted.contains(&m.name)).collect();
    queue.sort_by_key(|m| seen.get(&m.name).copied().unwrap_or(0));
    let mut left = budget;
    let mut chosen = BTreeSet::new();
    for Sized { name, bytes } in queue {
        if *bytes <= left {
            left -= bytes;
            chosen.insert(name.clone());
        }
    }
    chosen
}

impl Residents {
    /// Of `all`, of which each fits into `budget` bytes alone.
    pub fn new(all: Vec<Sized>, budget: u64, load: Arc<LoadModel>) -> Self {
        Self { all, budget, load, state: Mutex::default() }
    }

    /// Names of all models, in memory or not.
    pub fn names(&self) -> Vec<String> {
        self.all.iter().map(|m| m.name.clone()).collect()
    }

    /// Whether all fit at once.
    pub fn is_roomy(&self) -> bool {
        self.all.iter().map(|m| m.bytes).fold(0, u64::saturating_add) <= self.budget
    }

    /// The models in memory that may be asked for.
    pub fn here(&self) -> Vec<(String, Arc<Resident>)> {
        let state = self.state.lock();
        state.here.iter().map(|(name, resident)| (name.clone(), Arc::clone(resident))).collect()
    }

    /// A model in memory, also one that leaves.
    pub fn get(&self, name: &str) -> Option<Arc<Resident>> {
        let state = self.state.lock();
        state.here.get(name).or_else(|| state.leaving.get(name)).cloned()
    }

    /// Keeps a model in memory.
    pub fn hold(&self, name: &str) -> Hold {
        Hold(self.get(name))
    }

    /// Brings those into memory whose turn it is of the models that are `listed`; the others leave.
    ///
    /// # Errors
    /// Why some are not loaded, or do not leave. The others are loaded, and those in memory stay.
    pub async fn rotate(&self, listed: &[String]) -> anyhow::Result<()> {
        let wanted: BTreeSet<String> = listed.iter().cloned().collect();
        let next = {
            let mut state = self.state.lock();
            let next = choose(&self.all, &wanted, &state.seen, self.budget);
            state.turn += 1;
            let turn = state.turn;
            state.seen.extend(next.iter().map(|name| (name.clone(), turn)));
            let (here, gone) =
                std::mem::take(&mut state.here).into_iter().partition(|(n, _)| next.contains(n));
            state.here = here;
            state.leaving.extend(gone);
            // A model that was about to be unloaded and is wanted again need not be loaded.
            let back = std::mem::take(&mut state.leaving);
            let (back, leaving) = back.into_iter().partition(|(n, _)| next.contains(n));
            state.leaving = leaving;
            let back: BTreeMap<_, _> = back;
            state.here.extend(back);
            next
        };
        self.leave().await?;
        let missing = {
            let state = self.state.lock();
            next.into_iter().filter(|name| !state.here.contains_key(name)).collect::<Vec<_>>()
        };
        let mut faults = Vec::new();
        for name in missing {
            let (load, own) = (Arc::clone(&self.load), name.clone());
            let loading = tokio::task::spawn_blocking(move || load(&own));
            match loading.await.map_err(anyhow::Error::from).and_then(|loaded| loaded) {
                Ok(resident) => {
                    tracing::info!(model = name, "loaded");
                    self.state.lock().here.insert(name, Arc::new(resident));
                }
                Err(why) => faults.push(format!("{name} cannot be loaded: {why}")),
            }
        }
        match faults.is_empty() {
            true => Ok(()),
            false => Err(anyhow!(faults.join("; "))),
        }
    }

    /// Waits until no round needs the models that are to be unloaded.
    async fn leave(&self) -> anyhow::Result<()> {
        let waiting = async {
            loop {
                {
                    let mut state = self.state.lock();
                    state.leaving.retain(|name, resident| {
                        let stays = Arc::strong_count(resident) > 1;
                        if !stays {
                            tracing::info!(model = name, "unloaded until its next turn");
                        }
                        stays
                    });
                    if state.leaving.is_empty() {
                        return;
                    }
                }
                tokio::time::sleep(LEAVE_LOOK).await;
            }
        };
        let left = tokio::time::timeout(LEAVE_TIME, waiting).await;
        left.map_err(|_| anyhow!("rounds hold models for longer than {LEAVE_TIME:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sized(name: &str, bytes: u64) -> Sized {
        Sized { name: name.into(), bytes }
    }

    #[test]
    fn all_are_in_memory_where_they_fit() {
        let all = [sized("a", 4), sized("b", 5)];
        let wanted = ["a", "b", "c"].map(str::to_owned).into();
        let chosen = choose(&all, &wanted, &BTreeMap::new(), 9);
        assert_eq!(chosen, ["a", "b"].map(str::to_owned).into());
        // What is not wanted takes no room.
        let chosen = choose(&all, &["b".to_owned()].into(), &BTreeMap::new(), 9);
        assert_eq!(chosen, ["b".to_owned()].into());
    }

    #[test]
    fn each_has_its_turn_where_they_do_not_fit() {
        let all = [sized("large", 8), sized("a", 4), sized("b", 4), sized("c", 3)];
        let wanted: BTreeSet<String> = all.iter().map(|m| m.name.clone()).collect();
        let (mut seen, mut turns) = (BTreeMap::new(), BTreeMap::<String, u32>::new());
        for turn in 1..=30 {
            let chosen = choose(&all, &wanted, &seen, 8);
            let bytes: u64 = all.iter().filter(|m| chosen.contains(&m.name)).map(|m| m.bytes).sum();
            assert!((4..=8).contains(&bytes), "{chosen:?}");
            for name in chosen {
                *turns.entry(name.clone()).or_default() += 1;
                seen.insert(name, turn);
            }
        }
        assert!(turns.len() == 4 && turns.values().all(|count| *count >= 8), "{turns:?}");
    }
}
