//! Defines the flags of `validate`, under Targon's names where it has them.

use super::Failure;
use super::shared::{ComputeArgs, DatabaseArg, ModelsArg, ScrutinyArgs, check_http, proof_scheme};
use super::subnet_args::{ChainArgs, OriginalArgs, WalletArgs};
use super::update::UpdateArgs;
use crate::clock::Clock;
use crate::proof::Scheme;
use crate::validator::models::{CONFIG_FILE, ENDPOINT, Mode};
use crate::validator::round::{Keep, RoundSettings, Times};
use crate::validator::run::CHECKS_DEFAULT;
use crate::validator::run::epochs::EpochRule;
use crate::validator::run::hub::Urls;
use crate::validator::run::keeping::Keeping;
use crate::validator::run::rewriting::Rewriting;
use crate::validator::scores::rules::{ScoringProfile, ScoringRules, WINDOW_MAX};
use crate::verify;
use clap::{Args, ValueEnum};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Longest time for a prompt: it is made in this process.
const PROMPT_TIME: Duration = Duration::from_secs(60);
/// How long a query may take beyond its own limit before the round continues without it.
const QUERY_GRACE: Duration = Duration::from_secs(10);
/// Tokens of a round's prompt: a passage of 500 characters or a query of 400, who speaks and what
/// is asked for in 1 KiB, and what a chat template writes around them. Bytes bound tokens.
const PROMPT_TOKENS_MAX: usize = 4096;
/// Blocks without a round after which a validator starts anew (protocol 5.7).
const AWAY_BLOCKS_MAX: u64 = 360;
/// Between two blocks of finney.
const BLOCK_SECONDS: u64 = 12;
/// Version that weights of the profile `targon-4.4` name: 4.4.1 (protocol 0).
const TARGON_VERSION: u64 = 404_010;

/// Arguments of `validate`.
#[derive(Args)]
pub(super) struct ValidateArgs {
    #[command(flatten)]
    pub(super) models: ModelsArg,
    #[command(flatten)]
    pub(super) wallet: WalletArgs,
    #[command(flatten)]
    pub(super) chain: ChainArgs,
    #[command(flatten)]
    pub(super) original: OriginalArgs,
    #[command(flatten)]
    pub(super) listed: ListArgs,
    #[command(flatten)]
    pub(super) round: RoundArgs,
    #[command(flatten)]
    pub(super) verifying: VerifyingArgs,
    #[command(flatten)]
    pub(super) weights: WeightsArgs,
    #[command(flatten)]
    pub(super) keeping: KeepingArgs,
    #[command(flatten)]
    pub(super) update: UpdateArgs,
    #[command(flatten)]
    pub(super) hub: HubArgs,
    #[command(flatten)]
    pub(super) database: DatabaseArg,
    /// The file for rounds that could not be stored in the database before the program ended.
    #[arg(long, env = "TARGON_UNSAVED", default_value = "unsaved-rounds.jsonl")]
    pub(super) unsaved: PathBuf,
    /// Serve /health, /ready and /metrics at this address and port, such as 127.0.0.1:9100. By
    /// default nothing listens. Anyone who can reach the address can read the validator's records,
    /// and cannot change anything.
    #[arg(long, alias = "metrics", env = "TARGON_LISTEN", value_name = "ADDRESS")]
    pub(super) listen: Option<SocketAddr>,
    /// Show rounds, miners and weights live on the terminal, in place of log lines.
    #[arg(long, env = "TARGON_TUI", conflicts_with_all = ["rounds", "once"])]
    pub(super) tui: bool,
    /// Seconds for which verifications may continue after SIGTERM.
    #[arg(long, env = "TARGON_SHUTDOWN_TIMEOUT", default_value_t = 30)]
    pub(super) shutdown_timeout: u64,
    #[command(flatten)]
    pub(super) compute: ComputeArgs,
}

impl ValidateArgs {
    /// Tokens of the longest sequence that is verified; unknown where users' requests are.
    pub(super) fn tokens_needed(&self) -> Option<usize> {
        let is_known = self.hub.organics.is_none();
        is_known.then_some(PROMPT_TOKENS_MAX + self.round.tokens_max as usize)
    }

    /// How long a round takes at most.
    pub(super) fn round_time(&self) -> Duration {
        let (_, query) = self.round.waits();
        PROMPT_TIME + query + QUERY_GRACE + Duration::from_secs(self.verifying.verdicts_timeout)
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum ListMode {
    /// The model that Targon's validators ask for by default.
    Default,
    /// A file with one name a line.
    Config,
    /// A server that answers with a JSON list.
    Endpoint,
}

/// Which models miners are asked for.
#[derive(Args)]
pub(super) struct ListArgs {
    /// The source of the list of models that miners are told; by default the models of --models.
    /// Only models of --models can be verified, so only they are requested.
    #[arg(
        id = "models.mode",
        long = "models.mode",
        env = "TARGON_MODELS_MODE",
        help_heading = "Models"
    )]
    mode: Option<ListMode>,
    /// The file of --models.mode config; by default models.txt.
    #[arg(
        id = "models.config",
        long = "models.config",
        env = "TARGON_MODELS_CONFIG",
        help_heading = "Models"
    )]
    config: Option<PathBuf>,
    /// The server of --models.mode endpoint; by default that of Targon's validators.
    #[arg(
        id = "models.endpoint",
        long = "models.endpoint",
        env = "TARGON_MODELS_ENDPOINT",
        help_heading = "Models"
    )]
    endpoint: Option<String>,
}

impl ListArgs {
    /// Whether the list is another than that of the models file.
    pub(super) fn is_apart(&self) -> bool {
        self.mode.is_some()
    }

    /// Where the list comes from; the verified models where it is not said.
    pub(super) fn mode(&self) -> Option<Mode> {
        self.mode.map(|mode| match mode {
            ListMode::Default => Mode::Default,
            ListMode::Config => {
                Mode::Config(self.config.clone().unwrap_or_else(|| CONFIG_FILE.into()))
            }
            ListMode::Endpoint => {
                Mode::Endpoint(self.endpoint.clone().unwrap_or_else(|| ENDPOINT.into()))
            }
        })
    }

    /// Refuses what no mode would use, and a file that cannot be read now: later it is only said
    /// that none of its models is there.
    pub(super) async fn check(&self, clock: &Clock) -> Result<(), Failure> {
        let (has_config, has_endpoint) = (self.config.is_some(), self.endpoint.is_some());
        for (is_given, is_used, name) in [
            (has_config, matches!(self.mode, Some(ListMode::Config)), "config"),
            (has_endpoint, matches!(self.mode, Some(ListMode::Endpoint)), "endpoint"),
        ] {
            if is_given && !is_used {
                let what = format!("--models.{name} goes only with --models.mode {name}");
                return Err(Failure::user(what));
            }
        }
        match self.mode() {
            Some(mode @ Mode::Config(_)) => {
                let listed = mode.list(clock).await;
                listed.map(drop).map_err(|e| Failure::user(format!("--models.config {e}")))
            }
            _ => Ok(()),
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum KeepArg {
    /// Keep no request and no answer.
    None,
    /// Those of answers that did not pass.
    Faults,
    /// Keep every request with its answer.
    All,
}

#[derive(Clone, Copy, ValueEnum)]
enum RewriteArg {
    /// Never.
    Never,
    /// If it fails, the passage is used without rewriting, and the log says so.
    OrPassage,
    /// If it fails, the round is unscored.
    Always,
}

/// How rounds are held.
#[derive(Args)]
pub(super) struct RoundArgs {
    /// Stop after this number of rounds, print their verdicts, and set weights from them.
    #[arg(long, env = "TARGON_ROUNDS", help_heading = "Rounds",
        value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) rounds: Option<u64>,
    /// One round: the same as --rounds 1.
    #[arg(long, conflicts_with = "rounds", help_heading = "Rounds")]
    pub(super) once: bool,
    /// Requests, scores and weights: default (with proofs and corrected rules) or targon-4.4.
    #[arg(long, env = "TARGON_PROFILE", default_value = "default", help_heading = "Rounds")]
    pub(super) profile: ScoringProfile,
    /// The proof to ask for: residue-v1, residue-v1-u4, toploc or none. The default is residue-v1,
    /// and none in the profile targon-4.4.
    #[arg(long, env = "TARGON_PROOF", help_heading = "Rounds")]
    proof: Option<String>,
    /// The most miners that are asked in a round.
    #[arg(long, env = "TARGON_MINERS_MAX", default_value_t = 37, help_heading = "Rounds",
        value_parser = clap::value_parser!(u16).range(1..=256))]
    miners_max: u16,
    /// The smallest token limit of a request.
    #[arg(long, env = "TARGON_TOKENS_MIN", default_value_t = 512, help_heading = "Rounds",
        value_parser = clap::value_parser!(u32).range(8..=65_536))]
    tokens_min: u32,
    /// The largest token limit of a request.
    #[arg(long, env = "TARGON_TOKENS_MAX", default_value_t = 1920, help_heading = "Rounds",
        value_parser = clap::value_parser!(u32).range(8..=65_536))]
    tokens_max: u32,
    /// Seconds that may pass between two reads of an answer.
    #[arg(long, env = "TARGON_READ_TIMEOUT", default_value_t = 5, help_heading = "Rounds",
        value_parser = clap::value_parser!(u64).range(1..=600))]
    read_timeout: u64,
    /// Seconds that a whole answer may take.
    #[arg(long, env = "TARGON_QUERY_TIMEOUT", default_value_t = 120, help_heading = "Rounds",
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    query_timeout: u64,
    /// The share of answers whose every row is verified, between 0 and 1.
    #[arg(long, env = "TARGON_SLOW_SHARE", default_value_t = 0.1, help_heading = "Rounds")]
    slow_share: f64,
    /// Which requests and answers are stored in full.
    #[arg(long, env = "TARGON_CAPTURES", default_value = "faults", help_heading = "Rounds")]
    captures: KeepArg,
    /// Whether this engine rewrites the passage of a prompt into a query in its own words.
    #[arg(long, env = "TARGON_REWRITE", default_value = "or-passage", help_heading = "Rounds")]
    rewrite: RewriteArg,
    /// A file of JSON lines with a `text` or `conversations` field: the passages of prompts.
    #[arg(long, env = "TARGON_DATASET", help_heading = "Rounds")]
    pub(super) dataset: Option<String>,
    /// A member with a permit and more stake than this, in TAO, is a validator and is not asked.
    #[arg(
        id = "vpermit_tao_limit",
        long = "vpermit-tao-limit",
        env = "TARGON_VPERMIT_TAO_LIMIT",
        default_value_t = 4096.0,
        help_heading = "Rounds"
    )]
    pub(super) vpermit_tao_limit: f64,
    /// Also ask miners at addresses of private networks, such as those of this machine.
    #[arg(long, env = "TARGON_PRIVATE_AXONS", help_heading = "Rounds")]
    pub(super) private_axons: bool,
    /// Validate without a validator permit. The networks test and local need none.
    #[arg(long, env = "IS_TESTNET", help_heading = "Rounds")]
    pub(super) allow_no_permit: bool,
}

impl RoundArgs {
    /// Whether the engine writes prompts.
    pub(super) fn rewriting(&self) -> Rewriting {
        match self.rewrite {
            RewriteArg::Never => Rewriting::Never,
            RewriteArg::OrPassage => Rewriting::OrPassage,
            RewriteArg::Always => Rewriting::Always,
        }
    }

    /// After how many rounds it ends.
    pub(super) fn count(&self) -> Option<u64> {
        self.rounds.or(self.once.then_some(1))
    }

    /// How long a query waits: between two reads, and in all.
    pub(super) fn waits(&self) -> (Duration, Duration) {
        (Duration::from_secs(self.read_timeout), Duration::from_secs(self.query_timeout))
    }

    pub(super) fn settings(
        &self,
        netuid: u16,
        verifying: &VerifyingArgs,
    ) -> Result<RoundSettings, Failure> {
        if self.tokens_min > self.tokens_max {
            let (min, max) = (self.tokens_min, self.tokens_max);
            let what = format!("--tokens-min must be at most --tokens-max, {max}, got {min}");
            return Err(Failure::user(what));
        }
        if !(0.0..=1.0).contains(&self.slow_share) {
            let what = format!("--slow-share must lie between 0 and 1, got {}", self.slow_share);
            return Err(Failure::user(what));
        }
        let (_, query) = self.waits();
        let proof = self.proof()?;
        if verifying.rules == Some(verify::Profile::Proof) && proof.is_none() {
            let what = "--rules proof needs a proof to be asked for, and --proof is none";
            let hint = "the profile targon-4.4 asks for none unless --proof says so";
            return Err(Failure::user(what).with_hint(Some(hint)));
        }
        // Nobody has more stake than no number, and everybody has more than less than nothing.
        if !(0.0..).contains(&self.vpermit_tao_limit) {
            let got = self.vpermit_tao_limit;
            return Err(Failure::user(format!(
                "--vpermit-tao-limit must be at least 0, got {got}"
            )));
        }
        Ok(RoundSettings {
            netuid,
            profile: self.profile.to_string(),
            asked_max: usize::from(self.miners_max),
            lengths: self.tokens_min..=self.tokens_max,
            proof,
            slow_share: self.slow_share,
            keep: match self.captures {
                KeepArg::None => Keep::Nothing,
                KeepArg::Faults => Keep::Faults,
                KeepArg::All => Keep::All,
            },
            times: Times {
                prompt: PROMPT_TIME,
                answers: query + QUERY_GRACE,
                verdicts: Duration::from_secs(verifying.verdicts_timeout),
            },
        })
    }

    fn proof(&self) -> Result<Option<Scheme>, Failure> {
        match (self.proof.as_deref(), self.profile) {
            (None, ScoringProfile::Targon44) => Ok(None),
            (None, ScoringProfile::Default) => Ok(Some(Scheme::Residue)),
            (Some(name), _) => proof_scheme(name),
        }
    }
}

/// How answers are verified.
#[derive(Args)]
pub(super) struct VerifyingArgs {
    /// Files of limits that `calibrate --pairs` wrote, each for the model that it names, separated
    /// by commas. Other models have the default limits of `verify`.
    #[arg(
        long,
        value_name = "FILE",
        env = "TARGON_LIMITS",
        value_delimiter = ',',
        help_heading = "Verification"
    )]
    pub(super) limits: Vec<PathBuf>,
    /// Demand that hidden rows are equal bit for bit: all miners run this engine.
    #[arg(long, env = "TARGON_EXACT", help_heading = "Verification")]
    pub(super) exact: bool,
    #[command(flatten)]
    pub(super) scrutiny: ScrutinyArgs,
    /// The rules: targon-4.1 (powv), targon-4.4 (ranks) or proof. The default is proof if a proof
    /// was requested, and targon-4.4 otherwise.
    #[arg(long, env = "TARGON_RULES", help_heading = "Verification")]
    pub(super) rules: Option<verify::Profile>,
    /// Answers that are verified at once; each has a KV cache of its own, and they share all cores.
    #[arg(long, env = "TARGON_CHECKS", default_value_t = CHECKS_DEFAULT as u16,
        help_heading = "Verification", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(super) checks: u16,
    /// Memory for the models that answers are verified with, such as 16GiB or 60%; by default all
    /// that is available. If it does not hold all models, they are loaded in turn, epoch by epoch.
    #[arg(
        long = "verify-memory",
        env = "TARGON_VERIFY_MEMORY",
        value_name = "SIZE",
        help_heading = "Verification"
    )]
    pub(super) memory: Option<String>,
    /// Seconds for all verdicts of a round, from its last answer on. Answers that are not verified
    /// by then are unscored.
    #[arg(long, env = "TARGON_VERDICTS_TIMEOUT", default_value_t = 1800,
        help_heading = "Verification", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    verdicts_timeout: u64,
}

/// A hub. Nothing is fetched from a hub or sent to one unless it is named.
#[derive(Args)]
pub(super) struct HubArgs {
    /// Fetch users' requests from URL/organics every 20 blocks, verify and score them, and report
    /// the scores to URL/organics/scores.
    #[arg(
        id = "organics.url",
        long = "organics.url",
        env = "TARGON_ORGANICS_URL",
        value_name = "URL",
        help_heading = "Hub"
    )]
    organics: Option<String>,
    /// Send the statistics of every round to URL.
    #[arg(
        id = "stats.url",
        long = "stats.url",
        env = "TARGON_STATS_URL",
        value_name = "URL",
        help_heading = "Hub"
    )]
    stats: Option<String>,
}

impl HubArgs {
    pub(super) fn urls(&self) -> Result<Urls, Failure> {
        for (flag, url) in [("organics.url", &self.organics), ("stats.url", &self.stats)] {
            if let Some(url) = url {
                check_http(flag, url)?;
            }
        }
        Ok(Urls { organics: self.organics.clone(), stats: self.stats.clone() })
    }
}

/// How long records are kept. Weights, evidence and hotkeys are kept for ever.
#[derive(Args)]
pub(super) struct KeepingArgs {
    /// Days that rounds with their verdicts are kept; 0 is for ever.
    #[arg(long, env = "TARGON_KEEP_ROUNDS", default_value_t = 90, help_heading = "Records")]
    keep_rounds: u32,
    /// The newest rounds that are kept, at most; 0 is all.
    #[arg(long, env = "TARGON_KEEP_ROUNDS_MAX", default_value_t = 0, help_heading = "Records")]
    keep_rounds_max: u32,
    /// Days that requests and answers are kept; 0 is as long as their rounds.
    #[arg(long, env = "TARGON_KEEP_CAPTURES", default_value_t = 7, help_heading = "Records")]
    keep_captures: u32,
    /// Days that the evidence of verifications is kept; 0 is as long as their rounds.
    #[arg(long, env = "TARGON_KEEP_REPORTS", default_value_t = 30, help_heading = "Records")]
    keep_reports: u32,
}

impl KeepingArgs {
    pub(super) fn keeping(&self) -> Keeping {
        let days = |n: u32| (n > 0).then(|| Duration::from_secs(u64::from(n) * 86_400));
        Keeping {
            rounds: days(self.keep_rounds),
            rounds_max: (self.keep_rounds_max > 0).then_some(self.keep_rounds_max),
            captures: days(self.keep_captures),
            reports: days(self.keep_reports),
            // No window is longer.
            samples_max: Some(WINDOW_MAX as u32),
        }
    }
}

/// When and how weights are set.
#[derive(Args)]
pub(super) struct WeightsArgs {
    /// Set weights and read the metagraph every so many blocks, counted from block 0. By default
    /// both happen when the chain runs an epoch for the subnet.
    #[arg(
        long,
        env = "TARGON_EPOCH_LENGTH",
        value_parser = clap::value_parser!(u64).range(1..),
        help_heading = "Weights"
    )]
    epoch_length: Option<u64>,
    /// How many of the newest samples of a miner and model count: 30 by default, and 15 in the
    /// profile targon-4.4.
    #[arg(long, env = "TARGON_WINDOW", help_heading = "Weights")]
    window: Option<usize>,
    /// Decide weights and show them; sign nothing for the chain.
    #[arg(long, env = "TARGON_DRY_RUN", help_heading = "Weights")]
    pub(super) dry_run: bool,
}

impl WeightsArgs {
    /// Where epochs begin.
    pub(super) fn epochs(&self) -> EpochRule {
        self.epoch_length.map_or(EpochRule::Chain, EpochRule::Every)
    }

    /// Blocks after the last round from which on old samples do not count (protocol 5.7). Rounds
    /// are known by the block that they began at, and are stored `round` later at most.
    pub(super) fn away_max(&self, round: Duration) -> u64 {
        let blocks = round.as_secs().div_ceil(BLOCK_SECONDS);
        self.epoch_length.unwrap_or(0).max(AWAY_BLOCKS_MAX) + blocks
    }

    pub(super) fn scoring(&self, profile: ScoringProfile) -> Result<ScoringRules, Failure> {
        let rules = ScoringRules::of(profile);
        match self.window {
            Some(window) => rules.with_window(window).map_err(Failure::user),
            None => Ok(rules),
        }
    }

    /// The version that weights name; by default the subnet's own.
    pub(super) fn version_key(&self, profile: ScoringProfile) -> Option<u64> {
        (profile == ScoringProfile::Targon44).then_some(TARGON_VERSION)
    }
}
