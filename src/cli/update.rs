//! Defines the flags of updates, and replaces the running process by the new program.

use super::Failure;
use super::out::note;
use super::subnet::tell;
use crate::entropy::Entropy;
use crate::update::{
    DownloadLimits, Installed, PROBATION_TIME, Probation, ReleaseSource, STARTS_MAX, UpdateError,
    Updater,
};
use clap::Args;
use sd_notify::NotifyState;
use std::time::Duration;

/// What the service manager waits for a new program to feed its watchdog, in microseconds: models
/// are loaded first. The new program is then watched as its unit says.
const START_TIME_US: u32 = 15 * 60 * 1_000_000;

/// Where newer releases come from.
#[derive(Args)]
pub(super) struct UpdateArgs {
    /// The list of the newest release, as docs/updates.md describes it.
    #[arg(
        id = "update.url",
        long = "update.url",
        env = "TARGON_UPDATE_URL",
        help_heading = "Updates"
    )]
    url: Option<String>,
    /// The minisign public key that signs releases: the second line of its file.
    #[arg(
        id = "update.key",
        long = "update.key",
        env = "TARGON_UPDATE_KEY",
        help_heading = "Updates"
    )]
    key: Option<String>,
    /// Seconds between two checks for a newer release.
    #[arg(
        id = "update.interval",
        long = "update.interval",
        env = "TARGON_UPDATE_INTERVAL",
        default_value_t = 3600,
        value_parser = clap::value_parser!(u64).range(60..=2_592_000),
        help_heading = "Updates"
    )]
    interval: u64,
    /// Never replace this program by a newer release.
    #[arg(long = "autoupdate-off", env = "NO_AUTO_UPDATE", help_heading = "Updates")]
    off: bool,
}

impl UpdateArgs {
    /// What looks for newer releases; nothing where that is off, or not set up, which is said.
    ///
    /// # Errors
    /// When an address or key is given that cannot be used.
    pub(super) fn updater(&self, is_wanted: bool) -> Result<Option<Updater>, Failure> {
        if self.off || !is_wanted {
            return Ok(None);
        }
        let source = match ReleaseSource::new(self.url.as_deref(), self.key.as_deref()) {
            Ok(source) => source,
            Err(refusal @ UpdateError::NotConfigured) => {
                tracing::warn!("{refusal}; --autoupdate-off says that this is meant");
                return Ok(None);
            }
            Err(refusal) => return Err(Failure::user(refusal)),
        };
        Updater::new(source, DownloadLimits::default()).map(Some).map_err(Failure::ours)
    }

    /// Warns of a source that nobody looks at.
    pub(super) fn warn_unused(&self) {
        if self.url.is_some() || self.key.is_some() {
            tracing::warn!("--update.url and --update.key have no effect without --autoupdate");
        }
    }

    /// Time between two looks.
    pub(super) fn every(&self) -> Duration {
        Duration::from_secs(self.interval)
    }
}

/// Completes once a newer program is in place; never without an updater.
pub(super) async fn replaced(updater: Option<Updater>, every: Duration) -> Installed {
    match updater {
        Some(updater) => updater.follow(every, &Entropy::system()).await,
        None => std::future::pending().await,
    }
}

/// Becomes the program that is in place now; returns only where that fails.
pub(super) fn restart(installed: &Installed) -> Failure {
    tracing::info!("restarting as the new program");
    if sd_notify::watchdog_enabled().is_some() {
        tell(NotifyState::WatchdogUsec(START_TIME_US));
    }
    // The supervisor's next start takes the new program as well.
    Failure::ours(installed.restart())
}

/// The probation of this program, where it has just replaced an older one; one that was started too
/// often is rolled back here.
pub(super) fn on_probation() -> Option<Probation> {
    let probation = Probation::begin().unwrap_or_else(|error| {
        note!("warning: whether this program is on probation cannot be told: {error}");
        None
    })?;
    if !probation.is_over() {
        return Some(probation);
    }
    roll_back(probation, &format!("it was started {STARTS_MAX} times and never lasted"));
    None
}

/// Becomes the program before this one; returns where that fails.
pub(super) fn roll_back(probation: Probation, why: &str) {
    let (own, minutes) = (env!("CARGO_PKG_VERSION"), PROBATION_TIME.as_secs() / 60);
    note!("error: release {own} failed in its first {minutes} minutes: {why}; rolling back");
    let error = probation.roll_back();
    note!("error: the program before it cannot come back: {error}");
}
