//! Launches single kernels on a card and compares what they give with what was expected.

use crate::models::cuda::Card;
use crate::models::cuda::launch::{Arg, Launch, Memory, Pinned, Plain, Stream, values_of};
use crate::ops::dtype::Dtype;
use crate::ops::lcg::Lcg;
use crate::ops::pool::Pool;
use anyhow::{Context, ensure};
use std::cell::RefCell;
use std::sync::Arc;

/// A stream of a card, noise, and the type of the values.
pub(super) struct KernelRunner<'a> {
    pub(super) stream: Stream,
    pub(super) pool: &'a Pool,
    pub(super) dtype: Dtype,
    noise: RefCell<Lcg>,
}

impl<'a> KernelRunner<'a> {
    pub(super) fn new(card: &Arc<Card>, pool: &'a Pool, dtype: Dtype) -> anyhow::Result<Self> {
        Ok(Self { stream: Stream::new(card)?, pool, dtype, noise: RefCell::new(Lcg::new(11)) })
    }

    pub(super) fn is_f16(&self) -> i32 {
        i32::from(self.dtype == Dtype::F16)
    }

    /// Numbers from -1 to 1.
    pub(super) fn noise(&self, count: usize) -> Vec<f32> {
        let mut noise = self.noise.borrow_mut();
        (0..count).map(|_| noise.bits() as f32 / u32::MAX as f32 * 2.0 - 1.0).collect()
    }

    pub(super) fn rounded(&self, values: &[f32]) -> Vec<u16> {
        values.iter().map(|x| self.dtype.round(*x)).collect()
    }

    pub(super) fn widened(&self, bits: &[u16]) -> Vec<f32> {
        bits.iter().map(|b| self.dtype.widen(*b)).collect()
    }

    /// Memory of the card with these values.
    pub(super) fn put<T: Plain>(&self, values: &[T]) -> anyhow::Result<Memory> {
        let memory =
            Memory::new(self.stream.card(), size_of_val(values).max(16), "one kernel's test")?;
        memory.write(&self.stream, 0, values)?;
        Ok(memory)
    }

    /// The first values of memory, after all that was launched.
    pub(super) fn get<T: Plain>(&self, memory: &Memory, count: usize) -> anyhow::Result<Vec<T>> {
        let bytes = count * size_of::<T>();
        let mut host = Pinned::new(&self.stream, bytes)?;
        host.fetch(memory, 0..bytes)?;
        Ok(values_of(host.bytes()?, count))
    }

    /// Runs one kernel to its end; an error names it.
    pub(super) fn launch(
        &self,
        kernel: &'static str,
        grid: [usize; 3],
        (threads, shared): (u32, usize),
        args: &[Arg],
    ) -> anyhow::Result<()> {
        let launch = Launch { kernel, grid, threads, shared, args: args.to_vec() };
        self.stream.run(&[launch]).with_context(|| kernel.to_owned())?;
        self.stream.wait().with_context(|| kernel.to_owned())
    }

    /// The kernel's name in this type, of those in both.
    pub(super) fn name(&self, names: [&'static str; 2]) -> &'static str {
        names[usize::from(self.dtype == Dtype::F16)]
    }
}

/// Fails at the first number that has other bits than it must; how many were compared.
pub(super) fn same(kernel: &str, got: &[f32], want: &[f32]) -> anyhow::Result<usize> {
    let differ = got.iter().zip(want).position(|(g, w)| g.to_bits() != w.to_bits());
    let at = differ.unwrap_or(0);
    ensure!(
        differ.is_none() && got.len() == want.len(),
        "{kernel}: element {at} of {} is {:e}, not {:e}",
        want.len(),
        got.get(at).copied().unwrap_or(f32::NAN),
        want.get(at).copied().unwrap_or(f32::NAN),
    );
    Ok(got.len())
}

/// The same for whole numbers.
pub(super) fn same_words(kernel: &str, got: &[u64], want: &[u64]) -> anyhow::Result<usize> {
    let differ = got.iter().zip(want).position(|(g, w)| g != w);
    let at = differ.unwrap_or(0);
    ensure!(
        differ.is_none() && got.len() == want.len(),
        "{kernel}: element {at} of {} is {:#x}, not {:#x}",
        want.len(),
        got.get(at).copied().unwrap_or_default(),
        want.get(at).copied().unwrap_or_default(),
    );
    Ok(got.len())
}

/// `u32` values as whole numbers of any width.
pub(super) fn words(values: &[u32]) -> Vec<u64> {
    values.iter().map(|v| u64::from(*v)).collect()
}
