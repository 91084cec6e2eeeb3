//! Applies the roofline, with a rounded ridge: a part of a step takes as long as the root of the
//! squares of what its bytes and its operations take alone. Where one of them takes far longer,
//! that is the roofline; where they take equally long, they overlap in part.

use super::devices::{DeviceKind, DeviceSpec};
use super::work::{Part, Work, decode, prefill};
use crate::engine::plan::weight_bytes;
use crate::models::spec::Spec;
use crate::verify::FastRows;
use serde::Serialize;

/// The share of a datasheet's numbers that an engine reaches.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Efficiency {
    /// Share of the bandwidth that is reached.
    pub memory: f64,
    /// Share of the peak arithmetic that is reached.
    pub compute: f64,
}

impl Efficiency {
    /// What this engine reaches of a processor's ceilings that were measured in the same run
    /// (docs/hardware.md); of a datasheet's numbers it is less.
    pub const OF_CEILINGS: Self = Self { memory: 0.72, compute: 0.70 };
    /// The same where VDPBF16PS multiplies: what comes between products takes a larger share.
    pub const OF_DOT_CEILINGS: Self = Self { compute: 0.62, ..Self::OF_CEILINGS };

    /// What this engine is taken to reach. It was measured on processors only, and against their
    /// measured ceilings, so for every card this is an assumption: half of what its instruction can
    /// do at most.
    pub fn assumed(device: &DeviceSpec) -> Self {
        match device.kind {
            DeviceKind::Gpu => Self { memory: 0.7, compute: 0.5 * device.mma_share },
            DeviceKind::Cpu => Self { memory: 0.6, compute: 0.45 },
        }
    }
}

/// What holds a step back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bottleneck {
    /// Reading weights and cache.
    Memory,
    /// Operations take longer than reading memory.
    Compute,
}

/// What is asked of a model.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Sequences that decode at once.
    pub batches: Vec<usize>,
    /// Positions of each.
    pub context: usize,
    /// Prompts that are computed at once.
    pub prompts: usize,
    /// Tokens of a prompt.
    pub prompt: usize,
    /// Tokens of an answer.
    pub answer: usize,
}

/// Decoding with a batch.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Decode {
    /// Sequences that decode at once.
    pub batch: usize,
    /// Tokens a second of all of them.
    pub tokens_per_second: f64,
    /// What holds it back.
    pub bound: Bottleneck,
    /// Whether weights and all sequences fit into the device's memory.
    pub fits: bool,
}

/// A model on a device.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Prediction {
    /// The device's name in the table.
    pub device: &'static str,
    /// Where its numbers come from.
    pub source: &'static str,
    /// Shares of the datasheet's numbers.
    pub efficiency: Efficiency,
    /// Bytes of the weights that lie in memory.
    pub weights: u64,
    /// Devices that one copy of the weights needs.
    pub devices: u64,
    /// Seconds to the first token after the prompt.
    pub first_token_seconds: f64,
    /// Tokens a second of the prompts.
    pub prefill_tokens_per_second: f64,
    /// A row for each batch.
    pub decode: Vec<Decode>,
    /// Answers that a validator checks in a minute: one pass over prompt and answer each.
    pub checks_per_minute: f64,
    /// Watts of the device.
    pub power: f64,
}

/// Share of a card's memory that is left to weights and cache.
const USABLE: f64 = 0.9;

/// Predicts `spec` on `device`. A model that does not fit is spread over several, which are taken
/// to add up without loss: an upper bound.
pub fn predict(
    spec: &Spec,
    device: &DeviceSpec,
    load: &Workload,
    own: Option<Efficiency>,
) -> Prediction {
    let efficiency = own.unwrap_or_else(|| Efficiency::assumed(device));
    let weights = weight_bytes(spec);
    let usable = device.memory as f64 * USABLE;
    let cache = |batch: usize| {
        let row = spec.kv_dims().block_bytes() as f64 / crate::ops::attention::BLOCK_TOKENS as f64;
        row * (batch * (load.context + load.answer)) as f64
    };
    let devices = ((weights as f64 + cache(1)) / usable).ceil().max(1.0);
    let time = |work: Work| seconds(work, device, devices, efficiency);
    let decode = |batch: &usize| {
        let (seconds, bound) = time(decode(spec, *batch, load.context));
        Decode {
            batch: *batch,
            tokens_per_second: *batch as f64 / seconds,
            bound,
            fits: weights as f64 + cache(*batch) <= usable * devices,
        }
    };
    let first_token_seconds = time(prefill(spec, 1, load.prompt, 1)).0;
    let prefill_seconds = time(prefill(spec, load.prompts, load.prompt, 1)).0;
    let positions = load.prompt + load.answer;
    let checked = FastRows::DEFAULT.of(spec, positions).saturating_add(1).min(load.answer);
    let check = time(prefill(spec, 1, positions, checked)).0;
    Prediction {
        device: device.name,
        source: device.source,
        efficiency,
        weights,
        devices: devices as u64,
        first_token_seconds,
        prefill_tokens_per_second: (load.prompts * load.prompt) as f64 / prefill_seconds,
        decode: load.batches.iter().map(decode).collect(),
        checks_per_minute: 60.0 / check,
        power: device.power * devices,
    }
}

/// Seconds of a step, and what holds its longer part back.
fn seconds(work: Work, device: &DeviceSpec, devices: f64, share: Efficiency) -> (f64, Bottleneck) {
    let part = |part: Part| {
        let memory = part.bytes / (device.bandwidth * devices * share.memory);
        let compute = part.operations / (device.peak * devices * share.compute);
        let bound = if memory >= compute { Bottleneck::Memory } else { Bottleneck::Compute };
        (memory.hypot(compute), bound)
    };
    let (products, attention) = (part(work.products), part(work.attention));
    let longer = if products.0 >= attention.0 { products.1 } else { attention.1 };
    (products.0 + attention.0, longer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::plan::devices::named;
    use crate::models::config::samples::{LLAMA_8B, LlamaSizes};

    fn llama(layers: usize, hidden: usize, inter: usize) -> Spec {
        LlamaSizes { layers, hidden, inter, heads: hidden / 128, ..LLAMA_8B }.spec()
    }

    fn load() -> Workload {
        Workload { batches: vec![1, 256], context: 0, prompts: 1, prompt: 2048, answer: 512 }
    }

    #[test]
    fn the_roof_of_an_8b_model_on_an_h100_is_known() {
        let h100 = named(&["h100-sxm".into()]).unwrap()[0];
        let roof = Some(Efficiency { memory: 1.0, compute: 1.0 });
        let p = predict(&llama(32, 4096, 14_336), &h100, &load(), roof);
        // 15.0 GB of weights without the embedding at 3.35 TB/s.
        assert!((220.0..226.0).contains(&p.decode[0].tokens_per_second), "{p:?}");
        assert_eq!(
            (p.decode[0].bound, p.decode[1].bound),
            (Bottleneck::Memory, Bottleneck::Memory)
        );
        assert_eq!((p.devices, p.decode[0].fits), (1, true));
        let assumed = predict(&llama(32, 4096, 14_336), &h100, &load(), None);
        let ratio = assumed.decode[0].tokens_per_second / p.decode[0].tokens_per_second;
        assert!((ratio - 0.7).abs() < 1e-3, "{ratio}");
        // Half of the 62 % that mma.sync reaches, and reading overlaps in part.
        let ratio = assumed.prefill_tokens_per_second / p.prefill_tokens_per_second;
        assert!((0.31..0.36).contains(&ratio), "{ratio}");
        // Prefill is bound by arithmetic, 2 * 6.98e9 a token without the head, and attention. Steps
        // of 512 rows read all weights, which takes 0.6 times as long.
        let roof = 989.4e12 / (2.0 * 6.98e9);
        assert!((0.82 * roof..0.85 * roof).contains(&p.prefill_tokens_per_second), "{p:?}");
    }

    #[test]
    fn at_the_ridge_bytes_and_operations_overlap_in_part() {
        let h100 = named(&["h100-sxm".into()]).unwrap()[0];
        let share = Efficiency { memory: 1.0, compute: 1.0 };
        let part = |bytes, operations| {
            let work = Work {
                products: Part { bytes, operations },
                attention: Part { bytes: 0.0, operations: 0.0 },
            };
            seconds(work, &h100, 1.0, share)
        };
        let (bytes, operations) = (h100.bandwidth, h100.peak);
        assert!((part(bytes, operations).0 - 2.0_f64.sqrt()).abs() < 1e-12);
        assert_eq!(part(bytes, 0.0), (1.0, Bottleneck::Memory));
        assert_eq!(part(0.0, operations), (1.0, Bottleneck::Compute));
    }

    #[test]
    fn what_does_not_fit_takes_several_devices() {
        let big = llama(80, 8192, 28_672);
        let cards = named(&["rtx-4090".into(), "h200".into()]).unwrap();
        let p: Vec<Prediction> = cards.iter().map(|d| predict(&big, d, &load(), None)).collect();
        assert_eq!((p[0].devices, p[1].devices), (7, 2));
        let small = llama(16, 2048, 8192);
        assert!(
            !predict(&small, &cards[0], &Workload { batches: vec![4096], ..load() }, None).decode
                [0]
            .fits
        );
    }
}
