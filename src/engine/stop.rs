//! Finds stop strings in streamed text: which text may be sent now, and where the output ends.
//!
//! Only a suffix that is a proper prefix of some stop string is held back. It is sent as soon as it
//! can no longer become a stop string, and when the output ends otherwise.

/// Searches one stream for stop strings.
pub struct StopStrings {
    strings: Vec<String>,
    include: bool,
    held: String,
}

/// What a piece of text led to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Scan {
    /// Text that may be shown; the rest is held back.
    Show(String),
    /// A stop string ends the stream; `text` is what remains to be shown.
    Stop {
        /// The last text.
        text: String,
        /// The stop string that was found.
        matched: String,
    },
}

impl StopStrings {
    /// Watches for `strings` (none empty); `include` keeps the match in the text.
    pub fn new(strings: Vec<String>, include: bool) -> Self {
        Self { strings, include, held: String::new() }
    }

    /// Takes the next piece. The match that *ends* first wins, among those the longest.
    pub fn push(&mut self, piece: &str) -> Scan {
        if self.strings.is_empty() {
            return Scan::Show(piece.to_owned());
        }
        self.held.push_str(piece);
        let matches = self.strings.iter().filter_map(|s| {
            self.held.find(s.as_str()).map(|at| (at + s.len(), std::cmp::Reverse(s.len()), s))
        });
        if let Some((end, _, matched)) = matches.min_by_key(|(end, length, _)| (*end, *length)) {
            let keep = if self.include { end } else { end - matched.len() };
            let (text, matched) = (self.held[..keep].to_owned(), matched.clone());
            self.held.clear();
            return Scan::Stop { text, matched };
        }
        let keep = self.held.len() - self.possible_start();
        let rest = self.held.split_off(keep);
        Scan::Show(std::mem::replace(&mut self.held, rest))
    }

    /// The text held back, at a normal end.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Length of the longest suffix that a stop string may begin with.
    fn possible_start(&self) -> usize {
        let longest = self.strings.iter().map(String::len).max().unwrap_or(0);
        let first = self.held.len().saturating_sub(longest.saturating_sub(1));
        let mut starts = (first..self.held.len()).filter(|at| self.held.is_char_boundary(*at));
        let begins = |at: usize| self.strings.iter().any(|s| s.starts_with(&self.held[at..]));
        starts.find(|at| begins(*at)).map_or(0, |at| self.held.len() - at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(strings: &[&str], include: bool, pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let mut stop = StopStrings::new(strings.iter().map(|s| (*s).into()).collect(), include);
        let mut shown = Vec::new();
        for piece in pieces {
            match stop.push(piece) {
                Scan::Show(text) => shown.push(text),
                Scan::Stop { text, matched } => {
                    shown.push(text);
                    return (shown, Some(matched));
                }
            }
        }
        shown.push(stop.finish());
        (shown, None)
    }

    #[test]
    fn only_a_possible_beginning_is_held_back() {
        let (shown, matched) = run(&["END"], false, &["a", "E", "x", "EN", "D!"]);
        assert_eq!(
            (shown.as_slice(), matched.as_deref()),
            (["a", "", "Ex", "", ""].map(String::from).as_slice(), Some("END"))
        );
        let (shown, matched) = run(&["END"], false, &["aEN"]);
        assert_eq!((shown.concat().as_str(), matched), ("aEN", None));
    }

    #[test]
    fn the_match_may_stay_in_the_text() {
        let (shown, _) = run(&["\n\n"], true, &["a\n", "\nb"]);
        assert_eq!(shown.concat(), "a\n\n");
    }

    /// Looks at the text after every character, as if it came one by one.
    fn naive(strings: &[String], text: &str) -> (String, Option<String>) {
        let ends = text.char_indices().map(|(i, c)| i + c.len_utf8());
        for end in ends {
            let hit = strings.iter().filter(|s| text[..end].ends_with(s.as_str()));
            if let Some(s) = hit.max_by_key(|s| s.len()) {
                return (text[..end - s.len()].to_owned(), Some(s.clone()));
            }
        }
        (text.to_owned(), None)
    }

    proptest! {
        #[test]
        fn equals_a_naive_reference(
            strings in proptest::collection::vec("[abé]{1,4}", 1..4),
            pieces in proptest::collection::vec("[abcé]{0,3}", 0..12),
        ) {
            let borrowed: Vec<&str> = strings.iter().map(String::as_str).collect();
            let texts: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (shown, matched) = run(&borrowed, false, &texts);
            let (want, want_matched) = naive(&strings, &pieces.concat());
            prop_assert_eq!((shown.concat(), matched), (want, want_matched));
        }
    }
}
