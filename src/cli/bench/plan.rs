//! Runs `bench plan`: predicts what a model would do on devices that are not here.

use super::output::write_page;
use crate::bench::plan::devices::named;
use crate::bench::plan::predict::{Efficiency, Prediction, Workload, predict};
use crate::bench::plan::prices::{self, Price, per_million};
use crate::bench::report::sheet::Sheet;
use crate::cli::Failure;
use crate::cli::out::outln;
use crate::cli::printable::printable;
use crate::cli::shared::{hub, runtime};
use crate::engine::plan::Bytes;
use crate::models::checkpoint::Checkpoint;
use crate::models::config;
use crate::models::error::read_json;
use crate::models::hub::WantedFiles;
use crate::models::spec::Spec;
use anyhow::bail;
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Arguments of `bench plan`.
#[derive(Args)]
#[command(after_help = "Examples:
  targon-engine bench plan HuggingFaceTB/SmolLM2-135M-Instruct
  targon-engine bench plan ./config.json --devices h100-sxm,h200 --batch 1,64
  targon-engine bench plan model.gguf --prices prices.toml --csv > plan.csv")]
pub(in crate::cli) struct BenchPlanArgs {
    /// A config.json, a checkpoint directory, a GGUF file, or OWNER/NAME on the Hub (of which only
    /// the configuration is fetched).
    model: String,
    /// Devices of the table, with commas between them. Default: all.
    #[arg(long, value_delimiter = ',')]
    devices: Vec<String>,
    /// Sequences that decode at once, with commas between them.
    #[arg(long, value_delimiter = ',', default_value = "1,8,64",
          value_parser = clap::value_parser!(u16).range(1..=4096))]
    batch: Vec<u16>,
    /// Positions of each sequence while it decodes.
    #[arg(long, default_value_t = 1024)]
    context: u32,
    /// Tokens of a prompt.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    prompt: u32,
    /// Tokens of an answer.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    answer: u32,
    /// Share of the datasheet's bandwidth that is reached, in place of the assumed one.
    #[arg(long, requires = "compute_share", value_parser = share)]
    memory_share: Option<f64>,
    /// Share of the datasheet's arithmetic that is reached, in place of the assumed one.
    #[arg(long, requires = "memory_share", value_parser = share)]
    compute_share: Option<f64>,
    /// A TOML file with [[price]] entries: device, per_hour (dollars), date, source.
    #[arg(long)]
    prices: Option<PathBuf>,
    /// Print JSON.
    #[arg(long, conflicts_with = "csv")]
    json: bool,
    /// Print one line of comma-separated values for each device and batch.
    #[arg(long)]
    csv: bool,
    /// Write the predictions as a page of its own, too.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

fn share(text: &str) -> anyhow::Result<f64> {
    match text.parse() {
        Ok(share) if share > 0.0 && share <= 1.0 => Ok(share),
        _ => bail!("must lie above 0 and at most at 1"),
    }
}

pub(super) fn run(args: &BenchPlanArgs) -> Result<(), Failure> {
    let devices = named(&args.devices).map_err(|e| Failure::user(format!("--devices: {e}")))?;
    let prices = args.prices.as_deref().map(prices::read).transpose().map_err(Failure::user)?;
    let prices = prices.unwrap_or_default();
    let spec = spec(&args.model)?;
    let [context, prompt, answer] =
        [args.context, args.prompt, args.answer].map(|tokens| tokens as usize);
    let longest = prompt.max(context) + answer;
    if longest > spec.context {
        let what = format!(
            "{longest} tokens are asked for, but the model's context is {} tokens",
            spec.context
        );
        return Err(Failure::user(what).with_hint(Some("lower --prompt, --context or --answer")));
    }
    let batches = args.batch.iter().map(|b| usize::from(*b)).collect();
    let load = Workload { batches, context, prompts: 1, prompt, answer };
    let own = args.memory_share.zip(args.compute_share);
    let own = own.map(|(memory, compute)| Efficiency { memory, compute });
    let predictions: Vec<Prediction> =
        devices.iter().map(|device| predict(&spec, device, &load, own)).collect();
    let sheet = sheet(args, &spec, &predictions, &prices).map(printable);
    if args.json {
        let asked = json!({"prompt": prompt, "context": context, "answer": answer});
        let all = json!({
            "model": args.model, "tokens": asked, "predictions": predictions, "prices": prices,
        });
        outln!("{all}");
    } else if args.csv {
        print_csv(args, &predictions, &prices);
    } else {
        outln!("{}", sheet.markdown());
    }
    args.html.as_deref().map_or(Ok(()), |path| write_page(path, &sheet))
}

/// The model's shape.
fn spec(model: &str) -> Result<Spec, Failure> {
    let path = Path::new(model);
    let fetched = match path.exists() {
        true => path.to_owned(),
        false => runtime()?.block_on(fetch(model))?,
    };
    let is_json = fetched.extension().is_some_and(|e| e == "json");
    let (place, json) = match is_json {
        true => {
            let json = read_json(&fetched).map_err(Failure::user)?;
            (fetched, json)
        }
        false => {
            let checkpoint = Checkpoint::open(&fetched).map_err(Failure::user)?;
            (checkpoint.config_path, checkpoint.config)
        }
    };
    config::parse(&place, &json).map_err(Failure::user)
}

async fn fetch(repo: &str) -> Result<PathBuf, Failure> {
    if repo.split('/').count() != 2 || repo.starts_with(['.', '/']) {
        let what = format!("{} is neither a file here nor OWNER/NAME", printable(repo));
        return Err(Failure::user(what));
    }
    let hub = hub()?;
    let wanted = WantedFiles::Configuration;
    let snapshot = hub.fetch(repo, "main", wanted, &|_, _, _| {}).await.map_err(Failure::user)?;
    Ok(snapshot.directory.join("config.json"))
}

fn price<'a>(prices: &'a [Price], device: &str) -> Option<&'a Price> {
    prices.iter().find(|p| p.device == device)
}

/// The predictions with what they rest on.
fn sheet(args: &BenchPlanArgs, spec: &Spec, predictions: &[Prediction], prices: &[Price]) -> Sheet {
    let weights = predictions.first().map_or(0, |p| p.weights);
    let kv = spec.kv_dims().block_bytes() / crate::ops::attention::BLOCK_TOKENS;
    let (prompt, context, answer) = (args.prompt, args.context, args.answer);
    let mut columns: Vec<String> =
        ["device", "devices", "first token", "prefill tok/s"].map(String::from).to_vec();
    columns.extend(args.batch.iter().map(|b| format!("tok/s, batch {b}")));
    columns.extend(["checks/min", "$/Mtok"].map(String::from));
    Sheet {
        title: format!("Predictions for {}", args.model),
        before: vec![
            format!("{}, {} of weights in 16 bits", args.model, Bytes(weights)),
            format!(
                "prompt {prompt}, context {context}, answer {answer} tokens; {kv} bytes of KV \
                 cache a token"
            ),
        ],
        columns,
        rows: predictions.iter().map(|p| row(p, prices)).collect(),
        after: notes(predictions, prices),
    }
}

fn row(p: &Prediction, prices: &[Price]) -> Vec<String> {
    let mut row = vec![
        p.device.to_owned(),
        p.devices.to_string(),
        format!("{:.1} ms", p.first_token_seconds * 1e3),
        number(p.prefill_tokens_per_second),
    ];
    row.extend(p.decode.iter().map(|d| match d.fits {
        true => format!("{} ({:?})", number(d.tokens_per_second), d.bound).to_lowercase(),
        false => "no room".into(),
    }));
    row.push(number(p.checks_per_minute));
    row.push(cheapest(p, prices).map_or("-".into(), |dollars| format!("{dollars:.3}")));
    row
}

fn notes(predictions: &[Prediction], prices: &[Price]) -> Vec<String> {
    let mut notes = vec![
        "devices: how many hold the model; checks/min: fast checks of such answers on them.".into(),
        "Predicted, not measured: the datasheet's numbers times the share that is reached.".into(),
    ];
    for p in predictions {
        let (memory, compute) = (p.efficiency.memory * 100.0, p.efficiency.compute * 100.0);
        let shares = format!("{memory:.0} % of bandwidth, {compute:.0} % of arithmetic");
        notes.push(format!("  {:<12} {shares}; {}", p.device, p.source));
    }
    notes.extend([
        "Time between kernels is not counted, so small models are slower on cards than this."
            .into(),
        "This engine has run on processors only: rows of cards say what their roofline allows."
            .into(),
    ]);
    for price in prices.iter().filter(|p| predictions.iter().any(|q| q.device == p.device)) {
        let source = price.source.as_deref().map_or(String::new(), |s| format!(", {s}"));
        let (device, per_hour, date) = (&price.device, price.per_hour, &price.date);
        notes.push(format!("  {device}: ${per_hour} an hour on {date}{source}"));
    }
    for price in prices.iter().filter(|p| named(std::slice::from_ref(&p.device)).is_err()) {
        notes.push(format!("The price of {} counts for no device of the table.", price.device));
    }
    notes
}

/// Dollars for a million tokens at the best batch that fits.
fn cheapest(p: &Prediction, prices: &[Price]) -> Option<f64> {
    let per_hour = price(prices, p.device)?.per_hour * p.devices as f64;
    let fitting = p.decode.iter().filter(|d| d.fits).map(|d| d.tokens_per_second);
    fitting.reduce(f64::max).map(|best| per_million(per_hour, best))
}

/// Three significant digits below a thousand, none after the point above.
fn number(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

fn print_csv(args: &BenchPlanArgs, predictions: &[Prediction], prices: &[Price]) {
    let BenchPlanArgs { prompt, context, answer, .. } = args;
    outln!(
        "prompt,context,answer,device,devices,first_token_seconds,prefill_tokens_per_second,\
         batch,tokens_per_second,bound,fits,checks_per_minute,dollars_per_million_tokens"
    );
    for p in predictions {
        for d in &p.decode {
            let per_hour = price(prices, p.device).map(|q| q.per_hour * p.devices as f64);
            let dollars = per_hour.map(|h| per_million(h, d.tokens_per_second).to_string());
            outln!(
                "{prompt},{context},{answer},{},{},{},{},{},{},{},{},{},{}",
                p.device,
                p.devices,
                p.first_token_seconds,
                p.prefill_tokens_per_second,
                d.batch,
                d.tokens_per_second,
                format!("{:?}", d.bound).to_lowercase(),
                d.fits,
                p.checks_per_minute,
                dollars.unwrap_or_default()
            );
        }
    }
}
