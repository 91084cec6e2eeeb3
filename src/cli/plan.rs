//! Runs `plan`: prints the memory that models need, without loading or downloading them.

use super::Failure;
use super::out::outln;
use super::progress::{Bars, table};
use super::shared::ModelsArg;
use super::shared::runtime;
use crate::lifecycle::accounts::MemoryAccounts;
use crate::lifecycle::load::shape;
use clap::Args;

/// Arguments of `plan`.
#[derive(Args)]
pub(super) struct PlanArgs {
    #[command(flatten)]
    models: ModelsArg,
}

pub(super) fn run(args: &PlanArgs) -> Result<(), Failure> {
    let config = args.models.read(&[])?;
    let bars = Bars::new();
    let runtime = runtime()?;
    let memory = MemoryAccounts::default();
    let (mut rows, mut leases) = (Vec::new(), Vec::new());
    for model in config.models {
        let name = model.name.clone();
        let spec = runtime.block_on(shape(&model, &bars));
        let planned = spec.and_then(|spec| memory.plan_shape(&model, &spec));
        rows.push((
            name,
            planned.map(|(plan, lease)| {
                leases.push(lease);
                plan
            }),
        ));
    }
    outln!("{}", table(&rows, &memory.free()));
    match rows.iter().find_map(|(name, plan)| plan.as_ref().err().map(|why| (name, why))) {
        Some((name, why)) => Err(Failure::user(format!("{name} cannot be served: {why}"))),
        None => Ok(()),
    }
}
