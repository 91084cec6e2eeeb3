//! Checks captured answers: a request with the response that a client received, as it was received.
//!
//! A [`Capture`] is one line of a file. Its request is read as a server does ([`Question`]).
//! [`Verification::capture`] parses the response ([`Answer`]), writes it again and compares every
//! field ([`Mirror`]), and then runs the model ([`Verifier`]). A line that cannot be read is
//! rejected, because it holds the peer's bytes.

use super::answer::{Answer, RawResponse};
use super::mirror::{Mirror, Told};
use super::question::{Question, QuestionError};
use super::structure::Walk;
use super::{
    Claim, Profile, Reason, Rejection, Report, Verdict, Verification, Verifier, structure,
};
use crate::clock::Clock;
use crate::engine::request::Request;
use crate::proof::Scheme;
use serde::Deserialize;
use serde_json::Value;
use std::time::Duration;

/// Characters of a fault in a line that are repeated.
const FAULT_CHARS_MAX: usize = 200;
/// How far a peer's clock may be ahead.
const AHEAD_MS_MAX: u64 = 60_000;

/// One line of a file.
#[derive(Clone, Debug, Deserialize)]
pub struct Capture {
    /// The body of the request.
    pub request: Value,
    response: Option<Value>,
    chunks: Option<Vec<Value>>,
    /// The hotkey that must have signed the proof.
    hotkey: Option<String>,
    /// Who answered, where there is no hotkey.
    miner: Option<String>,
    /// When it was asked, in milliseconds since 1970.
    asked_ms: Option<u64>,
}

impl Capture {
    /// A request with its answer in one piece.
    pub fn of_response(request: Value, response: Value) -> Self {
        Self { response: Some(response), ..Self::of(request) }
    }

    /// A request with its answer in chunks.
    pub fn of_stream(request: Value, chunks: Vec<Value>) -> Self {
        Self { chunks: Some(chunks), ..Self::of(request) }
    }

    fn of(request: Value) -> Self {
        Self { request, response: None, chunks: None, hotkey: None, miner: None, asked_ms: None }
    }

    /// When it was asked, as far as a chat template could print it. Where the capture does not say
    /// so, the answer's `created` counts. That is the peer's word, so it may be at most `age_max`
    /// before `now_ms`, and a minute after it; otherwise it is taken to be asked now.
    pub fn asked_ms(&self, now_ms: u64, age_max: Duration) -> u64 {
        let first = self.sent().bodies().first();
        let created = first.and_then(|body| body["created"].as_u64()?.checked_mul(1000));
        let age_max = u64::try_from(age_max.as_millis()).unwrap_or(u64::MAX);
        let plausible = now_ms.saturating_sub(age_max)..=now_ms.saturating_add(AHEAD_MS_MAX);
        self.asked_ms.or(created.filter(|ms| plausible.contains(ms))).unwrap_or(now_ms)
    }

    /// Reads a line. JSON that nests too deep to be read is refused like any other.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(line: &[u8]) -> Result<Self, Rejection> {
        let wrong = |what: String| {
            let what: String = what.chars().take(FAULT_CHARS_MAX).collect();
            Rejection::new(Reason::BadStream, format!("this is not a captured answer: {what}"))
        };
        let capture: Self = serde_json::from_slice(line).map_err(|e| wrong(e.to_string()))?;
        match (&capture.response, &capture.chunks) {
            (Some(_), None) | (None, Some(_)) => Ok(capture),
            _ => Err(wrong("it must have either `response` or `chunks`".into())),
        }
    }

    /// Whom evidence is about.
    pub fn miner(&self) -> Option<&str> {
        self.hotkey.as_deref().or(self.miner.as_deref())
    }

    /// The model that was asked, where it was named.
    pub fn model(&self) -> Option<&str> {
        self.request["model"].as_str()
    }

    /// What was asked, for an answer of any age that is verified at `now_ms`; the model's name is
    /// `model` where the request names none.
    ///
    /// # Errors
    /// The request cannot be read, which is no fault of the peer.
    pub async fn question(
        &self,
        verifier: &Verifier,
        model: &str,
        now_ms: u64,
    ) -> Result<Question, QuestionError> {
        let asked_ms = self.asked_ms(now_ms, Duration::MAX);
        Question::read(verifier, model, &self.request, self.hotkey.as_deref(), asked_ms).await
    }

    fn sent(&self) -> RawResponse<'_> {
        match (&self.response, &self.chunks) {
            (Some(body), _) => RawResponse::Whole(body),
            (None, chunks) => RawResponse::Stream(chunks.as_deref().unwrap_or_default()),
        }
    }
}

/// What was asked and sent of one choice, and what checking it found.
#[derive(Clone, Debug)]
pub struct CheckedChoice {
    /// Number of the choice, from 0.
    pub choice: u32,
    /// The rules that checked.
    pub profile: Profile,
    /// The proof that was asked for.
    pub scheme: Option<Scheme>,
    /// The request that the choice answers.
    pub request: Request,
    /// What came, where it can be read.
    pub answer: Option<Answer>,
    /// What verification found of the answer.
    pub report: Report,
    /// How long it took.
    pub seconds: f64,
}

impl Verification<'_> {
    /// Verifies every choice of a capture, whose request was read as `question`.
    ///
    /// Where Targon's rules read log-probabilities of which nobody says what distribution they
    /// describe, they may be the model's own or those at the temperature: servers do either. A
    /// choice that fails by them as the one is read as the other.
    pub fn capture(self, mut question: Question, capture: &Capture) -> Vec<CheckedChoice> {
        let sent = capture.sent();
        question.adapt(sent);
        let is_open =
            self.profile_for(question.proof) == Profile::Ranks && question.has_unnamed_mode(sent);
        let mut checked = self.reading(&question, sent);
        let is_misread = |choice: &CheckedChoice| match &choice.report.verdict {
            Verdict::Reject(r) => matches!(r.reason, Reason::LogprobMismatch | Reason::Overfit),
            Verdict::Pass | Verdict::Unscored(_) => false,
        };
        if is_open && checked.iter().any(is_misread) {
            question.scale();
            for (first, second) in checked.iter_mut().zip(self.reading(&question, sent)) {
                if is_misread(first) && !matches!(second.report.verdict, Verdict::Reject(_)) {
                    *first = second;
                }
            }
        }
        checked
    }

    fn reading(self, question: &Question, sent: RawResponse<'_>) -> Vec<CheckedChoice> {
        let clock = Clock::system();
        let profile = self.profile_for(question.proof);
        let answers = read(self.verifier, question, sent);
        let claims: Vec<Claim<'_>> = claims(question, &answers).collect();
        let mut reports = self.answers(&claims).into_iter();
        drop(claims);
        let seconds = clock.elapsed().as_secs_f64() / answers.len().max(1) as f64;
        let scheme = question.proof.map(|asked| asked.scheme);
        let checked = (0..).zip(question.understood.requests.iter().cloned()).zip(answers);
        let checked = checked.map(|((choice, request), answer)| {
            let (answer, report) = match answer {
                Read::Refused(verdict, answer) => (answer, Report::bare(verdict)),
                Read::Fine(answer) => {
                    let left_out =
                        || Verdict::Unscored("the answer was left without a report".into());
                    (Some(answer), reports.next().unwrap_or_else(|| Report::bare(left_out())))
                }
            };
            CheckedChoice { choice, profile, scheme, request, answer, report, seconds }
        });
        checked.collect()
    }
}

/// A choice once everything was compared that needs no model.
enum Read {
    /// The verdict stands.
    Refused(Verdict, Option<Answer>),
    /// Nothing is wrong with it so far; the model's rows decide.
    Fine(Answer),
}

/// The answers that must still be verified, in order.
fn claims<'a>(question: &'a Question, read: &'a [Read]) -> impl Iterator<Item = Claim<'a>> {
    (0..).zip(question.requests().iter().zip(read)).filter_map(|(choice, (request, read))| {
        let Read::Fine(answer) = read else { return None };
        Some(claim(question, choice, request, answer))
    })
}

fn claim<'a>(
    question: &'a Question,
    choice: u32,
    request: &'a Request,
    answer: &'a Answer,
) -> Claim<'a> {
    Claim {
        seed: question.seed,
        choice,
        proof: question.proof,
        limit_is_free: question.limit_is_free,
        ..Claim::new(request, answer)
    }
}

/// Reads every choice, writes all of them again, and compares.
fn read(verifier: &Verifier, question: &Question, sent: RawResponse<'_>) -> Vec<Read> {
    let walked: Vec<Result<(Answer, Walk), Verdict>> = (0..)
        .zip(question.requests())
        .map(|(choice, request)| walk(verifier, question, sent, choice, request))
        .collect();
    let told = walked.iter().zip(question.requests()).map(|(walked, request)| {
        let (answer, walk) = walked.as_ref().ok()?;
        Some(Told::new(answer, walk, request.prompt.len()))
    });
    let told: Vec<Option<Told>> = told.collect();
    let mirror = Mirror { model: &verifier.model.text, question, told: &told };
    let compared = mirror.compare(sent).into_iter();
    let read =
        walked.into_iter().zip(compared).map(|(walked, compared)| match (walked, compared) {
            (Err(verdict), _) => Read::Refused(verdict, None),
            (Ok((answer, _)), Err(rejection)) => {
                Read::Refused(Verdict::Reject(rejection), Some(answer))
            }
            (Ok((answer, _)), Ok(())) if answer.ids.is_empty() => {
                let what = "nothing was to be generated, so there are no rows to check";
                Read::Refused(Verdict::Unscored(what.into()), Some(answer))
            }
            (Ok((answer, _)), Ok(())) => Read::Fine(answer),
        });
    read.collect()
}

/// Takes one choice apart and follows its tokens.
fn walk(
    verifier: &Verifier,
    question: &Question,
    sent: RawResponse<'_>,
    choice: u32,
    request: &Request,
) -> Result<(Answer, Walk), Verdict> {
    let answer = Answer::read(sent, choice, question.echoed(choice as usize));
    if let (0, Ok(answer)) = (request.max_tokens, &answer)
        && answer.ids.is_empty()
    {
        let walk = Walk { pieces: Vec::new(), end: structure::End::Implied };
        return Ok((answer.clone(), walk));
    }
    let answer = answer.and_then(Answer::with_tokens).map_err(|rejection| {
        let may_lack_ids = matches!(sent, RawResponse::Whole(_)) && !question.asks_ids();
        match rejection.reason {
            Reason::BadIds if may_lack_ids => {
                let what = "the request asked for no ids of tokens: it needs `return_token_ids`";
                Verdict::Unscored(what.into())
            }
            _ => Verdict::Reject(rejection),
        }
    })?;
    // Its text is compared where everything is that a client can read.
    let answer = Answer { text: None, ..answer };
    let claim = claim(question, choice, request, &answer);
    match structure::check(&claim, &verifier.model.text, verifier.context_max) {
        Ok(walk) => Ok((answer, walk)),
        Err(stop) => Err(stop.into()),
    }
}
