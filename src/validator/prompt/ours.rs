//! Holds passages and tasks of our own. A task is put together from parts, so that the same passage
//! is asked about in very many ways.

use crate::chance::Chance;

const PASSAGES: &str = include_str!("../data/passages.txt");

/// For whom an answer is written.
const READERS: [&str; 24] = [
    "a child of ten",
    "a curious pensioner",
    "a student in the first year",
    "somebody who has never heard of the subject",
    "an expert in another field",
    "a busy shop owner",
    "a journalist who needs clear facts",
    "a school class",
    "a sceptical neighbour",
    "a new colleague",
    "a traveller from far away",
    "a nurse after a long shift",
    "a group of volunteers",
    "an engineer",
    "a farmer",
    "a judge who has little time",
    "a parent of small children",
    "a teacher who prepares a lesson",
    "a person who learns English",
    "an apprentice",
    "a town councillor",
    "a sailor on night watch",
    "a friend who disagrees",
    "a reader of a hundred years ago",
];

/// What an answer must pay attention to.
const ANGLES: [&str; 24] = [
    "what it costs",
    "who gains and who loses by it",
    "how it was done in the past",
    "what can go wrong",
    "what is often misunderstood",
    "how one could test it at home",
    "safety",
    "the difference between town and country",
    "what is known and what is only believed",
    "the seasons",
    "the tools that are needed",
    "how long it takes",
    "fairness",
    "what a beginner should do first",
    "the numbers behind it",
    "how other countries deal with it",
    "what it teaches about people",
    "the smallest change that would help",
    "the law as an ordinary person meets it",
    "health",
    "the words that are used for it",
    "what will be different in twenty years",
    "the materials and where they come from",
    "how to explain it without technical terms",
];

/// The form of an answer.
const FORMS: [&str; 16] = [
    "a short essay",
    "a list of numbered steps",
    "a dialogue between two people",
    "a letter",
    "a talk of three minutes",
    "a page of questions and answers",
    "a table in plain text with a paragraph below it",
    "a story with a clear ending",
    "a plan for one week",
    "an entry of an encyclopaedia",
    "a report for a committee",
    "advice to a friend",
    "a comparison of two views",
    "notes for a lesson",
    "an article for a local newspaper",
    "a diary entry followed by a summary",
];

/// What an answer must contain a number of.
const ITEMS: [&str; 8] = [
    "examples",
    "reasons",
    "facts",
    "open questions",
    "common mistakes",
    "practical hints",
    "terms with their meaning",
    "objections with replies",
];

/// How many passages there are.
pub fn passages() -> usize {
    PASSAGES.lines().count()
}

/// One of them.
pub(super) fn passage(chance: &mut Chance) -> &'static str {
    chance.line(PASSAGES)
}

/// Draws an element of a list that is not empty.
fn pick(chance: &mut Chance, list: &[&'static str]) -> &'static str {
    chance.pick(list).copied().unwrap_or_default()
}

/// What is to be done with a passage.
pub(super) fn task(chance: &mut Chance) -> String {
    let (reader, angle, form) =
        (pick(chance, &READERS), pick(chance, &ANGLES), pick(chance, &FORMS));
    let (count, items) = (3 + chance.below(7), pick(chance, &ITEMS));
    match chance.below(6) {
        0 => format!(
            "Write {form} about this for {reader}. Pay attention to {angle}, and give \
             {count} {items}."
        ),
        1 => format!(
            "Answer as {form}, with {count} {items}. Your reader is {reader}. Say \
             something about {angle}."
        ),
        2 => format!(
            "For {reader}: {form} with {count} {items}. One part of it must be about \
             {angle}."
        ),
        3 => format!(
            "Take {angle} as your starting point and write {form} for {reader}. Use \
             {count} {items}."
        ),
        4 => format!(
            "Give {count} {items} first, then go on with {form}. Have {reader} in mind, \
             and also {angle}."
        ),
        _ => format!(
            "I need {form} that {reader} would like to read. It should have {count} \
             {items} and deal with {angle}."
        ),
    }
}
