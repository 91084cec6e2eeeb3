//! Runs `doctor --as-validator`: asks a miner as validators do, and prints what each rule
//! concludes.

use super::Failure;
use super::query::url;
use super::shared::{MODELS_ADVICE, ModelsArg, plain_verifier};
use super::subnet_args::{WALLET_ADVICE, WalletArgs};
use crate::chain::keys::{Hotkey, Keypair};
use crate::chance::Chance;
use crate::clock::Clock;
use crate::doctor::Finding;
use crate::doctor::miner::{Asking, ask, list, rules::READ_TIMEOUT};
use crate::entropy::Entropy;
use crate::ops::lanes::Isa;
use crate::ops::pool::Pool;
use crate::validator::query::{QuerySigner, Size, Target};
use crate::verify::Verifier;
use clap::Args;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;

/// How long a whole answer may take: the original waits for ever, as long as bytes come.
const TIMEOUT: Duration = Duration::from_secs(600);

/// Which miner, and what to ask it for.
#[derive(Args)]
pub(super) struct MinerArgs {
    /// Ask this miner, `ip:port` or a URL, as validators of Targon 4.4 do, and say what each of
    /// their rules concludes. Nothing else is looked at.
    #[arg(long, value_name = "ADDRESS")]
    as_validator: Option<String>,
    /// The miner's hotkey, which signed requests are for.
    #[arg(long, requires = "as_validator")]
    hotkey: Option<Hotkey>,
    /// Which model to ask for. Default: the first that the miner lists.
    #[arg(long, requires = "as_validator")]
    model: Option<String>,
    /// Most tokens of each of two answers; validators draw 512 to 1920.
    #[arg(long, requires = "as_validator", default_value_t = 512)]
    #[arg(value_parser = clap::value_parser!(u32).range(8..=1920))]
    max_tokens: u32,
    /// Temperature of both answers. Default: drawn below 1, as validators do.
    #[arg(long, requires = "as_validator")]
    temperature: Option<f64>,
    /// A key of the open API of your own server; never sent with a signed request.
    #[arg(long, env = "TARGON_QUERY_API_KEY", hide_env_values = true, requires = "as_validator")]
    api_key: Option<String>,
}

impl MinerArgs {
    pub(super) fn is_named(&self) -> bool {
        self.as_validator.is_some()
    }

    fn address(&self) -> &str {
        self.as_validator.as_deref().unwrap_or_default().trim()
    }

    /// Refuses flags with which nothing could be asked.
    fn check(&self, wallet: &WalletArgs) -> Result<(), Failure> {
        if self.address().is_empty() {
            let what = "--as-validator must be ip:port or a URL, got an empty address";
            return Err(Failure::user(what));
        }
        if let Some(t) = self.temperature.filter(|t| !(0.0..=2.0).contains(t)) {
            return Err(Failure::user(format!("--temperature must lie in 0 to 2, got {t}")));
        }
        if wallet.is_named() && self.hotkey.is_none() {
            let what = "a signed request needs the hotkey that it is for";
            return Err(Failure::user(what).with_hint(Some("name the miner's by --hotkey")));
        }
        Ok(())
    }

    fn target(&self, signer: Option<Arc<Keypair>>) -> Target {
        Target {
            url: url(self.address()),
            hotkey: self.hotkey,
            api_key: self.api_key.clone().filter(|_| signer.is_none()),
            signer: signer.map(|key| QuerySigner { key, entropy: Entropy::system() }),
            read_timeout: READ_TIMEOUT,
            timeout: TIMEOUT,
            size: Size::of_tokens(self.max_tokens),
        }
    }
}

/// Asks the miner, and says what was found. What is wrong with the wallet or the models file is
/// among it.
pub(super) fn examine(
    args: &MinerArgs,
    models: &ModelsArg,
    wallet: &WalletArgs,
    runtime: &Runtime,
) -> Result<Vec<Finding>, Failure> {
    args.check(wallet)?;
    let signer = match wallet.is_named().then(|| wallet.keypair()).transpose() {
        Ok(signer) => signer.map(Arc::new),
        Err(failure) => return Ok(vec![failure.fault("wallet", WALLET_ADVICE)]),
    };
    let (target, clock) = (args.target(signer), Clock::system());
    let (model, mut findings) = runtime.block_on(list(&target, args.model.as_deref(), &clock));
    let Some(model) = model else { return Ok(findings) };
    let verifier = verifier(&model, models, runtime).unwrap_or_else(|finding| {
        findings.push(finding);
        None
    });
    let asking = Asking {
        model: &model,
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        verifier: verifier.as_ref(),
    };
    let mut chance = Chance::of(&Entropy::system());
    findings.extend(runtime.block_on(ask(&target, asking, &mut chance, &clock)));
    Ok(findings)
}

/// Who checks with the model's weights, where the models file has it.
fn verifier(
    model: &str,
    models: &ModelsArg,
    runtime: &Runtime,
) -> Result<Option<Verifier>, Finding> {
    if !models.path.exists() && !models.is_given() {
        return Ok(None);
    }
    let all = models.read(&[]).map_err(|failure| failure.fault("models", MODELS_ADVICE))?.models;
    let Some(config) = all.into_iter().find(|config| config.name == model) else {
        return Ok(None);
    };
    let weights = |failure: Failure| failure.fault("weights", "rules that need them say nothing");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let pool = Pool::new(cores, Isa::best())
        .map_err(|e| weights(Failure::ours(format!("cannot start compute threads: {e}"))))?;
    plain_verifier(runtime, config, &pool).map(Some).map_err(weights)
}
