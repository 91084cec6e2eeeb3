//! Runs `export`: prints what a validator has recorded, as lines of JSON or CSV.

use super::Failure;
use super::out::outln;
use super::shared::{DatabaseArg, runtime};
use super::tables::csv_field;
use crate::clock::Clock;
use crate::store::{Cell, Filter, Store, StoreError, What};
use anyhow::anyhow;
use clap::{Args, ValueEnum};
use jiff::{Span, SpanRelativeTo, Timestamp, civil, tz::TimeZone};
use serde_json::Value;
use serde_json::value::RawValue;

/// Arguments of `export`.
#[derive(Args)]
pub(super) struct ExportArgs {
    #[command(flatten)]
    database: DatabaseArg,
    /// What to export.
    #[arg(long, env = "TARGON_EXPORT_WHAT", value_enum, default_value_t = Table::Responses)]
    what: Table,
    /// The format. CSV has a line of names first.
    #[arg(long, env = "TARGON_EXPORT_FORMAT", value_enum, default_value_t = Format::Jsonl)]
    format: Format,
    /// Only what is as new: a time such as 2026-11-01T12:00:00Z, a date (UTC), or how long ago,
    /// such as 36h or 7d.
    #[arg(long, env = "TARGON_EXPORT_SINCE")]
    since: Option<String>,
    /// Only records of the miner with this uid, or rounds in which it was asked.
    #[arg(long, env = "TARGON_EXPORT_UID")]
    uid: Option<u16>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Table {
    /// Rounds, without what the miners did.
    Rounds,
    /// What each miner did in each round, with captures and reports where they are kept.
    Responses,
    /// What scores are made of.
    Samples,
    /// Weights of each epoch, and how they came about.
    Weights,
}

impl Table {
    fn what(self) -> What {
        match self {
            Self::Rounds => What::Rounds,
            Self::Responses => What::Responses,
            Self::Samples => What::Samples,
            Self::Weights => What::Weights,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// One JSON object a line.
    Jsonl,
    /// RFC 4180, with line feeds; empty where there is nothing, JSON as text.
    Csv,
}

pub(super) fn run(args: &ExportArgs) -> Result<(), Failure> {
    let what = args.what.what();
    if args.uid.is_some() && !what.has_uid() {
        return Err(Failure::user(
            "--uid cannot be used with --what weights: they are of all uids",
        ));
    }
    let since_ms = match &args.since {
        Some(text) => since(text, Clock::system().unix_ms()).map_err(Failure::user)?,
        None => 0,
    };
    let filter = Filter { since_ms, uid: args.uid };
    runtime()?.block_on(print(args, what, filter)).map_err(Failure::user)
}

async fn print(args: &ExportArgs, what: What, filter: Filter) -> Result<(), StoreError> {
    let store = Store::open_to_read(&args.database.url).await?;
    let columns = what.columns();
    if args.format == Format::Csv {
        outln!("{}", columns.join(","));
    }
    let mut export = store.export(what, filter);
    loop {
        let rows = export.next().await?;
        if rows.is_empty() {
            store.close().await;
            return Ok(());
        }
        for row in &rows {
            match args.format {
                Format::Jsonl => outln!("{}", object(&columns, row)),
                Format::Csv => outln!("{}", record(row)),
            }
        }
    }
}

/// A row as JSON.
fn object(columns: &[&str], row: &[Cell]) -> String {
    let member = |(name, cell): (&&str, &Cell)| {
        let value = match cell {
            Cell::Null => "null".to_owned(),
            Cell::Integer(value) => value.to_string(),
            Cell::Real(value) => Value::from(*value).to_string(),
            Cell::Text(text) => Value::from(text.as_str()).to_string(),
            // As it was written, where it is one value indeed.
            Cell::Json(text) => match RawValue::from_string(text.clone()) {
                Ok(json) => json.get().to_owned(),
                Err(_) => Value::from(text.as_str()).to_string(),
            },
        };
        format!("\"{name}\":{value}")
    };
    let members: Vec<_> = columns.iter().zip(row).map(member).collect();
    format!("{{{}}}", members.join(","))
}

/// A row as CSV.
fn record(row: &[Cell]) -> String {
    let field = |cell: &Cell| match cell {
        Cell::Null => String::new(),
        Cell::Integer(value) => value.to_string(),
        Cell::Real(value) => Value::from(*value).to_string(),
        Cell::Text(text) | Cell::Json(text) => csv_field(text),
    };
    row.iter().map(field).collect::<Vec<_>>().join(",")
}

/// A point in time as the user writes it, in milliseconds since 1970.
fn since(text: &str, now_ms: u64) -> anyhow::Result<u64> {
    let refuse = || {
        let forms = "2026-11-01T12:00:00Z, 2026-11-01, 36h or 7d";
        anyhow!("--since must be a time, a date or how long ago, such as {forms}, got {text:?}")
    };
    if let Ok(time) = text.parse::<Timestamp>() {
        return u64::try_from(time.as_millisecond()).map_err(|_| refuse());
    }
    if let Ok(date) = text.parse::<civil::Date>() {
        let midnight = date.to_zoned(TimeZone::UTC).map_err(|_| refuse())?;
        return u64::try_from(midnight.timestamp().as_millisecond()).map_err(|_| refuse());
    }
    let span: Span = text.parse().map_err(|_| refuse())?;
    let ago = span.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|_| refuse())?;
    let ago = u64::try_from(ago.as_millis()).map_err(|_| refuse())?;
    Ok(now_ms.saturating_sub(ago))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_is_a_time_a_date_or_how_long_ago() {
        let now = 1_800_000_000_000;
        let day = 24 * 60 * 60 * 1000;
        for (text, expected) in [
            ("2026-11-01T12:00:00Z", Ok(1_793_534_400_000)),
            ("2026-11-01T13:00:00+01:00", Ok(1_793_534_400_000)),
            ("2026-11-01", Ok(1_793_491_200_000)),
            ("36h", Ok(now - day * 3 / 2)),
            ("7d", Ok(now - 7 * day)),
            ("90000d", Ok(0)),
            ("-7d", Err(())),
            ("1960-01-01", Err(())),
            ("yesterday", Err(())),
            ("", Err(())),
        ] {
            assert_eq!(since(text, now).map_err(|_| ()), expected, "{text}");
        }
    }

    #[test]
    fn rows_become_json_and_csv() {
        let row = [
            Cell::Null,
            Cell::Integer(-7),
            Cell::Real(0.1),
            Cell::Text("a \"b\", c\nd".into()),
            Cell::Json("{\"a\": [1, 2.50]}".into()),
            Cell::Json("not JSON".into()),
        ];
        let names = ["none", "n", "x", "text", "json", "broken"];
        let (start, end) = (r#"{"none":null,"n":-7,"x":0.1,"#, r#""broken":"not JSON"}"#);
        let middle = r#""text":"a \"b\", c\nd","json":{"a": [1, 2.50]},"#;
        let expected = format!("{start}{middle}{end}");
        assert_eq!(object(&names, &row), expected);
        let expected = ",-7,0.1,\"a \"\"b\"\", c\nd\",\"{\"\"a\"\": [1, 2.50]}\",not JSON";
        assert_eq!(record(&row), expected);
    }
}
