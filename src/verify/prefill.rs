//! Runs one pass over prompt and output, with what is asked of the row that each token was drawn
//! from. Outputs of the same prompt share its keys and values ([`Prefix`]).

use super::Stop;
use crate::models::pass::{Batch, Pass, PassFault, RowAsk, RowReport, Scored, blocks_of};
use std::collections::BTreeMap;
use std::ops::Range;

/// Rows of one step.
const STEP_ROWS: usize = 256;

/// A check of the rows of an output.
pub trait RowSink {
    /// What is asked of the rows that the tokens `indices` of the output were drawn from, one ask
    /// each; the first row is at `position`. Which row of the batch it is, is filled in later.
    ///
    /// # Errors
    /// What ends the run.
    fn ask(&mut self, indices: Range<usize>, position: usize) -> Result<Vec<RowAsk<'_>>, Stop>;

    /// Takes what was asked of the row of token `index`; they come in order.
    ///
    /// # Errors
    /// What ends the run.
    fn take(&mut self, index: usize, report: RowReport) -> Result<(), Stop>;
}

/// What a check is called that nobody waits for.
pub(super) const UNWANTED: &str = "nobody waits for the outcome any more";

/// Whether anybody still waits for the outcome; asked before every step.
pub type IsWanted<'a> = dyn Fn() -> bool + Sync + 'a;

/// A prompt with the outputs that follow it, one after the other. The first output is run together
/// with the prompt. Every later one finds the prompt's keys and values, runs its last token again,
/// and writes its own over those of the output before it. Rows have the bits that a pass of their
/// own would give them: these depend neither on the chunking nor on what lies behind a position.
pub struct Prefix<'a> {
    pass: Box<dyn Pass>,
    prompt: &'a [u32],
    output_max: usize,
    is_run: bool,                       // the prompt's keys and values are there
    asked: BTreeMap<usize, RowAsk<'a>>, // of rows of the prompt, before its last
    scored: BTreeMap<usize, Scored>,    // what they said
    is_wanted: &'a IsWanted<'a>,
}

impl<'a> Prefix<'a> {
    /// Makes room for `prompt` and outputs of at most `output_max` tokens; runs nothing yet. `pass`
    /// is given the KV blocks that it takes.
    ///
    /// # Errors
    /// When there is no memory, or no prompt.
    pub fn new(
        pass: impl FnOnce(usize) -> Result<Box<dyn Pass>, PassFault>,
        prompt: &'a [u32],
        output_max: usize,
    ) -> Result<Self, Stop> {
        if prompt.is_empty() {
            return Err(Stop::Fault("a prompt must have at least one token, got none".into()));
        }
        let pass = pass(blocks_of(prompt.len() + output_max.saturating_sub(1)))
            .map_err(|e| Stop::Fault(e.to_string()))?;
        Ok(Self {
            pass,
            prompt,
            output_max,
            is_run: false,
            asked: BTreeMap::new(),
            scored: BTreeMap::new(),
            is_wanted: &|| true,
        })
    }

    /// The same, which also asks this of rows of the prompt, by their position.
    pub fn asking(self, asked: BTreeMap<usize, RowAsk<'a>>) -> Self {
        Self { asked, ..self }
    }

    /// The same, given up with a fault once `is_wanted` says no.
    pub fn while_wanted(self, is_wanted: &'a IsWanted<'a>) -> Self {
        Self { is_wanted, ..self }
    }

    /// What the rows of the prompt said, by their position, once an output was run.
    pub fn scored(&self) -> &BTreeMap<usize, Scored> {
        &self.scored
    }

    /// Runs the model over the prompt, where that was not done yet, and `output`, and has every
    /// output row checked, in order.
    ///
    /// # Errors
    /// What `rows` says, or a fault of the engine. Other outputs can be run all the same.
    pub fn run(&mut self, output: &[u32], rows: &mut dyn RowSink) -> Result<(), Stop> {
        let (room, length) = (self.output_max, output.len());
        assert!(length <= room, "there is room for {room} tokens, got {length}");
        // The last token decides nothing: its row would predict what follows.
        let ids = [self.prompt, &output[..length.saturating_sub(1)]].concat();
        let start = if self.is_run { self.prompt.len() - 1 } else { 0 };
        self.steps(start, &ids, rows)
    }

    /// Goes on with an output of which the first `done` tokens, at least one, were run last.
    ///
    /// # Errors
    /// As for [`run`](Self::run).
    pub fn extend(
        &mut self,
        output: &[u32],
        done: usize,
        rows: &mut dyn RowSink,
    ) -> Result<(), Stop> {
        assert!(self.is_run && done > 0 && output.len() <= self.output_max);
        let ids = [self.prompt, &output[..output.len().saturating_sub(1)]].concat();
        self.steps(self.prompt.len() - 1 + done, &ids, rows)
    }

    fn steps(&mut self, from: usize, ids: &[u32], rows: &mut dyn RowSink) -> Result<(), Stop> {
        steps(ids, from).try_for_each(|(start, ids)| self.step(start, ids, rows))
    }

    /// Runs `ids` at the positions from `start` on.
    fn step(&mut self, start: usize, ids: &[u32], rows: &mut dyn RowSink) -> Result<(), Stop> {
        if !(self.is_wanted)() {
            return Err(Stop::Fault(UNWANTED.into()));
        }
        let (end, first) = (start + ids.len(), self.prompt.len() - 1);
        let of_prompt: Vec<usize> =
            self.asked.range(start..end.min(first).max(start)).map(|(p, _)| *p).collect();
        let from = first.max(start);
        let indices = if from < end { from - first..end - first } else { 0..0 };
        let own = rows.ask(indices.clone(), from)?;
        debug_assert_eq!(own.len(), indices.len());
        let mut asks: Vec<RowAsk<'_>> = of_prompt
            .iter()
            .map(|position| RowAsk { row: position - start, ..self.asked[position].clone() })
            .collect();
        let placed = own.into_iter().zip(from - start..);
        asks.extend(placed.map(|(ask, row)| RowAsk { row, ..ask }));
        let results = self.pass.step(&Batch::of(ids, start), &asks);
        let results = results.map_err(|e| Stop::Fault(e.to_string()))?;
        drop(asks);
        let places = of_prompt.iter().copied().chain(from..);
        let mut reports = places.zip(results).map(|(position, result)| {
            let fault = |e| Stop::Fault(format!("our row at position {position}: {e}"));
            Ok::<_, Stop>((position, result.map_err(fault)?))
        });
        for report in reports.by_ref().take(of_prompt.len()) {
            let (position, report) = report?;
            self.scored.extend(report.scores.map(|scored| (position, scored)));
        }
        self.is_run |= end > first;
        for report in reports {
            let (position, report) = report?;
            rows.take(position - first, report)?;
        }
        Ok(())
    }
}

/// The steps of a pass over `ids` from the position `from` on, each with its first position.
pub fn steps(ids: &[u32], from: usize) -> impl Iterator<Item = (usize, &[u32])> {
    let left = ids.get(from..).unwrap_or_default();
    (from..).step_by(STEP_ROWS).zip(left.chunks(STEP_ROWS))
}

/// The hidden row that each token of `output` was drawn from, as 16-bit patterns.
///
/// # Errors
/// As for a [`Prefix`].
pub fn hidden_rows(
    pass: impl FnOnce(usize) -> Result<Box<dyn Pass>, PassFault>,
    prompt: &[u32],
    output: &[u32],
) -> Result<Vec<Vec<u16>>, Stop> {
    hidden_rows_while(&|| true, pass, prompt, output)
}

/// The same, given up with a fault once `is_wanted` says no.
pub(super) fn hidden_rows_while(
    is_wanted: &IsWanted<'_>,
    pass: impl FnOnce(usize) -> Result<Box<dyn Pass>, PassFault>,
    prompt: &[u32],
    output: &[u32],
) -> Result<Vec<Vec<u16>>, Stop> {
    let mut rows = HiddenRows(Vec::with_capacity(output.len()));
    let mut prefix = Prefix::new(pass, prompt, output.len())?.while_wanted(is_wanted);
    prefix.run(output, &mut rows)?;
    Ok(rows.0)
}

struct HiddenRows(Vec<Vec<u16>>);

impl RowSink for HiddenRows {
    fn ask(&mut self, indices: Range<usize>, position: usize) -> Result<Vec<RowAsk<'_>>, Stop> {
        let ask = |(_, position)| RowAsk { hidden: true, ..RowAsk::new(0, position) };
        Ok(indices.zip(position..).map(ask).collect())
    }

    fn take(&mut self, _: usize, report: RowReport) -> Result<(), Stop> {
        self.0.extend(report.hidden);
        Ok(())
    }
}
