//! Implements the pass on a card: a step's inputs in one copy, its launches, its answers in one
//! copy.

use super::answer::{self, ChunkReading};
use super::asks::Answers;
use super::error::CudaError;
use super::graphs::Graphs;
use super::launch::Stream;
use super::layout::Layout;
use super::memory::{Inputs, KvBlocks, Outputs};
use super::step::{StepMemory, StepRun};
use super::weights::CudaWeights;
use crate::models::arithmetic::Arithmetic;
use crate::models::hosted::HostedRows;
use crate::models::pass::{Batch, Pass, PassFault, RowAsk, RowResult};
use crate::ops::pool::Pool;
use std::cell::RefCell;
use std::sync::Arc;

/// Runs a model on a card.
pub struct CudaPass {
    weights: Arc<CudaWeights>,
    arithmetic: Arithmetic,
    stream: Stream,
    pool: Pool,
    kv: KvBlocks,
    memory: StepMemory,
    inputs: Inputs,
    outputs: Outputs,
    answers: Answers,
    graphs: Graphs,
    hosted: HostedRows,
}

impl CudaPass {
    /// With an empty cache of `blocks` blocks; portable.
    ///
    /// # Errors
    /// When the card has no room for it.
    pub fn new(weights: &Arc<CudaWeights>, pool: &Pool, blocks: usize) -> Result<Self, CudaError> {
        let stream = Stream::new(&weights.card)?;
        let kv = KvBlocks::new(&stream, &weights.spec, blocks)?;
        stream.wait()?;
        Ok(Self {
            weights: Arc::clone(weights),
            arithmetic: Arithmetic::Portable,
            answers: Answers::new(&stream),
            stream,
            pool: pool.clone(),
            kv,
            memory: StepMemory::new(),
            inputs: Inputs::new(),
            outputs: Outputs::new(),
            graphs: Graphs::default(),
            hosted: HostedRows::default(),
        })
    }

    /// The same by another arithmetic. Its cache must still be empty: keys and values of two canons
    /// do not go together.
    #[must_use]
    pub fn computing(self, arithmetic: Arithmetic) -> Self {
        Self { arithmetic, ..self }
    }

    fn run(&mut self, batch: &Batch, asks: &[RowAsk<'_>]) -> Result<Vec<RowResult>, CudaError> {
        if batch.ids.is_empty() {
            return Ok(Vec::new());
        }
        self.inputs.clear();
        let model = (&*self.weights, self.arithmetic);
        let layout = Layout::new(model, &self.pool, batch, self.kv.blocks, &mut self.inputs)?;
        let chunks = self.answers.plan(&self.weights, asks, &mut self.inputs)?;
        let buffers = self.memory.fit(&self.weights, &layout)?;
        for chunk in &chunks {
            self.outputs.clear();
            chunk.reserve(&self.weights, &mut self.outputs);
            self.outputs.fit(&self.stream)?;
        }
        self.inputs.send(&self.stream)?;
        let step = StepRun {
            weights: &self.weights,
            arithmetic: self.arithmetic,
            kv: &self.kv,
            inputs: &self.inputs,
            layout: &layout,
            buffers,
            launches: RefCell::default(),
        };
        let mut branch = step.layers();
        if branch && has_repeated_rows(asks) {
            // A row that is read twice gets its branch once.
            step.add_norm(step.branch(true, None), &self.weights.norm, None, buffers.normed);
            branch = false;
        }
        let mut results = Vec::with_capacity(asks.len());
        for chunk in &chunks {
            self.outputs.clear();
            let places = chunk.reserve(&self.weights, &mut self.outputs);
            let finals = self.outputs.pointer(places.finals);
            step.final_rows(branch, chunk.rows, chunk.order.len(), finals);
            if chunk.with_logits > 0 {
                step.logits(finals, self.outputs.pointer(places.logits), chunk.with_logits);
            }
            answer::launch(chunk, &step, &self.outputs, &places);
            let launches = step.launches.take();
            match layout.is_decode {
                true => self.graphs.run(&self.stream, launches)?,
                false => self.stream.run(&launches)?,
            }
            let reading = ChunkReading { chunk, places, weights: &self.weights, pool: &self.pool };
            results.extend(reading.collect(&mut self.outputs, &mut self.hosted)?);
        }
        if asks.is_empty() {
            // Nobody reads: what failed must show all the same.
            self.stream.run(&step.launches.take())?;
            self.stream.wait()?;
        }
        Ok(results)
    }
}

impl Pass for CudaPass {
    fn step(&mut self, batch: &Batch, asks: &[RowAsk<'_>]) -> Result<Vec<RowResult>, PassFault> {
        self.run(batch, asks).map_err(|error| {
            // Copies and kernels of a step that failed half-way end before the next one.
            let _ = self.stream.wait();
            error.into()
        })
    }

    fn hosted(&self) -> HostedRows {
        self.hosted
    }
}

fn has_repeated_rows(asks: &[RowAsk<'_>]) -> bool {
    let mut rows: Vec<usize> = asks.iter().map(|ask| ask.row).collect();
    rows.sort_unstable();
    rows.windows(2).any(|pair| pair[0] == pair[1])
}
