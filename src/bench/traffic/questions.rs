//! Makes the requests of `bench serve`: prompts that no cache knows, of one length or as a
//! validator draws them. The same seed makes the same requests; those of a validator name the day.

use super::heard::LoadRequest;
use crate::chance::Chance;
use crate::validator::prompt::Draft;
use crate::validator::prompt::dataset::Passages;
use crate::validator::round::ask::{Endpoint, QueryContent, QuerySampling, unchecked_body};
use serde_json::json;

/// Words that prompts are made of.
const WORDS: [&str; 32] = [
    "river", "stone", "market", "winter", "engine", "paper", "garden", "signal", "harbour",
    "letter", "copper", "forest", "window", "bridge", "music", "salt", "clock", "desert", "island",
    "school", "silver", "train", "valley", "bread", "mirror", "circle", "planet", "shadow",
    "doctor", "answer", "number", "travel",
];
/// The shortest answer of a validator's load is this part of the longest, as 512 is of 1920.
const SHORTEST: f64 = 512.0 / 1920.0;

/// What is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LoadShape {
    /// Prompts and answers of one length, greedy.
    Fixed,
    /// What a validator of the subnet asks: half chat and half completions, with its prompts and
    /// its ranges of temperature, seed and length.
    Targon,
}

impl LoadShape {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fixed => "fixed",
            Self::Targon => "targon",
        }
    }
}

/// All that is asked, by number.
#[derive(Clone, Debug)]
pub struct Questions {
    /// What is asked.
    pub shape: LoadShape,
    /// The model's name at the server.
    pub model: String,
    /// Whether [`LoadShape::Fixed`] uses the completions endpoint instead of chat.
    pub is_completion: bool,
    /// Words of a prompt of [`LoadShape::Fixed`], at least 9; about as many tokens.
    pub words: usize,
    /// Tokens of an answer; with [`LoadShape::Targon`] the most.
    pub tokens: u32,
    /// Whether [`LoadShape::Fixed`] asks for answers that end only at their length.
    pub ignores_eos: bool,
    /// Whether the first prompt is asked again and again.
    pub is_repeated: bool,
    /// Decides all that is drawn.
    pub seed: u64,
    /// The day that prompts of [`LoadShape::Targon`] name, as `YYYY-MM-DD`.
    pub date: String,
}

impl Questions {
    /// Makes request number `index`.
    pub fn ask(&self, index: u64) -> LoadRequest {
        let index = if self.is_repeated { 0 } else { index };
        let mut chance = Chance::seeded(self.seed.wrapping_add(index.wrapping_mul(0x9e37_79b9)));
        let is_completion = match self.shape {
            LoadShape::Fixed => self.is_completion,
            LoadShape::Targon => chance.below(2) == 0,
        };
        let endpoint = if is_completion { Endpoint::Completion } else { Endpoint::Chat };
        let content = self.content(endpoint, &mut chance);
        let shortest = match self.shape {
            LoadShape::Fixed => self.tokens,
            LoadShape::Targon => ((f64::from(self.tokens) * SHORTEST) as u32).max(8),
        };
        let sampling = QuerySampling::draw(&mut chance, &(shortest..=self.tokens.max(shortest)));
        let mut body = unchecked_body(&self.model, sampling, content);
        if self.shape == LoadShape::Fixed {
            body["stream_options"] = json!({"include_usage": true});
            body["temperature"] = json!(0);
            // Log-probabilities are work that only a validator asks for.
            body["logprobs"] = json!(null);
            if self.ignores_eos {
                body["ignore_eos"] = json!(true);
            }
        }
        LoadRequest { path: endpoint.path(), body }
    }

    fn content(&self, endpoint: Endpoint, chance: &mut Chance) -> QueryContent {
        match (self.shape, endpoint) {
            (LoadShape::Fixed, Endpoint::Completion) => QueryContent::Text(self.words(chance)),
            (LoadShape::Fixed, Endpoint::Chat) => {
                let user = json!({"role": "user", "content": self.words(chance)});
                QueryContent::Messages(json!([user]))
            }
            (LoadShape::Targon, _) => {
                let draft = Draft::draw(&Passages::Ours, &self.date, chance);
                let prompt = draft.finish(None);
                match endpoint {
                    Endpoint::Completion => QueryContent::Text(prompt.text()),
                    Endpoint::Chat => QueryContent::Messages(prompt.messages()),
                }
            }
        }
    }

    /// Begins with a number of its own, so that no two prompts share a prefix.
    fn words(&self, chance: &mut Chance) -> String {
        let mut text = format!("{} {}", chance.hex::<4>(), chance.hex::<4>());
        // The number counts as some words.
        for _ in 8..self.words.max(9) {
            text.push(' ');
            text.push_str(WORDS[chance.below(WORDS.len() as u64) as usize]);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn questions(shape: LoadShape) -> Questions {
        Questions {
            shape,
            model: "m".into(),
            is_completion: true,
            words: 40,
            tokens: 1920,
            ignores_eos: true,
            is_repeated: false,
            seed: 7,
            date: "2026-01-31".into(),
        }
    }

    #[test]
    fn prompts_differ_from_their_first_word_on_unless_asked() {
        let q = questions(LoadShape::Fixed);
        let text = |i| q.ask(i).body["prompt"].as_str().unwrap()[..8].to_owned();
        let starts: HashSet<String> = (0..500).map(text).collect();
        assert_eq!(starts.len(), 500);
        assert_eq!(q.ask(3), q.ask(3));
        let same = Questions { is_repeated: true, ..questions(LoadShape::Fixed) };
        assert_eq!(same.ask(3), same.ask(9));
        let body = q.ask(0).body;
        assert_eq!(
            (body["max_tokens"].as_u64(), body["ignore_eos"].as_bool()),
            (Some(1920), Some(true))
        );
        assert!(body["logprobs"].is_null() && body["stream"] == true);
    }

    #[test]
    fn a_validators_load_has_both_endpoints_and_its_ranges() {
        let q = questions(LoadShape::Targon);
        let asked: Vec<LoadRequest> = (0..400).map(|i| q.ask(i)).collect();
        let chats = asked.iter().filter(|a| a.path.contains("chat")).count();
        assert!((120..280).contains(&chats), "{chats}");
        for LoadRequest { body, .. } in &asked {
            assert!((512..=1920).contains(&body["max_tokens"].as_u64().unwrap()), "{body}");
            assert!((0.0..1.0).contains(&body["temperature"].as_f64().unwrap()), "{body}");
            assert!(body["logprobs"] == true && body["ignore_eos"].is_null(), "{body}");
            // Nobody but a client of the open API asks for usage.
            assert!(body["stream_options"].is_null(), "{body}");
        }
        let chat = asked.iter().find(|a| a.path.contains("chat")).unwrap();
        let roles: Vec<_> = chat.body["messages"].as_array().unwrap().iter().collect();
        assert_eq!((&roles[0]["role"], &roles[1]["role"]), (&json!("system"), &json!("user")));
        assert!(chat.body["messages"][0]["content"].as_str().unwrap().contains("2026-01-31"));
        let text = asked.iter().find(|a| !a.path.contains("chat")).unwrap();
        assert!(text.body["prompt"].as_str().unwrap().contains("2026-01-31"));
        assert_eq!(q.ask(3), q.ask(3));
    }
}
