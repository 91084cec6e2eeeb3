//! Reads a release from its server: bounded in bytes, in time, and to one host.

use super::refusal::UpdateError;
use super::release::Build;
use crate::endpoint::{reasons, shown};
use crate::tls;
use minisign_verify::PublicKey;
use reqwest::header::LOCATION;
use reqwest::{Client, Response, redirect};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Duration;
use url::Url;

/// Redirects that are followed, all of them on the same host.
const REDIRECTS_MAX: usize = 3;

/// How much is read, and how long.
#[derive(Clone, Copy, Debug)]
pub struct DownloadLimits {
    /// Bytes of a release's list of files, at most.
    pub list_bytes: u64,
    /// Bytes of a program.
    pub file_bytes: u64,
    /// Longest wait for a connection.
    pub connect_time: Duration,
    /// Longest time for the list, from the request to its last byte.
    pub list_time: Duration,
    /// For a program in all.
    pub file_time: Duration,
    /// Longest wait between two reads.
    pub gap: Duration,
}

impl Default for DownloadLimits {
    fn default() -> Self {
        Self {
            list_bytes: 256 << 10,
            file_bytes: 1 << 30,
            connect_time: Duration::from_secs(10),
            list_time: Duration::from_secs(30),
            file_time: Duration::from_secs(1800),
            gap: Duration::from_secs(20),
        }
    }
}

/// Where releases are, and who signs them.
#[derive(Clone, Debug)]
pub struct ReleaseSource {
    /// URL of the release's list.
    pub(super) url: Url,
    /// Whose signatures are taken.
    pub(super) key: PublicKey,
}

impl ReleaseSource {
    /// Checks an address and a key, as flags give them.
    ///
    /// # Errors
    /// When one of them is missing or cannot be used.
    pub fn new(url: Option<&str>, key: Option<&str>) -> Result<Self, UpdateError> {
        let set = |text: &&str| !text.trim().is_empty();
        let (Some(url), Some(key)) = (url.filter(set), key.filter(set)) else {
            return Err(UpdateError::NotConfigured);
        };
        let refuse = |why: String| UpdateError::Address { url: shown(url.trim()), why };
        let address: Url = url.trim().parse().map_err(|e| refuse(format!("{e}")))?;
        let is_local = match address.host() {
            Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
            Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
            _ => false,
        };
        // A signature says who made a file, not that nothing newer is held back.
        if address.scheme() != "https" && !(address.scheme() == "http" && is_local) {
            return Err(refuse("must be https, or http at a loopback address".into()));
        }
        let key = PublicKey::from_base64(key.trim());
        Ok(Self { url: address, key: key.map_err(|e| UpdateError::Key { why: e.to_string() })? })
    }
}

/// A server of releases.
pub(super) struct ReleaseServer {
    client: Client,
    limits: DownloadLimits,
}

impl ReleaseServer {
    pub(super) fn new(limits: DownloadLimits) -> Result<Self, reqwest::Error> {
        tls::install();
        let same_host = redirect::Policy::custom(|attempt| {
            let first = attempt.previous().first().map(Url::origin);
            match first == Some(attempt.url().origin()) && attempt.previous().len() <= REDIRECTS_MAX
            {
                true => attempt.follow(),
                false => attempt.stop(),
            }
        });
        let client = Client::builder()
            .connect_timeout(limits.connect_time)
            .read_timeout(limits.gap)
            .redirect(same_host)
            .user_agent(concat!("targon-engine/", env!("CARGO_PKG_VERSION")))
            .build()?;
        Ok(Self { client, limits })
    }

    async fn get(&self, url: &Url, within: Duration) -> Result<Response, UpdateError> {
        let request = self.client.get(url.clone()).timeout(within);
        let response = request.send().await.map_err(|e| self.failed(url, within, e))?;
        let status = response.status();
        if status.is_redirection() {
            let to = response.headers().get(LOCATION).and_then(|to| to.to_str().ok());
            let to = to.and_then(|to| response.url().join(to).ok());
            let to = to.map_or("nowhere".into(), |to| shown(to.as_str()));
            return Err(UpdateError::Redirected { url: shown(url.as_str()), to });
        }
        if !status.is_success() {
            return Err(UpdateError::Status { url: shown(url.as_str()), status: status.as_u16() });
        }
        Ok(response)
    }

    fn failed(&self, url: &Url, within: Duration, e: reqwest::Error) -> UpdateError {
        let url = shown(url.as_str());
        if e.is_timeout() {
            let (seconds, gap) = (within.as_secs(), self.limits.gap.as_secs());
            return UpdateError::Late { url, seconds, gap };
        }
        let why = reasons(&e.without_url());
        UpdateError::Unreachable { url, why: why.chars().take(300).collect() }
    }

    /// Reads the list of the newest release.
    pub(super) async fn list(&self, url: &Url) -> Result<Vec<u8>, UpdateError> {
        let (within, limit) = (self.limits.list_time, self.limits.list_bytes);
        let mut response = self.get(url, within).await?;
        let mut bytes = Vec::new();
        while let Some(part) = response.chunk().await.map_err(|e| self.failed(url, within, e))? {
            if (bytes.len() + part.len()) as u64 > limit {
                return Err(UpdateError::Long { url: shown(url.as_str()), limit });
            }
            bytes.extend_from_slice(&part);
        }
        Ok(bytes)
    }

    /// Reads the program beside the list at `source` into `file`, down to the disk, and checks its
    /// length, checksum and signature; `path` is the file's name in what is reported.
    pub(super) async fn program(
        &self,
        source: &ReleaseSource,
        build: &Build,
        (file, path): (&mut File, &Path),
    ) -> Result<(), UpdateError> {
        let name = &build.file;
        let refuse = |why: String| UpdateError::Signature { file: name.clone(), why };
        let mut signed =
            source.key.verify_stream(&build.signature).map_err(|e| refuse(e.to_string()))?;
        let list = shown(source.url.as_str());
        let url = source.url.join(name);
        let url = url.map_err(|e| UpdateError::List { url: list.clone(), why: e.into() })?;
        if build.bytes > self.limits.file_bytes {
            return Err(UpdateError::Long {
                url: shown(url.as_str()),
                limit: self.limits.file_bytes,
            });
        }
        let within = self.limits.file_time;
        let mut response = self.get(&url, within).await?;
        let (mut read, mut sum) = (0u64, Sha256::new());
        let truncated =
            |got| UpdateError::Truncated { file: name.clone(), expected: build.bytes, got };
        loop {
            let part = match response.chunk().await {
                Ok(Some(part)) => part,
                Ok(None) => break,
                // A server that says how much there is and sends less ends in an error here.
                Err(e) if !e.is_timeout() && read < build.bytes => return Err(truncated(read)),
                Err(e) => return Err(self.failed(&url, within, e)),
            };
            read += part.len() as u64;
            if read > build.bytes {
                return Err(UpdateError::Long { url: shown(url.as_str()), limit: build.bytes });
            }
            sum.update(&part);
            signed.update(&part);
            file.write_all(&part).map_err(|e| UpdateError::io("cannot write", path, e))?;
        }
        if read < build.bytes {
            return Err(truncated(read));
        }
        let got = hex::encode(sum.finalize());
        if got != build.sha256 {
            let (file, expected) = (name.clone(), build.sha256.clone());
            return Err(UpdateError::Checksum { file, expected, got });
        }
        signed.finalize().map_err(|e| refuse(e.to_string()))?;
        file.sync_all().map_err(|e| UpdateError::io("cannot bring to the disk", path, e))
    }
}
