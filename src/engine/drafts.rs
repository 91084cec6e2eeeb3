//! Guesses the next tokens: what followed the last time that the same tokens stood together (prompt
//! lookup, Saxena, 2023). All functions are pure functions of the tokens so far.
//!
//! Answers repeat their prompt when they edit code or quote a text, and then a few rows of one step
//! cost little more than a single one, since every step reads all weights. Where nothing repeats,
//! there is no guess, and a step is what it would be without.

/// Rows of a step, known tokens and drafts together, up to which drafts are added: more rows are no
/// longer nearly free.
pub const STEP_ROWS_MAX: usize = 16;
/// Tokens that must agree before a guess is made: the longest run is tried first.
const RUNS: [usize; 3] = [4, 3, 2];
/// Tokens back to which a run is looked for.
const REACH: usize = 8192;

/// At most `count` tokens that followed the latest earlier occurrence of the last tokens.
pub fn guess(tokens: &[u32], count: usize) -> Vec<u32> {
    if count == 0 {
        return Vec::new();
    }
    let tokens = &tokens[tokens.len().saturating_sub(REACH)..];
    let after = RUNS.into_iter().find_map(|run| {
        let (earlier, last) = (tokens.get(..tokens.len().checked_sub(1)?)?, tokens.len());
        let wanted = &tokens[last.checked_sub(run)?..];
        let at = earlier.windows(run).rposition(|window| window == wanted)?;
        Some(at + run)
    });
    let after = after.map_or(&[][..], |after| &tokens[after..]);
    after[..after.len().min(count)].to_vec()
}

/// How many drafts a sequence gets: twice as many as came true the last time, at least one.
#[derive(Clone, Debug)]
pub struct DraftCount {
    drafted: usize,
    accepted: usize,
    length: usize,
}

impl Default for DraftCount {
    fn default() -> Self {
        Self { drafted: 0, accepted: 0, length: usize::MAX }
    }
}

impl DraftCount {
    /// Most drafts of the next step.
    pub fn next(&mut self, max: usize) -> usize {
        if self.drafted > 0 {
            self.length = (2 * self.accepted).max(1);
        }
        (self.drafted, self.accepted) = (0, 0);
        self.length.min(max)
    }

    /// So many were made.
    pub fn drafted(&mut self, count: usize) {
        self.drafted = count;
    }

    /// One of them came true.
    pub fn accepted(&mut self) {
        self.accepted += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guess_is_what_followed_the_longest_latest_run() {
        let text = [1, 2, 3, 4, 9, 9, 2, 3, 4, 7, 5, 2, 3, 4];
        assert_eq!(guess(&text, 2), [7, 5], "the latest of two occurrences");
        let text = [1, 2, 3, 4, 6, 0, 3, 4, 7, 1, 2, 3, 4];
        assert_eq!(guess(&text, 3), [6, 0, 3], "a longer run, though it lies further back");
        assert_eq!(guess(&text, 99), [6, 0, 3, 4, 7, 1, 2, 3, 4], "no more than there is");
    }

    #[test]
    fn where_nothing_repeats_there_is_no_guess() {
        for text in [&[][..], &[1], &[1, 1], &[1, 2], &[1, 2, 3, 4, 5], &[5, 1, 5]] {
            assert_eq!(guess(text, 4), [0_u32; 0], "{text:?}");
        }
        assert_eq!(guess(&[1, 1, 1], 4), [1], "a run may overlap itself");
        assert_eq!(guess(&[7, 8, 7, 8], 0), [0_u32; 0], "none are asked for");
    }

    #[test]
    fn what_lies_too_far_back_is_not_looked_at() {
        let mut text = vec![1, 2, 3];
        text.extend((10..).take(REACH - 2));
        text.extend([1, 2]);
        assert_eq!(guess(&text, 1), [0_u32; 0]);
        text.truncate(3);
        text.extend([9, 1, 2]);
        assert_eq!(guess(&text, 1), [3]);
    }

    #[test]
    fn drafts_grow_with_success_and_shrink_without() {
        let mut pace = DraftCount::default();
        assert_eq!(pace.next(6), 6);
        pace.drafted(6);
        assert_eq!(pace.next(6), 1, "none came true");
        pace.drafted(1);
        pace.accepted();
        assert_eq!(pace.next(6), 2);
        pace.drafted(0);
        assert_eq!(pace.next(6), 2, "a step without a guess says nothing");
        pace.drafted(2);
        pace.accepted();
        pace.accepted();
        assert_eq!(pace.next(6), 4);
    }
}
