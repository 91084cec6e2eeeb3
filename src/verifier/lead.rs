//! Recovers tokens that a client drops. The original client drops chunks until the first one with
//! text. If an answer begins inside a character, its first tokens are parts of that character and
//! show no text. Those ids are lost, and the remaining ones spell another text at other positions.
//! They can be recovered from the bytes of the first character that was shown.

use super::sent::Sent;
use crate::models::text::Text;
use crate::verify::answer::Answer;
use std::collections::BTreeMap;

/// Bytes of a character before its last one.
const LOST_BYTES_MAX: usize = 3;

/// The answers that what was sent can stand for: itself, and where its first character has more
/// bytes than its first token, itself with each row of tokens that can have come before: four at
/// most.
pub(super) fn readings(model: &Text, sent: Sent) -> Vec<Answer> {
    let Sent { answer, first } = sent;
    let leads = answer.ids.first().map_or_else(Vec::new, |id| leads(model, &first, *id));
    let with = |lead: &Vec<u32>| {
        let mut longer = answer.clone();
        longer.ids.splice(0..0, lead.iter().copied());
        longer.logprobs.splice(0..0, lead.iter().map(|_| None));
        longer
    };
    let more: Vec<Answer> = leads.iter().map(with).collect();
    std::iter::once(answer).chain(more).collect()
}

fn leads(model: &Text, shown: &str, id: u32) -> Vec<Vec<u32>> {
    let Some(lost) = lost(shown, model.tokenizer.bytes_of(id)) else { return Vec::new() };
    let mut tokens: BTreeMap<&[u8], u32> = BTreeMap::new();
    for id in 0..model.vocab as u32 {
        let bytes = model.tokenizer.bytes_of(id);
        let is_part = !bytes.is_empty() && lost.windows(bytes.len()).any(|part| part == bytes);
        if is_part && !model.tokenizer.is_special(id) {
            tokens.entry(bytes).or_insert(id);
        }
    }
    splits(lost, &tokens)
}

/// The bytes of the first character that a token of these bytes does not have, if it completes one.
fn lost<'a>(shown: &'a str, bytes: &[u8]) -> Option<&'a [u8]> {
    let width = shown.chars().next()?.len_utf8();
    let shown = shown.as_bytes();
    // What follows the first character in the token may be the beginning of another.
    let lost = (1..width).find(|at| bytes.starts_with(&shown[*at..width]))?;
    (!bytes.starts_with(&shown[..width])).then_some(&shown[..lost])
}

/// All rows of tokens that have these bytes together.
fn splits(bytes: &[u8], tokens: &BTreeMap<&[u8], u32>) -> Vec<Vec<u32>> {
    if bytes.is_empty() {
        return vec![Vec::new()];
    }
    let mut found = Vec::new();
    for end in 1..=bytes.len().min(LOST_BYTES_MAX) {
        let Some(id) = tokens.get(&bytes[..end]) else { continue };
        for rest in splits(&bytes[end..], tokens) {
            found.push([vec![*id], rest].concat());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lost_bytes_are_those_before_the_token() {
        // 日 is e6 97 a5, é is c3 a9.
        assert_eq!(lost("日", &[0xa5]), Some(&[0xe6, 0x97][..]));
        assert_eq!(lost("日", &[0x97, 0xa5]), Some(&[0xe6][..]));
        assert_eq!(lost("日x", &[0xa5, b'x']), Some(&[0xe6, 0x97][..]));
        assert_eq!(lost("é", &[0xa9, 0xc3]), Some(&[0xc3][..]));
        for (shown, bytes) in
            [("日", &[0xe6, 0x97, 0xa5][..]), ("a", b"a"), ("", b"a"), ("日", b"a")]
        {
            assert_eq!(lost(shown, bytes), None, "{shown}");
        }
    }

    #[test]
    fn every_split_into_known_tokens_is_found() {
        let known: [(&[u8], u32); 5] =
            [(&[1], 10), (&[2], 20), (&[3], 30), (&[1, 2], 12), (&[2, 3], 23)];
        let all = BTreeMap::from(known);
        let found = splits(&[1, 2, 3], &all);
        assert_eq!(found, [vec![10, 20, 30], vec![10, 23], vec![12, 30]]);
        assert!(splits(&[1, 2, 4], &all).is_empty());
    }
}
