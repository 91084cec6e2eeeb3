//! Adds up what many answers say together: sequential tests distinguish another stack's rounding,
//! arithmetic in eight bits, and other weights.
//!
//! All three hypotheses are noise on our logits, of a standard deviation that was measured
//! (`docs/bench.md`): [`HONEST`] where the same weights are computed in 16 bits by another library,
//! [`EIGHT_BITS`] where weights or activations have eight, [`OTHER`] from six bits down. Answers
//! agree where 16 bits explain them better than eight, and are of other weights where those explain
//! them better than eight bits; eight bits lie between, because an honest server may compute its
//! products in them. Each row adds a log-likelihood ratio to both tests, within `ROW_MAX`, and each
//! answer at most a quarter of what decides: rows of an answer share keys and values, so they are
//! not independent observations.

use super::answer::{ServerAnswer, TokenSource};
use super::score::TokenScore;
use crate::verify::evidence::{ALARM, ANSWER_MAX};
use serde::Serialize;

/// Standard deviation of the logits of an honest stack in 16 bits: of the two measured, the one
/// that rounds all activations too.
pub const HONEST: f64 = 0.06;
/// Where weights or the inputs of products have eight bits.
pub const EIGHT_BITS: f64 = 0.11;
/// Of other weights: those of six bits are the nearest.
pub const OTHER: f64 = 0.16;
/// The most that a row adds, in nats.
const ROW_MAX: f64 = 1.0;
/// Evidence for agreement at which it is believed: a thousand to one.
const AGREES: f64 = -6.907_755_278_982_137;
/// Standard deviations of surprise that other weights alone explain.
const SURPRISE_MAX: f64 = 6.0;
/// Rows that a verdict needs at least.
const ROWS_MIN: usize = 64;

/// How an answer was drawn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Drawn {
    /// The most probable token, always.
    Greedy,
    /// At temperature 1, untruncated.
    Sampled,
}

/// What the answers show together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub enum Conclusion {
    /// The answers agree with these weights.
    #[serde(rename = "agrees")]
    Agrees,
    /// Too little was said.
    #[serde(rename = "cannot tell")]
    CannotTell,
    /// They were computed with others.
    #[serde(rename = "not these weights")]
    NotTheseWeights,
}

impl Conclusion {
    /// The conclusion as a verdict is printed.
    pub fn words(self) -> &'static str {
        match self {
            Self::Agrees => "agrees",
            Self::CannotTell => "cannot tell",
            Self::NotTheseWeights => "not these weights",
        }
    }
}

/// The answers so far.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
pub struct AuditEvidence {
    /// Answers with a token that is known here.
    pub answers: usize,
    /// Answers without a token that is known: empty ones, among others.
    pub without_tokens: usize,
    /// Tokens of those answers.
    pub tokens: usize,
    /// Answers whose tokens are known from ids, from names, from text.
    pub sources: [usize; 3],
    /// Rows whose log-probabilities were compared.
    pub compared: usize,
    /// Nats for eight bits over 16: below zero, these weights in 16 bits explain more.
    pub nats_eight_bits: f64,
    /// Nats for other weights over these in eight bits.
    pub nats_other: f64,
    /// Tokens that are our most probable ones.
    pub first: usize,
    /// Tokens among our five most probable ones.
    pub among_five: usize,
    /// Of greedy answers: tokens, and those that are not our most probable ones.
    pub greedy: [usize; 2],
    /// Sampled tokens that this engine draws from the same seed, of all.
    pub drawn: [usize; 2],
    /// Answers whose prompts have another number of tokens than ours.
    pub other_prompts: usize,
    /// Rows whose token has a log-probability of the server.
    reported: usize,
    squares: f64,
    errors: f64,
    surprise: f64,
    variance: f64,
}

impl AuditEvidence {
    /// Adds an answer, of which there is no row where it has no token; `prompt` is how many tokens
    /// we asked with.
    pub fn add(&mut self, answer: &ServerAnswer, drawn: Drawn, rows: &[TokenScore], prompt: usize) {
        self.answers += 1;
        self.other_prompts += usize::from(answer.prompt_tokens.is_some_and(|n| n != prompt as u64));
        if answer.ids.is_empty() {
            self.without_tokens += 1;
            return;
        }
        self.tokens += rows.len();
        self.sources[answer.source as usize] += 1;
        let (mut eight_bits, mut other) = (0.0, 0.0);
        for row in rows {
            self.first += usize::from(row.rank == 1);
            self.among_five += usize::from(row.rank <= 5);
            if let Some(noise) = row.noise {
                self.compared += 1;
                self.squares += noise * noise;
            }
            if let Some(error) = row.error {
                self.reported += 1;
                self.errors += error.abs();
            }
            match drawn {
                Drawn::Greedy => {
                    self.greedy[0] += 1;
                    self.greedy[1] += usize::from(row.rank > 1);
                }
                Drawn::Sampled => {
                    self.surprise += row.surprise;
                    self.variance += row.variance;
                    self.drawn[0] += usize::from(row.is_drawn);
                    self.drawn[1] += 1;
                }
            }
            eight_bits += ratio(row, drawn, (EIGHT_BITS, HONEST));
            other += ratio(row, drawn, (OTHER, EIGHT_BITS));
        }
        // Tokens of a text that was tokenised again may be others than were drawn.
        if answer.source != TokenSource::Text {
            self.nats_eight_bits += eight_bits.clamp(-ANSWER_MAX, ANSWER_MAX);
            self.nats_other += other.clamp(-ANSWER_MAX, ANSWER_MAX);
        }
    }

    /// The standard deviation of logits that explains the reports.
    pub fn noise(&self) -> Option<f64> {
        (self.compared > 0).then(|| (self.squares / self.compared as f64).sqrt())
    }

    /// The mean difference of log-probabilities.
    pub fn mean_error(&self) -> Option<f64> {
        (self.reported > 0).then(|| self.errors / self.reported as f64)
    }

    /// How much more sampled tokens surprise than they should, in standard deviations.
    pub fn surprise(&self) -> Option<f64> {
        (self.variance > 0.0).then(|| self.surprise / self.variance.sqrt())
    }

    /// What is concluded so far, and why.
    pub fn verdict(&self) -> (Conclusion, String) {
        let cannot = |why: String| (Conclusion::CannotTell, why);
        let prompts = self.other_prompts;
        if prompts > 0 {
            let what = format!("the server counts other tokens in {prompts} prompts");
            return cannot(format!("{what}: it asks its model something else than we ask ours"));
        }
        if self.tokens < ROWS_MIN {
            return cannot(format!("only {} tokens came, {ROWS_MIN} are needed", self.tokens));
        }
        if let Some(far) = self.surprise().filter(|far| *far > SURPRISE_MAX) {
            let what = format!("its tokens surprise these weights by {far:.1} standard deviations");
            let is_guess = self.sources[TokenSource::Text as usize] > 0;
            return match self.agreement() {
                Some(how) => cannot(format!("{how}, but {what}: they are not drawn as asked")),
                None if is_guess => cannot(format!("{what}, but the tokens are a guess from text")),
                None => (Conclusion::NotTheseWeights, what),
            };
        }
        let odds = format!(
            "the evidence is {:+.1} nats for eight bits over 16, {:+.1} for other weights over \
             eight bits",
            self.nats_eight_bits, self.nats_other
        );
        match (self.nats_eight_bits, self.nats_other) {
            (_, other) if other >= ALARM => (Conclusion::NotTheseWeights, odds),
            (eight_bits, _) if eight_bits <= AGREES => (Conclusion::Agrees, odds),
            _ => cannot(odds),
        }
    }

    /// What agrees with these weights, however the tokens were drawn: a server may truncate or
    /// penalise by defaults of its own.
    fn agreement(&self) -> Option<String> {
        let what = if self.compared > 0 { "log-probabilities" } else { "greedy tokens" };
        match (self.nats_eight_bits, self.nats_other) {
            (_, other) if other >= ALARM => None,
            (eight_bits, _) if eight_bits <= AGREES => {
                Some(format!("its {what} agree with these weights"))
            }
            (_, other) if other <= AGREES => {
                Some(format!("its {what} agree with these weights in eight bits"))
            }
            _ => None,
        }
    }
}

/// The log-likelihood ratio of a row: noise of `more` over noise of `less`.
fn ratio(row: &TokenScore, drawn: Drawn, (more, less): (f64, f64)) -> f64 {
    let nats = match (row.noise, drawn) {
        (Some(noise), _) => {
            let gain = 0.5 * (1.0 / (less * less) - 1.0 / (more * more));
            (less / more).ln() + gain * noise * noise
        }
        // Whether the difference of two noisy logits keeps its sign.
        (None, Drawn::Greedy) => {
            let probability =
                |sd: f64| normal(row.lead / (sd * std::f64::consts::SQRT_2)).max(1e-300);
            probability(more).ln() - probability(less).ln()
        }
        (None, Drawn::Sampled) => 0.0,
    };
    nats.clamp(-ROW_MAX, ROW_MAX)
}

/// The normal distribution function, within 1.2e-7 of itself everywhere (a Chebyshev fit of the
/// complementary error function: Press et al., Numerical Recipes, 6.2).
fn normal(x: f64) -> f64 {
    const FIT: [f64; 10] = [
        -1.265_512_23,
        1.000_023_68,
        0.374_091_96,
        0.096_784_18,
        -0.186_288_06,
        0.278_868_07,
        -1.135_203_98,
        1.488_515_87,
        -0.822_152_23,
        0.170_872_77,
    ];
    let z = x.abs() / std::f64::consts::SQRT_2;
    let t = 1.0 / (1.0 + 0.5 * z);
    let fit = FIT.iter().rev().fold(0.0, |sum, c| sum * t + c);
    let tail = 0.5 * t * (fit - z * z).exp();
    if x < 0.0 { tail } else { 1.0 - tail }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(source: TokenSource) -> ServerAnswer {
        let (ids, reported) = (vec![1; 32], Vec::new());
        ServerAnswer { ids, source, reported, text: String::new(), prompt_tokens: Some(5) }
    }

    fn row(noise: Option<f64>, lead: f64) -> TokenScore {
        TokenScore {
            logprob: -1.0,
            rank: if lead > 0.0 { 1 } else { 2 },
            noise,
            error: noise,
            lead,
            surprise: 0.0,
            variance: 1.0,
            is_drawn: false,
        }
    }

    fn after(
        rows: &[TokenScore],
        drawn: Drawn,
        source: TokenSource,
        answers: usize,
    ) -> AuditEvidence {
        let mut evidence = AuditEvidence::default();
        (0..answers).for_each(|_| evidence.add(&answer(source), drawn, rows, 5));
        evidence
    }

    #[test]
    fn the_normal_distribution_is_known() {
        for (x, want) in [(0.0, 0.5), (1.0, 0.841_344_75), (-1.96, 0.024_997_9), (-6.0, 9.87e-10)] {
            assert!((normal(x) - want).abs() < 2e-7 * want.max(1.0), "{x}: {}", normal(x));
        }
    }

    #[test]
    fn small_noise_agrees_large_noise_does_not_and_eight_bits_cannot_be_told() {
        let of =
            |noise: f64| after(&[row(Some(noise), 1.0); 32], Drawn::Sampled, TokenSource::Ids, 8);
        // As measured: bf16, eight bits, six bits, four bits.
        for (noise, verdict) in [
            (0.0, Conclusion::Agrees),
            (0.018, Conclusion::Agrees),
            (0.061, Conclusion::Agrees),
            (0.102, Conclusion::CannotTell),
            (0.112, Conclusion::CannotTell),
            (0.163, Conclusion::NotTheseWeights),
            (0.49, Conclusion::NotTheseWeights),
        ] {
            assert_eq!(of(noise).verdict().0, verdict, "{noise}");
        }
        assert!((of(0.3).noise().unwrap() - 0.3).abs() < 1e-12);
        // Where two are equally likely, nothing is added.
        for pair in [(EIGHT_BITS, HONEST), (OTHER, EIGHT_BITS)] {
            let (more, less) = pair;
            let gain: f64 = 0.5 * (1.0 / (less * less) - 1.0 / (more * more));
            let middle = ((more / less).ln() / gain).sqrt();
            let nats = ratio(&row(Some(middle), 1.0), Drawn::Sampled, pair);
            assert!(nats.abs() < 1e-12, "{pair:?}: {nats}");
        }
    }

    #[test]
    fn one_answer_never_decides_and_text_only_informs() {
        let far = [row(Some(5.0), 1.0); 128];
        let one = after(&far, Drawn::Sampled, TokenSource::Names, 1);
        assert_eq!((one.nats_other, one.verdict().0), (ANSWER_MAX, Conclusion::CannotTell));
        let text = after(&far, Drawn::Sampled, TokenSource::Text, 20);
        assert_eq!((text.nats_other, text.verdict().0), (0.0, Conclusion::CannotTell));
    }

    #[test]
    fn greedy_tokens_speak_without_log_probabilities() {
        let flipped = after(&[row(None, -1.0); 32], Drawn::Greedy, TokenSource::Ids, 8);
        assert_eq!(flipped.verdict().0, Conclusion::NotTheseWeights);
        let kept = after(&[row(None, 0.15); 32], Drawn::Greedy, TokenSource::Ids, 8);
        assert_eq!(kept.verdict().0, Conclusion::Agrees);
        // A clear lead is kept by both.
        let clear = after(&[row(None, 9.0); 32], Drawn::Greedy, TokenSource::Ids, 8);
        assert_eq!(clear.verdict().0, Conclusion::CannotTell);
    }

    #[test]
    fn other_prompts_and_surprising_tokens_are_seen() {
        let mut other = AuditEvidence::default();
        (0..8).for_each(|_| {
            other.add(&answer(TokenSource::Ids), Drawn::Sampled, &[row(Some(5.0), 1.0); 32], 6);
        });
        assert!(other.verdict().1.contains("counts other tokens in 8 prompts"));
        let surprising = TokenScore { surprise: 2.0, ..row(None, 1.0) };
        let far = after(&[surprising; 32], Drawn::Sampled, TokenSource::Ids, 4);
        assert_eq!(far.verdict().0, Conclusion::NotTheseWeights);
        assert_eq!(
            after(&[], Drawn::Sampled, TokenSource::Ids, 1).verdict().0,
            Conclusion::CannotTell
        );
    }

    #[test]
    fn surprising_tokens_accuse_nobody_whose_log_probabilities_agree() {
        let of = |noise: Option<f64>| {
            let surprising = TokenScore { surprise: 2.0, ..row(noise, 1.0) };
            after(&[surprising; 32], Drawn::Sampled, TokenSource::Ids, 8).verdict()
        };
        for (noise, how) in
            [(0.0, "these weights, but"), (0.11, "these weights in eight bits, but")]
        {
            let (verdict, why) = of(Some(noise));
            assert_eq!(verdict, Conclusion::CannotTell, "{noise}: {why}");
            assert!(why.starts_with(&format!("its log-probabilities agree with {how}")), "{why}");
            assert!(why.ends_with("they are not drawn as asked"), "{why}");
        }
        for noise in [None, Some(0.135), Some(0.3)] {
            let (verdict, why) = of(noise);
            assert_eq!(verdict, Conclusion::NotTheseWeights, "{noise:?}: {why}");
        }
    }

    #[test]
    fn an_answer_without_tokens_is_counted_and_is_no_guess() {
        let surprising = TokenScore { surprise: 2.0, ..row(None, 1.0) };
        let mut evidence = after(&[surprising; 32], Drawn::Sampled, TokenSource::Ids, 4);
        let empty = ServerAnswer { ids: Vec::new(), ..answer(TokenSource::Text) };
        evidence.add(&empty, Drawn::Sampled, &[], 5);
        assert_eq!((evidence.answers, evidence.without_tokens, evidence.tokens), (5, 1, 128));
        assert_eq!(
            (evidence.sources, evidence.verdict().0),
            ([4, 0, 0], Conclusion::NotTheseWeights)
        );
    }
}
