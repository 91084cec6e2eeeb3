//! Defines the command line: there is one type for each command and one function that runs it.
//!
//! Data goes to stdout, everything else to stderr. Exit code 0 is success, 1 is something the user
//! can mend, 2 is our own failure.

mod as_validator;
mod audit;
mod bench;
mod cache;
mod calibrate;
mod checked;
mod config;
mod doctor;
mod examples;
mod explain;
mod export;
mod failure;
mod fetch;
mod layers;
mod logging;
mod manual;
mod out;
mod plan;
mod printable;
mod progress;
mod query;
mod serve;
mod shared;
mod status;
mod subnet;
mod subnet_args;
mod tables;
mod tui;
mod update;
mod validate;
mod validate_args;
mod validate_table;
mod verifier;
mod verify;
mod verify_html;
mod wallet;

#[cfg(test)]
mod guides;

use crate::config::log::LogFilter;
use crate::update::Probation;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use examples::with_examples;
pub use failure::Failure;
use out::note;
use std::process::ExitCode;
use tracing_subscriber::filter::LevelFilter;

/// The heading in `--help` of what every command takes, so that it does not stand between the
/// command's own flags.
const COMMON: &str = "Every command";

/// Miner and validator for Bittensor subnet 4 on one embedded LLM engine.
#[derive(Parser)]
#[command(name = "targon-engine", version, about, max_term_width = 100)]
struct Cli {
    /// The log level: error, warn, info, debug, trace or off, or levels of parts such as
    /// `warn,engine=debug`.
    #[arg(long, global = true, help_heading = COMMON, env = "TARGON_LOG", default_value = "info")]
    log: LogFilter,
    /// Log as one JSON object a line.
    #[arg(long, global = true, help_heading = COMMON, env = "TARGON_LOG_JSON")]
    log_json: bool,
    /// The same as `--log info`, under the SDK's name.
    #[arg(long = "logging.info", global = true, hide = true)]
    logging_info: bool,
    /// The same as `--log debug`, under the SDK's name.
    #[arg(long = "logging.debug", global = true, env = "BT_LOGGING_DEBUG", hide = true)]
    logging_debug: bool,
    /// The same as `--log trace`, under the SDK's name.
    #[arg(long = "logging.trace", global = true, env = "BT_LOGGING_TRACE", hide = true)]
    logging_trace: bool,
    /// A YAML file with values for flags; the command line and the environment override it.
    #[arg(long, global = true, help_heading = COMMON, env = "TARGON_CONFIG")]
    config: Option<std::path::PathBuf>,
    #[command(subcommand)]
    command: Command,
}

impl Cli {
    /// What is logged: the SDK's flags are stronger, the most talkative strongest.
    fn log(&self) -> LogFilter {
        match (self.logging_trace, self.logging_debug, self.logging_info) {
            (true, ..) => LogFilter::level(LevelFilter::TRACE),
            (_, true, _) => LogFilter::level(LevelFilter::DEBUG),
            (_, _, true) => LogFilter::level(LevelFilter::INFO),
            _ => self.log.clone(),
        }
    }
}

#[derive(Subcommand)]
enum Command {
    /// Serve models over HTTP, and with a wallet as a miner on a subnet.
    Serve(Box<serve::ServeArgs>),
    /// Print the memory that the models will need, without loading or downloading them.
    Plan(plan::PlanArgs),
    /// Compute the whitening that a model's proofs need, and store it.
    Calibrate(calibrate::CalibrateArgs),
    /// Serve `/verify` and `/generate` as Targon's verifier container does.
    Verifier(verifier::VerifierArgs),
    /// Measure models, servers and verification, predict devices, compare reports.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// The former name of `bench attack`.
    #[command(hide = true)]
    AttackBench(bench::Former),
    /// Check captured answers: exit code 0 when all pass, 3 when one is rejected, 4 when one could
    /// not be scored.
    Verify(verify::VerifyArgs),
    /// Ask any OpenAI server for answers, and say whether they agree with weights that are here:
    /// exit code 0 they do, 3 they do not, 4 it cannot be told.
    Audit(Box<audit::AuditArgs>),
    /// Send one request to a miner as a validator would, and print what comes back.
    Query(Box<query::QueryArgs>),
    /// Print what a validator has recorded: rounds, responses, samples or weights.
    ///
    /// The validator may run meanwhile.
    Export(export::ExportArgs),
    /// Show every number behind a miner's weight, down to the round and token that cost it.
    Explain(explain::ExplainArgs),
    /// Validate a subnet: ask miners, check their answers with these models, set weights.
    Validate(Box<validate::ValidateArgs>),
    /// Show the state of a running miner and its standing on the subnet.
    Status(status::StatusArgs),
    /// Show a wallet, or make a hotkey.
    Wallet(wallet::Arguments),
    /// Download a model from the Hugging Face Hub and print where it is.
    Fetch(fetch::FetchArgs),
    /// List and clean what the program keeps on disk and can get or compute again.
    #[command(subcommand)]
    Cache(cache::CacheCommand),
    /// Look at machine, clock, wallet, chain, ports and models, or at a miner as validators see it,
    /// and say what is wrong: exit code 1 when something does not work.
    Doctor(Box<doctor::DoctorArgs>),
    /// Check configuration files.
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Print a completion script for a shell.
    Completions(manual::CompletionsArgs),
    /// Write manual pages, one for each command.
    Man(manual::ManArgs),
}

/// Parses the arguments, runs the command, prints a failure. A new program that fails in its first
/// minutes gives way to the one before it.
pub fn main() -> ExitCode {
    let probation = update::on_probation();
    let failed = match launch() {
        Ok(code) => return code,
        Err(code) => code,
    };
    if let Some(probation) = probation.filter(Probation::is_open) {
        update::roll_back(probation, &format!("it ended with {failed}"));
    }
    ExitCode::from(failed)
}

/// # Errors
/// The exit code of a failure, which was printed.
fn launch() -> Result<ExitCode, u8> {
    let arguments: Vec<_> = std::env::args_os().collect();
    let command = layers::apply(with_examples(Cli::command()), &arguments).map_err(report)?;
    let parsed = command.try_get_matches_from(arguments).and_then(|m| Cli::from_arg_matches(&m));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(e) => {
            out::help(&e);
            // `--help` and `--version` come here too, and are not failures.
            return if e.use_stderr() { Err(1) } else { Ok(ExitCode::SUCCESS) };
        }
    };
    let log = cli.log();
    let outcome = logging::start(&log, cli.log_json).and_then(|()| run(cli.command, log));
    outcome.map_err(report)
}

/// Prints a failure; its exit code.
fn report(failure: Failure) -> u8 {
    note!("error: {}", failure.message);
    if let Some(hint) = failure.hint {
        note!("\nhint: {hint}");
    }
    if failure.is_ours { 2 } else { 1 }
}

fn run(command: Command, log: LogFilter) -> Result<ExitCode, Failure> {
    match command {
        Command::Verify(args) => return verify::run(&args),
        Command::Doctor(args) => return doctor::run(&args),
        Command::Audit(args) => return audit::run(&args),
        Command::Serve(args) => serve::run(*args, log),
        Command::Bench(command) => bench::run(&command),
        Command::AttackBench(former) => former.refuse(),
        Command::Verifier(args) => verifier::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Query(args) => query::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Validate(args) => validate::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Wallet(args) => wallet::run(&args),
        Command::Fetch(args) => fetch::run(&args),
        Command::Cache(command) => cache::run(&command),
        Command::Config(command) => config::run(&command),
        Command::Completions(args) => manual::completions(&args, Cli::command()),
        Command::Man(args) => manual::pages(&args, with_examples(Cli::command())),
    }?;
    Ok(ExitCode::SUCCESS)
}
