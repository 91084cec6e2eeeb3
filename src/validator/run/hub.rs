//! Exchanges data with a hub: requests of users are fetched from it and scored, and rounds are
//! reported to it. Neither happens without a URL.

use super::checking;
use super::residents::Residents;
use super::subnet::Subnet;
use crate::clock::Clock;
use crate::store::record::{Round, Sample};
use crate::validator::organics::{self, Bucket, Record, ScoredRecord};
use crate::validator::query::{QuerySigner, Size, Target};
use crate::validator::round::AnswerVerdict;
use crate::validator::scores::series::Organic;
use crate::verify::Profile;
use anyhow::anyhow;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::time::Duration;

/// How long a hub may take for one request (protocol 5.13).
const TIME: Duration = Duration::from_secs(60);
/// How long a bucket may take in all; records that are not verified by then are unscored. The next
/// bucket is due after four minutes, and rounds need the same cores.
const PULL_TIME: Duration = Duration::from_secs(600);
/// Bytes of a bucket.
const BUCKET_BYTES_MAX: usize = 64 << 20;

/// Where the hub is.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Urls {
    /// Of requests of users: `/organics` and `/organics/scores` below it.
    pub organics: Option<String>,
    /// URL that statistics of rounds are sent to.
    pub stats: Option<String>,
}

/// A client of the hub that keeps its last bucket.
pub struct OrganicsHub {
    urls: Urls,
    signer: QuerySigner,
    clock: Clock,
    last: Mutex<Last>,
}

#[derive(Default)]
struct Last {
    bucket: String,
    /// By who answered: uid and hotkey.
    scores: BTreeMap<(u16, String), Vec<Organic>>,
}

impl OrganicsHub {
    /// A hub client; without URLs it does nothing.
    pub fn new(urls: Urls, signer: QuerySigner, clock: Clock) -> Self {
        Self { urls, signer, clock, last: Mutex::default() }
    }

    fn target(&self, url: &str) -> Target {
        Target {
            url: url.to_owned(),
            // No receiver: a hub has no hotkey.
            hotkey: None,
            signer: Some(self.signer.clone()),
            api_key: None,
            read_timeout: TIME,
            timeout: TIME,
            size: Size { bytes: BUCKET_BYTES_MAX, ..Size::LARGE },
        }
    }

    /// The samples from users' requests of the hotkey that holds a uid now.
    pub fn organics(&self, uid: u16, hotkey: &str) -> Option<Vec<Organic>> {
        self.last.lock().scores.get(&(uid, hotkey.to_owned())).cloned()
    }

    /// Fetches a bucket, verifies and scores it, and reports what was found. Returns how many
    /// records counted.
    ///
    /// # Errors
    /// When the hub does not answer, or with something else.
    pub async fn pull(
        &self,
        residents: &Residents,
        rules: Option<Profile>,
        subnet: &Subnet,
    ) -> anyhow::Result<usize> {
        let Some(url) = &self.urls.organics else { return Ok(0) };
        let started = self.clock.elapsed();
        let models: Vec<String> = residents.here().into_iter().map(|(name, _)| name).collect();
        let target = self.target(url);
        let body = organics::request(&models);
        let bytes = target.call("/organics", Some(body), &self.clock).await;
        let bucket = Bucket::read(&bytes?)?;
        if self.last.lock().bucket == bucket.bucket_id {
            return Ok(0);
        }
        let name = bucket.bucket_id.clone();
        let (records, wrong) = bucket.records();
        for what in &wrong {
            tracing::warn!(bucket = name, "a record is skipped: {what}");
        }
        let holds = |record: &Record| {
            let neuron = subnet.metagraph.uid(record.uid);
            neuron.is_some_and(|n| n.hotkey.to_string() == record.hotkey)
        };
        let mut scored = Vec::new();
        for record in records.into_iter().filter(|record| holds(record)) {
            let is_late = self.clock.elapsed().saturating_sub(started) > PULL_TIME;
            scored.push(match is_late {
                false => {
                    let how = (rules, self.signer.entropy.word());
                    score(residents, how, (record, self.clock.unix_ms())).await
                }
                true => late(record),
            });
        }
        let mut scores: BTreeMap<(u16, String), Vec<Organic>> = BTreeMap::new();
        for one in &scored {
            let key = (one.record.uid, one.record.hotkey.clone());
            scores.entry(key).or_default().push(one.organic);
        }
        *self.last.lock() = Last { bucket: name, scores };
        let report = organics::report(&scored);
        let told = target.call("/organics/scores", Some(report), &self.clock).await;
        told.map_err(|e| anyhow!("{} records count, but are not reported: {e}", scored.len()))?;
        Ok(scored.len())
    }

    /// Whether rounds are reported.
    pub fn wants_stats(&self) -> bool {
        self.urls.stats.is_some()
    }

    /// Reports a round, with the samples that scores are made of by now.
    ///
    /// # Errors
    /// When the hub does not take it.
    pub async fn tell(
        &self,
        round: &Round,
        models: &[String],
        samples: &[Sample],
    ) -> anyhow::Result<()> {
        let Some(url) = &self.urls.stats else { return Ok(()) };
        let body = organics::stats(round, &self.signer.key.hotkey().to_string(), models, samples);
        self.target(url).call("/", Some(body), &self.clock).await?;
        Ok(())
    }
}

/// A record that there was no time for.
fn late(record: Record) -> ScoredRecord {
    let (organic, tokens) = (Organic::Unscored, record.tokens_at_most(u64::MAX));
    let what = format!("there was no time for it within {} s", PULL_TIME.as_secs());
    ScoredRecord { record, organic, tokens, fault: Some(("INTERNAL_ERROR".to_owned(), what)) }
}

async fn score(
    residents: &Residents,
    how: (Option<Profile>, u64),
    (record, now_ms): (Record, u64),
) -> ScoredRecord {
    let seen = record.tokens_at_most(u64::MAX);
    let found = |organic, cause: &str, what: String| {
        let fault = Some((cause.to_owned(), what));
        ScoredRecord { record: record.clone(), organic, tokens: seen, fault }
    };
    if !record.success {
        let what = "the hub got no whole answer".to_owned();
        return found(Organic::Failed, "BAD_STREAM", what);
    }
    if record.chunks().is_empty() {
        return found(Organic::Empty, "TOO_SHORT", "the answer has no tokens".to_owned());
    }
    let Some(resident) = residents.get(&record.model_name) else {
        let what = "the model is not in memory".to_owned();
        return found(Organic::Unscored, "INTERNAL_ERROR", what);
    };
    let (model, capture) = (&record.model_name, record.capture());
    let checked = checking::verify_alone(&resident, how, model, (&capture, now_ms)).await;
    match checked.verdict {
        AnswerVerdict::Pass => {
            let tokens = record.tokens_at_most(checked.tokens.into());
            match record.tps(tokens) {
                Some(tps) => {
                    ScoredRecord { organic: Organic::Tps(tps), tokens, fault: None, record }
                }
                None => {
                    let what = "it verifies, and has no time or no token to measure a speed by";
                    found(Organic::Unscored, "INTERNAL_ERROR", what.to_owned())
                }
            }
        }
        AnswerVerdict::Reject { cause, what } => found(Organic::Rejected, &cause, what),
        AnswerVerdict::Unscored(why) => found(Organic::Unscored, "INTERNAL_ERROR", why),
    }
}
