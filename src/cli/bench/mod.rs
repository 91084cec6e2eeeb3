//! Defines the subcommands of `bench`, which measure, predict and compare.

mod attack;
mod compare;
mod engine;
mod output;
mod plan;
mod serve;

use super::Failure;
use clap::{Args, Subcommand};
use std::ffi::OsString;

/// What is measured or predicted.
#[derive(Subcommand)]
pub(super) enum BenchCommand {
    /// Measure a model in this process: prefill, decode and checks over batch and depth, beside the
    /// ceilings of this machine and what `bench plan` predicts.
    Engine(engine::EngineArgs),
    /// Measure a server that speaks OpenAI's API, this program's or another's, under load: times,
    /// throughput, and what kept its promises.
    Serve(Box<serve::BenchServeArgs>),
    /// Predict a model on a table of devices, from its configuration alone: tokens a second, what
    /// holds them back, and what they cost.
    Plan(plan::BenchPlanArgs),
    /// Rank machines by their reports: speed, energy, money, and what a validator's check costs.
    Compare(compare::CompareArgs),
    /// Say what each verification scheme catches, on a model of your choice.
    Attack(attack::AttackArgs),
}

pub(super) fn run(command: &BenchCommand) -> Result<(), Failure> {
    match command {
        BenchCommand::Engine(args) => engine::run(args),
        BenchCommand::Serve(args) => serve::run(args),
        BenchCommand::Plan(args) => plan::run(args),
        BenchCommand::Compare(args) => compare::run(args),
        BenchCommand::Attack(args) => attack::run(args),
    }
}

/// A command under a name that it no longer has.
#[derive(Args)]
pub(super) struct Former {
    /// Whatever it was given.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _rest: Vec<OsString>,
}

impl Former {
    pub(super) fn refuse(&self) -> Result<(), Failure> {
        Err(Failure::user("there is no command `attack-bench` any more")
            .with_hint(Some("it is `targon-engine bench attack`, with the same flags")))
    }
}
