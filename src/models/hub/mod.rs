//! Downloads models from the Hugging Face Hub into the cache that all Hugging Face tools share.
//!
//! A revision is resolved to a commit; files are fetched by range, so a dropped connection resumes
//! where it stopped, and are checked against the Hub's own checksum (SHA-256 for large files, the
//! git blob id for small ones) before they get their place. `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`,
//! `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean what they mean elsewhere.

mod error;
mod kept;
mod listing;
mod store;

pub use error::HubError;
pub use listing::WantedFiles;

use crate::endpoint::{reasons, shown};
use crate::tls;
use error::{BURST_BYTES, corrupt};
use futures_util::{StreamExt, TryStreamExt, stream};
pub use kept::Snapshot;
use listing::{Listing, RepositoryFile, check_name, check_repo};
use reqwest::{Client, Response, StatusCode, header};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;
use store::{has_size, link, lock, make_parent, size_of, verify, write_small};

/// Attempts in a row that bring less than a burst before a download is given up.
const ATTEMPTS_MAX: u32 = 5;
/// The time for [`BURST_BYTES`], and for a model description.
const PATIENCE: Duration = Duration::from_secs(60);
/// Files fetched at once.
const FILES_AT_ONCE: usize = 4;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// The pauses before a model description is asked for again.
const LISTING_PAUSES: [Duration; 3] =
    [Duration::from_millis(200), Duration::from_millis(500), Duration::from_secs(1)];
/// Bytes of a model description.
const LISTING_MAX: usize = 16 << 20;

/// `(file, bytes done, bytes in all)`, called as bytes arrive.
pub type OnBytes<'a> = &'a (dyn Fn(&str, u64, u64) + Sync);

/// Access to one Hub and the local cache.
pub struct Hub {
    endpoint: String,
    cache: PathBuf,
    token: Option<String>,
    offline: bool,
    patience: Duration,
    client: Client,
}

/// Whether a repository of the Hub can be called so.
pub fn is_repository(name: &str) -> bool {
    check_repo(name).is_ok()
}

/// Whether a revision or a file of a repository can be called so.
pub fn is_name(name: &str) -> bool {
    check_name(name).is_ok()
}

impl Hub {
    /// The Hub and cache that the environment names.
    ///
    /// # Errors
    /// When it names no cache, or no HTTP client can be made (no usable TLS roots).
    pub fn from_env() -> Result<Self, HubError> {
        let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let of_user = || var("HOME").map(|home| Path::new(&home).join(".cache/huggingface"));
        let home = var("HF_HOME").map(PathBuf::from).or_else(of_user);
        let cache = var("HF_HUB_CACHE").map(PathBuf::from);
        let cache = cache.or_else(|| home.as_ref().map(|home| home.join("hub")));
        let cache = cache.ok_or(HubError::NoHome)?;
        let stored = || std::fs::read_to_string(home?.join("token")).ok();
        let token = var("HF_TOKEN").or_else(stored).map(|t| t.trim().to_owned());
        let offline = var("HF_HUB_OFFLINE")
            .is_some_and(|v| ["1", "true", "yes", "on"].contains(&v.to_ascii_lowercase().as_str()));
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        Self::new(&endpoint, cache, token, offline)
    }

    /// A Hub at `endpoint` with its cache in `cache`.
    ///
    /// # Errors
    /// As for [`from_env`](Self::from_env).
    pub fn new(
        endpoint: &str,
        cache: PathBuf,
        token: Option<String>,
        offline: bool,
    ) -> Result<Self, HubError> {
        tls::install();
        let client = Client::builder()
            .user_agent(concat!("targon-engine/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .build()
            .map_err(|e| HubError::Network { url: shown(endpoint), why: reasons(&e) })?;
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        let token = token.filter(|t| !t.is_empty());
        Ok(Self { endpoint, cache, token, offline, patience: PATIENCE, client })
    }

    /// Gives up on answers that take longer than this for 64 KiB.
    #[must_use]
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// URL of the Hub.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The directory that its files are kept in.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// Whether only what is kept may be used.
    pub fn is_offline(&self) -> bool {
        self.offline
    }

    /// The commit that `revision` of `repo` stands for, as the Hub says now; nothing is downloaded.
    ///
    /// # Errors
    /// When the Hub cannot be asked or has no such revision.
    pub async fn commit(&self, repo: &str, revision: &str) -> Result<String, HubError> {
        check_repo(repo)?;
        check_name(revision)?;
        Ok(self.listing(repo, revision).await?.sha)
    }

    /// Where `wanted` of `repo` at `revision` is kept; nothing is asked of the Hub.
    ///
    /// # Errors
    /// When it is not kept whole.
    pub fn kept(
        &self,
        repo: &str,
        revision: &str,
        wanted: WantedFiles<'_>,
    ) -> Result<Snapshot, HubError> {
        check_repo(repo)?;
        check_name(revision)?;
        let root = self.cache.join(format!("models--{}", repo.replace('/', "--")));
        kept::find(&root, repo, revision, wanted)
    }

    /// Makes `wanted` of `repo` at `revision` present and returns where it is. While the Hub cannot
    /// be asked, that is what the revision stood for when it was last fetched.
    ///
    /// # Errors
    /// When it is neither cached nor to be had, or a file does not match its checksum.
    pub async fn fetch(
        &self,
        repo: &str,
        revision: &str,
        wanted: WantedFiles<'_>,
        progress: OnBytes<'_>,
    ) -> Result<Snapshot, HubError> {
        check_repo(repo)?;
        check_name(revision)?;
        let root = self.cache.join(format!("models--{}", repo.replace('/', "--")));
        if self.offline {
            return kept::find(&root, repo, revision, wanted);
        }
        if let Some(kept) = kept::find_commit(&root, repo, revision, wanted) {
            return Ok(kept);
        }
        let listing = match self.listing_at_last(repo, revision).await {
            Ok(listing) => listing,
            Err(e) if e.may_pass() => {
                let Ok(kept) = kept::find(&root, repo, revision, wanted) else { return Err(e) };
                tracing::warn!(repo, revision, commit = kept.commit, "the kept files serve: {e}");
                return Ok(kept);
            }
            Err(e) => return Err(e),
        };
        let blobs = listing.choose(repo, wanted)?;
        let directory = root.join("snapshots").join(&listing.sha);
        let commit = listing.sha.as_str();
        stream::iter(blobs)
            .map(|(blob, entries)| {
                let place = Place { blob: root.join("blobs").join(blob), directory: &directory };
                self.file(repo, commit, entries, place, progress)
            })
            .buffer_unordered(FILES_AT_ONCE)
            .try_collect::<()>()
            .await?;
        let reference = root.join("refs").join(revision);
        let is_part = matches!(wanted, WantedFiles::Configuration);
        if !(is_part && reference.exists()) {
            write_small(&reference, listing.sha.as_bytes())?;
        }
        Ok(Snapshot { commit: listing.sha, directory })
    }

    /// The listing, asked for again where the Hub fails for a moment.
    async fn listing_at_last(&self, repo: &str, revision: &str) -> Result<Listing, HubError> {
        for pause in LISTING_PAUSES {
            match self.listing(repo, revision).await {
                // A Hub that is slow has had its time.
                Err(e) if e.may_pass() && !matches!(e, HubError::Slow { .. }) => {
                    tracing::debug!(repo, revision, "asking again: {e}");
                    tokio::time::sleep(pause).await;
                }
                outcome => return outcome,
            }
        }
        self.listing(repo, revision).await
    }

    async fn listing(&self, repo: &str, revision: &str) -> Result<Listing, HubError> {
        let url = format!("{}/api/models/{repo}/revision/{revision}?blobs=true", self.endpoint);
        let body = self.in_time(&url, self.small(&url)).await??;
        Listing::parse(&self.named(&url), &body)
    }

    /// A model description's bytes.
    async fn small(&self, url: &str) -> Result<Vec<u8>, HubError> {
        let response = self.get(url, None).await?;
        let network = |e| self.network(url, e);
        let mut body = Vec::new();
        let mut chunks = response.bytes_stream();
        while let Some(chunk) = chunks.next().await {
            body.extend_from_slice(&chunk.map_err(network)?);
            if body.len() > LISTING_MAX {
                return Err(corrupt(
                    &self.named(url),
                    format!("at most {LISTING_MAX} bytes"),
                    "more",
                ));
            }
        }
        Ok(body)
    }

    /// What comes of `work`, unless it takes too long.
    async fn in_time<T>(&self, url: &str, work: impl Future<Output = T>) -> Result<T, HubError> {
        let slow =
            |_| HubError::Slow { url: self.named(url), seconds: self.patience.as_secs_f64() };
        tokio::time::timeout(self.patience, work).await.map_err(slow)
    }

    /// An address for errors: that of the Hub may hold a key, and what follows it names a file.
    fn named(&self, url: &str) -> String {
        let path = url.strip_prefix(&self.endpoint).unwrap_or_default();
        format!("{}{path}", shown(&self.endpoint))
    }

    fn network(&self, url: &str, e: reqwest::Error) -> HubError {
        // A redirect may lead to an address that is signed for us alone.
        HubError::Network { url: self.named(url), why: reasons(&e.without_url()) }
    }

    async fn get(&self, url: &str, from: Option<u64>) -> Result<Response, HubError> {
        let mut request = self.client.get(url);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        if let Some(from) = from {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        let network = |e| self.network(url, e);
        let response = request.send().await.map_err(network)?;
        let status = response.status();
        if !status.is_success() {
            return Err(HubError::Status { url: self.named(url), status });
        }
        Ok(response)
    }

    /// One blob of a snapshot, from the cache or the Hub, under all its names.
    async fn file(
        &self,
        repo: &str,
        commit: &str,
        entries: Vec<RepositoryFile>,
        place: Place<'_>,
        progress: OnBytes<'_>,
    ) -> Result<(), HubError> {
        let Some(entry) = entries.first() else { return Ok(()) };
        let path = &place.blob;
        let url = format!("{}/{repo}/resolve/{commit}/{}", self.endpoint, entry.rfilename);
        if !has_size(path, entry.size()) {
            make_parent(path)?;
            let _lock = lock(&path.with_extension("lock")).await?;
            if !has_size(path, entry.size()) {
                self.download(&url, entry, path, progress).await?;
            }
        }
        for entry in &entries {
            progress(&entry.rfilename, entry.size(), entry.size());
            link(path, &place.directory.join(&entry.rfilename))?;
        }
        Ok(())
    }

    /// Downloads until the file is whole, resuming after every break that brought a burst.
    async fn download(
        &self,
        url: &str,
        entry: &RepositoryFile,
        path: &Path,
        progress: OnBytes<'_>,
    ) -> Result<(), HubError> {
        let partial = path.with_extension("incomplete");
        let mut barren = 0;
        loop {
            let before = size_of(&partial);
            let outcome = self.append(url, entry, &partial, progress).await;
            if size_of(&partial) == entry.size() {
                match verify(entry, &partial) {
                    Ok(()) => {
                        let io = |source| HubError::Io { path: path.to_owned(), source };
                        return std::fs::rename(&partial, path).map_err(io);
                    }
                    Err(e) => {
                        // Nothing of it can be trusted; the next attempt starts over.
                        std::fs::remove_file(&partial)
                            .map_err(|source| HubError::Io { path: partial.clone(), source })?;
                        barren += 1;
                        if barren >= 2 {
                            return Err(e);
                        }
                        continue;
                    }
                }
            }
            barren = if size_of(&partial) >= before + BURST_BYTES { 0 } else { barren + 1 };
            match outcome {
                Err(e @ (HubError::Io { .. } | HubError::Corrupt { .. })) => return Err(e),
                Err(HubError::Status { status, url }) if status.is_client_error() => {
                    return Err(HubError::Status { url, status });
                }
                Err(e) if barren >= ATTEMPTS_MAX => return Err(e),
                Ok(()) if barren >= ATTEMPTS_MAX => {
                    let (want, got) = (entry.size(), size_of(&partial));
                    return Err(corrupt(
                        &self.named(url),
                        format!("{want} bytes"),
                        format!("{got} bytes"),
                    ));
                }
                _ => tokio::time::sleep(Duration::from_millis(200 << barren.min(5))).await,
            }
        }
    }

    /// One request that appends to `partial` what the Hub sends.
    async fn append(
        &self,
        url: &str,
        entry: &RepositoryFile,
        partial: &Path,
        progress: OnBytes<'_>,
    ) -> Result<(), HubError> {
        let io = |source| HubError::Io { path: partial.to_owned(), source };
        let mut at = size_of(partial).min(entry.size());
        let response = self.get(url, (at > 0).then_some(at)).await?;
        if response.status() != StatusCode::PARTIAL_CONTENT {
            at = 0; // the server sends the whole file again
        }
        let mut file = std::fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(partial)
            .map_err(io)?;
        file.set_len(at).map_err(io)?;
        file.seek(SeekFrom::End(0)).map_err(io)?;
        let mut chunks = response.bytes_stream();
        let mut has_ended = false;
        while !has_ended {
            let burst = async {
                let full = at + BURST_BYTES;
                while at < full {
                    let Some(chunk) = chunks.next().await else { return Ok(true) };
                    let network = |e| self.network(url, e);
                    let chunk = chunk.map_err(network)?;
                    at += chunk.len() as u64;
                    if at > entry.size() {
                        let (want, got) = (entry.size(), format!("at least {at} bytes"));
                        return Err(corrupt(&self.named(url), format!("{want} bytes"), got));
                    }
                    file.write_all(&chunk).map_err(io)?;
                    progress(&entry.rfilename, at, entry.size());
                }
                Ok(false)
            };
            has_ended = self.in_time(url, burst).await??;
        }
        file.sync_all().map_err(io)
    }
}

/// Where a blob and the names of it go.
struct Place<'a> {
    blob: PathBuf,
    directory: &'a Path,
}
