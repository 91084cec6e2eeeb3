//! Defines arguments that several commands take.

use super::Failure;
use super::printable::printable;
use super::progress::Bars;
use crate::config::models_toml::{self, Config, ModelConfig};
use crate::config::server_toml::check_keys;
use crate::endpoint::shown;
use crate::files;
use crate::lifecycle::verifiers::{VerifierRules, load_verifier};
use crate::models::hub::{Hub, HubError};
use crate::ops::lanes::Isa;
use crate::ops::pool::Pool;
use crate::proof::{Scheme, UnknownScheme};
use crate::verify::scrutiny::{TwinPolicy, WantedScrutiny};
use crate::verify::{FastRows, Verifier};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, FromArgMatches};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// What to do about a models file that cannot be read.
pub(super) const MODELS_ADVICE: &str = "name the file by --models; `config check` reads it alone";
/// The models file where none is named.
const MODELS_DEFAULT: &str = "models.toml";

#[derive(Args)]
pub(super) struct ModelsArg {
    // Before the path: it is read while the path is still there.
    #[command(flatten)]
    source: ModelsSource,
    /// Which models: a file with [[model]] entries.
    #[arg(long = "models", env = "TARGON_MODELS", default_value = MODELS_DEFAULT)]
    pub(super) path: PathBuf,
}

impl ModelsArg {
    /// Whether somebody named the file, so that it must be there.
    pub(super) fn is_given(&self) -> bool {
        self.source.is_given || self.path != Path::new(MODELS_DEFAULT)
    }

    /// Reads the file; `keys` open the API besides those that it names.
    pub(super) fn read(&self, keys: &[String]) -> Result<Config, Failure> {
        check_keys(keys).map_err(|e| Failure::user(format!("--api-key: keys {e}")))?;
        models_toml::read(&self.path, keys)
            .map_err(|e| Failure::user(&e).with_hint(e.hint.as_deref()))
    }
}

/// Whether `--models` or its variable names the file. It has no flag of its own.
struct ModelsSource {
    is_given: bool,
}

impl FromArgMatches for ModelsSource {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(Self { is_given: is_given(matches, "path") })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Whether the command line or a variable has a value for the argument of this id.
pub(super) fn is_given(matches: &ArgMatches, id: &str) -> bool {
    let given = [ValueSource::CommandLine, ValueSource::EnvVariable];
    matches.value_source(id).is_some_and(|source| given.contains(&source))
}

/// Lets a type look at the arguments that others define.
macro_rules! without_flags {
    ($name:ty) => {
        impl clap::Args for $name {
            fn augment_args(command: clap::Command) -> clap::Command {
                command
            }

            fn augment_args_for_update(command: clap::Command) -> clap::Command {
                command
            }
        }
    };
}

pub(super) use without_flags;
without_flags!(ModelsSource);

#[derive(Args)]
pub(super) struct ListenArgs {
    /// Address to listen on. Without API keys anyone who can reach it can use it: keep it on
    /// loopback.
    #[arg(long, env = "TARGON_HOST", default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, env = "TARGON_PORT", default_value_t = 8000)]
    port: u16,
}

impl ListenArgs {
    /// The address; a host's name is looked up where `may_ask`, else there is none.
    pub(super) async fn address(&self, may_ask: bool) -> Result<Option<SocketAddr>, Failure> {
        let address = format!("{}:{}", self.host, self.port);
        if let Ok(address) = address.parse() {
            return Ok(Some(address));
        }
        if !may_ask {
            return Ok(None);
        }
        let found = tokio::net::lookup_host(&address).await;
        let mut found = found.map_err(|e| {
            Failure::user(format!("--host {} is not an address of a machine: {e}", self.host))
        })?;
        Ok(found.next())
    }

    pub(super) async fn bind(&self) -> Result<(TcpListener, SocketAddr), Failure> {
        let address = format!("{}:{}", self.host, self.port);
        let listener = TcpListener::bind(&address)
            .await
            .map_err(|e| Failure::user(format!("cannot listen on {address}: {e}")))?;
        let local = listener.local_addr().map_err(Failure::ours)?;
        Ok((listener, local))
    }
}

#[derive(Args)]
pub(super) struct ComputeArgs {
    /// Compute threads for all models; by default all cores.
    #[arg(long, env = "TARGON_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Instruction set of the kernels (amx, avx512-bf16, avx512, avx2, neon or scalar); by default
    /// the fastest. Results do not change.
    #[arg(long, env = "TARGON_ISA")]
    isa: Option<Isa>,
}

impl ComputeArgs {
    pub(super) fn pool(&self) -> Result<Pool, Failure> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = self.threads.map_or(cores, usize::from);
        Pool::new(threads, self.isa.unwrap_or_else(Isa::best))
            .map_err(|e| Failure::ours(format!("cannot start compute threads: {e}")))
    }
}

/// Where a validator's records are.
#[derive(Args)]
pub(super) struct DatabaseArg {
    /// The validator's records: a path, sqlite://PATH or postgres://USER:PASSWORD@HOST/DATABASE.
    #[arg(
        id = "database.url",
        long = "database.url",
        env = "TARGON_DATABASE_URL",
        hide_env_values = true,
        default_value = "validator.sqlite"
    )]
    pub(super) url: String,
}

/// How closely suspicious answers are looked at.
#[derive(Args)]
pub(super) struct ScrutinyArgs {
    /// When to compute an answer's rows a second time, as an honest stack of 16 bits would: never,
    /// suspicion (where the first time found something), a share of all answers (0.05) besides, or
    /// always. Never also rejects an answer of which rounding might explain the distance. Default:
    /// suspicion on the processor, never elsewhere.
    #[arg(long, value_name = "WHEN", env = "TARGON_TWIN", help_heading = "Verification")]
    twin: Option<TwinPolicy>,
    /// Try known cheats on answers that the twin finds too far: one more prefill for each, and
    /// memory for the weights once more.
    #[arg(long, env = "TARGON_NAME_CHEATS", help_heading = "Verification")]
    name_cheats: bool,
    /// Stop a fast check of a proof after a random number of chunks, unless these leave it open
    /// what the answer is: cheaper, and blind to what comes later.
    #[arg(long, env = "TARGON_EARLY_EXIT", help_heading = "Verification")]
    early_exit: bool,
    /// How many rows, and the last, a fast check of a proof computes the logits of: a number, or as
    /// many as this share of the multiply-adds of the pass over prompt and answer pays for, at
    /// least 32.
    #[arg(
        long,
        value_name = "ROWS",
        env = "TARGON_ROWS",
        default_value_t,
        help_heading = "Verification"
    )]
    rows: FastRows,
}

impl ScrutinyArgs {
    pub(super) fn asked(&self) -> WantedScrutiny {
        WantedScrutiny {
            twin: self.twin,
            stops_early: self.early_exit,
            names: self.name_cheats,
            rows: self.rows,
        }
    }
}

/// Loads a model to verify with by the default limits.
pub(super) fn plain_verifier(
    runtime: &Runtime,
    config: ModelConfig,
    pool: &Pool,
) -> Result<Verifier, Failure> {
    let bars = Bars::new();
    let loaded = runtime.block_on(load_verifier(config, pool, VerifierRules::plain(), &bars));
    loaded.map_err(Failure::user)
}

/// Refuses the URL of the flag `--flag` where requests cannot be sent to it.
pub(super) fn check_http(flag: &str, url: &str) -> Result<(), Failure> {
    let base = url.trim_end_matches('/');
    if ["http://", "https://"].iter().any(|scheme| base.starts_with(scheme)) {
        return Ok(());
    }
    let what = format!("--{flag} must begin with http:// or https://, got {}", shown(url));
    Err(Failure::user(printable(&what)))
}

/// The Hub and its cache.
pub(super) fn hub() -> Result<Hub, Failure> {
    Hub::from_env().map_err(|e| match e {
        HubError::NoHome => Failure::user(e).with_hint(Some("set HOME, or HF_HOME")),
        e => Failure::ours(e),
    })
}

/// Refuses a file of the flag `--flag` that could not be written when the work is done.
pub(super) fn check_writable(flag: &str, path: Option<&Path>) -> Result<(), Failure> {
    let Some(path) = path else { return Ok(()) };
    let place = path.display();
    files::check_writable(path)
        .map_err(|e| Failure::user(format!("--{flag} {place} cannot be written: {e}")))
}

/// The proof that the flag `--proof` asks for.
pub(super) fn proof_scheme(name: &str) -> Result<Option<Scheme>, Failure> {
    if name == "none" {
        return Ok(None);
    }
    let scheme = name.parse().map(Some);
    scheme.map_err(|e: UnknownScheme| Failure::user(format!("--proof {name}: {e}, none")))
}

/// What requests run on, beside the compute threads.
pub(super) fn runtime() -> Result<Runtime, Failure> {
    // Few, because they compete with the compute threads for cores: what takes long is read on
    // other threads, and with 1, 2 and 4 of these a busy server answers probes equally fast. Two,
    // so that one that is not scheduled for a while does not hold up every connection.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads((cores / 4).clamp(2, 4))
        .enable_all()
        .build()
        .map_err(|e| Failure::ours(format!("cannot start the async runtime: {e}")))
}
