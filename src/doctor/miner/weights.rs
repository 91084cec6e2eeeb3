//! Applies the rules of Targon 4.4 that need the model's weights: it reports what
//! `verify/targon.rs` rules, by the same pass over ids as a validator of this program.

use crate::clock::Clock;
use crate::doctor::{Finding, Level};
use crate::models::pass::LogprobMode;
use crate::validator::query::Streamed;
use crate::verify::answer::Answer;
use crate::verify::targon::{Ruling, rulings};
use crate::verify::{Claim, Depth, Profile, Reason, Report, Verdict, Verifier, question};
use serde_json::Value;

/// Checks a streamed answer to `body`; `chance` picks the places that are looked at closely.
pub async fn check(
    verifier: &Verifier,
    topic: &str,
    body: &Value,
    streamed: &Streamed,
    chance: u64,
) -> Vec<Finding> {
    let of =
        |rule: &str, level, fact: String| Finding::new(format!("{topic}, {rule}"), level, fact);
    let mut request = match question::understand(verifier, body, Clock::system().unix_ms()).await {
        Ok(understood) => match understood.requests.into_iter().next() {
            Some(request) => request,
            None => return Vec::new(),
        },
        Err(e) => {
            let fact = format!("no rule that needs weights was reached: {e}");
            return vec![of("weights", Level::Warning, fact).hint("look at the models file")];
        }
    };
    // The original compares what is drawn from.
    request.logprob_mode = LogprobMode::Scaled;
    let chunks: Vec<Value> = streamed.arrivals.iter().map(|a| a.chunk.clone()).collect();
    let answer = match Answer::of_stream(&chunks, 0) {
        Ok(answer) => answer,
        Err(refused) => {
            let rule = refused.reason.name();
            return vec![of(rule, Level::Fault, refused.what).hint(advice(refused.reason))];
        }
    };
    let (verifier, topic) = (verifier.clone(), topic.to_owned());
    let work = move || {
        let claim = Claim { end_is_implied: true, ..Claim::new(&request, &answer) };
        let check = verifier.verify(Profile::Ranks, chance).depth(Depth::Slow);
        let report = check.answer(&claim);
        let rulings = rulings(&claim, &report.rows, &verifier.limits, chance);
        findings(&topic, &report, &rulings)
    };
    let broke = |e: tokio::task::JoinError| {
        let hint = "a fault of this program, not of the miner: ask again, and report it";
        vec![of("weights", Level::Warning, e.to_string()).hint(hint)]
    };
    tokio::task::spawn_blocking(work).await.unwrap_or_else(broke)
}

/// The rulings, and the verdict where it rests on none of them.
fn findings(topic: &str, report: &Report, rulings: &[Ruling]) -> Vec<Finding> {
    let of = |rule: &str, level, fact: &str| Finding::new(format!("{topic}, {rule}"), level, fact);
    let ruled = rulings.iter().filter(|_| !report.rows.is_empty()).map(|ruling| {
        let rule = ruling.reason.name();
        match ruling.broken_at {
            Some(_) => of(rule, Level::Fault, &ruling.what).hint(advice(ruling.reason)),
            None => of(rule, Level::Ok, &ruling.what),
        }
    });
    let mut findings: Vec<Finding> = ruled.collect();
    let is_told = findings.iter().any(|f| f.level == Level::Fault);
    match &report.verdict {
        Verdict::Pass => {
            let fact = "a validator of 4.4 takes this answer: its speed counts";
            findings.push(of("verdict", Level::Ok, fact));
        }
        Verdict::Reject(refused) => {
            if !is_told {
                let rule = refused.reason.name();
                let told = of(rule, Level::Fault, &refused.what).hint(advice(refused.reason));
                findings.push(told);
            }
            let fact = format!("{} makes this answer a miss", refused.reason.name());
            let hint = "see the finding of that rule";
            findings.push(of("verdict", Level::Fault, &fact).hint(hint));
        }
        Verdict::Unscored(why) => {
            let fact = format!("cannot be checked here: {why}");
            let hint = "the miner is not the cause";
            findings.push(of("verdict", Level::Warning, &fact).hint(hint));
        }
    }
    findings
}

/// What a miner can do about a rule that it breaks.
fn advice(reason: Reason) -> &'static str {
    match reason {
        Reason::TextMismatch | Reason::BadIds => {
            "text and ids must belong together; the original never compares them, this program does"
        }
        Reason::LogprobMismatch => {
            "report log-probabilities after temperature (logprobs_mode `scaled`); the original \
             computes this mean and forgets it, this program does not"
        }
        Reason::BadPowv => "weight values of other weights: are these the model's own, in bf16?",
        Reason::EarlyEnd | Reason::SkippedEosEot => {
            "end where the model ends: at its end tokens, not before and not after"
        }
        Reason::BadStream => "the chunks are not those of an OpenAI stream",
        _ => "other weights, a quantisation, or other sampling than was asked for",
    }
}
