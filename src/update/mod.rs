//! Updates the program: a list at a URL names the newest release, and a minisign key says whose
//! releases count.
//!
//! [`Updater::look`] reads the list, and where it names a newer version, downloads the file for
//! this machine beside the running one, checks length, SHA-256 and signature, and lets it say its
//! version. [`Staged::install`] puts it in place, [`Updater::follow`] does both until it succeeds,
//! and [`Installed::restart`] becomes it, at a moment that the caller chooses. Whatever goes wrong
//! is a [`UpdateError`], and the running program stays. There is no way to an older version
//! (`docs/updates.md`), but back to the one before, where a new one fails in its first minutes
//! ([`Probation`]).

mod download;
mod install;
mod probation;
mod refusal;
mod release;
#[cfg(test)]
mod tests;

use crate::endpoint::shown;
use crate::entropy::Entropy;
use download::ReleaseServer;
pub use download::{DownloadLimits, ReleaseSource};
pub use install::Installed;
use install::Staging;
pub use probation::{PROBATION_TIME, Probation, STARTS_MAX};
pub use refusal::{ListError, SelfTestError, UpdateError};
use release::Release;
pub use release::{Version, target};
use std::time::Duration;

/// Looks for releases that are newer than a program.
pub struct Updater {
    source: ReleaseSource,
    server: ReleaseServer,
    installed: Installed,
    version: Version,
    target: String,
}

/// What a look found.
#[derive(Debug)]
pub enum FoundRelease {
    /// The release is the running version.
    Same,
    /// The release is older than the running version, and is left alone.
    Older(Version),
    /// The release is newer, and lies ready.
    Newer(Staged),
}

/// A newer program, checked, that waits for its moment. Dropped, it is removed.
#[derive(Debug)]
pub struct Staged {
    version: Version,
    installed: Installed,
    /// Absent where another process has put it in place already.
    staging: Option<Staging>,
}

impl Staged {
    /// The version that waits.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Puts the new program in the old one's place.
    ///
    /// # Errors
    /// When a step fails; the old program is then still there, or the new one not safe on the disk.
    pub fn install(self) -> Result<Installed, UpdateError> {
        self.staging.map_or(Ok(()), Staging::swap)?;
        Ok(self.installed)
    }
}

impl Updater {
    /// An updater of the running program.
    ///
    /// # Errors
    /// When the program's file cannot be found, or no client can be made.
    pub fn new(source: ReleaseSource, limits: DownloadLimits) -> Result<Self, UpdateError> {
        let version = env!("CARGO_PKG_VERSION");
        let version =
            version.parse().map_err(|e: ListError| UpdateError::Unfit { why: e.into() })?;
        Self::of(Installed::running()?, version, source, limits)
    }

    fn of(
        installed: Installed,
        version: Version,
        source: ReleaseSource,
        limits: DownloadLimits,
    ) -> Result<Self, UpdateError> {
        let server = ReleaseServer::new(limits).map_err(|e| UpdateError::Unreachable {
            url: shown(source.url.as_str()),
            why: e.to_string(),
        })?;
        Ok(Self { source, server, installed, version, target: target() })
    }

    /// Looks once.
    ///
    /// # Errors
    /// When there is no list, or a newer release that cannot be taken.
    pub async fn look(&self) -> Result<FoundRelease, UpdateError> {
        let url = &self.source.url;
        let release = Release::read(url.as_str(), &self.server.list(url).await?)?;
        match release.version.cmp(&self.version) {
            std::cmp::Ordering::Less => Ok(FoundRelease::Older(release.version)),
            std::cmp::Ordering::Equal => Ok(FoundRelease::Same),
            std::cmp::Ordering::Greater => self.stage(&release).await.map(FoundRelease::Newer),
        }
    }

    async fn stage(&self, release: &Release) -> Result<Staged, UpdateError> {
        let (version, installed) = (release.version, self.installed.clone());
        installed.check_not_failed(version)?;
        let build = release.build(&self.target)?;
        build.check_signed_for(version)?;
        let (staging, mut file) = installed.begin()?;
        let path = staging.path().to_owned();
        self.server.program(&self.source, build, (&mut file, &path)).await?;
        // Only a file that has the right signature is run, and only one that runs is kept.
        let sha256 = build.sha256.clone();
        let tried = tokio::task::spawn_blocking(move || {
            if staging.is_in_place(&sha256)? {
                return Ok(None);
            }
            staging.finish(file, version).map(|()| Some(staging))
        });
        let tried = tried.await.map_err(|e| UpdateError::Unfit { why: e.into() })?;
        Ok(Staged { version, installed, staging: tried? })
    }

    /// Looks now and every `every`, a little earlier or later, until a newer release is in the
    /// program's place. A refusal is logged once; repetitions are not logged.
    pub async fn follow(&self, every: Duration, entropy: &Entropy) -> Installed {
        let mut last = String::new();
        loop {
            let said = match self.look().await {
                Ok(FoundRelease::Newer(staged)) => match put(staged).await {
                    Ok(installed) => return installed,
                    Err(refusal) => refusal.to_string(),
                },
                Ok(FoundRelease::Same) => String::new(),
                Ok(FoundRelease::Older(version)) => {
                    format!("release {version} is older than this one")
                }
                Err(refusal) => refusal.to_string(),
            };
            if !said.is_empty() && said != last {
                tracing::warn!(running = %self.version, "no update: {said}");
            }
            last = said;
            // So that not all programs of a network ask in the same second: from 3/4 to 5/4.
            let jitter = entropy.word() as u32 % 256;
            tokio::time::sleep(every * 3 / 4 + every * jitter / 512).await;
        }
    }
}

/// Puts a release in place.
async fn put(staged: Staged) -> Result<Installed, UpdateError> {
    let version = staged.version;
    let installed = tokio::task::spawn_blocking(move || staged.install()).await;
    let installed = installed.map_err(|e| UpdateError::Unfit { why: e.into() })??;
    tracing::info!(%version, "a newer release is in place; it runs after the next restart");
    Ok(installed)
}
