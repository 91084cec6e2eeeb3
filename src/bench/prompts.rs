//! Makes prompts for measurements: subjects, tasks and styles are multiplied, in a fixed order that
//! mixes them. Sets that must not share prompts (attacked, honest, calibration) take different
//! ranges.

use super::stats::shuffle;

const SUBJECTS: [&str; 64] = [
    "the sea",
    "bread",
    "the Moon",
    "bicycles",
    "winter",
    "a market town",
    "honey bees",
    "maps",
    "volcanoes",
    "music",
    "old trees",
    "trains",
    "glass",
    "the human heart",
    "chess",
    "salt",
    "lighthouses",
    "rivers",
    "the printing press",
    "coffee",
    "gravity",
    "a small island",
    "libraries",
    "bridges",
    "paper",
    "the night sky",
    "wolves",
    "clocks",
    "rain",
    "a village school",
    "computers",
    "sleep",
    "gardens",
    "money",
    "the desert",
    "painting",
    "whales",
    "electricity",
    "cooking",
    "mountains",
    "a sailing ship",
    "languages",
    "vaccines",
    "the Roman Empire",
    "football",
    "magnets",
    "a spider's web",
    "dreams",
    "steel",
    "theatre",
    "fire",
    "mathematics",
    "postal services",
    "a coral reef",
    "friendship",
    "photography",
    "wheat",
    "earthquakes",
    "the alphabet",
    "robots",
    "a summer holiday",
    "democracy",
    "cats",
    "recycling",
];
/// What is asked; `_` stands for the subject.
const TASKS: [&str; 16] = [
    "Explain how _ came to be.",
    "Write a short story about _.",
    "List five facts about _.",
    "What would the world be like without _?",
    "Write a letter to a friend about _.",
    "Describe _ to somebody who has never seen or heard of it.",
    "Write a dialogue between two people who disagree about _.",
    "What do children usually get wrong about _?",
    "Write a poem about _.",
    "Give advice to someone who wants to learn more about _.",
    "Compare _ with something that is very different.",
    "What questions would a journalist ask an expert on _?",
    "Write the opening speech of a conference on _.",
    "How might _ change in the next hundred years?",
    "Write a diary entry of somebody whose work has to do with _.",
    "Summarise the most important ideas about _.",
];
const STYLES: [&str; 5] = [
    "",
    " Use plain words.",
    " Answer in three paragraphs.",
    " Be precise and give examples.",
    " Make it entertaining.",
];
/// Seed of the order.
const ORDER: u64 = 0x7072_6f6d;

/// Every prompt once; always the same, in the same order.
pub fn all() -> Vec<String> {
    let mut prompts = Vec::with_capacity(SUBJECTS.len() * TASKS.len() * STYLES.len());
    for subject in SUBJECTS {
        for task in TASKS {
            let task = task.replace('_', subject);
            prompts.extend(STYLES.map(|style| format!("{task}{style}")));
        }
    }
    shuffle(&mut prompts, ORDER);
    prompts
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn prompts_are_many_distinct_and_mixed() {
        let prompts = all();
        assert_eq!(prompts.len(), 5120);
        assert_eq!(prompts.iter().collect::<BTreeSet<_>>().len(), prompts.len());
        assert_eq!(prompts, all());
        // Any range holds most subjects and tasks.
        for part in prompts.chunks_exact(320) {
            let with = |words: &str| part.iter().filter(|p| p.contains(words)).count();
            let subjects = SUBJECTS.iter().filter(|s| with(s) > 0).count();
            assert!(subjects > 56, "{subjects}");
            assert!((2..60).contains(&with("Write a poem")));
        }
    }
}
