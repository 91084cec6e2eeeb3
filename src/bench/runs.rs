//! Runs prefill and decode once on an engine: what `bench engine` and `cargo bench --bench engine`
//! measure.

use super::site::{Energy, Site};
use crate::clock::Clock;
use crate::engine::Engine;
use crate::engine::output::Event;
use crate::engine::request::Request;
use anyhow::{Context, bail};

/// Tries to measure one decode.
const DECODE_TRIES: usize = 5;

/// What one run took.
pub(super) struct Run {
    /// Tokens of all sequences.
    pub(super) tokens: usize,
    /// Time of the run.
    pub(super) seconds: f64,
    /// Energy of the run, where the site counts it.
    pub(super) joules: Option<f64>,
}

impl Run {
    /// Tokens a second of all sequences together.
    pub(super) fn rate(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }
}

/// Clock and counters of energy at the start of a run.
pub(super) struct Meter<'a> {
    site: Option<&'a Site>,
    clock: Clock,
    energy: Option<Energy>,
}

impl<'a> Meter<'a> {
    /// Starts now; without a site it counts no energy.
    pub(super) fn start(site: Option<&'a Site>) -> Self {
        let energy = site.and_then(Site::energy);
        Self { site, clock: Clock::system(), energy }
    }

    /// Ends now, after so many tokens.
    pub(super) fn end(self, tokens: usize) -> Run {
        let seconds = self.clock.elapsed().as_secs_f64();
        let used = self.energy.zip(self.site.and_then(Site::energy));
        let joules = used.and_then(|(before, after)| after.since(&before));
        Run { tokens, seconds, joules }
    }
}

/// Prompts until each has its first token.
pub(super) fn prefill(
    engine: &Engine,
    site: Option<&Site>,
    requests: Vec<Request>,
) -> anyhow::Result<Run> {
    let tokens = requests.iter().map(|request| request.prompt.len()).sum();
    let meter = Meter::start(site);
    let running = requests.into_iter().map(|request| engine.submit(request));
    for generation in running.collect::<Result<Vec<_>, _>>()? {
        generation.collect_blocking()?;
    }
    Ok(meter.end(tokens))
}

/// Tokens that a sequence must be allowed, so that `tokens` are measured while all of them run: the
/// first goes on while the others start.
pub(super) fn decode_tokens(tokens: usize, batch: usize) -> usize {
    tokens + batch + 4
}

/// Decodes `tokens` tokens of each of `batch` sequences. `request` makes that of a sequence for so
/// many tokens. Prompts are computed before, so that all sequences find theirs and start together.
/// What counts is between the last of their first tokens and the end of the sequence that began
/// first.
pub(super) fn decode(
    engine: &Engine,
    site: Option<&Site>,
    (batch, tokens): (usize, usize),
    request: &dyn Fn(usize, usize) -> Request,
) -> anyhow::Result<Run> {
    for _ in 0..DECODE_TRIES {
        if let Some(run) = decode_once(engine, site, (batch, tokens), request)? {
            return Ok(run);
        }
    }
    bail!("the first sequence ends before the last begins: {tokens} decoded tokens are too few")
}

/// Nothing where the first sequence ended before this thread had seen the last one begin.
fn decode_once(
    engine: &Engine,
    site: Option<&Site>,
    (batch, tokens): (usize, usize),
    request: &dyn Fn(usize, usize) -> Request,
) -> anyhow::Result<Option<Run>> {
    let submit = |tokens: usize| {
        let requests = (0..batch).map(|i| request(i, tokens));
        requests.map(|request| engine.submit(request)).collect::<Result<Vec<_>, _>>()
    };
    for generation in submit(1)? {
        generation.collect_blocking()?;
    }
    let count = || engine.stats().snapshot().decode_tokens;
    let mut running = submit(decode_tokens(tokens, batch))?;
    for generation in &mut running {
        match generation.next_blocking() {
            Some(Event::Step(_)) => {}
            other => bail!("no first token: {other:?}"),
        }
    }
    let (before, meter) = (count(), Meter::start(site));
    let mut running = running.into_iter();
    running.next().context("no sequence")?.collect_blocking()?;
    let run = meter.end(count().saturating_sub(before) as usize);
    for generation in running {
        generation.collect_blocking()?;
    }
    let is_measured = run.tokens > 0 && run.seconds > 0.0;
    Ok(is_measured.then_some(run))
}
