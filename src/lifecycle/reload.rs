//! Reads models.toml again while the server runs: at SIGHUP, and when the file changes.

use super::load::{Loading, start_models};
use super::prefixes;
use crate::config::log::LogFilter;
use crate::config::models_toml::{self, Config, ModelConfig};
use crate::server::listen::check_open;
use crate::server::registry::ModelState;
use crate::server::state::ServerState;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tokio::signal::unix::{SignalKind, signal};

/// How often the file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// By what a change of the file is noticed: when it was written, and its length.
pub type Stamp = (SystemTime, u64);

/// The file's stamp now; taken before it is read, so that no change is missed.
pub fn stamp(path: &Path) -> Option<Stamp> {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.modified().ok()?, meta.len()))
}

/// What a reload needs.
pub struct Reloader {
    /// The models file that is read again.
    pub path: PathBuf,
    /// Its stamp when it was last read.
    pub seen: Option<Stamp>,
    /// Keys that open the API besides those that the file names.
    pub keys: Vec<String>,
    /// What is logged where the file does not say.
    pub log: LogFilter,
    /// Follows another filter of the log.
    pub set_log: fn(&LogFilter) -> anyhow::Result<()>,
    /// What the file said.
    pub config: Config,
    /// Whose models and settings follow the file.
    pub state: ServerState,
    /// What models are loaded with, as the first ones were.
    pub loading: Loading,
    /// Where the open routes listen, and whether this is a miner.
    pub open: (SocketAddr, bool),
}

impl Reloader {
    /// Reloads for ever.
    ///
    /// # Errors
    /// When signals cannot be watched.
    pub async fn run(mut self) -> std::io::Result<()> {
        let mut hangup = signal(SignalKind::hangup())?;
        loop {
            let is_asked = tokio::select! {
                _ = hangup.recv() => true,
                () = tokio::time::sleep(LOOK_EVERY) => false,
            };
            let now = stamp(&self.path);
            if is_asked || now != self.seen {
                self.seen = now;
                self.reload();
            }
        }
    }

    /// Follows the file where it is whole and right; otherwise everything stays as it is.
    fn reload(&mut self) {
        let new = match models_toml::read(&self.path, &self.keys) {
            Ok(config) => config,
            Err(e) => return tracing::error!("nothing is reloaded: {e}"),
        };
        let (address, is_miner) = self.open;
        let is_open = new.server.settings.keys.is_empty();
        if let Err(e) = check_open(address, is_open, is_miner) {
            return tracing::error!("nothing is reloaded: {e}");
        }
        if let Some(what) = prefixes::unused(&new, is_miner) {
            tracing::warn!("{what}");
        }
        if new.server.settings.cors_origins != self.config.server.settings.cors_origins {
            tracing::warn!("[server] cors_origins is read only at start: restart to change it");
        }
        if let Err(why) = (self.set_log)(new.server.log.as_ref().unwrap_or(&self.log)) {
            tracing::error!("[server] log is not followed: {why}");
        }
        if new.server != self.config.server {
            tracing::info!(settings = ?new.server.settings, "reloaded [server]");
            self.state.set(new.server.settings.clone());
        }
        self.follow(&new.models);
        if let Some(gate) = self.state.gate() {
            gate.set_slots(new.models.iter().map(|m| m.wanted.sequences_max).sum());
        }
        self.config = new;
    }

    /// Removes, adds and retries models.
    fn follow(&self, models: &[ModelConfig]) {
        let registry = self.state.registry();
        let old = &self.config.models;
        for gone in old.iter().filter(|m| !models.contains(m)) {
            tracing::info!(model = gone.name, "removed; what runs on it goes on to its end");
            // One of the same name takes its place below, so that the list is never empty.
            if !models.iter().any(|m| m.name == gone.name) {
                registry.remove(&gone.name);
            }
            self.loading.memory.leave(&gone.name);
        }
        let has_failed = |name: &str| {
            registry.entry(name).is_some_and(|entry| matches!(entry.state, ModelState::Failed(_)))
        };
        let wanted: Vec<ModelConfig> =
            models.iter().filter(|m| !old.contains(m) || has_failed(&m.name)).cloned().collect();
        if wanted.is_empty() {
            return;
        }
        for model in &wanted {
            tracing::info!(model = model.name, "loading");
            self.loading.memory.leave(&model.name);
        }
        let registry = registry.announce(wanted.iter().map(|m| m.name.clone()));
        tokio::spawn(start_models(wanted, Loading { registry, ..self.loading.clone() }));
    }
}
