//! Plans memory: it computes what a model will need before anything of it is loaded, and on which
//! devices its layers lie.

use super::backend::BackendKind;
use super::{MIXED_PREFILL_TOKENS, Options};
use crate::models::cpu::workspace_bytes;
use crate::models::device::Device;
use crate::models::spec::Spec;
use crate::ops::attention::BLOCK_TOKENS;
use std::fmt;

/// Rows of a step that only prefills.
pub const STEP_TOKENS: usize = 512;
/// Rows of attention scores that mistral.rs holds at once.
const PROMPT_CHUNK: u64 = 1024;
/// Sequences that mistral.rs runs at once on the processor. Its attention of a step with one row
/// for each sequence (`flash_attn_cpu_single_q` of 0.8.1) has one buffer for all of them, so that
/// each gets the attention of the last one.
const MISTRAL_SEQUENCES_MAX: usize = 1;
/// Bytes that stay free on a card where the user says how large the cache is: for norms,
/// calibrations, code of kernels and graphs, and the driver's own.
#[cfg(feature = "cuda")]
const CARD_RESERVE: u64 = 256 << 20;
/// Requests of one model that may wait for a place; further ones are refused.
pub const WAITING_MAX: usize = 256;

/// How much memory the KV cache may take.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum KvMemory {
    /// Enough for `sequences_max` full contexts, or what the machine has left.
    Auto,
    /// A number of bytes.
    Bytes(u64),
    /// This share of the machine's available memory.
    Share(f64),
}

/// What the user asks for.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct MemoryWanted {
    /// Tokens of one sequence; `None` is the model's own context.
    pub context_max: Option<usize>,
    /// Memory of the KV cache.
    pub kv_memory: KvMemory,
    /// Sequences that run at once.
    pub sequences_max: usize,
    /// Tokens of one sequence that are guessed for a step; 0 for none.
    pub drafts_max: usize,
}

/// Bytes that one model needs, and the engine's sizes that follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryPlan {
    /// Bytes of the packed weights.
    pub weights: u64,
    /// Bytes of the KV cache.
    pub kv: u64,
    /// Buffers of a step and logits.
    pub workspace: u64,
    /// Sizes of the engine.
    pub options: Options,
}

/// Why a plan cannot be made.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum PlanError {
    /// More tokens than the model was made for.
    #[error("`context_max` = {wanted} is more than the model's context of {context} tokens")]
    Context {
        /// The context that was asked for.
        wanted: usize,
        /// The context of the model.
        context: usize,
    },
    /// Several devices for an engine that uses one.
    #[error("only engine = \"mistralrs\" puts a model on several devices")]
    OneDevice,
    /// A device that has no room for a layer beside what it needs anyway.
    #[error("{device} has {} free, which is not enough for one of the layers", Bytes(*free))]
    NoLayer {
        /// The device.
        device: Device,
        /// What it has free.
        free: u64,
    },
    /// The KV cache would not hold one sequence.
    #[error(
        "{} for the KV cache hold {tokens} tokens, but one sequence of {context} needs {}; \
         lower `context_max` or raise `kv_memory`",
        Bytes(*kv),
        Bytes(*needed)
    )]
    KvTooSmall {
        /// Memory of the cache.
        kv: u64,
        /// Tokens that it holds.
        tokens: usize,
        /// Tokens of one sequence.
        context: usize,
        /// Memory for one sequence.
        needed: u64,
    },
    /// More memory than there is.
    #[error("needs {}{}, but only {} are available: {} short", Bytes(*needed), Beside(*reserve),
            Bytes(*available), Bytes(needed + reserve - available))]
    Memory {
        /// Weights, KV cache and workspace.
        needed: u64,
        /// What has to stay free beside them.
        reserve: u64,
        /// What the machine has.
        available: u64,
    },
}

/// What one device has of a model.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// The device.
    pub device: Device,
    /// Layers that lie on it, after those of the parts before.
    pub layers: usize,
    /// Bytes that it needs for them and for its share of all else.
    pub bytes: u64,
}

impl MemoryPlan {
    /// Plans a model into `available` bytes of the processor's memory.
    ///
    /// # Errors
    /// When it cannot fit, with the numbers.
    pub fn new(spec: &Spec, wanted: MemoryWanted, available: u64) -> Result<Self, PlanError> {
        Self::on(Device::Cpu, spec, wanted, available)
    }

    /// Plans a model into `available` bytes of a device's memory.
    ///
    /// # Errors
    /// When it cannot fit, with the numbers.
    pub fn on(
        device: Device,
        spec: &Spec,
        wanted: MemoryWanted,
        available: u64,
    ) -> Result<Self, PlanError> {
        Self::with(BackendKind::Native, device, spec, wanted, available)
    }

    /// The same for a backend.
    ///
    /// # Errors
    /// When it cannot fit, with the numbers.
    pub fn with(
        backend: BackendKind,
        device: Device,
        spec: &Spec,
        wanted: MemoryWanted,
        available: u64,
    ) -> Result<Self, PlanError> {
        let wanted = sized(backend, device, spec, wanted)?;
        let needs = Needs::of(backend, device, spec, wanted);
        Self::fit(&needs, spec, wanted, available)
    }

    /// Plans a model whose layers lie on these devices, in this order, with `free` bytes each. The
    /// first one has embedding and head too. Each gets layers in proportion to what it has free
    /// beside what it needs anyway.
    ///
    /// # Errors
    /// When it cannot fit, with the numbers, or the engine uses one device only.
    pub fn over(
        backend: BackendKind,
        devices: &[(Device, u64)],
        spec: &Spec,
        wanted: MemoryWanted,
    ) -> Result<(Self, Vec<Part>), PlanError> {
        if let [(device, free)] = *devices {
            let plan = Self::with(backend, device, spec, wanted, free)?;
            return Ok((plan, vec![Part { device, layers: spec.layers, bytes: plan.total() }]));
        }
        let (BackendKind::Mistralrs, [(first, _), ..]) = (backend, devices) else {
            return Err(PlanError::OneDevice);
        };
        let wanted = sized(backend, *first, spec, wanted)?;
        let mut needs = Needs::of(backend, *first, spec, wanted);
        let mut fixed = vec![needs.workspace; devices.len()];
        fixed[0] += needs.outer;
        let room = |((_, free), fixed): (&(Device, u64), &u64)| free.saturating_sub(*fixed);
        let rooms: Vec<u64> = devices.iter().zip(&fixed).map(room).collect();
        let layers = in_proportion(spec.layers, &rooms);
        if let Some(index) = layers.iter().position(|layers| *layers == 0) {
            let (device, free) = devices[index];
            return Err(PlanError::NoLayer { device, free });
        }
        // What each layer may have where it has least.
        let each = rooms.iter().zip(&layers).map(|(room, layers)| room / *layers as u64).min();
        let available = fixed.iter().sum::<u64>() + each.unwrap_or(0) * spec.layers as u64;
        needs.workspace *= devices.len() as u64;
        let plan = Self::fit(&needs, spec, wanted, available)?;
        let layer = (plan.weights - needs.outer + plan.kv) / spec.layers as u64;
        let part = |(((device, _), layers), fixed): ((&(Device, u64), usize), u64)| Part {
            device: *device,
            layers,
            bytes: fixed + layers as u64 * layer,
        };
        let parts = devices.iter().zip(layers).zip(fixed).map(part).collect();
        Ok((plan, parts))
    }

    /// Plans what needs so much into `available` bytes; `wanted` is what [`sized`] gives.
    fn fit(
        needs: &Needs,
        spec: &Spec,
        wanted: MemoryWanted,
        available: u64,
    ) -> Result<Self, PlanError> {
        let Needs { weights, block: block_bytes, workspace, .. } = *needs;
        let context_max = wanted.context_max.unwrap_or(spec.context);
        let sequences_max = wanted.sequences_max;
        let left = available.saturating_sub(weights + workspace);
        let per_sequence = context_max.div_ceil(BLOCK_TOKENS) as u64;
        let wanted_blocks = match wanted.kv_memory {
            KvMemory::Auto => (per_sequence * sequences_max as u64).min(left / 5 * 4 / block_bytes),
            KvMemory::Bytes(bytes) => bytes / block_bytes,
            KvMemory::Share(share) => (available as f64 * share) as u64 / block_bytes,
        };
        let kv = (needs.cache)(wanted_blocks * block_bytes);
        if wanted_blocks < per_sequence {
            return Err(PlanError::KvTooSmall {
                kv,
                tokens: wanted_blocks as usize * BLOCK_TOKENS,
                context: context_max,
                needed: per_sequence * block_bytes,
            });
        }
        // What `auto` leaves is more.
        let reserve = if wanted.kv_memory == KvMemory::Auto { 0 } else { needs.reserve };
        let needed = weights + kv + workspace;
        if needed + reserve > available {
            return Err(PlanError::Memory { needed, reserve, available });
        }
        let options = Options {
            context_max,
            blocks: wanted_blocks as usize,
            sequences_max,
            waiting_max: WAITING_MAX,
            step_tokens_max: STEP_TOKENS.min(context_max),
            drafts_max: wanted.drafts_max,
        };
        Ok(Self { weights, kv, workspace, options })
    }

    /// Bytes of weights, KV cache and workspace together.
    pub fn total(&self) -> u64 {
        self.weights + self.kv + self.workspace
    }
}

/// What is asked for within what the model and the engine can do.
fn sized(
    backend: BackendKind,
    device: Device,
    spec: &Spec,
    wanted: MemoryWanted,
) -> Result<MemoryWanted, PlanError> {
    let context_max = wanted.context_max.unwrap_or(spec.context);
    if context_max > spec.context {
        return Err(PlanError::Context { wanted: context_max, context: spec.context });
    }
    let sequences_max = match (backend, device.resolved()) {
        (BackendKind::Mistralrs, Device::Cpu) => wanted.sequences_max.min(MISTRAL_SEQUENCES_MAX),
        _ => wanted.sequences_max,
    };
    Ok(MemoryWanted { context_max: Some(context_max), sequences_max, ..wanted })
}

/// Splits `count` in proportion to `weights`: each has its whole part, and the largest rests have
/// one more.
fn in_proportion(count: usize, weights: &[u64]) -> Vec<usize> {
    let sum: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
    if sum == 0 {
        return vec![0; weights.len()];
    }
    let share = |weight: &u64| u128::from(*weight) * count as u128;
    let mut parts: Vec<usize> = weights.iter().map(|w| (share(w) / sum) as usize).collect();
    let mut by_rest: Vec<usize> = (0..weights.len()).collect();
    by_rest.sort_by_key(|index| std::cmp::Reverse(share(&weights[*index]) % sum));
    let left = count - parts.iter().sum::<usize>();
    by_rest.into_iter().take(left).for_each(|index| parts[index] += 1);
    parts
}

/// Bytes that a device needs for a shape.
struct Needs {
    weights: u64,
    /// Of the weights, those outside the layers.
    outer: u64,
    /// One block of the KV cache.
    block: u64,
    workspace: u64,
    /// What a KV cache of so many bytes takes of the device's memory.
    cache: fn(u64) -> u64,
    /// What stays free where the size of the cache is given.
    reserve: u64,
}

impl Needs {
    fn of(backend: BackendKind, device: Device, spec: &Spec, wanted: MemoryWanted) -> Self {
        let context_max = wanted.context_max.unwrap_or(spec.context);
        let step = STEP_TOKENS.min(context_max);
        match backend {
            BackendKind::Native => {
                Self::new(device, spec, step.max(wanted.sequences_max + MIXED_PREFILL_TOKENS))
            }
            BackendKind::Mistralrs => Self::of_mistral(device, spec, context_max),
        }
    }

    /// What mistral.rs needs for sequences of `context` tokens: numbers of 32 bits on the
    /// processor, of 16 on a card; the head with the rows of its tap, and the embedding where it is
    /// another matrix; a prompt is computed in one step, its attention in chunks.
    fn of_mistral(device: Device, spec: &Spec, context: usize) -> Self {
        let width = match device.resolved() {
            Device::Cuda(_) => 2,
            _ => 4,
        };
        let (hidden, context) = (spec.hidden as u64, context as u64);
        let embedding = if spec.tied { 0 } else { spec.vocab as u64 * hidden };
        let taps = if spec.tied { 1 } else { 2 } * hidden * hidden;
        let head = spec.vocab.next_multiple_of(64) as u64 * hidden;
        let outer = (head + embedding + taps) * width;
        let weights = (weight_bytes(spec) / 2 + embedding + taps) * width;
        let widest = spec.hidden.max(spec.feed_forward.inter).max(spec.qkv_rows()) as u64;
        let scores = spec.attention.heads as u64 * context.min(PROMPT_CHUNK);
        // Scores are numbers of 32 bits on every device.
        let workspace = context * (4 * width * widest + 2 * 4 * scores);
        // A step copies the caches of its sequences into those of a batch, and back.
        let block = 2 * spec.kv_dims().block_bytes() as u64 * width / 2;
        Self { weights, outer, block, workspace, cache: |bytes| bytes, reserve: 0 }
    }

    /// What the native engine needs, with steps of `rows` rows.
    fn new(device: Device, spec: &Spec, rows: usize) -> Self {
        match device.resolved() {
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => {
                use crate::models::cuda::Sizes;
                let Sizes { held, block, workspace, .. } = Sizes::new(spec, rows);
                let (cache, reserve) = (Sizes::cache, CARD_RESERVE);
                Self { weights: held, outer: 0, block, workspace, cache, reserve }
            }
            _ => Self {
                weights: weight_bytes(spec),
                outer: 0,
                block: spec.kv_dims().block_bytes() as u64,
                workspace: workspace_bytes(spec, rows) as u64,
                cache: |bytes| bytes,
                reserve: 0,
            },
        }
    }
}

/// Bytes of the packed weights: two for each parameter, rows padded to blocks of 64.
pub fn weight_bytes(spec: &Spec) -> u64 {
    let padded = |rows: usize| rows.next_multiple_of(64) as u64;
    let (hidden, inter) = (spec.hidden as u64, spec.feed_forward.inter);
    let mlp = 2 * padded(inter) * hidden + padded(spec.hidden) * inter as u64;
    let feed_forward = match spec.feed_forward.experts {
        None => mlp,
        Some(e) => e.count as u64 * mlp + padded(e.count) * hidden,
    };
    let attention =
        padded(spec.qkv_rows()) * hidden + padded(spec.hidden) * spec.attention_cols() as u64;
    2 * (spec.layers as u64 * (attention + feed_forward) + padded(spec.vocab) * hidden)
}

/// A number of bytes for people.
#[derive(Clone, Copy)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.0 as f64;
        match self.0 {
            0..1024 => write!(f, "{} B", self.0),
            1024..1_048_576 => write!(f, "{:.1} KiB", value / 1024.0),
            1_048_576..1_073_741_824 => write!(f, "{:.1} MiB", value / 1_048_576.0),
            _ => write!(f, "{:.2} GiB", value / 1_073_741_824.0),
        }
    }
}

/// Bytes that stay free, where there are some, for the error that counts them.
struct Beside(u64);

impl fmt::Display for Beside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            bytes => write!(f, " beside {} that stay free", Bytes(bytes)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::config::samples::SMOLLM2_135M;

    fn spec() -> Spec {
        SMOLLM2_135M.spec()
    }

    fn plan(wanted: MemoryWanted, available: u64) -> Result<MemoryPlan, String> {
        MemoryPlan::new(&spec(), wanted, available).map_err(|e| e.to_string())
    }

    const WANTED: MemoryWanted = MemoryWanted {
        context_max: None,
        kv_memory: KvMemory::Auto,
        sequences_max: 8,
        drafts_max: 0,
    };

    #[test]
    fn weights_are_two_bytes_a_parameter() {
        assert_eq!(weight_bytes(&spec()), 268_959_744);
    }

    #[test]
    fn auto_takes_full_contexts_or_most_of_what_is_left() {
        let roomy = plan(WANTED, 64 << 30).unwrap();
        assert_eq!(roomy.options.blocks, 8 * 256);
        assert_eq!(roomy.kv, 8 * 8192 * 30 * 2 * 192 * 2);
        let tight = plan(WANTED, 1 << 30).unwrap();
        assert!(tight.options.blocks < 8 * 256 && tight.total() <= 1 << 30);
    }

    #[test]
    fn the_other_engine_needs_32_bit_weights_its_tap_and_its_caches_twice_and_runs_one_sequence() {
        let plan = |available| {
            MemoryPlan::with(BackendKind::Mistralrs, Device::Cpu, &spec(), WANTED, available)
        };
        let (native, other) = (self::plan(WANTED, 64 << 30).unwrap(), plan(64 << 30).unwrap());
        assert_eq!(other.weights, 2 * native.weights + 4 * 576 * 576);
        assert_eq!((native.options.sequences_max, other.options.sequences_max), (8, 1));
        assert_eq!(8 * other.kv, 4 * native.kv);
        assert!(matches!(plan(1 << 30), Err(PlanError::KvTooSmall { .. })));
    }

    #[test]
    fn layers_lie_on_cards_as_they_have_room() {
        let over = |free: &[u64]| {
            let cards = free.iter().enumerate().map(|(i, free)| (Device::Cuda(i), *free));
            let cards: Vec<(Device, u64)> = cards.collect();
            MemoryPlan::over(BackendKind::Mistralrs, &cards, &spec(), WANTED)
        };
        let layers = |free: &[u64]| -> Vec<usize> {
            let (plan, parts) = over(free).unwrap();
            let bytes: u64 = parts.iter().map(|part| part.bytes).sum();
            assert!(bytes <= plan.total() && plan.total() - bytes < 30, "{plan:?} {parts:?}");
            assert!(parts.iter().zip(free).all(|(part, free)| part.bytes <= *free), "{parts:?}");
            parts.into_iter().map(|part| part.layers).collect()
        };
        // 16 bits a number: half of what the processor needs, and all sequences at once.
        let (alone, parts) = over(&[64 << 30]).unwrap();
        let cpu = MemoryPlan::with(BackendKind::Mistralrs, Device::Cpu, &spec(), WANTED, 64 << 30);
        assert_eq!((2 * alone.weights, alone.options.sequences_max), (cpu.unwrap().weights, 8));
        assert_eq!((parts.len(), parts[0].layers), (1, 30));
        assert_eq!(layers(&[64 << 30, 64 << 30]), [15, 15]);
        assert_eq!(layers(&[16 << 30, 32 << 30, 48 << 30]).iter().sum::<usize>(), 30);
        assert_eq!(layers(&[1 << 60, 1 << 60]), [15, 15]);
        // Neither could hold the model with one context alone.
        let small = 1100 << 20;
        assert!(over(&[small]).is_err());
        let split = layers(&[small, small]);
        assert!(split[0] < split[1], "the first has embedding and head too: {split:?}");
        let error = |free: &[u64]| over(free).unwrap_err().to_string();
        assert!(error(&[64 << 30, 1 << 20]).starts_with("cuda:1 has 1.0 MiB free"));
        assert!(error(&[0, 0]).starts_with("cuda:0 has 0 B free"));
        let native = MemoryPlan::over(
            BackendKind::Native,
            &[(Device::Cuda(0), 1 << 40), (Device::Cuda(1), 1 << 40)],
            &spec(),
            WANTED,
        );
        assert_eq!(native.unwrap_err(), PlanError::OneDevice);
    }

    /// On a card matrices of 1 MiB and more are whole pages of 2 MiB, and so is the cache.
    #[cfg(feature = "cuda")]
    #[test]
    fn a_card_holds_whole_pages_and_keeps_a_reserve() {
        const MIB: u64 = 1 << 20;
        let on = |kv_memory, available| {
            let wanted = MemoryWanted { context_max: Some(512), kv_memory, ..WANTED };
            MemoryPlan::on(Device::Cuda(0), &spec(), wanted, available)
        };
        let plan = on(KvMemory::Bytes(45 * MIB), 64 << 30).unwrap();
        // By layer 2 MiB for queries, keys and values, 4 and 2 for the feed-forward part, and
        // 648 KiB after attention, which are less than a page; the head is 27 pages.
        assert_eq!(plan.weights, 30 * (8 * MIB + (648 << 10)) + 54 * MIB);
        // A block is 720 KiB: 64 of them are 45 MiB, and take 46.
        assert_eq!((plan.options.blocks, plan.kv), (64, 46 * MIB));
        // With a size for the cache, 256 MiB stay free; `auto` leaves a fifth of its own.
        let most = plan.total() + 256 * MIB;
        assert_eq!(on(KvMemory::Bytes(45 * MIB), most), Ok(plan));
        let why = on(KvMemory::Bytes(45 * MIB), most - MIB).unwrap_err().to_string();
        assert!(why.contains(" beside 256.0 MiB that stay free, but only"), "{why}");
        assert!(why.ends_with(": 1.0 MiB short"), "{why}");
        let share = KvMemory::Share(46.0 / 1024.0);
        assert!(on(share, 1024 * MIB).is_ok());
        assert!(on(KvMemory::Share(0.9), 1024 * MIB).is_err());
        assert!(on(KvMemory::Auto, most - MIB).is_ok());
    }

    #[test]
    fn what_cannot_fit_is_refused_with_numbers() {
        for (wanted, available, want) in [
            (
                MemoryWanted { context_max: Some(9000), ..WANTED },
                1 << 34,
                "more than the model's context",
            ),
            (WANTED, 300 << 20, "hold"),
            (
                MemoryWanted { kv_memory: KvMemory::Bytes(1 << 20), ..WANTED },
                1 << 34,
                "lower `context_max`",
            ),
            (MemoryWanted { kv_memory: KvMemory::Bytes(4 << 30), ..WANTED }, 1 << 30, "short"),
        ] {
            let error = plan(wanted, available).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
    }
}
