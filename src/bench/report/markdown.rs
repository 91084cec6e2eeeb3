//! Writes a report as Markdown, for a terminal and for a page of text.

use super::facts::CardFacts;
use super::schema::{BenchReport, LoadLevel, ReportKind, ReportRow};
use super::spread::Quantiles;
use crate::engine::plan::Bytes;
use comfy_table::{Table, presets};
use jiff::Timestamp;
use serde_json::{Map, Value};
use std::fmt::Write;

/// Writes a report as Markdown.
pub fn write(report: &BenchReport) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = head(report, &mut text);
    if !report.rows.is_empty() {
        let _ = writeln!(text, "\n{}\n\n{ROWS_LEGEND}", rows(&report.rows));
    }
    if !report.levels.is_empty() {
        let _ = writeln!(text, "\n{}\n\n{}", levels(&report.levels), legend(report));
    }
    let _ = tail(report, &mut text);
    text
}

/// What is said of a report, one line each: name and value.
pub(super) fn facts(report: &BenchReport) -> Vec<(&'static str, String)> {
    let (machine, model, program) = (&report.machine, &report.model, &report.program);
    let started = i64::try_from(report.started).ok().and_then(|s| Timestamp::from_second(s).ok());
    let threads = machine.threads.map_or(String::new(), |t| format!(", {t} threads"));
    let isa = machine.isa.as_ref().map_or(String::new(), |isa| format!(", {isa}"));
    let (cpu, cores) = (&machine.cpu, machine.cores);
    let memory = Bytes(machine.memory_bytes);
    let commit = program.commit.as_ref().map_or(String::new(), |c| format!(", commit {c}"));
    // Nothing is known of the machine that serves.
    let place = match report.kind {
        ReportKind::Engine => "machine",
        ReportKind::Serve => "client's machine",
    };
    let mut facts = vec![
        ("started", started.map_or("-".into(), |t| t.to_string())),
        ("took", format!("{:.1} s", report.seconds)),
        (place, format!("{cpu}, {cores} cores{threads}{isa}, {memory} of memory")),
        ("program", format!("{}{commit}, {}", program.version, program.canon)),
        ("model", model.name.clone()),
    ];
    let optional = [
        ("kernel", machine.kernel.clone()),
        ("driver", machine.driver.clone()),
        ("card", machine.card.as_ref().map(card)),
        ("weights root", model.weights_root.clone()),
        ("type", model.dtype.clone()),
        ("weights", model.weights_bytes.map(|b| Bytes(b).to_string())),
    ];
    facts.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value?))));
    if !report.settings.is_empty() {
        facts.push(("settings", settings(&report.settings)));
    }
    facts.extend(report.memory.map(|m| {
        let (kv, peak) = (Bytes(m.kv), Bytes(m.peak_resident));
        ("memory", format!("{kv} for keys and values, {peak} resident at most"))
    }));
    facts.extend(report.ceilings.as_ref().map(|c| {
        let (read, peak) = (c.read_bandwidth / 1e9, c.fma_peak / 1e9);
        let table = c.table.as_ref().map_or(String::new(), |t| {
            let (bandwidth, peak) = (t.bandwidth / 1e9, t.peak / 1e9);
            let device = &t.device;
            format!("; the datasheet of {device} says {bandwidth:.1} GB/s and {peak:.1} GFLOP/s")
        });
        ("ceilings", format!("{read:.1} GB/s read, {peak:.1} GFLOP/s measured here{table}"))
    }));
    facts.extend(report.signature.as_ref().map(|s| ("signed by", s.hotkey.clone())));
    facts
}

fn card(card: &CardFacts) -> String {
    let memory = Bytes(card.memory_bytes);
    let bus = card.bus.as_ref().map_or(String::new(), |bus| format!(", at {bus}"));
    format!("{}, {memory} of memory{bus}", card.name)
}

/// The flags that are set.
fn settings(all: &Map<String, Value>) -> String {
    let one = |(name, value): (&String, &Value)| match value {
        Value::Null | Value::Bool(false) => None,
        Value::Array(list) if list.is_empty() => None,
        Value::Bool(true) => Some(name.clone()),
        Value::String(text) => Some(format!("{name} {text}")),
        Value::Array(list) => {
            let list: Vec<String> = list.iter().map(Value::to_string).collect();
            Some(format!("{name} {}", list.join(" ")))
        }
        value => Some(format!("{name} {value}")),
    };
    all.iter().filter_map(one).collect::<Vec<_>>().join(", ")
}

fn head(report: &BenchReport, text: &mut String) -> std::fmt::Result {
    for (name, value) in facts(report) {
        writeln!(text, "- {name}: {value}")?;
    }
    Ok(())
}

fn tail(report: &BenchReport, text: &mut String) -> std::fmt::Result {
    if report.is_partial {
        writeln!(text, "\n**Partial**: the measurement did not run to its end.")?;
    }
    if !report.marks.is_empty() {
        writeln!(text, "\nDoubts:\n")?;
    }
    for mark in &report.marks {
        writeln!(text, "- {}: {}", mark.kind.name(), mark.what)?;
    }
    Ok(())
}

fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(header);
    table
}

/// Three significant digits below a thousand, none after the point above.
pub(super) fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

pub(super) const ROW_COLUMNS: [&str; 13] = [
    "phase",
    "batch",
    "depth",
    "tok/s",
    "sd",
    "95 %",
    "GB/s",
    "GFLOP/s",
    "bound",
    "predicted",
    "error",
    "of datasheet",
    "predicted by it",
];

/// The cells of a row.
pub(super) fn row(row: &ReportRow) -> [String; 13] {
    let interval = |[low, high]: [f64; 2]| format!("{}..{}", number(low), number(high));
    let percent = |share: f64| format!("{:.0} %", 100.0 * share);
    [
        row.phase.name().into(),
        row.batch.to_string(),
        row.depth.to_string(),
        number(row.speed.mean),
        row.speed.sd.map_or("-".into(), number),
        row.speed.interval.map_or("-".into(), interval),
        format!("{} ({})", number(row.bytes_per_second / 1e9), percent(row.of_bandwidth)),
        format!("{} ({})", number(row.operations_per_second / 1e9), percent(row.of_peak)),
        row.limit.name().into(),
        number(row.predicted),
        format!("{:+.0} %", 100.0 * row.error),
        row.datasheet.map_or("-".into(), |sheet| {
            format!("{}, {}", percent(sheet.of_bandwidth), percent(sheet.of_peak))
        }),
        row.datasheet.map_or("-".into(), |sheet| {
            format!("{} ({:+.0} %)", number(sheet.predicted), 100.0 * sheet.error)
        }),
    ]
}

fn rows(all: &[ReportRow]) -> Table {
    let mut table = table(ROW_COLUMNS);
    table.add_rows(all.iter().map(row));
    table
}

/// What the columns of rows mean.
pub(super) const ROWS_LEGEND: &str = "tok/s is the mean of the runs, with its standard deviation \
    and its interval of 95 %. GB/s and GFLOP/s are what the row needs at least, with the share of \
    the measured ceiling; bound is what holds it back. predicted is what `bench plan` says from \
    these ceilings, and error how far that lies above what was measured. of datasheet is the share \
    of the bandwidth and of the peak that the datasheet promises, and predicted by it is what \
    `bench plan` says without a measurement, with its error.";

/// What the columns of levels mean.
pub(super) fn legend(report: &BenchReport) -> String {
    let seconds = |name: &str| report.settings.get(name).and_then(Value::as_f64);
    let good = match (seconds("ttft_limit"), seconds("tpot_limit")) {
        (Some(first), Some(each)) => format!(
            "requests a second with the first token within {first} s and at most {each} s for each \
             token after it"
        ),
        _ => "requests a second that kept the limits".into(),
    };
    format!(
        "Times are in milliseconds. TTFT is the time to the first token, TPOT the mean time a \
         token after it, gap the time between two chunks. goodput/s: {good}."
    )
}

pub(super) const LEVEL_COLUMNS: [&str; 12] = [
    "load",
    "done",
    "failed",
    "tok/s",
    "goodput/s",
    "TTFT p50",
    "TTFT p99",
    "TPOT p50",
    "TPOT p99",
    "gap p99",
    "worst gap",
    "validator TPS",
];

/// The cells of a level; times in milliseconds.
pub(super) fn level(level: &LoadLevel) -> [String; 12] {
    let ms = |q: &Option<Quantiles>, value: fn(&Quantiles) -> f64| {
        q.as_ref().map_or("-".into(), |q| number(1e3 * value(q)))
    };
    [
        level.load(),
        format!("{} of {}", level.completed, level.sent),
        level.failed.values().sum::<usize>().to_string(),
        number(level.steady_tokens_per_second),
        number(level.goodput),
        ms(&level.first_token, |q| q.p50),
        ms(&level.first_token, |q| q.p99),
        ms(&level.per_token, |q| q.p50),
        ms(&level.per_token, |q| q.p99),
        ms(&level.gap, |q| q.p99),
        number(1e3 * level.worst_gap),
        level.validator_tps.as_ref().map_or("-".into(), |q| number(q.p50)),
    ]
}

fn levels(all: &[LoadLevel]) -> Table {
    let mut table = table(LEVEL_COLUMNS);
    table.add_rows(all.iter().map(level));
    table
}

#[cfg(test)]
mod tests {
    use crate::bench::conditions::{Mark, MarkKind};
    use crate::bench::report::schema::OfDatasheet;
    use crate::bench::report::seal::tests::sample;
    use serde_json::json;

    #[test]
    fn facts_rows_and_doubts_are_written() {
        let mut report = sample(10.0);
        report.marks.push(Mark::new(MarkKind::Busy, "others used it"));
        report.rows[0].datasheet =
            Some(OfDatasheet { of_bandwidth: 0.2, of_peak: 0.1, predicted: 90.0, error: 0.125 });
        report.is_partial = true;
        let text = super::write(&report);
        assert!(text.contains("- started: 2026-09-21T14:13:20Z"), "{text}");
        assert!(text.contains("- ceilings: 400.0 GB/s read, 6000.0 GFLOP/s"), "{text}");
        assert!(text.contains("| decode  | 1     | 128   | 10.5  |"), "{text}");
        assert!(text.contains("| 20 %, 10 %   | 90.0 (+12 %)    |"), "{text}");
        assert!(!text.contains("settings"), "{text}");
        report.settings = serde_json::from_value(json!({
            "batch": [1, 4], "rate": [], "runs": 6, "input": null, "repeat_prompts": false,
            "load": "fixed",
        }))
        .unwrap();
        let text = super::write(&report);
        assert!(text.contains("- settings: batch 1 4, runs 6, load fixed\n"), "{text}");
        assert!(text.contains("**Partial**") && text.contains("- busy: others"), "{text}");
    }
}
