//! Answers `/verify`: checks an answer against the request.

use super::Service;
use super::asked::{VerifyBody, understand};
use super::body::ReceivedBody;
use super::lead::readings;
use super::reply::{VerifierRefusal, VerifyReply};
use super::sent::{Bounds, Sent};
use super::service::{REQUESTS_MAX, RUNNING_MAX};
use crate::engine::request::Request;
use crate::verify::answer::Answer;
use crate::verify::{Claim, Depth, Profile, Reason, Rejection, Report, Stop, Verdict, Verifier};
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// How long an answer waits for others to be verified.
const WAIT_MAX: Duration = Duration::from_secs(300);

/// `POST /verify`.
pub(super) async fn verify(
    State(service): State<Service>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let outcome = checked(&service, &headers, body).await;
    service.counts.count(&outcome);
    match outcome {
        Ok(checked) => checked.into_response(),
        Err(refusal) => {
            tracing::warn!("/verify: {}", refusal.why());
            refusal.into_response()
        }
    }
}

async fn checked(
    service: &Service,
    headers: &HeaderMap,
    body: Body,
) -> Result<VerifyReply, VerifierRefusal> {
    if service.state.is_draining() {
        return Err(VerifierRefusal::closing());
    }
    let limits = service.state.settings().limits;
    let most = service.body_bytes_max();
    let held = service.bodies.read(headers, body, (most, limits.body_time)).await?;
    // From here on the end of the process waits for it.
    let _in_flight = service.state.begin().map_err(|_| VerifierRefusal::closing())?;
    let Ok(_slot) = service.slots.try_acquire() else {
        let what = format!("{REQUESTS_MAX} answers are being verified already, the limit");
        return Err(VerifierRefusal::busy(what));
    };
    if held.bytes.is_none() {
        // Only the answer can be that long: the caller's part has a limit of its own.
        let what = format!("the body has more than {most} bytes, which no answer here can need");
        return Ok(rejected(&Rejection::new(Reason::BadStream, what), None));
    }
    let held = Arc::new(held);
    let text = Arc::clone(&held);
    let asked = off(move || VerifyBody::read(bytes(&text), limits.body_bytes)).await??;
    let VerifyBody { model, is_chat, is_endless, params, output } = asked;
    let name = model.as_deref();
    let served = service.model(name).map_err(|e| VerifierRefusal::unscored(e.message))?;
    let (state, path) = (&service.state, "request_params");
    let surroundings = (state.entropy(), state.clock().unix_ms());
    let mut request = understand(&served, is_chat, params, path, surroundings).await?;
    let verifier = service.verifier(&served);
    // Nobody's model goes beyond its own context, whatever was asked. The last token needs no row.
    let room = (verifier.model.spec.context + 1).saturating_sub(request.prompt.len());
    let bounds = Bounds {
        asked: if is_endless { room } else { request.max_tokens.min(room) },
        context: verifier.context_max,
        longest: service.longest_token(name.unwrap_or_default(), &served),
    };
    let sent = match off(move || Sent::read(&bytes(&held)[output], bounds)).await? {
        Ok(sent) => sent,
        Err(Stop::Rejected(rejection)) => return Ok(rejected(&rejection, None)),
        Err(Stop::Fault(why)) => return Err(VerifierRefusal::unscored(why)),
    };
    if is_endless {
        // It may end where it likes.
        request.max_tokens = sent.answer.ids.len().max(1);
    }
    let overfit = is_overfit(&request, &sent.answer);
    match verdict(service, verifier, request, sent).await? {
        Verdict::Pass => Ok(VerifyReply::Verified),
        Verdict::Reject(rejection) => Ok(rejected(&rejection, Some(overfit))),
        Verdict::Unscored(why) => Err(VerifierRefusal::unscored(why)),
    }
}

fn bytes(held: &ReceivedBody) -> &[u8] {
    held.bytes.as_deref().unwrap_or_default()
}

/// Runs what takes its time away from the async threads.
async fn off<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, VerifierRefusal> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| VerifierRefusal::unscored(format!("the verifier broke: {e}")))
}

fn rejected(rejection: &Rejection, overfit: Option<bool>) -> VerifyReply {
    let cause = cause(rejection.reason, overfit.unwrap_or(false));
    VerifyReply::Rejected { error: rejection.to_string(), cause }
}

/// The container's word for a rejection.
fn cause(reason: Reason, is_overfit: bool) -> &'static str {
    match reason {
        Reason::TooShort => "TOO_SHORT",
        Reason::TooLong => "TOO_LONG",
        Reason::SkippedEosEot => "SKIPPED_EOS_EOT",
        Reason::EarlyEnd => "EARLY_END",
        Reason::Overfit => "OVERFIT",
        Reason::LogprobMismatch if is_overfit => "OVERFIT",
        Reason::LogprobRandom => "LOGPROB_RANDOM",
        Reason::UnlikelyToken => "UNLIKELY_TOKEN",
        Reason::UnlikelyTokens | Reason::LogprobMismatch | Reason::SamplerMargin => {
            "UNLIKELY_TOKENS"
        }
        _ => "BAD_STREAM",
    }
}

/// The container's rule for log-probabilities that are too good: how many of them may be exactly 0
/// at this temperature.
fn is_overfit(request: &Request, answer: &Answer) -> bool {
    let perfect = answer.logprobs.iter().filter(|l| **l == Some(0.0)).count();
    let temperature = f64::from(request.sampling.temperature.max(0.0));
    let share = perfect as f64 / answer.logprobs.len().max(1) as f64;
    share >= 1.0 - (0.5 * temperature).min(0.6)
}

/// Waits for its turn and verifies. A caller that goes away, or the end of the process, gives the
/// work up.
async fn verdict(
    service: &Service,
    verifier: Verifier,
    request: Request,
    sent: Sent,
) -> Result<Verdict, VerifierRefusal> {
    let token = service.state.abort_token().child_token();
    let _guard = token.clone().drop_guard();
    let running = Arc::clone(&service.running).acquire_owned();
    let running = tokio::select! {
        running = running => running.map_err(|e| VerifierRefusal::unscored(e.to_string()))?,
        () = token.cancelled() => return Err(VerifierRefusal::closing()),
        () = tokio::time::sleep(WAIT_MAX) => {
            let what = format!("{RUNNING_MAX} others are still being verified after {WAIT_MAX:?}");
            return Err(VerifierRefusal::busy(what));
        }
    };
    let (work, chance) = (token.clone(), service.state.entropy().word());
    let done = off(move || {
        // As long as the memory is in use, and not as long as somebody waits.
        let _running = running;
        run(&verifier, &request, sent, (&work, chance))
    });
    tokio::select! {
        done = done => done,
        () = token.cancelled() => Err(VerifierRefusal::closing()),
    }
}

fn run(
    verifier: &Verifier,
    request: &Request,
    sent: Sent,
    (token, chance): (&CancellationToken, u64),
) -> Verdict {
    let answers = readings(&verifier.model.text, sent);
    let claim = |answer| Claim { end_is_implied: true, ..Claim::new(request, answer) };
    let claims: Vec<Claim<'_>> = answers.iter().map(claim).collect();
    let is_wanted = || !token.is_cancelled();
    let check = verifier.verify(Profile::Ranks, chance).depth(Depth::Slow);
    best(check.while_wanted(&is_wanted).answers(&claims))
}

/// Of readings of one answer: that one of them passes, that one cannot be checked, or what is wrong
/// with it as it was sent.
fn best(reports: Vec<Report>) -> Verdict {
    let mut verdicts: Vec<Verdict> = reports.into_iter().map(|r| r.verdict).collect();
    let rank = |verdict: &Verdict| match verdict {
        Verdict::Pass => 0,
        Verdict::Unscored(_) => 1,
        Verdict::Reject(_) => 2,
    };
    // Among equals the first stays first.
    verdicts.sort_by_key(rank);
    let none = || Verdict::Unscored("an answer was left without a report".into());
    verdicts.into_iter().next().unwrap_or_else(none)
}
