//! Runs `doctor`: says what is wrong before anything is started.

use super::Failure;
use super::as_validator::{self, MinerArgs};
use super::out::outln;
use super::printable::printable;
use super::shared::runtime;
use super::shared::{ListenArgs, ModelsArg};
use super::subnet_args::{AxonArgs, ChainArgs, WalletArgs};
use crate::chain::keys::Hotkey;
use crate::clock::Clock;
use crate::config::models_toml::{ModelConfig, ModelSource};
use crate::doctor::{Finding, Level, machine, membership, models, network, wallet, worst};
use crate::engine::memory::memory;
use crate::models::hub::{Hub, WantedFiles};
use crate::models::remembered::cache_dir;
use clap::Args;
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `doctor`.
#[derive(Args)]
pub(super) struct DoctorArgs {
    #[command(flatten)]
    miner: MinerArgs,
    #[command(flatten)]
    models: ModelsArg,
    #[command(flatten)]
    wallet: WalletArgs,
    #[command(flatten)]
    chain: ChainArgs,
    #[command(flatten)]
    axon: AxonArgs,
    #[command(flatten)]
    listen: ListenArgs,
    /// Do not use the network: ask neither the chain, the Hub, nor the service for the public
    /// address.
    #[arg(long, env = "TARGON_DOCTOR_OFFLINE")]
    offline: bool,
    /// Print one JSON object: `worst` and `findings`.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &DoctorArgs) -> Result<ExitCode, Failure> {
    let runtime = runtime()?;
    let findings = match args.miner.is_named() {
        true => as_validator::examine(&args.miner, &args.models, &args.wallet, &runtime)?,
        false => runtime.block_on(examine(args))?,
    };
    let worst = worst(&findings);
    if args.json {
        outln!("{}", json!({"worst": worst, "findings": findings}));
    } else {
        print(&findings);
    }
    Ok(ExitCode::from(u8::from(worst == Level::Fault)))
}

async fn examine(args: &DoctorArgs) -> Result<Vec<Finding>, Failure> {
    let clock = Clock::system();
    let hub = Hub::from_env().map_err(Failure::ours)?;
    let mut findings = machine::examine(&[hub.cache().to_owned(), cache_dir()]);
    let mut hotkey = None;
    if args.wallet.is_named() {
        let (found, seen) = wallet::examine(&args.wallet.wallet()?);
        hotkey = found;
        findings.extend(seen);
    } else {
        let fact = "no wallet is named, so nothing is said about keys and registration";
        findings.push(
            Finding::new("wallet", Level::Note, fact)
                .hint("name one by --wallet.name and --wallet.hotkey"),
        );
    }
    findings.extend(ports(args).await?);
    if args.offline {
        findings.push(Finding::new("network", Level::Note, "nobody was asked (--offline)"));
    } else {
        findings.extend(online(args, &hub, hotkey, &clock).await?);
    }
    findings.extend(examine_models(args, &hub).await?);
    Ok(findings)
}

async fn ports(args: &DoctorArgs) -> Result<Vec<Finding>, Failure> {
    let mut findings = vec![network::port("axon port", args.axon.listen()?).await];
    if let Some(address) = args.listen.address() {
        findings.push(network::port("open port", address).await);
    }
    Ok(findings)
}

async fn online(
    args: &DoctorArgs,
    hub: &Hub,
    hotkey: Option<Hotkey>,
    clock: &Clock,
) -> Result<Vec<Finding>, Failure> {
    let mut findings = network::service("hub", hub.endpoint(), clock).await;
    match args.axon.external(args.axon.port).await {
        Ok(address) => {
            findings.extend(network::announced(address.ip()));
            findings.push(network::reachable(address).await);
        }
        Err(failure) => findings.push(
            Finding::new("public address", Level::Warning, failure.message())
                .hint("give it by --axon.external_ip"),
        ),
    }
    let endpoints = args.chain.endpoints()?;
    let (metagraph, seen) = membership::endpoints(&endpoints, args.chain.netuid(), clock).await;
    findings.extend(seen);
    if let (Some(metagraph), Some(hotkey)) = (metagraph, hotkey) {
        findings.extend(membership::registration(&metagraph, &hotkey));
    }
    Ok(findings)
}

async fn examine_models(args: &DoctorArgs, hub: &Hub) -> Result<Vec<Finding>, Failure> {
    if !args.models.path.exists() {
        let fact = format!("{} does not exist", args.models.path.display());
        let finding = Finding::new("models", Level::Note, fact)
            .hint("name the file with [[model]] entries by --models");
        return Ok(vec![finding]);
    }
    let mut findings = Vec::new();
    let mut available = memory().available;
    for model in args.models.read(&[])?.models {
        match files(&model, hub, args.offline || hub.is_offline()).await {
            Ok((path, seen)) => {
                findings.extend(seen);
                let (name, wanted) = (model.name.as_str(), model.wanted);
                let files = models::Files { name, path: &path, wanted };
                findings.extend(models::examine(&files, &mut available));
            }
            Err(finding) => findings.push(finding),
        }
    }
    Ok(findings)
}

/// Where a model's files are, or why they are nowhere.
async fn files(
    model: &ModelConfig,
    hub: &Hub,
    is_offline: bool,
) -> Result<(PathBuf, Option<Finding>), Finding> {
    let topic = format!("model {}", model.name);
    let (repo, revision, file) = match &model.source {
        ModelSource::Path(path) => return Ok((path.clone(), None)),
        ModelSource::Hub { repo, revision, file } => (repo, revision, file.as_deref()),
    };
    let now = match is_offline {
        true => None,
        false => Some(hub.commit(repo, revision).await),
    };
    let kept = hub.kept(repo, revision, file.map_or(WantedFiles::Checkpoint, WantedFiles::File));
    let finding = match (&kept, now) {
        (Ok(_), Some(Err(e))) => {
            Some(Finding::new(&topic, Level::Warning, format!("the Hub cannot be asked: {e}")))
        }
        (Ok(kept), Some(Ok(commit))) if kept.commit != commit => {
            let fact = format!("kept at {}, but {revision} is {commit} now", kept.commit);
            let hint = "the next start downloads it; a fixed `revision` keeps this one";
            Some(Finding::new(&topic, Level::Note, fact).hint(hint))
        }
        (Ok(_), _) => None,
        (Err(_), Some(Ok(commit))) => {
            let fact = format!("{repo} at {commit} is on the Hub and not kept here yet");
            return Err(
                Finding::new(topic, Level::Note, fact).hint(format!("targon-engine fetch {repo}"))
            );
        }
        (Err(why), None) => return Err(Finding::new(topic, Level::Fault, why.to_string())),
        (Err(_), Some(Err(e))) => return Err(Finding::new(topic, Level::Fault, e.to_string())),
    };
    let directory = kept.map(|kept| kept.directory).unwrap_or_default();
    Ok((file.map_or(directory.clone(), |file| directory.join(file)), finding))
}

fn print(findings: &[Finding]) {
    for finding in findings {
        let mark = match finding.level {
            Level::Ok => "ok     ",
            Level::Note => "note   ",
            Level::Warning => "warning",
            Level::Fault => "FAULT  ",
        };
        outln!("{mark}  {}: {}", printable(&finding.topic), printable(&finding.fact));
        if let Some(hint) = &finding.hint {
            outln!("         hint: {}", printable(hint));
        }
    }
    let count = |level: Level| findings.iter().filter(|f| f.level == level).count();
    outln!("\nfaults: {}, warnings: {}", count(Level::Fault), count(Level::Warning));
}
