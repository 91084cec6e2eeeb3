//! Counts rows whose logits a card sent to the host, by why.

/// Why the host read a row that a device computed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// The logits themselves were asked for.
    Asked,
    /// A grammar, penalties, bans or a logit bias.
    Rules,
    /// A margin of a verification.
    Margin,
    /// All tokens within a reach were asked for.
    Search,
    /// More alternatives than the device sorts.
    Alternatives,
    /// A draw with top-a.
    TopA,
    /// A draw that needs more than the largest logits that the device sorts.
    Draw,
}

/// Every reason, with its name in metrics.
const NAMES: [(Why, &str); 7] = [
    (Why::Asked, "asked"),
    (Why::Rules, "rules"),
    (Why::Margin, "margin"),
    (Why::Search, "search"),
    (Why::Alternatives, "alternatives"),
    (Why::TopA, "top_a"),
    (Why::Draw, "draw"),
];

/// So many rows for each reason; none on the processor, where logits are on the host anyway.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct HostedRows([u64; NAMES.len()]);

impl HostedRows {
    /// One more.
    pub fn count(&mut self, why: Why) {
        self.0[why as usize] += 1;
    }

    /// Each reason's name and rows.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        NAMES.into_iter().map(|(why, name)| (name, self.0[why as usize]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_place() {
        for (place, (why, _)) in NAMES.into_iter().enumerate() {
            assert_eq!(why as usize, place, "{why:?}");
        }
        let mut rows = HostedRows::default();
        rows.count(Why::Draw);
        rows.count(Why::Draw);
        rows.count(Why::Asked);
        let counted: Vec<_> = rows.iter().filter(|(_, count)| *count > 0).collect();
        assert_eq!(counted, [("asked", 1), ("draw", 2)]);
    }
}
