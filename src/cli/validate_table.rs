//! Makes the tables that `validate` prints: the verdicts of a round, and the weights at the end.

use super::printable::printable;
use super::tables::bordered;
use crate::store::record::{EpochWeights, MinerResponse, Round, WeightsState};
use comfy_table::{CellAlignment, Table};

/// Characters of an error in a table.
const ERROR_CHARS_MAX: usize = 60;

/// The verdicts of a round.
pub(super) fn verdicts(round: &Round) -> Table {
    let header = ["uid", "hotkey", "model", "TTFT s", "tokens/s", "outcome", "cause", "why"];
    let mut table = bordered(header);
    for response in &round.responses {
        let MinerResponse { uid, hotkey, timing, outcome, cause, error, .. } = response;
        let has_times = timing.tokens > 0;
        let time = |value: f64, digits| match has_times {
            true => format!("{value:.digits$}"),
            false => "-".to_owned(),
        };
        let error: String =
            error.as_deref().unwrap_or_default().chars().take(ERROR_CHARS_MAX).collect();
        table.add_row([
            uid.to_string(),
            hotkey.clone(),
            printable(&round.model),
            time(timing.first_token, 3),
            time(timing.tps, 1),
            outcome.name().to_owned(),
            printable(cause.as_deref().unwrap_or("-")),
            printable(&error),
        ]);
    }
    align(&mut table, &[0, 3, 4]);
    table
}

/// Who gets what, and how far the weights are.
pub(super) fn weights(weights: &EpochWeights, hotkey_of: impl Fn(u16) -> Option<String>) -> Table {
    let mut table = bordered(["uid", "hotkey", "weight", "share"]);
    let sum: f64 = weights.values.iter().map(|(_, value)| f64::from(*value)).sum();
    for (uid, value) in &weights.values {
        table.add_row([
            uid.to_string(),
            hotkey_of(*uid).unwrap_or_else(|| "-".to_owned()),
            value.to_string(),
            format!("{:.4}", f64::from(*value) / sum.max(1.0)),
        ]);
    }
    align(&mut table, &[0, 2, 3]);
    table
}

fn align(table: &mut Table, columns: &[usize]) {
    for place in columns {
        if let Some(column) = table.column_mut(*place) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

/// How far weights are, in words.
pub(super) fn state(weights: &EpochWeights) -> String {
    let epoch = weights.epoch;
    match &weights.state {
        WeightsState::Planned => format!("weights of epoch {epoch}: decided, not sent"),
        WeightsState::Sent { hash, .. } => {
            format!("weights of epoch {epoch}: sent as {hash}, not seen on the chain yet")
        }
        WeightsState::Committed { hash, reveal_round, .. } => format!(
            "weights of epoch {epoch}: committed as {hash}, revealed at drand round {reveal_round}"
        ),
        WeightsState::Confirmed => {
            format!("weights of epoch {epoch}: read back from the chain as sent")
        }
        WeightsState::Failed { why } => format!("weights of epoch {epoch}: not set: {why}"),
    }
}
