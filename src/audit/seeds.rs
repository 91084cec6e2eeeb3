//! Decides whether a server honours seeds: the same request gives the same answer, and another seed
//! gives another one.

use super::answer::ServerAnswer;
use super::score::TokenScore;

/// Nats that an answer surprises by before its repetition counts: two draws that ignore the seed
/// are equal less than once in a hundred thousand times.
const NATS_MIN: f64 = 12.0;

/// An answer that is too improbable to be repeated by chance.
pub struct SeedTest<'a> {
    text: &'a str,
}

impl<'a> SeedTest<'a> {
    /// `None` where the answer is so probable, or so short, that its repetition says nothing.
    pub fn new(answer: &'a ServerAnswer, rows: &[TokenScore]) -> Option<Self> {
        let nats: f64 = rows.iter().map(|row| -row.logprob).sum();
        (nats >= NATS_MIN).then_some(Self { text: &answer.text })
    }

    /// Whether the same request gave the same text.
    pub fn is_repeated(&self, again: &ServerAnswer) -> bool {
        again.text == self.text
    }

    /// What a repeated answer and one of another seed say together.
    pub fn conclude(&self, other_seed: &ServerAnswer) -> OtherSeed {
        match other_seed.text == self.text {
            true => OtherSeed::Same,
            false => OtherSeed::Differs,
        }
    }
}

/// What another seed gives where the same one repeats an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OtherSeed {
    /// Another answer: the server honours seeds.
    Differs,
    /// The same answer: a server that always answers the same shows nothing of its seeds.
    Same,
}

#[cfg(test)]
mod tests {
    use super::super::answer::TokenSource;
    use super::*;

    fn answer(text: &str) -> ServerAnswer {
        ServerAnswer {
            ids: vec![1],
            source: TokenSource::Ids,
            reported: Vec::new(),
            text: text.to_owned(),
            prompt_tokens: None,
        }
    }

    fn rows(nats: f64, tokens: usize) -> Vec<TokenScore> {
        let row = TokenScore {
            logprob: -nats / tokens as f64,
            rank: 2,
            noise: None,
            error: None,
            lead: 1.0,
            surprise: 0.0,
            variance: 1.0,
            is_drawn: false,
        };
        vec![row; tokens]
    }

    #[test]
    fn an_empty_or_probable_answer_is_not_asked_again() {
        assert!(SeedTest::new(&answer(""), &[]).is_none());
        assert!(SeedTest::new(&answer("Paris."), &rows(0.4, 2)).is_none());
        assert!(SeedTest::new(&answer("Paris."), &rows(11.9, 40)).is_none());
        assert!(SeedTest::new(&answer("Paris."), &rows(12.0, 1)).is_some());
    }

    #[test]
    fn a_seed_is_honoured_where_only_the_same_seed_repeats_the_answer() {
        let first = answer("one");
        let test = SeedTest::new(&first, &rows(40.0, 8)).unwrap();
        assert!(test.is_repeated(&answer("one")) && !test.is_repeated(&answer("two")));
        assert_eq!(test.conclude(&answer("two")), OtherSeed::Differs);
        assert_eq!(test.conclude(&answer("one")), OtherSeed::Same);
    }
}
