//! Runs `config check`: prints the models file as the program understands it.

use super::Failure;
use super::out::outln;
use super::printable::printable;
use super::shared::ModelsArg;
use crate::config::models_toml::ModelSource;
use clap::{Args, Subcommand};

/// What is done with configuration files.
#[derive(Subcommand)]
pub(super) enum ConfigCommand {
    /// Print how the models file is understood, or what is wrong with it. Nothing is downloaded or
    /// loaded. A file for --config is checked by every command that is given one.
    Check(CheckArgs),
}

/// Arguments of `config check`.
#[derive(Args)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    models: ModelsArg,
}

pub(super) fn run(command: &ConfigCommand) -> Result<(), Failure> {
    let ConfigCommand::Check(args) = command;
    let config = args.models.read(&[])?;
    for model in &config.models {
        let source = match &model.source {
            ModelSource::Path(path) => path.display().to_string(),
            ModelSource::Hub { repo, revision, file: None } => format!("Hub {repo} at {revision}"),
            ModelSource::Hub { repo, revision, file: Some(file) } => {
                format!("Hub {repo} at {revision}, {file}")
            }
        };
        let dtype = model.dtype.map_or("as stored".into(), |dtype| dtype.to_string());
        let context = model.wanted.context_max.map_or("the model's".into(), |n| n.to_string());
        let sequences = model.wanted.sequences_max;
        outln!("model {}", printable(&model.name));
        outln!("  files      {}", printable(&source));
        outln!("  dtype      {dtype}");
        outln!("  context    {context}");
        outln!("  sequences  {sequences}");
    }
    outln!("{}: {} models, no fault", args.models.path.display(), config.models.len());
    Ok(())
}
