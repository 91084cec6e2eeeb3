//! Turns a plan of the scheduler into the rows of a step and what is asked of each. A pass computes
//! them without knowing requests.

use super::guard::{Stage, Watch};
use super::live::{Live, ScoredRow};
use super::output::Fault;
use super::scheduler::{Plan, Slice};
use crate::models::pass::{Batch, RowAsk, RowFault, RowResult};
use crate::ops::pool::Pool;

/// A row of a plan that has something to report.
#[derive(Clone, Copy)]
pub(super) struct RowAt {
    pub(super) slice: usize,
    pub(super) position: usize,
    /// The token at its position, where that is a draft.
    pub(super) draft: Option<u32>,
    row: usize, // in the batch
}

/// What is asked of a row, or why its request ends before it is computed.
type Asked<'a> = Result<RowAsk<'a>, Fault>;

/// The batch of a plan, and its rows that `live`, the request of each slice, wants.
pub(super) fn lay_out(plan: &Plan, live: &[&Live]) -> (Batch, Vec<RowAt>) {
    let (mut batch, mut chosen) = (Batch::default(), Vec::new());
    for (slice, (planned, live)) in plan.slices.iter().zip(live).enumerate() {
        let blocks = planned.blocks.iter().map(|b| b.0).collect();
        let rows = batch.push(&planned.tokens, planned.start, blocks);
        let rows = rows.zip(planned.start..).filter(|(_, position)| live.wants_row(*position));
        chosen.extend(rows.map(|(row, position)| {
            let draft = planned.drafts_to(position).last().copied();
            RowAt { slice, position, draft, row }
        }));
    }
    (batch, chosen)
}

/// What is asked of `rows`, in their order. Masks of grammars are computed on all threads.
pub(super) fn ask<'a>(
    rows: &[RowAt],
    slices: &[Slice],
    live: &[&'a Live],
    watch: &Watch,
    pool: &Pool,
) -> Vec<Asked<'a>> {
    let ask = |RowAt { slice, position, row, .. }: RowAt| {
        let drafts = slices[slice].drafts_to(position);
        watch.guard(Stage::Reduce, || live[slice].ask(row, position, drafts))
    };
    match rows.iter().filter(|at| live[at.slice].has_grammar()).count() {
        0 | 1 => rows.iter().map(|at| ask(*at)).collect(),
        _ => pool.turn().map(rows.len(), |i| ask(rows[i])),
    }
}

/// What the row at `position` says.
pub(super) fn row(position: usize, result: Option<RowResult>) -> Result<ScoredRow, Fault> {
    match result {
        Some(Ok(report)) => match report.scores {
            Some(scored) => Ok(ScoredRow { scored, proof: report.proof }),
            None => Err(Fault::Panicked(Stage::Reduce)),
        },
        Some(Err(RowFault::NotFinite)) => Err(Fault::NotFinite { position }),
        Some(Err(RowFault::Panicked)) | None => Err(Fault::Panicked(Stage::Reduce)),
    }
}
