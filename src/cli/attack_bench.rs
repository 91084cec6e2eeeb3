//! `attack-bench`: what each verification scheme catches, on a model of the user's choice.

use super::Failure;
use super::shared::ComputeArgs;
use crate::bench::attack::{Bench, Line};
use clap::Args;
use comfy_table::{Table, presets};
use std::path::PathBuf;

/// Arguments of `attack-bench`.
#[derive(Args)]
pub(super) struct AttackBenchArgs {
    /// A checkpoint directory or GGUF file of a dense Llama.
    model: PathBuf,
    /// Prompts, each with an answer of 256 tokens.
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u16).range(2..=96))]
    prompts: u16,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print JSON in place of the table.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &AttackBenchArgs) -> Result<(), Failure> {
    let pool = args.compute.pool()?;
    let scratch = std::env::temp_dir().join(format!("targon-attack-{}", uuid::Uuid::new_v4()));
    std::fs::create_dir(&scratch)
        .map_err(|e| Failure::user(format!("{} cannot be made: {e}", scratch.display())))?;
    let lines = Bench::new(&args.model, &scratch, &pool, args.prompts.into())
        .and_then(|bench| bench.run(|next| tracing::info!("{next}")));
    // What is left in the temporary directory is the system's to clean.
    let _ = std::fs::remove_dir_all(&scratch);
    let lines = lines.map_err(Failure::user)?;
    if args.json {
        println!("{}", serde_json::to_string(&lines).map_err(Failure::ours)?);
    } else {
        println!("{}", table(&lines));
    }
    Ok(())
}

fn table(lines: &[Line]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "answers that are",
        "judged by",
        "rejected",
        "by 1/2/4/8 chunks",
        "chunk energy (min..max)",
        "exact chunks",
        "mean margin",
    ]);
    for line in lines {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        table.add_row([
            line.name.clone(),
            line.scheme.into(),
            format!("{}/{}", line.rejected, line.answers),
            or_dash(line.by_chunks.map(|n| n.map(|n| n.to_string()).join("/"))),
            or_dash(line.energy.map(|[mid, min, max]| format!("{mid:.1} ({min:.1}..{max:.1})"))),
            or_dash(line.exact.map(|(n, all)| format!("{n}/{all}"))),
            or_dash(line.margin.map(|m| format!("{m:.4}"))),
        ]);
    }
    table
}
