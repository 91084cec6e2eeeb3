//! Runs `doctor`: says what is wrong before anything is started.

use super::Failure;
use super::as_validator::{self, MinerArgs};
use super::out::outln;
use super::printable::printable;
use super::shared::runtime;
use super::shared::{ListenArgs, MODELS_ADVICE, ModelsArg, hub};
use super::subnet_args::{AxonArgs, ChainArgs, WALLET_ADVICE, WalletArgs};
use crate::chain::keys::Hotkey;
use crate::clock::Clock;
use crate::config::models_toml::ModelConfig;
use crate::doctor::{Finding, Level, machine, membership, models, network, wallet, worst};
use crate::engine::plan::MemoryPlan;
use crate::lifecycle::accounts::{Lease, MemoryAccounts};
use crate::models::hub::Hub;
use crate::models::remembered::cache_dir;
use crate::models::spec::Spec;
use clap::Args;
use serde_json::json;
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
    if args.offline && args.miner.is_named() {
        let what = "--offline does not go with --as-validator, which asks a miner";
        return Err(Failure::user(what).with_hint(Some("omit --offline or --as-validator")));
    }
    let runtime = runtime()?;
    let findings = match args.miner.is_named() {
        true => as_validator::examine(&args.miner, &args.models, &args.wallet, &runtime)?,
        false => runtime.block_on(examine(args)),
    };
    let worst = worst(&findings);
    if args.json {
        outln!("{}", json!({"worst": worst, "findings": findings}));
    } else {
        print(&findings);
    }
    Ok(ExitCode::from(u8::from(worst == Level::Fault)))
}

/// Looks at every part. A part that fails is a finding, and the others are looked at.
async fn examine(args: &DoctorArgs) -> Vec<Finding> {
    let clock = Clock::system();
    let (hub, own) = (hub(), cache_dir());
    let caches = hub.iter().map(|hub| hub.cache().to_owned()).chain(own.iter().cloned());
    let mut findings = machine::examine(&caches.collect::<Vec<_>>());
    if let Err(e) = &own {
        let finding = Finding::new("cache", Level::Fault, e.to_string());
        findings.push(finding.hint("set HOME, or TARGON_CACHE"));
    }
    let hub = hub.map_err(|failure| {
        findings.push(failure.fault("hub", "install the package ca-certificates"));
    });
    let hub = hub.ok();
    let (hotkey, seen) = keys(&args.wallet);
    findings.extend(seen);
    findings.extend(ports(args).await);
    if args.offline {
        let fact = "nobody was asked (--offline), and this clock was compared with no other";
        findings.push(Finding::new("network", Level::Note, fact));
    } else {
        findings.extend(online(args, hub.as_ref(), hotkey, &clock).await);
    }
    findings.extend(examine_models(args, hub.as_ref()).await);
    findings
}

fn keys(args: &WalletArgs) -> (Option<Hotkey>, Vec<Finding>) {
    if !args.is_named() {
        let fact = "no wallet is named, so nothing is said about keys and registration";
        let finding = Finding::new("wallet", Level::Note, fact)
            .hint("name one by --wallet.name and --wallet.hotkey");
        return (None, vec![finding]);
    }
    match args.wallet() {
        Ok(wallet) => wallet::examine(&wallet),
        Err(failure) => (None, vec![failure.fault("wallet", WALLET_ADVICE)]),
    }
}

async fn ports(args: &DoctorArgs) -> Vec<Finding> {
    let mut findings = vec![match args.axon.listen() {
        Ok(address) => network::port("axon port", "--axon.port", address).await,
        Err(failure) => failure.fault("axon port", "give an address of this machine"),
    }];
    findings.push(match args.listen.address(!args.offline).await {
        Ok(Some(address)) => network::port("open port", "--port", address).await,
        Ok(None) => Finding::new(
            "open port",
            Level::Note,
            "the name of --host was not looked up (--offline)",
        ),
        Err(failure) => failure.fault("open port", "give an address of this machine by --host"),
    });
    findings
}

async fn online(
    args: &DoctorArgs,
    hub: Option<&Hub>,
    hotkey: Option<Hotkey>,
    clock: &Clock,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    match hub {
        Some(hub) if hub.is_offline() => {
            let fact = "the Hub was not asked (HF_HUB_OFFLINE)";
            findings.push(Finding::new("hub", Level::Note, fact));
            findings.push(network::uncompared("the Hub was not asked"));
        }
        Some(hub) => findings.extend(network::service("hub", hub.endpoint(), clock).await),
        None => findings.push(network::uncompared("the Hub could not be asked")),
    }
    let mut external = None;
    match args.axon.external(args.axon.port).await {
        Ok(address) => {
            external = Some(address);
            findings.extend(network::announced(address.ip()));
            findings.push(network::reachable(address).await);
        }
        Err(failure) => {
            let level = if failure.is_ours { Level::Warning } else { Level::Fault };
            let finding = Finding::new("public address", level, failure.message());
            findings.push(finding.hint("give it by --axon.external_ip"));
        }
    }
    let endpoints = match args.chain.endpoints() {
        Ok(endpoints) => endpoints,
        Err(failure) => {
            findings.push(failure.fault("chain", "give ws://HOST:PORT or wss://HOST:PORT"));
            return findings;
        }
    };
    let (metagraph, seen) = membership::endpoints(&endpoints, args.chain.netuid(), clock).await;
    findings.extend(seen);
    if let (Some(metagraph), Some(hotkey)) = (metagraph, hotkey) {
        findings.extend(membership::registration(&metagraph, &hotkey, external));
    }
    findings
}

async fn examine_models(args: &DoctorArgs, hub: Option<&Hub>) -> Vec<Finding> {
    if !args.models.path.exists() && !args.models.is_given() {
        let fact = format!("{} does not exist", args.models.path.display());
        let finding = Finding::new("models", Level::Note, fact)
            .hint("name the file with [[model]] entries by --models");
        return vec![finding];
    }
    let models = match args.models.read(&[]) {
        Ok(config) => config.models,
        Err(failure) => return vec![failure.fault("models", MODELS_ADVICE)],
    };
    let is_offline = args.offline || hub.is_some_and(Hub::is_offline);
    let mut planned = Planned::default();
    let mut plan = |model: &ModelConfig, spec: &Spec| planned.plan(model, spec);
    models::examine_all(&models, (hub, is_offline), &mut plan).await
}

/// The memory of the models that were looked at, accounted for as `serve` does.
#[derive(Default)]
struct Planned {
    memory: MemoryAccounts,
    leases: Vec<Lease>,
}

impl Planned {
    fn plan(&mut self, model: &ModelConfig, spec: &Spec) -> anyhow::Result<MemoryPlan> {
        let (plan, lease) = self.memory.plan_shape(model, spec)?;
        self.leases.push(lease);
        Ok(plan)
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::models_toml::ModelSource;
    use crate::engine::backend::BackendKind;
    use crate::engine::plan::{KvMemory, MemoryWanted};
    use crate::models::config::samples::LlamaSizes;
    use crate::models::device::{Device, DeviceError};
    use std::path::PathBuf;

    /// A small model on `device`.
    fn model(name: &str, device: Device, backend: BackendKind) -> ModelConfig {
        ModelConfig {
            name: name.into(),
            source: ModelSource::Path(PathBuf::new()),
            backend,
            devices: vec![device],
            arithmetic: None,
            dtype: None,
            isq: None,
            prefix_cache_file: None,
            wanted: MemoryWanted {
                context_max: Some(64),
                kv_memory: KvMemory::Auto,
                sequences_max: 4,
                drafts_max: 0,
            },
        }
    }

    fn checkpoint() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let tiny = LlamaSizes {
            vocab: 512,
            hidden: 64,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            inter: 128,
            context: 512,
            tied: true,
        };
        std::fs::write(dir.path().join("config.json"), tiny.json().to_string()).unwrap();
        let header = b"{}";
        let length = (header.len() as u64).to_le_bytes();
        let weights = [&length[..], header].concat();
        std::fs::write(dir.path().join("model.safetensors"), weights).unwrap();
        dir
    }

    #[test]
    fn a_model_is_planned_by_the_memory_of_its_device_and_by_its_engine() {
        let dir = checkpoint();
        let free = |device| match device {
            Device::Cpu => Ok(1 << 40),
            Device::Cuda(0) => Ok(256 << 20),
            other => Err(DeviceError::NotBuilt(other)),
        };
        let memory = MemoryAccounts::measured_by(free);
        let mut planned = Planned { memory, leases: Vec::new() };
        let mut first = |device, backend| {
            let model = model("m", device, backend);
            let mut plan = |model: &ModelConfig, spec: &Spec| planned.plan(model, spec);
            models::examine(&model, dir.path(), &mut plan).swap_remove(0)
        };
        let host = first(Device::Cpu, BackendKind::Native);
        assert!(host.level == Level::Ok && host.fact.contains("on cpu for 4 seq"), "{host:?}");
        let other = first(Device::Cpu, BackendKind::Mistralrs);
        assert!(other.fact.contains("on cpu for 1 sequences"), "{other:?}");
        // The card has room for some of them, not for all.
        let mut count = 0;
        let full = loop {
            match first(Device::Cuda(0), BackendKind::Native) {
                finding if finding.level == Level::Ok => count += 1,
                finding => break finding,
            }
            assert!(count < 1000, "the memory of a card is shared");
        };
        assert!(count > 0 && full.level == Level::Fault, "{count}: {full:?}");
        assert!(full.fact.contains("cannot be served on cuda:0"), "{full:?}");
        let none = first(Device::Cuda(1), BackendKind::Native);
        assert!(none.level == Level::Fault && none.fact.contains("cuda:1"), "{none:?}");
        assert!(none.fact.contains("feature `cuda`"), "{none:?}");
    }
}
