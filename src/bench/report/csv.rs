//! Writes a report as comma-separated values: a line for each row of the engine or level of load.

use super::schema::{BenchReport, LoadLevel, ReportRow};
use super::spread::Quantiles;

const ENGINE: &str = "phase,batch,depth,tokens,runs,tokens_per_second,sd,low,high,\
    bytes_per_second,operations_per_second,of_bandwidth,of_peak,limit,predicted,error,\
    joules_per_token,of_datasheet_bandwidth,of_datasheet_peak,datasheet_predicted,\
    datasheet_error";
const SERVE: &str = "rate,concurrency,seconds,sent,completed,input_tokens,output_tokens,\
    steady_tokens_per_second,goodput,first_token_p50,first_token_p99,per_token_p50,per_token_p99,\
    gap_p99,worst_gap,validator_tps_p50";

/// Writes a report as text with a head line.
pub fn write(report: &BenchReport) -> String {
    let mut lines = Vec::new();
    if !report.rows.is_empty() || report.levels.is_empty() {
        lines.push(ENGINE.to_owned());
        lines.extend(report.rows.iter().map(row));
    }
    if !report.levels.is_empty() {
        lines.push(SERVE.to_owned());
        lines.extend(report.levels.iter().map(level));
    }
    lines.join("\n") + "\n"
}

fn optional<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(String::new, |v| v.to_string())
}

fn row(row: &ReportRow) -> String {
    let interval = row.speed.interval;
    [
        row.phase.name().into(),
        row.batch.to_string(),
        row.depth.to_string(),
        row.tokens.to_string(),
        row.speed.runs.to_string(),
        row.speed.mean.to_string(),
        optional(row.speed.sd),
        optional(interval.map(|i| i[0])),
        optional(interval.map(|i| i[1])),
        row.bytes_per_second.to_string(),
        row.operations_per_second.to_string(),
        row.of_bandwidth.to_string(),
        row.of_peak.to_string(),
        row.limit.name().into(),
        row.predicted.to_string(),
        row.error.to_string(),
        optional(row.joules_per_token),
        optional(row.datasheet.map(|sheet| sheet.of_bandwidth)),
        optional(row.datasheet.map(|sheet| sheet.of_peak)),
        optional(row.datasheet.map(|sheet| sheet.predicted)),
        optional(row.datasheet.map(|sheet| sheet.error)),
    ]
    .join(",")
}

fn level(level: &LoadLevel) -> String {
    let of = |q: &Option<Quantiles>, value: fn(&Quantiles) -> f64| optional(q.as_ref().map(value));
    [
        optional(level.rate),
        optional(level.concurrency),
        level.seconds.to_string(),
        level.sent.to_string(),
        level.completed.to_string(),
        level.input_tokens.to_string(),
        level.output_tokens.to_string(),
        level.steady_tokens_per_second.to_string(),
        level.goodput.to_string(),
        of(&level.first_token, |q| q.p50),
        of(&level.first_token, |q| q.p99),
        of(&level.per_token, |q| q.p50),
        of(&level.per_token, |q| q.p99),
        of(&level.gap, |q| q.p99),
        level.worst_gap.to_string(),
        of(&level.validator_tps, |q| q.p50),
    ]
    .join(",")
}

#[cfg(test)]
mod tests {
    use crate::bench::report::seal::tests::sample;

    #[test]
    fn every_line_has_a_value_for_each_name() {
        let text = super::write(&sample(10.0));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        let columns = lines[0].split(',').count();
        assert!(lines.iter().all(|line| line.split(',').count() == columns), "{text}");
        assert!(lines[2].starts_with("decode,1,128,32,2,10.5,"), "{text}");
    }
}
