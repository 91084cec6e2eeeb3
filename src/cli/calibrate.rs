//! Runs `calibrate`: computes and stores the whitening of a model's hidden rows, computes limits
//! from captured honest answers, and counts how many of this engine's own answers are equal bit for
//! bit.

use super::Failure;
use super::out::outln;
use super::printable::printable;
use super::progress::Bars;
use super::shared::runtime;
use super::shared::{ComputeArgs, ModelsArg};
use super::tables::bordered;
use crate::bench::own::{Own, OwnError, OwnTally};
use crate::config::models_toml::ModelConfig;
use crate::lifecycle::accounts::MemoryAccounts;
use crate::lifecycle::load::locate;
use crate::lifecycle::pairs::{CheckedPairs, MEASURING, WantedPairs, check_pairs, names};
use crate::lifecycle::verifiers::Verifiers;
use crate::models::Model;
use crate::models::identity::{Identity, Recalibrated};
use crate::models::margin::MARGIN_CLIP;
use crate::proof::codec::to_hex;
use crate::proof::commit::calibration_hash;
use crate::verify::bounds;
use crate::verify::calibrate::{
    ENERGY_FACTOR, MARGIN_FACTOR, STATISTIC_FACTOR, limits_file, split,
};
use crate::verify::classes::{ClassFit, fits, narrowest};
use crate::verify::limits_file::{self, LimitsFile, Share, ValueSpread};
use crate::verify::statistic::ByRows;
use crate::verify::{Limits, rounding_energy};
use clap::Args;
use comfy_table::Table;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Arguments of `calibrate`.
#[derive(Args)]
pub(super) struct CalibrateArgs {
    #[command(flatten)]
    models: ModelsArg,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Only this model.
    #[arg(long)]
    model: Option<String>,
    /// Take limits from honest answers with proofs, captured as `verify` reads them; may be given
    /// several times.
    #[arg(long, value_name = "FILE", requires = "aim")]
    pairs: Vec<PathBuf>,
    /// The file to write the limits to.
    #[arg(long, value_name = "FILE", requires = "pairs", group = "aim")]
    limits: Option<PathBuf>,
    /// Say which class each miner of --pairs belongs to, by its first answers: the narrowest of
    /// these files of limits that all of them keep. May be given several times.
    #[arg(long, value_name = "LIMITS", requires = "pairs", group = "aim")]
    classes: Vec<PathBuf>,
    /// How many answers of each miner --classes looks at.
    #[arg(long, value_name = "N", default_value_t = 8, requires = "classes")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1000))]
    first: u16,
    /// The miners that gave these answers: stack, version and hardware, as text.
    #[arg(long, value_name = "NAME", default_value = "unnamed", requires = "limits")]
    class: String,
    /// The share of prompts that are used only to test the limits.
    #[arg(long, value_name = "SHARE", default_value_t = 0.5, requires = "limits")]
    held_out: f64,
    /// Generate this number of answers here, and print how many are equal bit for bit when
    /// recomputed.
    #[arg(long, value_name = "N", conflicts_with = "pairs")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    answers: Option<u32>,
}

pub(super) fn run(args: &CalibrateArgs) -> Result<(), Failure> {
    if !(args.held_out > 0.0 && args.held_out < 1.0) {
        let message = format!("--held-out must lie between 0 and 1, got {}", args.held_out);
        return Err(Failure::user(message));
    }
    match (&args.limits, args.answers) {
        (Some(out), _) => take_limits(args, out),
        (None, _) if !args.classes.is_empty() => tell_classes(args),
        (None, Some(count)) => check_own(args, count),
        (None, None) => whiten(args),
    }
}

impl CalibrateArgs {
    fn is_wanted(&self, name: &str) -> bool {
        self.model.as_deref().is_none_or(|m| m == name)
    }

    /// The models of the file that are asked about.
    fn wanted(&self) -> Result<Vec<ModelConfig>, Failure> {
        let models = self.models.read(&[])?.models;
        let wanted: Vec<_> = models.into_iter().filter(|m| self.is_wanted(&m.name)).collect();
        match &self.model {
            Some(name) if wanted.is_empty() => {
                let place = self.models.path.display();
                let what = format!("--model: {place} has no model `{}`", printable(name));
                Err(Failure::user(what).with_hint(Some("add a [[model]] entry of that name")))
            }
            _ => Ok(wanted),
        }
    }
}

fn whiten(args: &CalibrateArgs) -> Result<(), Failure> {
    let wanted = args.wanted()?;
    let pool = args.compute.pool()?;
    let (runtime, bars) = (runtime()?, Bars::new());
    for config in wanted {
        let (name, dtype) = (config.name.clone(), config.dtype);
        let located = runtime.block_on(locate(config, &bars)).map_err(Failure::user)?;
        let model = Model::load(&located.path, dtype, &pool, |_, _| {}).map_err(Failure::user)?;
        let renewed = Identity::recalibrated(&model, &pool).map_err(Failure::user)?;
        let Recalibrated { identity, rows, path } = renewed;
        let rounding =
            rounding_energy::of_model(&model, &identity, &pool).map_err(Failure::user)?;
        let Identity { weights_root, calibration, .. } = identity;
        outln!("{name}");
        outln!("  weights root  {}", to_hex(&weights_root));
        outln!("  calibration   {}", to_hex(&calibration_hash(&calibration)));
        let (channels, shift) = (calibration.channels(), calibration.shift);
        outln!("  {channels} channels from {rows} rows, shift {shift}, in {}", path.display());
        if let Some(energy) = rounding {
            let limit = Limits::default().scaled(energy / rounding_energy::MEASURED).energy_u8;
            let most = format!("a chunk has an energy of at most {limit:.0} by default");
            outln!("  rounding      moves rows by an energy of {energy:.1}: {most}");
        }
    }
    Ok(())
}

/// Checks captured honest answers at every row, and writes limits between which they lie.
fn take_limits(args: &CalibrateArgs, out: &Path) -> Result<(), Failure> {
    // Before the work, not after it.
    limits_file::check_place(out).map_err(Failure::user)?;
    let CheckedPairs { samples, model, left_out } = measure(args, usize::MAX)?;
    let samples = samples.into_values().flatten().collect();
    let split = split(samples, args.held_out)
        .map_err(|e| Failure::user(format!("--pairs {} {e}", names(&args.pairs))))?;
    let file = limits_file(&model, &args.class, &split);
    limits_file::write(out, &file).map_err(Failure::user)?;
    describe(&file, left_out);
    outln!("written to {}", out.display());
    Ok(())
}

/// Says of every miner which class it belongs to.
fn tell_classes(args: &CalibrateArgs) -> Result<(), Failure> {
    let read = |path: &PathBuf| limits_file::read(path).map_err(Failure::user);
    let files = args.classes.iter().map(read).collect::<Result<Vec<LimitsFile>, _>>()?;
    let CheckedPairs { samples, model, left_out } = measure(args, usize::from(args.first))?;
    for (file, path) in files.iter().zip(&args.classes) {
        file.check_model(path, &model).map_err(Failure::user)?;
    }
    for (miner, answers) in &samples {
        let fits = fits(&files, answers);
        let count = answers.len();
        let miner = miner.as_deref().map_or("the miner".to_owned(), printable);
        match narrowest(&fits) {
            _ if answers.is_empty() => {
                outln!("{miner}: no answer can be used");
                continue;
            }
            Some(fit) => {
                outln!("{miner}: class `{}`, by {count} answers", printable(&fit.file.class));
            }
            None => outln!("{miner}: none of these classes, by {count} answers"),
        }
        for ClassFit { file, broken, missed } in &fits {
            let class = printable(&file.class);
            match broken {
                Some((number, what)) => outln!("  `{class}` is broken by answer {number}: {what}"),
                None => outln!("  `{class}` fits"),
            }
            let missed = 100.0 * missed;
            outln!("    of its honest members at most {missed:.1} % have one that does (95 %)");
        }
    }
    outln!("{left_out} captures could not be used");
    Ok(())
}

/// Checks captures, of each miner the first `answers_max` that can be used.
fn measure(args: &CalibrateArgs, answers_max: usize) -> Result<CheckedPairs, Failure> {
    let (config, pool) = (args.models.read(&[])?, args.compute.pool()?);
    let file = (args.models.path.as_path(), config);
    let mut verifiers = Verifiers::new(file, pool, MEASURING, Arc::new(Bars::new()));
    let wanted = WantedPairs { model: args.model.as_deref(), answers_max };
    let checked = runtime()?.block_on(check_pairs(&args.pairs, &mut verifiers, wanted));
    checked.map_err(|e| Failure::user(format!("--pairs {e}")).with_hint(e.hint()))
}

fn describe(file: &LimitsFile, left_out: usize) {
    let LimitsFile { class, calibration, held_out, limits, .. } = file;
    outln!("limits for miners of class `{class}`");
    outln!(
        "taken from {} answers to {} prompts ({} tokens), tested on {} answers to {} others; {} \
         captures could not be used",
        calibration.answers,
        calibration.prompts,
        calibration.tokens,
        held_out.answers,
        held_out.prompts,
        left_out
    );
    outln!("{}", table(file));
    outln!(
        "limits: largest honest energy of a chunk times {ENERGY_FACTOR}, largest trimmed mean \
         times {STATISTIC_FACTOR}, largest honest margin times {MARGIN_FACTOR}"
    );
    outln!(
        "honest rows show {:.2} of the twin's rounding error; checks subtract {} of it",
        calibration.twin_share,
        limits.shrink
    );
    let energies = [calibration.energy_u8, calibration.energy_u4];
    if energies.iter().flatten().all(|spread| spread.max == 0.0) && calibration.margin_max == 0.0 {
        outln!("all rows are equal bit for bit: `verify --exact` demands that");
    }
    if limits.margin >= MARGIN_CLIP {
        outln!("honest margins reach {MARGIN_CLIP}: a single one rejects nobody");
    }
}

fn table(file: &LimitsFile) -> Table {
    let mut table = bordered([
        "what",
        "honest mean",
        "99.9 %",
        "largest",
        "limit",
        "held out: rejected",
        "false-positive rate, 95 %",
    ]);
    for (what, [mean, p999, largest, limit], share) in rows(file) {
        let (rejected, interval) = rate(&share);
        table.add_row([what.to_owned(), mean, p999, largest, limit, rejected, interval]);
    }
    table
}

/// What is limited; mean, 99.9th percentile, largest and limit; and the held-out answers over it.
fn rows(file: &LimitsFile) -> [(&'static str, [String; 4], Share); 10] {
    let LimitsFile { calibration: c, held_out, limits, .. } = file;
    let (energy_u8, energy_u4) = ("energy, residue-v1", "energy, residue-v1-u4");
    let (trimmed_u8, trimmed_u4) = ("trimmed mean, residue-v1", "trimmed mean, residue-v1-u4");
    let far = Share::new(
        held_out.energy_u8.over + held_out.energy_u4.over,
        held_out.energy_u8.of + held_out.energy_u4.of,
    );
    let dash = || "-".to_owned();
    let (mean, largest) = (format!("{:.5}", c.margin_mean), format!("{:.4}", c.margin_max));
    let margin = [mean.clone(), dash(), largest, format!("{:.4}", limits.margin)];
    let margin_mean = [mean, dash(), dash(), format!("{:.4}", limits.margin_mean)];
    [
        (energy_u8, spread(c.energy_u8, limits.energy_u8), held_out.energy_u8),
        (energy_u4, spread(c.energy_u4, limits.energy_u4), held_out.energy_u4),
        ("energy over rounding's", spread(c.energy_rounding, limits.energy_rounding), far),
        (trimmed_u8, by_rows(c.trimmed_u8, limits.trimmed_u8), held_out.trimmed),
        (trimmed_u4, by_rows(c.trimmed_u4, limits.trimmed_u4), held_out.trimmed),
        ("twin, residue-v1", by_rows(c.twin_u8, limits.twin_u8), held_out.twin),
        ("twin, residue-v1-u4", by_rows(c.twin_u4, limits.twin_u4), held_out.twin),
        ("margin of a token", margin, held_out.margin),
        ("mean margin", margin_mean, held_out.margin_mean),
        ("any of these", [dash(), dash(), dash(), dash()], held_out.rejected),
    ]
}

fn spread(spread: Option<ValueSpread>, limit: f64) -> [String; 4] {
    match spread {
        Some(s) => [s.mean, s.p999, s.max, limit].map(|x| format!("{x:.3}")),
        None => ["-".into(), "-".into(), "-".into(), format!("{limit} (not measured)")],
    }
}

fn by_rows(values: Option<ValueSpread>, limits: ByRows) -> [String; 4] {
    let [mean, p999, largest, _] = spread(values, 0.0);
    [mean, p999, largest, limits.0.map(|x| format!("{x:.2}")).join(" ")]
}

fn rate(share: &Share) -> (String, String) {
    if share.of == 0 {
        return ("-".into(), "-".into());
    }
    let (low, high) = bounds::interval(share.over, share.of);
    let interval = format!("{:.2} % to {:.2} %", 100.0 * low, 100.0 * high);
    (format!("{} of {}", share.over, share.of), interval)
}

/// How many of this engine's own answers are equal when they are recomputed: all, or it is broken.
fn check_own(args: &CalibrateArgs, count: u32) -> Result<(), Failure> {
    let wanted = args.wanted()?;
    let pool = args.compute.pool()?;
    let (runtime, bars) = (runtime()?, Bars::new());
    for config in wanted {
        let name = config.name.clone();
        let located = runtime.block_on(locate(config, &bars)).map_err(Failure::user)?;
        let options = MemoryAccounts::default().plan(&located).map_err(Failure::user)?.0.options;
        let model = located.load_model(&pool, |_, _| {});
        let own = Own::start(model.map_err(Failure::user)?, options, &pool);
        let own = own.map_err(|e| own_failure(&name, e))?;
        let tally = runtime.block_on(own.check(&name, count));
        let OwnTally { equal, chunks, tokens } = tally.map_err(|e| own_failure(&name, e))?;
        let lower = 100.0 * bounds::interval(equal, count as usize).0;
        outln!("{name}: {equal} of {count} answers are equal bit for bit and drawn as replayed");
        outln!("  {chunks} chunks, {tokens} tokens; the true rate is above {lower:.2} % (95 %)");
        if equal < count as usize {
            return Err(Failure::ours("an answer of this engine is not what it recomputes"));
        }
    }
    Ok(())
}

fn own_failure(name: &str, e: OwnError) -> Failure {
    let message = format!("{name}: {e}");
    match e {
        OwnError::Refused(_) => Failure::user(message),
        OwnError::Engine(_) => Failure::ours(message),
    }
}
