//! Runs `audit`: asks a server for answers with log-probabilities, and says how far they are from
//! the weights that are here.

use super::Failure;
use super::out::{note, outln};
use super::printable::printable;
use super::shared::{ComputeArgs, ModelsArg, check_http, plain_verifier, runtime};
use crate::audit::asking::{AuditError, AuditRequests, Findings, audit};
use crate::audit::evidence::{AuditEvidence, Conclusion};
use crate::bench::prompts;
use crate::chance::Chance;
use crate::clock::Clock;
use crate::endpoint::shown;
use crate::entropy::Entropy;
use crate::proof::codec::to_hex;
use crate::validator::query::{Size, Target};
use clap::Args;
use serde_json::{Value, json};
use std::process::ExitCode;
use std::time::Duration;

/// Exit codes, as those of `verify`.
const AGREES: u8 = 0;
const NOT_THESE: u8 = 3;
const CANNOT_TELL: u8 = 4;

/// Arguments of `audit`.
#[derive(Args)]
#[command(after_help = "Examples:
  targon-engine audit --url https://llm.example --model M --models models.toml
  targon-engine audit --url http://127.0.0.1:8000 --model M --local mine --json

Exit code 0: the answers agree with these weights; 3: they were computed with
others; 4: too little was said to tell, or the server failed after its first
answer: then what was found so far is printed, and `broken_off` says why. A
server that never answers is an error: exit code 1.")]
pub(super) struct AuditArgs {
    /// The server, without /v1.
    #[arg(long)]
    url: String,
    /// The model's name there.
    #[arg(long)]
    model: String,
    /// The model's name in the models file, if it is another one.
    #[arg(long)]
    local: Option<String>,
    /// A key of the server's API.
    #[arg(long, env = "TARGON_AUDIT_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Use the chat endpoint. The default is completions, which use no chat template.
    #[arg(long)]
    chat: bool,
    /// The most answers to ask for; the test ends earlier when it is certain.
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=1000))]
    answers: u32,
    /// Tokens of each answer.
    #[arg(long, default_value_t = 48, value_parser = clap::value_parser!(u32).range(8..=128))]
    tokens: u32,
    /// The time limit of one answer, in seconds.
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    models: ModelsArg,
    #[command(flatten)]
    compute: ComputeArgs,
}

pub(super) fn run(args: &AuditArgs) -> Result<ExitCode, Failure> {
    let target = args.target()?;
    let name = args.local.as_ref().unwrap_or(&args.model);
    let models = args.models.read(&[])?.models;
    let config = models.into_iter().find(|m| m.name == *name).ok_or_else(|| {
        let what = format!("{} has no model `{name}`", args.models.path.display());
        Failure::user(printable(&what)).with_hint(Some("name one of its models by --local"))
    })?;
    let (runtime, pool) = (runtime()?, args.compute.pool()?);
    let verifier = plain_verifier(&runtime, config, &pool)?;
    let told = |answers: u32, evidence: &AuditEvidence| {
        let AuditEvidence { nats_eight_bits, nats_other, .. } = evidence;
        note!("answer {answers}: {nats_eight_bits:+.1} and {nats_other:+.1} nats so far");
    };
    let (asked, mut chance) = ((target, args.requests()), Chance::of(&Entropy::system()));
    let all = prompts::all();
    let drawn = (all.as_slice(), &mut chance, Clock::system());
    let found = runtime.block_on(audit(asked, &verifier, drawn, &told));
    let found = found.map_err(audit_failure)?;
    let root = to_hex(&verifier.identity.weights_root);
    match args.json {
        true => outln!("{}", as_json(&found, &root)),
        false => print(args, &found, &root),
    }
    Ok(ExitCode::from(code(found.evidence.verdict().0, found.broken_off.is_none())))
}

/// A test that broke off gives no conclusion, whatever it had found.
fn code(verdict: Conclusion, is_whole: bool) -> u8 {
    match verdict {
        Conclusion::Agrees if is_whole => AGREES,
        Conclusion::NotTheseWeights if is_whole => NOT_THESE,
        _ => CANNOT_TELL,
    }
}

impl AuditArgs {
    fn target(&self) -> Result<Target, Failure> {
        check_http("url", &self.url)?;
        let url = self.url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let timeout = Duration::from_secs(self.timeout);
        Ok(Target {
            url,
            hotkey: None,
            signer: None,
            api_key: self.api_key.clone(),
            read_timeout: timeout,
            timeout,
            size: Size::LARGE,
        })
    }

    fn requests(&self) -> AuditRequests {
        AuditRequests {
            model: self.model.clone(),
            is_chat: self.chat,
            answers_max: self.answers,
            tokens: self.tokens,
        }
    }
}

fn audit_failure(e: AuditError) -> Failure {
    match e.is_ours() {
        true => Failure::ours(e),
        false => Failure::user(printable(&e.to_string())),
    }
}

fn as_json(found: &Findings, root: &str) -> Value {
    let Findings { evidence, honours_seeds, broken_off } = found;
    let (verdict, why) = evidence.verdict();
    json!({
        "verdict": verdict, "why": why, "weights_root": root, "evidence": evidence,
        "logit_noise": evidence.noise(), "mean_logprob_error": evidence.mean_error(),
        "surprise_sd": evidence.surprise(), "seed_honoured": honours_seeds,
        "broken_off": broken_off.as_ref().map(ToString::to_string),
    })
}

fn print(args: &AuditArgs, found: &Findings, root: &str) {
    let Findings { evidence: e, honours_seeds, broken_off } = found;
    let percent = |part: usize, of: usize| 100.0 * part as f64 / of.max(1) as f64;
    outln!("{} at {}", printable(&args.model), printable(&shown(&args.url)));
    outln!("  weights here   {root}");
    let [ids, names, text] = e.sources;
    outln!("  answers        {} with {} tokens", e.answers, e.tokens);
    if e.without_tokens > 0 {
        outln!("  without tokens {} answers: empty, or none is certain", e.without_tokens);
    }
    outln!("  tokens known   by ids {ids}, by their bytes {names}, guessed from text {text}");
    let (first, five) = (percent(e.first, e.tokens), percent(e.among_five, e.tokens));
    outln!("  ranks          {first:.1} % first, {five:.1} % among five");
    match (e.noise(), e.mean_error()) {
        (Some(noise), Some(error)) => {
            outln!("  log-probs      off by {error:.4} nats; logits differ by about {noise:.3}");
        }
        _ => outln!("  log-probs      none could be compared"),
    }
    let [greedy, flipped] = e.greedy;
    outln!("  greedy         {flipped} of {greedy} tokens are not our most probable ones");
    if let Some(far) = e.surprise() {
        outln!("  sampled        tokens surprise by {far:+.1} standard deviations");
    }
    let [drawn, of] = e.drawn;
    match honours_seeds {
        None => outln!("  seed           cannot be told"),
        Some(false) => outln!("  seed           not honoured"),
        Some(true) => {
            let share = percent(drawn, of);
            outln!("  seed           honoured; this engine draws {share:.1} % of the same tokens");
        }
    }
    let (verdict, why) = e.verdict();
    match broken_off {
        None => outln!("{}: {why}", verdict.words()),
        Some(failure) => {
            outln!("broken off: {}", printable(&failure.to_string()));
            outln!("{} so far: {why}", verdict.words());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        audit: AuditArgs,
    }

    #[test]
    fn only_a_test_that_ended_gives_a_conclusion() {
        let of = |verdict| [code(verdict, true), code(verdict, false)];
        assert_eq!(of(Conclusion::Agrees), [0, 4]);
        assert_eq!(of(Conclusion::NotTheseWeights), [3, 4]);
        assert_eq!(of(Conclusion::CannotTell), [4, 4]);
    }

    #[test]
    fn an_address_is_checked_before_the_models_file_is_read() {
        let line = ["audit", "--url", "llm.example", "--model", "m", "--models", "/absent.toml"];
        let failure = run(&Program::parse_from(line).audit).unwrap_err();
        assert!(failure.message().starts_with("--url must begin with http"), "{failure:?}");
    }
}
