//! Runs `config check`: prints the models file as the program understands it.

use super::Failure;
use super::out::outln;
use super::printable::printable;
use super::shared::ModelsArg;
use crate::config::models_toml::{ModelConfig, ModelSource};
use crate::config::server_toml::ServerConfig;
use crate::engine::backend::BackendKind;
use crate::engine::plan::{Bytes, KvMemory};
use crate::lifecycle::prefixes;
use crate::models::device::names;
use crate::server::settings::Settings;
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
    // Whether this file's server is a miner stands in flags.
    if let Some(what) = prefixes::unused(&config, false) {
        tracing::warn!("{what}");
    }
    for model in &config.models {
        outln!("model {}", printable(&model.name));
        print(&model_rows(model));
    }
    outln!("server");
    print(&server_rows(&config.server));
    outln!("{}: {} models, no fault", args.models.path.display(), config.models.len());
    Ok(())
}

fn print(rows: &[(&str, String)]) {
    for (name, value) in rows {
        outln!("  {name:<13}{}", printable(value));
    }
}

fn model_rows(model: &ModelConfig) -> Vec<(&'static str, String)> {
    let files = match &model.source {
        ModelSource::Path(path) => path.display().to_string(),
        ModelSource::Hub { repo, revision, file: None } => format!("Hub {repo} at {revision}"),
        ModelSource::Hub { repo, revision, file: Some(file) } => {
            format!("Hub {repo} at {revision}, {file}")
        }
    };
    let engine = match model.backend {
        BackendKind::Native => "native",
        BackendKind::Mistralrs => "mistralrs",
    };
    let wanted = &model.wanted;
    let memory = match wanted.kv_memory {
        KvMemory::Auto => "for all sequences, or what the device has left".into(),
        KvMemory::Bytes(bytes) => Bytes(bytes).to_string(),
        KvMemory::Share(share) => format!("{:.0} % of what is free", 100.0 * share),
    };
    let mut rows = vec![
        ("files", files),
        ("engine", engine.into()),
        ("device", names(model.devices.iter().copied())),
        ("dtype", model.dtype.map_or("as stored".into(), |dtype| dtype.to_string())),
        ("context", wanted.context_max.map_or("the model's".into(), |n| n.to_string())),
        ("sequences", wanted.sequences_max.to_string()),
        ("kv memory", memory),
    ];
    let drafts = (wanted.drafts_max > 0).then(|| wanted.drafts_max.to_string());
    let prefixes = model.prefix_cache_file.as_ref().map(|path| path.display().to_string());
    let optional = [
        ("arithmetic", model.arithmetic.map(|arithmetic| arithmetic.to_string())),
        ("isq", model.isq.clone()),
        ("speculation", drafts.map(|tokens| format!("up to {tokens} tokens"))),
        ("prefixes in", prefixes),
    ];
    rows.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value?))));
    rows
}

fn server_rows(server: &ServerConfig) -> Vec<(&'static str, String)> {
    let Settings { keys, limits, cors_origins } = &server.settings;
    let keys = match keys.len() {
        0 => "none: the API is open".into(),
        count => count.to_string(),
    };
    let times = [limits.header_time, limits.body_time, limits.write_time, limits.stall_time];
    let [header, body, write, stall] = times.map(|time| time.as_secs());
    let mut rows = vec![
        ("API keys", keys),
        ("body", format!("{} at most", Bytes(limits.body_bytes as u64))),
        ("connections", format!("{} an address", limits.connections_per_address)),
        ("seconds", format!("header {header}, body {body}, write {write}, stall {stall}")),
    ];
    rows.extend((!cors_origins.is_empty()).then(|| ("CORS origins", cors_origins.join(", "))));
    rows.extend(server.log.as_ref().map(|log| ("log", log.to_string())));
    rows
}
