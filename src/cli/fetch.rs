//! Runs `fetch`: downloads a model from the Hub into the shared cache.

use super::Failure;
use super::out::outln;
use super::progress::Bars;
use super::shared::runtime;
use crate::lifecycle::load::Progress;
use crate::models::hub::{Hub, WantedFiles};
use clap::Args;

/// Arguments of `fetch`.
#[derive(Args)]
pub(super) struct FetchArgs {
    /// The repository, such as HuggingFaceTB/SmolLM2-135M-Instruct.
    repo: String,
    /// Branch, tag or commit.
    #[arg(long, default_value = "main")]
    revision: String,
    /// Only this file, for example one GGUF file.
    #[arg(long)]
    file: Option<String>,
}

pub(super) fn run(args: &FetchArgs) -> Result<(), Failure> {
    let hub = Hub::from_env().map_err(Failure::user)?;
    let wanted = args.file.as_deref().map_or(WantedFiles::Checkpoint, WantedFiles::File);
    let bars = Bars::new();
    let progress = |file: &str, done, total| bars.file(file, done, total);
    let fetched = runtime()?.block_on(hub.fetch(&args.repo, &args.revision, wanted, &progress));
    let snapshot = fetched.map_err(Failure::user)?;
    tracing::info!(repo = args.repo, commit = snapshot.commit, "fetched");
    let path = match &args.file {
        Some(file) => snapshot.directory.join(file),
        None => snapshot.directory,
    };
    outln!("{}", path.display());
    Ok(())
}
