//! Runs `bench serve`: puts a server that speaks OpenAI's API under load.

use super::output::{OutputArgs, until_interrupted};
use crate::bench::report::facts::{Machine, ModelFacts};
use crate::bench::report::schema::{BenchReport, ReportKind};
use crate::bench::traffic::drive::Load;
use crate::bench::traffic::heard::Transport;
use crate::bench::traffic::levels::{LevelsRun, LoadSetup, LoadWatch};
use crate::bench::traffic::questions::{LoadShape, Questions};
use crate::bench::traffic::server::{GreetError, Server};
use crate::bench::traffic::tally::Promise;
use crate::cli::Failure;
use crate::cli::out::note;
use crate::cli::printable::printable;
use crate::cli::shared::{check_http, runtime};
use crate::clock::Clock;
use crate::endpoint::shown;
use crate::validator::prompt::date;
use crate::validator::query::{QueryError, QueryFault, Size, Target};
use anyhow::bail;
use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};
use std::net::UdpSocket;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Words of a prompt where nothing is said.
const WORDS_DEFAULT: u32 = 128;

/// Arguments of `bench serve`.
#[derive(Args)]
#[command(after_help = "Examples:
  targon-engine bench serve --url http://127.0.0.1:8000 --model M --rate 1,2,4
  targon-engine bench serve --url http://127.0.0.1:8000 --model M \\
      --concurrency 1,8,32 --out report
  targon-engine bench serve --url http://127.0.0.1:8000 --model M \\
      --load targon --rate 2")]
pub(in crate::cli) struct BenchServeArgs {
    /// The server, without /v1.
    #[arg(long)]
    url: String,
    /// The model's name there.
    #[arg(long)]
    model: String,
    /// A key of the server's API.
    #[arg(long, env = "TARGON_BENCH_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// What is asked: `fixed` has one length; `targon` is what a validator of the subnet asks, half
    /// chat and half completions, with its prompts and its ranges of temperature, seed and length.
    #[arg(long, value_enum, default_value_t = LoadArg::Fixed)]
    load: LoadArg,
    /// Use the completions endpoint instead of chat, with --load fixed.
    #[arg(long)]
    completion: bool,
    /// Requests a second that arrive as a Poisson process, however long answers take; several
    /// levels with commas between them.
    #[arg(long, value_delimiter = ',', value_parser = positive, conflicts_with = "concurrency",
          allow_negative_numbers = true)]
    rate: Vec<f64>,
    /// Requests that run at once, always; several levels with commas between them. 1 where neither
    /// this nor --rate is given.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=4096))]
    concurrency: Vec<u16>,
    /// Requests of each level.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    requests: u32,
    /// Words of a prompt with --load fixed, about as many tokens; by default 128.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    input: Option<u32>,
    /// Tokens of an answer; with --load targon the most, by default 1920.
    #[arg(long, value_parser = clap::value_parser!(u32).range(8..=100_000))]
    output_tokens: Option<u32>,
    /// Leave out `ignore_eos`, which some servers refuse: answers may then be shorter.
    #[arg(long)]
    no_ignore_eos: bool,
    /// Use the same prompt every time, so that the server finds it in its prefix cache.
    #[arg(long)]
    repeat_prompts: bool,
    /// Seconds to the first token within which a request counts as good.
    #[arg(long, default_value_t = 5.0, value_parser = positive)]
    ttft_limit: f64,
    /// Mean seconds a token after the first within which a request counts as good.
    #[arg(long, default_value_t = 0.1, value_parser = positive)]
    tpot_limit: f64,
    /// Decides prompts and arrivals. Default: a fresh one.
    #[arg(long)]
    seed: Option<u64>,
    /// Seconds that one answer may take.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// Seconds that a connection may be silent, before the first token too; a validator's own are
    /// 5. As long as the answer may take where absent.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    read_timeout: Option<u64>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum LoadArg {
    /// Prompts and answers of one length.
    Fixed,
    /// What a validator of the subnet asks.
    Targon,
}

impl From<LoadArg> for LoadShape {
    fn from(load: LoadArg) -> Self {
        match load {
            LoadArg::Fixed => Self::Fixed,
            LoadArg::Targon => Self::Targon,
        }
    }
}

fn positive(text: &str) -> anyhow::Result<f64> {
    match text.parse() {
        Ok(number) if number > 0.0 && number <= 1e6 => Ok(number),
        _ => bail!("must be a number above 0 and at most 1000000"),
    }
}

pub(super) fn run(args: &BenchServeArgs) -> Result<(), Failure> {
    args.check()?;
    let output = args.output.start(Vec::new())?;
    let runtime = runtime()?;
    let is_wanted = until_interrupted(&runtime);
    let clock = Clock::system();
    let questions = args.questions(&clock)?;
    let server = args.server(&clock)?;
    runtime.block_on(greet(&server, &questions))?;
    let version = runtime.block_on(server.version());
    let facts = ModelFacts {
        name: args.model.clone(),
        weights_root: None,
        dtype: None,
        weights_bytes: None,
    };
    let machine = Machine::this(Path::new("/"));
    let mut report = BenchReport::new(ReportKind::Serve, clock.unix_ms() / 1000, machine, facts);
    args.note_settings(&mut report, &questions);
    report.settings.insert("server".into(), json!(version));
    let setup = LoadSetup {
        place: printable(&shown(&args.url)),
        loads: args.loads(),
        requests: args.requests.into(),
        promise: Promise { first_token: args.ttft_limit, per_token: args.tpot_limit },
        threads: runtime.metrics().num_workers(),
        is_here: args.is_here(),
    };
    let mut keep = |report: &BenchReport, file: &Map<String, Value>| {
        if let Some(level) = report.levels.last() {
            let (load, speed) = (level.load(), level.steady_tokens_per_second);
            note!("{load}: {} of {} answers, {speed:.1} tokens/s", level.completed, level.sent);
        }
        output.keep(report)?;
        output.keep_vllm(report.levels.len(), file)
    };
    let wanted = || is_wanted.load(Ordering::SeqCst);
    let mut watch = LoadWatch { is_wanted: &wanted, keep: &mut keep };
    let server: Arc<dyn Transport> = Arc::new(server);
    let run = LevelsRun { server: &server, questions: &questions, setup: &setup };
    let measuring = run.run(&mut report, &mut watch);
    let outcome = runtime.block_on(measuring);
    output.finish(report, outcome.map_err(Failure::user))
}

impl BenchServeArgs {
    /// Refuses what a validator's own load would not follow.
    fn check(&self) -> Result<(), Failure> {
        let unused = [("--input", self.input.is_some()), ("--completion", self.completion)];
        match (self.load, unused.iter().find(|(_, is_given)| *is_given)) {
            (LoadArg::Targon, Some((flag, _))) => {
                Err(Failure::user(format!("{flag} goes only with --load fixed")))
            }
            _ => Ok(()),
        }
    }

    fn words(&self) -> u32 {
        self.input.unwrap_or(WORDS_DEFAULT)
    }

    fn server(&self, clock: &Clock) -> Result<Server, Failure> {
        check_http("url", &self.url)?;
        let target = Target {
            url: self.url.trim_end_matches('/').trim_end_matches("/v1").to_owned(),
            hotkey: None,
            signer: None,
            api_key: self.api_key.clone(),
            read_timeout: Duration::from_secs(self.read_timeout.unwrap_or(self.timeout)),
            timeout: Duration::from_secs(self.timeout),
            size: Size::LARGE,
        };
        Server::new(target, clock.clone()).map_err(Failure::user)
    }

    fn questions(&self, clock: &Clock) -> Result<Questions, Failure> {
        let seed = self.seed.unwrap_or_else(|| crate::entropy::Entropy::system().word());
        let shape = LoadShape::from(self.load);
        Ok(Questions {
            shape,
            model: self.model.clone(),
            is_completion: self.completion,
            words: self.words() as usize,
            tokens: self.output_tokens.unwrap_or(match shape {
                LoadShape::Fixed => 128,
                LoadShape::Targon => 1920,
            }),
            ignores_eos: !self.no_ignore_eos,
            is_repeated: self.repeat_prompts,
            seed,
            date: date(clock.unix_ms()).map_err(Failure::user)?,
        })
    }

    /// Whether the server is on this machine: nothing else can listen at its address.
    fn is_here(&self) -> bool {
        let url = url::Url::parse(&self.url).ok();
        let addresses = url.and_then(|url| url.socket_addrs(|| None).ok()).unwrap_or_default();
        addresses.iter().any(|address| UdpSocket::bind((address.ip(), 0)).is_ok())
    }

    fn loads(&self) -> Vec<Load> {
        let rates = self.rate.iter().map(|rate| Load::Rate(*rate));
        let many = self.concurrency.iter().map(|many| Load::Concurrency((*many).into()));
        let all: Vec<Load> = rates.chain(many).collect();
        if all.is_empty() { vec![Load::Concurrency(1)] } else { all }
    }

    fn note_settings(&self, report: &mut BenchReport, questions: &Questions) {
        let is_fixed = questions.shape == LoadShape::Fixed;
        let concurrency: Vec<usize> = self.loads().into_iter().filter_map(Load::at_once).collect();
        for (name, value) in [
            ("url", json!(shown(&self.url))),
            ("load", json!(questions.shape.name())),
            ("completion", json!(is_fixed.then_some(self.completion))),
            ("ignore_eos", json!(is_fixed.then_some(questions.ignores_eos))),
            ("rate", json!(self.rate)),
            ("concurrency", json!(concurrency)),
            ("requests", json!(self.requests)),
            ("input", json!(is_fixed.then_some(self.words()))),
            ("timeout", json!(self.timeout)),
            ("read_timeout", json!(self.read_timeout)),
            ("output_tokens", json!(questions.tokens)),
            ("repeat_prompts", json!(self.repeat_prompts)),
            ("ttft_limit", json!(self.ttft_limit)),
            ("tpot_limit", json!(self.tpot_limit)),
            ("seed", json!(questions.seed.to_string())),
        ] {
            report.settings.insert(name.into(), value);
        }
    }
}

async fn greet(server: &Server, questions: &Questions) -> Result<(), Failure> {
    let greeted = server.greet(&questions.ask(0)).await;
    greeted.map_err(|e| Failure::user(printable(&e.to_string())).with_hint(hint(&e)))
}

fn hint(e: &GreetError) -> Option<&'static str> {
    let GreetError::Query(e) = e else { return None };
    match (e, e.fault()) {
        (_, QueryFault::Unreachable) => Some("is a server running there?"),
        (QueryError::Status { status, .. }, _) if status.as_u16() == 503 => {
            Some("wait until the model is loaded: this program's /ready then answers 200")
        }
        (_, QueryFault::Status) => Some("are --url, --model and --api-key right?"),
        _ => None,
    }
}
