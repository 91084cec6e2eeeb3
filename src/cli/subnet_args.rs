//! Defines the flags of members of a subnet, under the names that Targon and the
//! Bittensor SDK use. Dashes and underscores in place of dots work too ([`layers`](super::layers)).

use super::Failure;
use super::shared::{check_http, is_given, without_flags};
use crate::chain::keyfile::{self, KeyFileError};
use crate::chain::keys::Hotkey;
use crate::chain::keys::Keypair;
use crate::chain::network::{Endpoints, Network};
use crate::chain::wallet::{Wallet, WalletError};
use crate::endpoint::shown;
use crate::miner::address::{self, CHECK_IP};
use crate::server::door::Policy;
use clap::{ArgMatches, Args, FromArgMatches};
use secrecy::SecretString;
use std::io::IsTerminal;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// What to do about a wallet that cannot be looked at.
pub(super) const WALLET_ADVICE: &str = "name it by --wallet.name and --wallet.hotkey";
/// Name of a wallet and of a hotkey where none is given.
const DEFAULT: &str = "default";
/// Targon's subnet.
const NETUID: u16 = 4;

/// Which wallet signs.
#[derive(Args)]
pub(super) struct WalletArgs {
    /// The wallet's name; by default `default`.
    #[arg(
        id = "wallet.name",
        long = "wallet.name",
        env = "BT_WALLET_NAME",
        help_heading = "Wallet"
    )]
    pub(super) name: Option<String>,
    /// The hotkey's name; by default `default`.
    #[arg(
        id = "wallet.hotkey",
        long = "wallet.hotkey",
        env = "BT_WALLET_HOTKEY",
        help_heading = "Wallet"
    )]
    pub(super) hotkey: Option<String>,
    /// Where wallets are.
    #[arg(
        id = "wallet.path",
        long = "wallet.path",
        env = "BT_WALLET_PATH",
        default_value = "~/.bittensor/wallets",
        help_heading = "Wallet"
    )]
    pub(super) path: PathBuf,
}

impl WalletArgs {
    /// Whether a wallet is asked for.
    pub(super) fn is_named(&self) -> bool {
        self.name.is_some() || self.hotkey.is_some()
    }

    pub(super) fn wallet(&self) -> Result<Wallet, Failure> {
        let path = match self.path.strip_prefix("~") {
            Ok(rest) => {
                let home = std::env::var_os("HOME").filter(|home| !home.is_empty());
                let home = home.ok_or_else(|| {
                    let place = self.path.display();
                    Failure::user(format!("--wallet.path {place}: HOME is not set"))
                })?;
                Path::new(&home).join(rest)
            }
            Err(_) => self.path.clone(),
        };
        let name = |given: &Option<String>| given.clone().unwrap_or_else(|| DEFAULT.into());
        Wallet::new(&path, &name(&self.name), &name(&self.hotkey)).map_err(wallet_failure)
    }

    /// The hotkey, after a password where its file wants one.
    pub(super) fn keypair(&self) -> Result<Keypair, Failure> {
        self.wallet()?.keypair(ask_password).map_err(wallet_failure)
    }
}

pub(super) fn wallet_failure(e: WalletError) -> Failure {
    Failure::user(&e).with_hint(e.hint.as_deref())
}

fn ask_password(path: &Path) -> Result<SecretString, KeyFileError> {
    if !std::io::stdin().is_terminal() {
        let variable = keyfile::password_variable(path);
        let why = format!("is encrypted, and there is no terminal to ask: set {variable}");
        return Err(KeyFileError::NotAsked(why));
    }
    let prompt = format!("password of {}: ", path.display());
    let typed = rpassword::prompt_password(prompt)
        .map_err(|e| format!("needs a password, which cannot be read: {e}"));
    let typed = typed.map_err(KeyFileError::NotAsked)?;
    // Made of a copy of the exact length: making a string shorter may leave the old one in memory.
    let typed = Zeroizing::new(typed);
    Ok(SecretString::from(typed.as_str()))
}

/// Which chain.
#[derive(Args)]
pub(super) struct ChainArgs {
    /// finney, test or local.
    #[arg(
        long = "subtensor.network",
        env = "BT_SUBTENSOR_NETWORK",
        default_value = "finney",
        help_heading = "Chain"
    )]
    network: Network,
    /// `ws://` or `wss://` addresses instead of the network's own, separated by commas, the
    /// preferred one first.
    #[arg(
        long = "subtensor.chain_endpoint",
        env = "BT_SUBTENSOR_CHAIN_ENDPOINT",
        value_delimiter = ',',
        hide_env_values = true,
        help_heading = "Chain"
    )]
    chain_endpoint: Vec<String>,
    /// The subnet; by default 4.
    #[arg(long, env = "TARGON_NETUID", help_heading = "Chain")]
    pub(super) netuid: Option<u16>,
}

impl ChainArgs {
    pub(super) fn endpoints(&self) -> Result<Endpoints, Failure> {
        let is_near = |url: &str| {
            ["127.", "localhost", "[::1]"].iter().any(|host| url[5..].starts_with(host))
        };
        for url in self.chain_endpoint.iter().filter(|u| u.starts_with("ws://")) {
            if !is_near(url) {
                tracing::warn!("a chain endpoint is not encrypted: anybody between can forge it");
            }
        }
        Endpoints::new(self.network, &self.chain_endpoint)
            .map_err(|what| Failure::user(format!("--subtensor.chain_endpoint {what}")))
    }

    /// Whether the network is for tests: validators need no permit there.
    pub(super) fn is_test(&self) -> bool {
        matches!(self.network, Network::Test | Network::Local)
    }

    pub(super) fn netuid(&self) -> u16 {
        self.netuid.unwrap_or(NETUID)
    }
}

/// Where a miner listens, and to whom.
#[derive(Args)]
pub(super) struct AxonArgs {
    /// Port of the signed routes.
    #[arg(
        id = "axon.port",
        long = "axon.port",
        env = "BT_AXON_PORT",
        default_value_t = 8091,
        help_heading = "Axon"
    )]
    pub(super) port: u16,
    /// Address of the signed routes.
    #[arg(
        id = "axon.ip",
        long = "axon.ip",
        env = "BT_AXON_IP",
        default_value = "0.0.0.0",
        help_heading = "Axon"
    )]
    pub(super) ip: String,
    /// Address to announce on the chain; by default this machine's public one.
    #[arg(long = "axon.external_ip", env = "BT_AXON_EXTERNAL_IP", help_heading = "Axon")]
    external_ip: Option<IpAddr>,
    /// Port to announce on the chain; by default the port of the signed routes.
    #[arg(long = "axon.external_port", env = "BT_AXON_EXTERNAL_PORT", help_heading = "Axon",
        value_parser = clap::value_parser!(u16).range(1..))]
    external_port: Option<u16>,
    /// The service that is asked for the public address.
    #[arg(long, env = "TARGON_CHECK_IP", default_value = CHECK_IP, help_heading = "Axon")]
    check_ip: String,
    /// Show the extrinsic that would announce the address, decoded, and sign nothing.
    #[arg(long, env = "TARGON_DRY_RUN", help_heading = "Axon")]
    pub(super) dry_run: bool,
    /// Accept requests of members with any stake. Without this flag they need 10,000 TAO.
    #[arg(long, env = "TARGON_NO_FORCE_VALIDATOR_PERMIT", help_heading = "Axon")]
    no_force_validator_permit: bool,
    /// Hotkeys that may send requests without membership and stake, separated by commas.
    #[arg(long, env = "TARGON_ALLOW_HOTKEY", value_delimiter = ',', help_heading = "Axon")]
    allow_hotkey: Vec<Hotkey>,
    /// Hotkeys that may not send requests, separated by commas.
    #[arg(long, env = "TARGON_DENY_HOTKEY", value_delimiter = ',', help_heading = "Axon")]
    deny_hotkey: Vec<Hotkey>,
    /// Requests a second that one hotkey may send.
    #[arg(long, env = "TARGON_HOTKEY_RATE", default_value = "50", help_heading = "Axon")]
    hotkey_rate: NonZeroU32,
    /// Requests of one hotkey that may wait.
    #[arg(long, env = "TARGON_HOTKEY_WAITING", default_value_t = 64, help_heading = "Axon")]
    hotkey_waiting: usize,
    /// Blocks between two readings of the metagraph.
    #[arg(
        long,
        env = "TARGON_EPOCH_LENGTH",
        default_value_t = 360,
        value_parser = clap::value_parser!(u64).range(1..),
        help_heading = "Axon"
    )]
    pub(super) epoch_length: u64,
}

impl AxonArgs {
    /// Where the signed routes listen.
    pub(super) fn listen(&self) -> Result<SocketAddr, Failure> {
        let text = self.ip.trim_matches(['[', ']']);
        let ip: IpAddr = text.parse().map_err(|_| {
            Failure::user(format!("--axon.ip must be an IP address, got {}", self.ip))
        })?;
        Ok(SocketAddr::new(ip, self.port))
    }

    /// Where others reach it.
    pub(super) async fn external(&self, listening: u16) -> Result<SocketAddr, Failure> {
        let bound = self.listen()?.ip();
        check_http("check-ip", &self.check_ip)?;
        if let Some(ip) = self.external_ip {
            address::check(ip)
                .map_err(|rule| Failure::user(format!("--axon.external_ip {rule}")))?;
        }
        let given = self.external_ip.or(Some(bound).filter(|ip| !ip.is_unspecified()));
        let port = self.external_port.unwrap_or(listening);
        let found = address::external(given, port, &self.check_ip).await;
        // A user who was asked may answer the next time.
        found.map_err(|what| Failure::ours(what).with_hint(Some("give it by --axon.external_ip")))
    }

    /// Who may ask; `slots` requests run at once.
    pub(super) fn policy(&self, slots: usize) -> Policy {
        let defaults = Policy::default();
        Policy {
            stake_min: defaults.stake_min.filter(|_| !self.no_force_validator_permit),
            allow: self.allow_hotkey.iter().copied().collect(),
            deny: self.deny_hotkey.iter().copied().collect(),
            rate: self.hotkey_rate,
            slots,
            waiting_max: self.hotkey_waiting,
        }
    }
}

/// Ids and names of the flags that mean something to a member of a subnet only.
const MEMBERS: [(&str, &str); 15] = [
    ("wallet.path", "wallet.path"),
    ("network", "subtensor.network"),
    ("chain_endpoint", "subtensor.chain_endpoint"),
    ("axon.port", "axon.port"),
    ("axon.ip", "axon.ip"),
    ("external_ip", "axon.external_ip"),
    ("external_port", "axon.external_port"),
    ("check_ip", "check-ip"),
    ("dry_run", "dry-run"),
    ("no_force_validator_permit", "no-force-validator-permit"),
    ("allow_hotkey", "allow-hotkey"),
    ("deny_hotkey", "deny-hotkey"),
    ("hotkey_rate", "hotkey-rate"),
    ("hotkey_waiting", "hotkey-waiting"),
    ("epoch_length", "epoch-length"),
];

/// Which of them were given, by their names. It has no flags of its own, and stands before them:
/// they are read while they are still there.
pub(super) struct MemberFlags(Vec<&'static str>);

without_flags!(MemberFlags);

impl FromArgMatches for MemberFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = MEMBERS.iter().filter(|(id, _)| is_given(matches, id));
        Ok(Self(given.map(|(_, name)| *name).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl MemberFlags {
    /// Warns of those that were given to a server that is no member of a subnet.
    pub(super) fn warn_unused(&self) {
        if !self.0.is_empty() {
            let names =
                self.0.iter().map(|name| format!("--{name}")).collect::<Vec<_>>().join(", ");
            tracing::warn!(
                "without --wallet.name, --wallet.hotkey or --netuid this is no miner, and these \
                 flags have no effect: {names}"
            );
        }
    }
}

/// Flags of the original that mean nothing here: taken, so that command lines can be kept, with a
/// word on why.
#[derive(Args)]
pub(super) struct OriginalArgs {
    #[arg(long = "neuron.name", hide = true)]
    neuron_name: Option<String>,
    #[arg(long = "axon.max_workers", env = "BT_AXON_MAX_WORKERS", hide = true)]
    max_workers: Option<u32>,
    #[arg(long = "logging.logging_dir", env = "BT_LOGGING_LOGGING_DIR", hide = true)]
    logging_dir: Option<PathBuf>,
    #[arg(long = "logging.record_log", env = "BT_LOGGING_RECORD_LOG", hide = true)]
    record_log: bool,
    #[arg(long = "no_version_checking", hide = true)]
    no_version_checking: bool,
    #[arg(long = "strict", hide = true)]
    strict: bool,
    #[arg(long = "mock", hide = true)]
    mock: bool,
    #[arg(long = "model-endpoint", hide = true)]
    model_endpoint: Option<String>,
}

impl OriginalArgs {
    /// Warns of what has no effect.
    ///
    /// # Errors
    /// For what would change what is served.
    pub(super) fn check(&self) -> Result<(), Failure> {
        if self.mock {
            return Err(Failure::user("--mock is not built: this program serves real models only"));
        }
        if let Some(endpoint) = &self.model_endpoint {
            let what = format!(
                "--model-endpoint {}: this miner runs the models itself and is not a proxy",
                shown(endpoint)
            );
            return Err(Failure::user(what).with_hint(Some("list the models in models.toml")));
        }
        for (is_given, flag, why) in [
            (self.neuron_name.is_some(), "--neuron.name", "it named a log directory"),
            (self.max_workers.is_some(), "--axon.max_workers", "requests need no workers"),
            (self.logging_dir.is_some(), "--logging.logging_dir", "logs go to stderr"),
            (self.record_log, "--logging.record_log", "logs go to stderr"),
            (self.no_version_checking, "--no_version_checking", "no version is checked"),
            (self.strict, "--strict", "unknown flags are always errors"),
        ] {
            if is_given {
                tracing::warn!("{flag} has no effect here: {why}");
            }
        }
        Ok(())
    }
}
