//! The command line: one type for each command, one function that runs it.
//!
//! Data goes to stdout, everything else to stderr. Exit code 0 is success, 1 is something the user
//! can mend, 2 is our own failure.

mod attack_bench;
mod calibrate;
mod fetch;
mod load;
mod logging;
mod plan;
mod reload;
mod serve;
mod shared;
mod verifier;
mod verify;

use clap::{Parser, Subcommand};
use std::fmt;
use std::process::ExitCode;

/// Miner and validator for Bittensor subnet 4 on one embedded LLM engine.
#[derive(Parser)]
#[command(name = "targon-engine", version, about, max_term_width = 100)]
struct Cli {
    /// What is logged: error, warn, info, debug or trace, or a filter such as `engine=debug`.
    #[arg(long, global = true, env = "TARGON_LOG", default_value = "info")]
    log: String,
    /// Log as one JSON object a line.
    #[arg(long, global = true, env = "TARGON_LOG_JSON")]
    log_json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve models over HTTP.
    Serve(serve::ServeArgs),
    /// Say what memory the models will need, without loading them.
    Plan(plan::PlanArgs),
    /// Compute the whitening that a model's proofs need, and store it.
    Calibrate(calibrate::CalibrateArgs),
    /// Serve `/verify` and `/generate` as Targon's verifier container does.
    Verifier(verifier::VerifierArgs),
    /// Say what each verification scheme catches, on a model of your choice.
    AttackBench(attack_bench::AttackBenchArgs),
    /// Judge captured answers: exit code 0 when all pass, 3 when one is rejected, 4 when one could
    /// not be scored.
    Verify(verify::VerifyArgs),
    /// Download a model from the Hugging Face Hub and print where it is.
    Fetch(fetch::FetchArgs),
}

/// A failure of a command.
#[derive(Debug)]
pub struct Failure {
    message: String,
    hint: Option<String>,
    is_ours: bool,
}

impl Failure {
    /// Something the user can mend.
    fn user(message: impl fmt::Display) -> Self {
        Self { message: message.to_string(), hint: None, is_ours: false }
    }

    /// Our own failure.
    fn ours(message: impl fmt::Display) -> Self {
        Self { message: message.to_string(), hint: None, is_ours: true }
    }

    fn with_hint(self, hint: Option<impl Into<String>>) -> Self {
        Self { hint: hint.map(Into::into), ..self }
    }
}

/// Parses the arguments, runs the command, prints a failure.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // `--help` and `--version` come here too, and are not failures.
            let code = if e.use_stderr() { 1 } else { 0 };
            let _ = e.print();
            return ExitCode::from(code);
        }
    };
    let outcome = logging::start(&cli.log, cli.log_json).and_then(|()| run(cli.command, cli.log));
    match outcome {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("error: {}", failure.message);
            if let Some(hint) = failure.hint {
                eprintln!("\nhint: {hint}");
            }
            ExitCode::from(if failure.is_ours { 2 } else { 1 })
        }
    }
}

fn run(command: Command, log: String) -> Result<ExitCode, Failure> {
    match command {
        Command::Verify(args) => return verify::run(&args),
        Command::Serve(args) => serve::run(args, log),
        Command::AttackBench(args) => attack_bench::run(&args),
        Command::Verifier(args) => verifier::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Fetch(args) => fetch::run(&args),
    }?;
    Ok(ExitCode::SUCCESS)
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    // Few, because they compete with the compute threads for cores.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads((cores / 4).clamp(1, 4))
        .enable_all()
        .build()
        .map_err(|e| Failure::ours(format!("cannot start the async runtime: {e}")))
}
