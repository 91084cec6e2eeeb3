//! Launches of the CUDA kernels on candle's devices (feature `cuda`).
//!
//! Each operation writes into a tensor that already exists, allocates nothing and does not wait for
//! the device, so it may be captured in a CUDA graph. On a CPU device it computes the same with the
//! Rust code that the kernel is the twin of. The launch path has run on a driver that executes the
//! kernels on the CPU (`scripts/cuda-check`); it has never run on a card.

use crate::ops::lanes::Isa;
use crate::ops::logits::{LogSumExp, rank, top_k};
use crate::proof::residue::{Calibration, Profile, exact_hash, sketch};
use candle_core::backend::BackendStorage;
use candle_core::cuda::WrapErr;
use candle_core::cuda::cudarc::driver::{CudaSlice, LaunchConfig, PushKernelArg};
use candle_core::{CpuStorage, CudaDevice, CudaStorage, InplaceOp3, Layout, Result};
use half::bf16;

/// PTX 9.0 for sm_80 and later; needs a driver of at least 580.
const PROOF_PTX: &str = include_str!("../../kernels/proof.sm_80.ptx");
const LOGPROB_PTX: &str = include_str!("../../kernels/logprob.sm_80.ptx");
const SKETCH_THREADS: u32 = 128;
const REDUCE_THREADS: u32 = 256;
/// 32-bit words of a row's result before its top-k.
pub const RESULT_WORDS: usize = 5;

/// Where one row's sketch goes, and under which keys it is made: three i64 of the table tensor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SketchEntry {
    /// Key of the signs.
    pub sketch_key: u64,
    /// Key of the exact hash.
    pub exact_key: u64,
    /// Absolute position.
    pub position: u32,
    /// Row of the results; negative skips the row.
    pub slot: i32,
}

impl SketchEntry {
    /// The entry as the table holds it.
    pub fn words(self) -> [i64; 3] {
        let place = u64::from(self.position) | (self.slot as u32 as u64) << 32;
        [self.sketch_key as i64, self.exact_key as i64, place as i64]
    }

    fn from_words(words: &[i64]) -> Self {
        let place = words[2] as u64;
        Self {
            sketch_key: words[0] as u64,
            exact_key: words[1] as u64,
            position: place as u32,
            slot: (place >> 32) as u32 as i32,
        }
    }
}

/// Sketches and hashes of bf16 rows: `results.inplace_op3(&rows, &table, &op)`. Results are i64:
/// hashes in the first `slots` words, sketches (two to a word) in the words after them.
pub struct SketchRows {
    calibration: Calibration,
    profile: Profile,
    device: Option<(CudaSlice<i8>, CudaSlice<i16>)>,
}

impl SketchRows {
    /// For a model; `device` where rows will lie on a GPU.
    ///
    /// # Errors
    /// When the calibration cannot be copied there.
    pub fn new(
        calibration: Calibration,
        profile: Profile,
        device: Option<&CudaDevice>,
    ) -> Result<Self> {
        let copy = |device: &CudaDevice| -> Result<_> {
            let exponents = device.clone_htod(&calibration.exponents)?;
            Ok((exponents, device.clone_htod(&calibration.means)?))
        };
        let device = device.map(copy).transpose()?;
        Ok(Self { calibration, profile, device })
    }

    /// Words of a result tensor for `slots` rows.
    pub fn result_words(slots: usize) -> usize {
        slots + slots.div_ceil(2)
    }

    fn shape(&self, out: &Layout, rows: &Layout, table: &Layout) -> Result<(usize, usize)> {
        let (count, channels) = rows.shape().dims2()?;
        if channels != self.calibration.channels() {
            let want = self.calibration.channels();
            candle_core::bail!("sketch-rows: expected {want} channels, got {channels}");
        }
        if table.shape().dims2()? != (count, 3) {
            candle_core::bail!("sketch-rows: the table must be ({count}, 3)");
        }
        let words = out.shape().dims1()?;
        for layout in [out, rows, table] {
            if !layout.is_contiguous() || layout.start_offset() != 0 {
                candle_core::bail!("sketch-rows: tensors must be contiguous and start at 0");
            }
        }
        // words = slots + ceil(slots / 2)
        Ok((count, words * 2 / 3))
    }
}

impl InplaceOp3 for SketchRows {
    fn name(&self) -> &'static str {
        "sketch-rows"
    }

    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        out_layout: &Layout,
        rows: &CpuStorage,
        rows_layout: &Layout,
        table: &CpuStorage,
        table_layout: &Layout,
    ) -> Result<()> {
        let (_, slots) = self.shape(out_layout, rows_layout, table_layout)?;
        let (rows, table) = (rows.as_slice::<bf16>()?, table.as_slice::<i64>()?);
        let CpuStorage::I64(out) = out else {
            candle_core::bail!("sketch-rows: results must be i64");
        };
        let channels = self.calibration.channels();
        for (row, words) in rows.chunks_exact(channels).zip(table.chunks_exact(3)) {
            let entry = SketchEntry::from_words(words);
            let Ok(slot) = usize::try_from(entry.slot) else { continue };
            let values: Vec<f32> = row.iter().map(|x| x.to_f32()).collect();
            let bits: Vec<u16> = row.iter().map(|x| x.to_bits()).collect();
            let SketchEntry { sketch_key, exact_key, position, .. } = entry;
            let bytes = sketch(&self.calibration, self.profile, sketch_key, position, &values);
            out[slot] = exact_hash(exact_key, position, &bits) as i64;
            let (word, shift) = (slots + slot / 2, 32 * (slot % 2));
            let kept = out[word] as u64 & !(0xffff_ffff << shift);
            out[word] = (kept | u64::from(u32::from_le_bytes(bytes)) << shift) as i64;
        }
        Ok(())
    }

    fn cuda_fwd(
        &self,
        out: &mut CudaStorage,
        out_layout: &Layout,
        rows: &CudaStorage,
        rows_layout: &Layout,
        table: &CudaStorage,
        table_layout: &Layout,
    ) -> Result<()> {
        let (count, slots) = self.shape(out_layout, rows_layout, table_layout)?;
        let Some((exponents, means)) = &self.device else {
            candle_core::bail!("sketch-rows: made without a device");
        };
        let device = rows.device().clone();
        let function = device.get_or_load_custom_func("sketch_rows", "proof", PROOF_PTX)?;
        let (rows, table) = (rows.as_cuda_slice::<bf16>()?, table.as_cuda_slice::<i64>()?);
        let out = out.as_cuda_slice_mut::<i64>()?;
        let (mut hashes, mut sketches) = out.split_at_mut(slots);
        let config = LaunchConfig {
            grid_dim: (count as u32, 1, 1),
            block_dim: (SKETCH_THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        let channels = self.calibration.channels() as i32;
        let (projections, shift) = match self.profile {
            Profile::U8 => (4_i32, i32::from(self.calibration.shift)),
            Profile::U4 => (8, i32::from(self.calibration.shift) + 2),
        };
        let is_f16 = 0_i32;
        let mut launch = function.builder();
        launch.arg(rows).arg(exponents).arg(means).arg(table).arg(&mut sketches).arg(&mut hashes);
        launch.arg(&channels).arg(&shift).arg(&projections).arg(&is_f16);
        // SAFETY: arguments are those of the kernel, in its order and types; sizes were checked
        // above, and slots of the table are the caller's to keep below `slots`.
        unsafe { launch.launch(config) }.w()?;
        Ok(())
    }
}

/// Reductions of f32 logits (rows, vocab): `results.inplace_op3(&logits, &targets, &op)`; targets
/// are i32 (-1 for none), results u32, [`ReduceLogits::result_words`] of them.
pub struct ReduceLogits {
    k: usize,
    temperature: f32,
}

impl ReduceLogits {
    /// With the `k` largest logits, at `temperature`.
    pub fn new(k: usize, temperature: f32) -> Self {
        Self { k, temperature }
    }

    /// Words of a result tensor: five a row, then all ids of the top-k, then their logits.
    pub fn result_words(&self, rows: usize) -> usize {
        rows * (RESULT_WORDS + 2 * self.k)
    }

    fn shape(&self, out: &Layout, logits: &Layout, targets: &Layout) -> Result<(usize, usize)> {
        let (rows, vocab) = logits.shape().dims2()?;
        if targets.shape().dims1()? != rows || out.shape().dims1()? != self.result_words(rows) {
            let want = self.result_words(rows);
            candle_core::bail!("reduce-logits: needs {rows} targets and {want} result words");
        }
        for layout in [out, logits, targets] {
            if !layout.is_contiguous() || layout.start_offset() != 0 {
                candle_core::bail!("reduce-logits: tensors must be contiguous and start at 0");
            }
        }
        Ok((rows, vocab))
    }
}

impl InplaceOp3 for ReduceLogits {
    fn name(&self) -> &'static str {
        "reduce-logits"
    }

    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        out_layout: &Layout,
        logits: &CpuStorage,
        logits_layout: &Layout,
        targets: &CpuStorage,
        targets_layout: &Layout,
    ) -> Result<()> {
        let (rows, vocab) = self.shape(out_layout, logits_layout, targets_layout)?;
        let (logits, targets) = (logits.as_slice::<f32>()?, targets.as_slice::<i32>()?);
        let CpuStorage::U32(out) = out else {
            candle_core::bail!("reduce-logits: results must be u32");
        };
        for (r, row) in logits.chunks_exact(vocab).enumerate() {
            let lse = LogSumExp::new(Isa::best(), row, self.temperature);
            let sum = crate::ops::math::exp64(-lse.logprob(lse.max())) as f32;
            let target = u32::try_from(targets[r]).ok();
            let target_logit = target.map_or(f32::NEG_INFINITY, |t| row[t as usize]);
            let target_rank = target.map_or(0, |t| rank(row, t));
            out[r * RESULT_WORDS..][..RESULT_WORDS].copy_from_slice(&[
                lse.max().to_bits(),
                sum.to_bits(),
                target_logit.to_bits(),
                target_rank,
                0,
            ]);
            for (i, (id, logit)) in top_k(Isa::best(), row, self.k).into_iter().enumerate() {
                out[rows * RESULT_WORDS + r * self.k + i] = id;
                out[rows * (RESULT_WORDS + self.k) + r * self.k + i] = logit.to_bits();
            }
        }
        Ok(())
    }

    fn cuda_fwd(
        &self,
        out: &mut CudaStorage,
        out_layout: &Layout,
        logits: &CudaStorage,
        logits_layout: &Layout,
        targets: &CudaStorage,
        targets_layout: &Layout,
    ) -> Result<()> {
        let (rows, vocab) = self.shape(out_layout, logits_layout, targets_layout)?;
        let device = logits.device().clone();
        let function = device.get_or_load_custom_func("reduce_logits", "logprob", LOGPROB_PTX)?;
        let (logits, targets) = (logits.as_cuda_slice::<f32>()?, targets.as_cuda_slice::<i32>()?);
        let out = out.as_cuda_slice_mut::<u32>()?;
        let (mut results, mut top) = out.split_at_mut(rows * RESULT_WORDS);
        let (mut ids, mut values) = top.split_at_mut(rows * self.k);
        let config = LaunchConfig {
            grid_dim: (rows as u32, 1, 1),
            block_dim: (REDUCE_THREADS, 1, 1),
            shared_mem_bytes: REDUCE_THREADS * self.k as u32 * 8,
        };
        let (vocab, stops, k) = (vocab as i32, 0_i32, self.k as i32);
        let inverse_temperature = 1.0 / self.temperature;
        let mut launch = function.builder();
        // Without stop ids the pointer is never followed.
        launch.arg(logits).arg(targets).arg(targets).arg(&mut results);
        launch.arg(&mut ids).arg(&mut values).arg(&vocab).arg(&stops).arg(&k);
        launch.arg(&inverse_temperature);
        // SAFETY: arguments are those of the kernel, in its order and types; sizes were checked.
        unsafe { launch.launch(config) }.w()?;
        Ok(())
    }
}
