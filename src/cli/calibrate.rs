//! `calibrate`: the whitening of a model's hidden rows, computed and stored.

use super::load::{DownloadBars, locate};
use super::shared::{ComputeArgs, ModelsArg};
use super::{Failure, runtime};
use crate::models::calibration::{HONEST_ERROR, beside, compute, write};
use crate::models::root::weights_root;
use crate::models::{Model, calibration};
use crate::proof::codec::to_hex;
use crate::proof::commit::calibration_hash;
use clap::Args;
use std::path::PathBuf;

/// Arguments of `calibrate`.
#[derive(Args)]
pub(super) struct CalibrateArgs {
    #[command(flatten)]
    models: ModelsArg,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Only this one.
    #[arg(long)]
    model: Option<String>,
    /// Relative error between honest implementations; sets the width of a residue step.
    #[arg(long, default_value_t = HONEST_ERROR)]
    honest_error: f64,
}

pub(super) fn run(args: &CalibrateArgs) -> Result<(), Failure> {
    if !(args.honest_error > 0.0 && args.honest_error < 1.0) {
        let message = format!("--honest-error must lie between 0 and 1, got {}", args.honest_error);
        return Err(Failure::user(message));
    }
    let config = args.models.read(&[])?;
    let is_wanted = |name: &str| args.model.as_deref().is_none_or(|m| m == name);
    let wanted: Vec<_> = config.models.into_iter().filter(|m| is_wanted(&m.name)).collect();
    if wanted.is_empty() {
        return Err(Failure::user(format!("{} lists no such model", args.models.path.display())));
    }
    let pool = args.compute.pool()?;
    let (runtime, bars) = (runtime()?, DownloadBars::new());
    for config in wanted {
        let (name, dtype) = (config.name.clone(), config.dtype);
        let located = runtime.block_on(locate(config, &bars)).map_err(Failure::user)?;
        let model = Model::load(&located.path, dtype, &pool, |_, _| {}).map_err(Failure::user)?;
        let root = weights_root(&model.checkpoint, &pool).map_err(Failure::user)?;
        let (decoder, tokenizer) = (&model.decoder, &model.tokenizer);
        let (calibration, rows) =
            compute(decoder, tokenizer, &pool, args.honest_error).map_err(Failure::user)?;
        let path = store(&model, &root, &calibration, rows)?;
        println!("{name}");
        println!("  weights root  {}", to_hex(&root));
        println!("  calibration   {}", to_hex(&calibration_hash(&calibration)));
        let (channels, shift) = (calibration.channels(), calibration.shift);
        println!("  {channels} channels from {rows} rows, shift {shift}, in {}", path.display());
    }
    Ok(())
}

/// Beside the model, where that is allowed; else in the cache.
fn store(
    model: &Model,
    root: &[u8; 32],
    calibration: &crate::proof::residue::Calibration,
    rows: usize,
) -> Result<PathBuf, Failure> {
    let path = beside(&model.checkpoint.path);
    if write(&path, model, root, calibration, rows).is_ok() {
        return Ok(path);
    }
    let path = calibration::in_cache(root, model.decoder.dtype);
    write(&path, model, root, calibration, rows)
        .map_err(|e| Failure::user(format!("cannot write {}: {e}", path.display())))?;
    Ok(path)
}
