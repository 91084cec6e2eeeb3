//! Makes a row of `bench engine`: speeds beside bytes, operations, ceilings and the prediction.

use super::plan::devices::{DeviceKind, DeviceSpec, named};
use super::plan::predict::{Efficiency, Workload, predict};
use super::plan::work::{decode, prefill};
use super::report::schema::{Ceilings, Limit, OfDatasheet, Phase, ReportRow};
use super::report::spread::Spread;
use crate::models::spec::Spec;
use crate::verify::FastRows;

/// Below this share of both ceilings something else holds a row back.
const OVERHEAD_BELOW: f64 = 0.25;

/// Phase, batch and depth of a row.
#[derive(Clone, Copy)]
pub(super) struct RowSize {
    pub(super) phase: Phase,
    pub(super) batch: usize,
    pub(super) depth: usize,
    pub(super) tokens: usize,
}

impl RowSize {
    /// Bytes and operations of a token, at least.
    fn work(self, spec: &Spec) -> (f64, f64) {
        let Self { phase, batch, depth, tokens } = self;
        let (work, count) = match phase {
            Phase::Prefill => (prefill(spec, batch, depth, 1), batch * depth),
            Phase::Decode => (decode(spec, batch, depth + tokens / 2), batch),
            Phase::Verify => {
                let checked = FastRows::DEFAULT.of(spec, depth + tokens).saturating_add(1);
                (prefill(spec, 1, depth + tokens, checked.min(tokens)), depth + tokens)
            }
        };
        (work.bytes() / count as f64, work.operations() / count as f64)
    }

    /// Tokens a second that the plan predicts for `device`.
    fn predicted(self, spec: &Spec, device: &DeviceSpec, share: Option<Efficiency>) -> f64 {
        let Self { phase, batch, depth, tokens } = self;
        let context = depth + tokens / 2;
        let batches = vec![batch];
        let load = Workload { batches, context, prompts: batch, prompt: depth, answer: tokens };
        let prediction = predict(spec, device, &load, share);
        match phase {
            Phase::Prefill => prediction.prefill_tokens_per_second,
            Phase::Decode => prediction.decode.first().map_or(0.0, |d| d.tokens_per_second),
            Phase::Verify => prediction.checks_per_minute / 60.0 * (depth + tokens) as f64,
        }
    }
}

/// A device that does what was measured.
fn measured_device(ceilings: &Ceilings) -> DeviceSpec {
    DeviceSpec {
        name: "this machine",
        kind: DeviceKind::Cpu,
        memory: u64::MAX,
        bandwidth: ceilings.read_bandwidth,
        peak: ceilings.fma_peak,
        mma_share: 1.0,
        power: 0.0,
        source: "measured in the same run",
    }
}

/// The row of these runs, in tokens a second; `None` where there is none.
pub(super) fn row(
    spec: &Spec,
    (ceilings, efficiency): (&Ceilings, Efficiency),
    size: RowSize,
    runs: Vec<f64>,
) -> Option<ReportRow> {
    let speed = Spread::of(&runs)?;
    let (bytes, operations) = size.work(spec);
    let (bytes_per_second, operations_per_second) = (bytes * speed.mean, operations * speed.mean);
    let of_bandwidth = bytes_per_second / ceilings.read_bandwidth;
    let of_peak = operations_per_second / ceilings.fma_peak;
    let predicted = size.predicted(spec, &measured_device(ceilings), Some(efficiency));
    let table =
        ceilings.table.as_ref().and_then(|table| named(std::slice::from_ref(&table.device)).ok());
    let datasheet = table.and_then(|found| found.into_iter().next()).map(|device| {
        let predicted = size.predicted(spec, &device, None);
        OfDatasheet {
            of_bandwidth: bytes_per_second / device.bandwidth,
            of_peak: operations_per_second / device.peak,
            predicted,
            error: predicted / speed.mean - 1.0,
        }
    });
    let limit = match of_bandwidth.max(of_peak) {
        most if most < OVERHEAD_BELOW => Limit::Overhead,
        _ if of_bandwidth >= of_peak => Limit::Memory,
        _ => Limit::Compute,
    };
    let RowSize { phase, batch, depth, tokens } = size;
    Some(ReportRow {
        phase,
        batch,
        depth,
        tokens,
        error: predicted / speed.mean - 1.0,
        runs,
        speed,
        bytes_per_second,
        operations_per_second,
        of_bandwidth,
        of_peak,
        limit,
        predicted,
        joules_per_token: None,
        datasheet,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::schema::TableCeilings;
    use crate::models::config::samples::LLAMA_8B;

    /// An 8B Llama at 100 GB/s and 1 TFLOP/s, on a machine that calls itself a Ryzen.
    fn measured(size: RowSize, speed: f64) -> ReportRow {
        let spec = LLAMA_8B.spec();
        let table = TableCeilings { device: "ryzen-9950x".into(), bandwidth: 89.6e9, peak: 4.4e12 };
        let ceilings = Ceilings { read_bandwidth: 100e9, fma_peak: 1e12, table: Some(table) };
        row(&spec, (&ceilings, Efficiency::OF_CEILINGS), size, vec![speed; 3]).unwrap()
    }

    #[test]
    fn decode_of_one_sequence_reads_all_weights_for_each_token() {
        let size = RowSize { phase: Phase::Decode, batch: 1, depth: 128, tokens: 64 };
        let row = measured(size, 5.0);
        // 15.0 GB without the embedding, five times a second.
        assert!((74e9..77e9).contains(&row.bytes_per_second), "{row:?}");
        assert_eq!(row.limit, Limit::Memory);
        // 72 % of 100 GB/s over 15.03 GB, and a little for 15 GFLOP.
        assert!((4.70..4.80).contains(&row.predicted), "{row:?}");
        assert!((row.error - (row.predicted / 5.0 - 1.0)).abs() < 1e-12);
        assert_eq!(measured(size, 0.5).limit, Limit::Overhead);
        // 60 % of the datasheet's 89.6 GB/s over the same bytes.
        let sheet = row.datasheet.unwrap();
        assert!((sheet.predicted / row.predicted - 0.6 * 89.6 / 72.0).abs() < 1e-2, "{row:?}");
        assert!((sheet.error - (sheet.predicted / 5.0 - 1.0)).abs() < 1e-12);
        assert!((sheet.of_bandwidth / row.of_bandwidth - 100.0 / 89.6).abs() < 1e-9, "{row:?}");
    }

    #[test]
    fn prefill_is_bound_by_arithmetic_and_checks_cost_as_much() {
        let size = RowSize { phase: Phase::Prefill, batch: 4, depth: 1024, tokens: 64 };
        let row = measured(size, 40.0);
        assert_eq!(row.limit, Limit::Compute);
        assert!((0.5..0.6).contains(&row.of_peak), "{row:?}");
        let check = measured(RowSize { phase: Phase::Verify, ..size }, 40.0);
        assert!((check.predicted / row.predicted - 1.0).abs() < 0.1, "{check:?}");
    }
}
