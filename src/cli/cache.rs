//! Runs `cache`: lists what is kept on disk, and removes it.

use super::Failure;
use super::out::{note, outln};
use super::printable::printable;
use super::shared::hub;
use crate::clock::Clock;
use crate::engine::plan::Bytes;
use crate::models::cache::{CacheDirectories, CacheKind, InUse, Item, KINDS, find, remove};
use anyhow::anyhow;
use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand};
use comfy_table::{CellAlignment, Table, presets};
use serde_json::json;

/// Milliseconds of a day.
const DAY_MS: u64 = 86_400_000;

/// What to do with the cache.
#[derive(Subcommand)]
pub(super) enum CacheCommand {
    /// List what is kept, where, how large it is, when it was last used, and who holds it.
    List(CacheListArgs),
    /// Remove what can be fetched or computed again; what a process uses stays.
    Clean(CleanArgs),
}

/// Arguments of `cache list`.
#[derive(Args)]
pub(super) struct CacheListArgs {
    /// Print one JSON object: `places`, `items` and `bytes`.
    #[arg(long)]
    json: bool,
}

/// Arguments of `cache clean`.
#[derive(Args)]
pub(super) struct CleanArgs {
    /// Only what was last used longer ago: days, hours or minutes, as in 30d, 12h or 90m.
    #[arg(long, value_name = "AGE", value_parser = age_ms)]
    older_than: Option<u64>,
    /// Only this kind; may be given several times.
    #[arg(long, value_name = "KIND", value_parser = PossibleValuesParser::new(kinds()))]
    only: Vec<String>,
    /// Remove it; without this it is only said what would be removed.
    #[arg(long)]
    yes: bool,
}

fn kinds() -> Vec<&'static str> {
    KINDS.iter().map(|kind| kind.name).collect()
}

fn age_ms(text: &str) -> anyhow::Result<u64> {
    let wrong = || anyhow!("must be a number with d, h or m, as in 30d, got {text}");
    let unit = text.chars().next_back().ok_or_else(wrong)?;
    let each = match unit {
        'd' => DAY_MS,
        'h' => DAY_MS / 24,
        'm' => DAY_MS / 24 / 60,
        _ => return Err(wrong()),
    };
    let count: u64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    count.checked_mul(each).ok_or_else(wrong)
}

pub(super) fn run(command: &CacheCommand) -> Result<(), Failure> {
    let hub = hub()?;
    let places = CacheDirectories::new(hub.cache()).map_err(Failure::user)?;
    match command {
        CacheCommand::List(args) => list(args, &places),
        CacheCommand::Clean(args) => clean(args, &places, Clock::system().unix_ms()),
    }
}

fn all(
    places: &CacheDirectories,
    is_wanted: impl Fn(&CacheKind) -> bool,
) -> Result<Vec<Item>, Failure> {
    let mut items = Vec::new();
    for kind in KINDS.iter().filter(|kind| is_wanted(kind)) {
        items.extend(find(places, kind).map_err(Failure::user)?);
    }
    Ok(items)
}

fn list(args: &CacheListArgs, places: &CacheDirectories) -> Result<(), Failure> {
    let items = all(places, |_| true)?;
    let bytes: u64 = outermost(&items).iter().map(|item| item.bytes).sum();
    if args.json {
        outln!("{}", json!({"places": places, "items": items, "bytes": bytes}));
        return Ok(());
    }
    outln!("{}", table(&items, Clock::system().unix_ms()));
    outln!("{} in {} and {}", Bytes(bytes), places.hub.display(), places.own.display());
    for kind in KINDS {
        outln!("  {:<12} {}", kind.name, kind.what);
    }
    Ok(())
}

/// Those that lie within no other, as an unfinished download does within its model.
fn outermost(items: &[Item]) -> Vec<&Item> {
    let is_within =
        |item: &Item| items.iter().any(|o| o.path != item.path && item.path.starts_with(&o.path));
    items.iter().filter(|item| !is_within(item)).collect()
}

fn table(items: &[Item], now_ms: u64) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(["kind", "size", "last used", "held", "name"]);
    for item in items {
        table.add_row([
            item.kind.to_owned(),
            Bytes(item.bytes).to_string(),
            ago(now_ms.saturating_sub(item.used_ms)),
            item.held.as_ref().map_or_else(String::new, describe),
            printable(&item.name),
        ]);
    }
    if let Some(sizes) = table.column_mut(1) {
        sizes.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn ago(ms: u64) -> String {
    match ms / (DAY_MS / 24) {
        0 => "this hour".to_owned(),
        hours @ 1..48 => format!("{hours} h ago"),
        hours => format!("{} days ago", hours / 24),
    }
}

fn describe(held: &InUse) -> String {
    match held {
        InUse::Process(id) => format!("process {id} uses it"),
        InUse::Lock(path) => format!("{} is locked", printable(&path.display().to_string())),
        InUse::Link => "a link elsewhere".to_owned(),
    }
}

fn clean(args: &CleanArgs, places: &CacheDirectories, now_ms: u64) -> Result<(), Failure> {
    let is_wanted =
        |kind: &CacheKind| args.only.is_empty() || args.only.iter().any(|k| k == kind.name);
    let mut items = all(places, is_wanted)?;
    let age = args.older_than.unwrap_or(0);
    items.retain(|item| now_ms.saturating_sub(item.used_ms) >= age);
    let (mut count, mut bytes) = (0, 0);
    for item in outermost(&items) {
        let name = format!("{} {}", item.kind, printable(&item.name));
        let held = match args.yes {
            true => remove(places, item).map_err(Failure::user)?,
            false => item.held.clone(),
        };
        if let Some(held) = held {
            note!("{name} stays: {}", describe(&held));
            continue;
        }
        let word = if args.yes { "removed" } else { "would remove" };
        outln!("{word} {name}, {}", Bytes(item.bytes));
        (count, bytes) = (count + 1, bytes + item.bytes);
    }
    match args.yes {
        true => outln!("removed {count}, {} freed", Bytes(bytes)),
        false => outln!("{count} could be removed, {}; --yes removes them", Bytes(bytes)),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_read_and_told() {
        for (text, ms) in [("30d", 30 * DAY_MS), ("12h", DAY_MS / 2), ("90m", 5_400_000)] {
            assert_eq!(age_ms(text).unwrap(), ms);
        }
        for text in ["", "d", "30", "-1d", "1.5d", "30\u{e9}", "99999999999999999999d"] {
            assert!(age_ms(text).unwrap_err().to_string().contains("as in 30d"), "{text}");
        }
        assert_eq!(ago(59 * 60_000), "this hour");
        assert_eq!((ago(DAY_MS), ago(3 * DAY_MS)), ("24 h ago".into(), "3 days ago".into()));
    }
}
