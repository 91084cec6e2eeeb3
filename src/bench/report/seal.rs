//! Reads, signs and checks files of reports. Every fault in a file is named.

use super::schema::{BenchReport, SCHEMA, Signature, VERSION};
use crate::chain::keys::{Hotkey, Keypair};
use crate::files;
use anyhow::{anyhow, bail};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::Path;

const REPORT_BYTES_MAX: u64 = 64 << 20;
/// What a signature says it is of.
const DOMAIN: &[u8] = b"targon-engine bench report 1\n";

/// What is known of a report's signature.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Sealed {
    /// The report has no signature.
    Unsigned,
    /// It is signed by this hotkey.
    By(Hotkey),
}

/// What is signed: a hash of the report without its signature, in the order of the schema.
fn message(report: &BenchReport) -> anyhow::Result<Vec<u8>> {
    let bare = BenchReport { signature: None, ..report.clone() };
    let bytes =
        serde_json::to_vec(&bare).map_err(|e| anyhow!("a report cannot be written: {e}"))?;
    Ok([DOMAIN, Sha256::digest(&bytes).as_slice()].concat())
}

/// Signs a report.
///
/// # Errors
/// When it holds what JSON cannot.
pub fn sign(report: &mut BenchReport, keypair: &Keypair) -> anyhow::Result<()> {
    let signature = keypair.sign(&message(report)?);
    let (hotkey, signature) = (keypair.hotkey().to_string(), hex::encode(signature));
    report.signature = Some(Signature { hotkey, signature });
    Ok(())
}

/// Checks a report's signature.
///
/// # Errors
/// When it is not the hotkey's over this report.
pub fn check(report: &BenchReport) -> anyhow::Result<Sealed> {
    let Some(sent) = &report.signature else { return Ok(Sealed::Unsigned) };
    let hotkey: Hotkey = sent.hotkey.parse().map_err(|e| anyhow!("`signature.hotkey`: {e}"))?;
    let bytes = hex::decode(&sent.signature)
        .map_err(|e| anyhow!("`signature.signature` is not hexadecimal: {e}"))?;
    let bytes: [u8; 64] = bytes.try_into().map_err(|bytes: Vec<u8>| {
        anyhow!("`signature.signature` must have 64 bytes, got {}", bytes.len())
    })?;
    match hotkey.verify(&message(report)?, &bytes) {
        true => Ok(Sealed::By(hotkey)),
        false => Err(anyhow!("the signature is not {hotkey}'s over this report: it was changed")),
    }
}

/// Reads a report.
///
/// # Errors
/// The file, and what is wrong with it.
pub fn read(path: &Path) -> anyhow::Result<BenchReport> {
    let place = path.display();
    let bytes =
        files::read(path, REPORT_BYTES_MAX).map_err(|e| anyhow!("{place} cannot be read: {e}"))?;
    parse(&bytes).map_err(|what| anyhow!("{place}: {what}"))
}

fn parse(bytes: &[u8]) -> anyhow::Result<BenchReport> {
    let value: Value = serde_json::from_slice(bytes).map_err(|e| anyhow!("it is not JSON: {e}"))?;
    if value["schema"] != SCHEMA {
        bail!("`schema` must be \"{SCHEMA}\", got {}", value["schema"]);
    }
    if value["version"] != VERSION {
        let got = &value["version"];
        bail!("`version` must be {VERSION}, got {got}: another program wrote it");
    }
    let report = serde_path_to_error::deserialize(value);
    let report = report.map_err(|e| anyhow!("`{}`: {}", e.path(), e.inner()))?;
    check_speeds(&report)?;
    Ok(report)
}

/// Refuses what no machine measures, and what would be ranked as if it had.
fn check_speeds(report: &BenchReport) -> anyhow::Result<()> {
    let rows = report.rows.iter().flat_map(|row| {
        let speeds = row.runs.iter().copied().chain([row.speed.mean]);
        speeds
            .map(|speed| ("rows: speed", speed))
            .chain(row.joules_per_token.map(|joules| ("rows: joules_per_token", joules)))
    });
    let levels = report.levels.iter().flat_map(|level| {
        let speed = ("levels: steady_tokens_per_second", level.steady_tokens_per_second);
        [speed, ("levels: goodput", level.goodput), ("levels: seconds", level.seconds)]
    });
    match rows.chain(levels).find(|(_, value)| !(0.0..f64::INFINITY).contains(value)) {
        Some((key, value)) => bail!("`{key}` must be at least 0, got {value}"),
        None => Ok(()),
    }
}

#[cfg(test)]
pub(in crate::bench) mod tests {
    use super::*;
    use crate::bench::report::facts::{Machine, ModelFacts};
    use crate::bench::report::schema::{Ceilings, Limit, MemoryUse, Phase, ReportKind, ReportRow};
    use crate::bench::report::spread::Spread;

    /// A small report of an engine.
    pub(in crate::bench) fn sample(speed: f64) -> BenchReport {
        let machine = Machine {
            cpu: "AMD EPYC 9654 96-Core Processor".into(),
            cores: 96,
            threads: Some(96),
            isa: Some("avx512".into()),
            memory_bytes: 1 << 38,
            kernel: None,
            driver: None,
            governor: None,
            card: None,
        };
        let model = ModelFacts {
            name: "m<script>".into(),
            weights_root: Some("ab".into()),
            dtype: Some("bf16".into()),
            weights_bytes: Some(1 << 30),
        };
        let mut report = BenchReport::new(ReportKind::Engine, 1_790_000_000, machine, model);
        report.is_partial = false;
        report.ceilings = Some(Ceilings { read_bandwidth: 4e11, fma_peak: 6e12, table: None });
        report.memory = Some(MemoryUse { weights: 1 << 30, kv: 1 << 28, peak_resident: 3 << 29 });
        for (phase, factor) in [(Phase::Prefill, 8.0), (Phase::Decode, 1.0), (Phase::Verify, 5.0)] {
            let runs = vec![factor * speed, factor * speed * 1.1];
            report.rows.push(ReportRow {
                phase,
                batch: 1,
                depth: 128,
                tokens: 32,
                speed: Spread::of(&runs).unwrap(),
                runs,
                bytes_per_second: 1e11,
                operations_per_second: 1e12,
                of_bandwidth: 0.25,
                of_peak: 0.166,
                limit: Limit::Memory,
                predicted: factor * speed,
                error: -0.05,
                joules_per_token: Some(0.5),
                datasheet: None,
            });
        }
        report
    }

    #[test]
    fn a_report_comes_back_as_it_was_written() {
        let report = sample(123.456_789_012_345_67);
        let bytes = serde_json::to_vec_pretty(&report).unwrap();
        assert_eq!(parse(&bytes).unwrap(), report);
    }

    #[test]
    fn a_signature_is_over_every_number() {
        let keypair = Keypair::from_seed(&[7; 32]).unwrap();
        let mut report = sample(100.0);
        assert_eq!(check(&report).unwrap(), Sealed::Unsigned);
        sign(&mut report, &keypair).unwrap();
        let read = parse(&serde_json::to_vec_pretty(&report).unwrap()).unwrap();
        assert_eq!(check(&read).unwrap(), Sealed::By(keypair.hotkey()));
        let mut changed = read.clone();
        changed.rows[1].runs[0] += 1e-9;
        assert!(check(&changed).unwrap_err().to_string().contains("it was changed"));
        let other = Keypair::from_seed(&[8; 32]).unwrap().hotkey();
        let mut stolen = read;
        stolen.signature.as_mut().unwrap().hotkey = other.to_string();
        assert!(check(&stolen).is_err());
        stolen.signature.as_mut().unwrap().signature = "00".into();
        let refused = check(&stolen).unwrap_err().to_string();
        assert!(refused.contains("must have 64 bytes, got 1"), "{refused}");
    }

    #[test]
    fn what_is_no_report_is_refused_by_name() {
        let good = serde_json::to_value(sample(1.0)).unwrap();
        let with = |key: &str, value: Value| {
            let mut changed = good.clone();
            changed[key] = value;
            parse(changed.to_string().as_bytes()).unwrap_err().to_string()
        };
        assert!(parse(b"{").unwrap_err().to_string().contains("it is not JSON"));
        assert!(with("schema", "x".into()).contains("`schema` must be \"targon-engine-bench\""));
        assert!(with("version", 2.into()).contains("`version` must be 1, got 2"));
        assert!(with("seconds", "x".into()).contains("`seconds`: invalid type"));
        assert!(with("more", 1.into()).contains("unknown field `more`"));
        let mut slow = good.clone();
        slow["rows"][1]["speed"]["mean"] = (-1).into();
        let error = parse(slow.to_string().as_bytes()).unwrap_err().to_string();
        assert_eq!(error, "`rows: speed` must be at least 0, got -1");
        let directory = tempfile::tempdir().unwrap();
        let error = read(&directory.path().join("a.json")).unwrap_err().to_string();
        assert!(error.contains("a.json cannot be read"), "{error}");
    }
}
