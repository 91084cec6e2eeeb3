//! Writes a report as Markdown, for a terminal and for a page of text.

use super::schema::{BenchReport, LoadLevel, ReportRow};
use super::spread::Quantiles;
use crate::engine::plan::Bytes;
use comfy_table::{Table, presets};
use jiff::Timestamp;
use std::fmt::Write;

/// Writes a report as Markdown.
pub fn write(report: &BenchReport) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = head(report, &mut text);
    if !report.rows.is_empty() {
        let _ = writeln!(text, "\n{}", rows(&report.rows));
    }
    if !report.levels.is_empty() {
        let _ = writeln!(text, "\n{}", levels(&report.levels));
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
    let mut facts = vec![
        ("started", started.map_or("-".into(), |t| t.to_string())),
        ("took", format!("{:.1} s", report.seconds)),
        ("machine", format!("{cpu}, {cores} cores{threads}{isa}, {memory} of memory")),
        ("program", format!("{}{commit}, {}", program.version, program.canon)),
        ("model", model.name.clone()),
    ];
    let optional = [
        ("kernel", machine.kernel.clone()),
        ("driver", machine.driver.clone()),
        ("weights root", model.weights_root.clone()),
        ("type", model.dtype.clone()),
        ("weights", model.weights_bytes.map(|b| Bytes(b).to_string())),
    ];
    facts.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value?))));
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

fn head(report: &BenchReport, text: &mut String) -> std::fmt::Result {
    for (name, value) in facts(report) {
        writeln!(text, "- {name}: {value}")?;
    }
    Ok(())
}

fn tail(report: &BenchReport, text: &mut String) -> std::fmt::Result {
    if report.is_partial {
        writeln!(text, "\n**Partial**: it ended before its end.")?;
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

pub(super) const ROW_COLUMNS: [&str; 11] = [
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
];

/// The cells of a row.
pub(super) fn row(row: &ReportRow) -> [String; 11] {
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
    ]
}

fn rows(all: &[ReportRow]) -> Table {
    let mut table = table(ROW_COLUMNS);
    table.add_rows(all.iter().map(row));
    table
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
    let load = match (level.rate, level.concurrency) {
        (Some(rate), _) => format!("{rate}/s"),
        (None, Some(many)) => format!("{many} at once"),
        (None, None) => "-".into(),
    };
    [
        load,
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
    use crate::bench::report::seal::tests::sample;

    #[test]
    fn facts_rows_and_doubts_are_written() {
        let mut report = sample(10.0);
        report.marks.push(Mark::new(MarkKind::Busy, "others used it"));
        report.is_partial = true;
        let text = super::write(&report);
        assert!(text.contains("- started: 2026-09-21T14:13:20Z"), "{text}");
        assert!(text.contains("- ceilings: 400.0 GB/s read, 6000.0 GFLOP/s"), "{text}");
        assert!(text.contains("| decode  | 1     | 128   | 10.5  |"), "{text}");
        assert!(text.contains("**Partial**") && text.contains("- busy: others"), "{text}");
    }
}
