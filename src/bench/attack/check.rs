//! Verifies every answer under every scheme, and every malformed variant of an answer.

use super::catalogue::Attack;
use super::malformed::{self, Changed, Variant};
use super::published;
use super::results::{Detector, Line, is_rejected};
use super::trial::{AttackedAnswer, Subject};
use crate::bench::stats::Rate;
use crate::engine::request::Request;
use crate::proof::Scheme;
use crate::proof::codec::to_hex;
use crate::verify::answer::Answer;
use crate::verify::capture::Capture;
use crate::verify::mirror::{Mirror, Told};
use crate::verify::question::Question;
use crate::verify::scrutiny::{Scrutiny, TwinPolicy};
use crate::verify::statistic::ByRows;
use crate::verify::{
    Challenge, Claim, Depth, Limits, Profile, Report, Verdict, Verifier, structure,
};
use anyhow::{Context, anyhow};
use serde_json::{Value, json};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use tokio::runtime::Runtime;

/// A verifier that knows every question, and how its verdicts become lines of results.
pub(super) struct AttackVerifier(Verifier);

impl AttackVerifier {
    /// With the model's true weights.
    pub(super) fn new(subject: &Subject, limits: Limits, scrutiny: Scrutiny) -> Self {
        Self(
            Verifier::new(
                Arc::clone(&subject.model),
                Arc::clone(&subject.identity),
                subject.pool.clone(),
                subject.engine.options().context_max,
            )
            .with_limits(limits)
            .with_scrutiny(scrutiny),
        )
    }

    /// What answers are checked by.
    pub(super) fn limits(&self) -> &Limits {
        &self.0.limits
    }

    /// Verifies answers with their proofs. Who can prove true rows can report their
    /// log-probabilities, so these are left out: here rows and draws count.
    pub(super) fn proofs(
        &self,
        trials: &[AttackedAnswer],
        scheme: Scheme,
        depth: Depth,
    ) -> Vec<Report> {
        let verify = |t: &AttackedAnswer| {
            let silent = Answer { logprobs: Vec::new(), ..t.answer.clone() };
            self.verify(t, &silent, Some(scheme), depth)
        };
        trials.iter().map(verify).collect()
    }

    fn verify(
        &self,
        trial: &AttackedAnswer,
        answer: &Answer,
        scheme: Option<Scheme>,
        depth: Depth,
    ) -> Report {
        let ask = &trial.ask;
        let asked = |scheme| Challenge { scheme, nonce: Some(ask.nonce()), hotkey: ask.hotkey };
        let claim = Claim {
            proof: scheme.map(asked),
            end_is_implied: trial.end_is_implied,
            ..Claim::new(&ask.request, answer)
        };
        let profile = if scheme.is_some() { Profile::Proof } else { Profile::Ranks };
        self.0.verify(profile, ask.index as u64).depth(depth).answer(&claim)
    }

    /// The lines of one scheme: hidden rows alone, and for `residue-v1` with margins as well.
    pub(super) fn lines(
        &self,
        (name, detector): (&str, Detector),
        scheme: Scheme,
        trials: &[AttackedAnswer],
        reports: &[Report],
    ) -> Vec<Line> {
        let rows = Line::of_rows(name, detector, scheme, reports, self.limits());
        let mut lines = vec![rows];
        if scheme == Scheme::Residue {
            lines.push(Line::of_margins(name, detector, WITH_MARGIN, reports));
        }
        lines.extend(self.statistics((name, detector), scheme, reports));
        let bytes = bytes_per_token(trials);
        lines.iter_mut().for_each(|line| line.bytes_per_token = bytes);
        lines
    }

    /// The lines of what all rows say together, by their energies and by the twin.
    fn statistics(
        &self,
        (name, detector): (&str, Detector),
        scheme: Scheme,
        reports: &[Report],
    ) -> Vec<Line> {
        type Values = fn(&Report) -> &[f64];
        let of = |what: &str, values: Values, limits: Option<ByRows>| {
            let check = format!("{scheme}, {what}");
            let limits = limits?;
            Some(Line::of_statistic((name, &check), detector, reports, (values, &limits)))
        };
        let Self(Verifier { limits, scrutiny, .. }) = self;
        let energies = of("trimmed mean", |r| &r.energies, limits.trimmed(scheme));
        let twin = match scrutiny.twin {
            TwinPolicy::Always => of("twin", |r| &r.twin, limits.twin(scheme)),
            _ => None,
        };
        energies.into_iter().chain(twin).collect()
    }

    /// The line of a check of every row.
    pub(super) fn slow_line(
        &self,
        attack: &Attack,
        trials: &[AttackedAnswer],
        slow: &[Report],
    ) -> Line {
        let line = Line::of_margins(attack.name, attack.detector, WITH_ALL_MARGINS, slow);
        Line { bytes_per_token: bytes_per_token(trials), ..line }
    }

    /// The subnet's rules on the same tokens, as published and with their gaps closed.
    pub(super) fn rank_lines(
        &self,
        name: &str,
        detector: Detector,
        trials: &[AttackedAnswer],
    ) -> [Line; 2] {
        let reports: Vec<Report> =
            trials.iter().map(|t| self.verify(t, &t.answer, None, Depth::Slow)).collect();
        let mended = Line::new(name, detector, "targon-4.4, mended", &reports);
        let mut published = Line::bare(name, detector, "targon-4.4, published", mended.rejected);
        let checked = trials.iter().zip(&reports);
        let ends = &self.0.model.text.stop_ids;
        let causes: Vec<&str> =
            checked.filter_map(|(t, r)| published::rejects(t, r, ends)).collect();
        published.rejected = Rate::new(causes.len(), trials.len());
        for cause in causes {
            *published.reasons.entry(cause.to_owned()).or_insert(0) += 1;
        }
        [published, mended]
    }

    /// Every malformed variant of every answer: refused, or not.
    pub(super) fn malformed(
        &self,
        attack: &Attack,
        scheme: Scheme,
        trials: &[AttackedAnswer],
    ) -> Line {
        let (mut refused, mut of) = (0, 0);
        for trial in trials {
            let received = match Received::new(&self.0, trial, scheme) {
                Ok(received) => received,
                Err(why) => {
                    tracing::warn!("{scheme}: an honest stream cannot be made: {why}");
                    of += 1;
                    continue;
                }
            };
            // Where the honest answer is refused, a refusal of its variants says nothing.
            if is_rejected(&self.verify(trial, &trial.answer, Some(scheme), Depth::Fast)) {
                tracing::warn!("{scheme}: an honest answer is refused");
                of += 1;
                continue;
            }
            for (name, variant) in malformed::variants() {
                of += 1;
                // A panic is what must not happen; here it counts as not refused.
                let outcome =
                    catch_unwind(AssertUnwindSafe(|| self.refuses(trial, &received, &variant)));
                match outcome {
                    Ok(true) => refused += 1,
                    Ok(false) => tracing::warn!("{scheme}: {name} is not refused"),
                    Err(_) => tracing::warn!("{scheme}: {name} makes the verifier panic"),
                }
            }
        }
        let check = if scheme == Scheme::Residue { WITH_MARGIN } else { scheme.name() };
        Line::bare(attack.name, attack.detector, check, Rate::new(refused, of))
    }

    fn refuses(&self, trial: &AttackedAnswer, received: &Received, variant: &Variant) -> bool {
        match variant.apply(&trial.answer, &received.chunks) {
            Changed::Answer(Ok(answer)) => {
                let scheme = Some(received.scheme);
                is_rejected(&self.verify(trial, &answer, scheme, Depth::Fast))
            }
            Changed::Answer(Err(_)) => true,
            Changed::Chunks(chunks) => {
                received.check(&self.0, chunks).is_ok_and(|r| is_rejected(&r))
            }
        }
    }
}

/// An answer as a client receives it, who asked in HTTP.
struct Received {
    scheme: Scheme,
    body: Value,
    chunks: Vec<Value>,
    runtime: Runtime,
}

impl Received {
    /// The honest stream of a trial, which passes.
    fn new(verifier: &Verifier, trial: &AttackedAnswer, scheme: Scheme) -> anyhow::Result<Self> {
        let AttackedAnswer { ask, answer, .. } = trial;
        let request = &ask.request;
        let body = json!({
            "model": "attacked", "prompt": request.prompt, "max_tokens": request.max_tokens,
            "temperature": request.sampling.temperature, "ignore_eos": request.stop.ignore_eos,
            "stream": true, "proof": {"scheme": scheme.name(), "nonce": to_hex(&ask.nonce())},
        });
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        let question = runtime.block_on(Question::read(verifier, "attacked", &body, None, 0))?;
        let claim = Claim { end_is_implied: trial.end_is_implied, ..Claim::new(request, answer) };
        let walk = structure::check(&claim, &verifier.model.text, verifier.context_max);
        let walk = walk.map_err(|stop| anyhow!("{stop:?}"))?;
        let mut answer = answer.clone();
        answer.powv = powv(verifier, request, &answer.ids)?;
        let told = [Some(Told::new(&answer, &walk, request.prompt.len()))];
        let mirror = Mirror { model: &verifier.model.text, question: &question, told: &told };
        let received = Self { scheme, chunks: mirror.chunks(), body, runtime };
        let verdict = received.check(verifier, received.chunks.clone())?.verdict;
        match verdict {
            Verdict::Pass => Ok(received),
            other => Err(anyhow!("{other}")),
        }
    }

    fn check(&self, verifier: &Verifier, chunks: Vec<Value>) -> anyhow::Result<Report> {
        let capture = Capture::of_stream(self.body.clone(), chunks);
        let question = self.runtime.block_on(capture.question(verifier, "attacked", 0))?;
        let checked = verifier.verify(None, 0).capture(question, &capture);
        checked.into_iter().next().map(|j| j.report).context("there is no choice")
    }
}

fn powv(verifier: &Verifier, request: &Request, ids: &[u32]) -> anyhow::Result<Vec<Option<i64>>> {
    let input: u64 = request.prompt.iter().map(|id| u64::from(*id)).sum();
    let mut output = 0;
    let value = |id: &u32| {
        let value = verifier.model.parameters.powv(input, output)?;
        output += u64::from(*id);
        Ok(Some(value))
    };
    ids.iter().map(value).collect()
}

/// How lines with margins are checked.
pub(super) const WITH_MARGIN: &str = "residue-v1 + margin";
/// The same in a check of every row.
const WITH_ALL_MARGINS: &str = "residue-v1 + margin, all rows";

fn bytes_per_token(trials: &[AttackedAnswer]) -> f64 {
    let bytes: usize = trials.iter().map(AttackedAnswer::proof_bytes).sum();
    let tokens: usize = trials.iter().map(|t| t.answer.ids.len()).sum();
    bytes as f64 / tokens.max(1) as f64
}
