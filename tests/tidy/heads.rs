//! Module heads: the first sentence of a `//!` begins with what the module does.

/// Verbs that a head begins with. A new one is added here: without the list, a plural noun
/// ("Files of weights.") would look like a verb.
const VERBS: &str = "accepts adds admits allocates allows answers applies asks binds bounds builds \
    checks chooses collects commits compares computes connects contains converts counts creates \
    decides decodes defines deletes derives describes determines does downloads draws encodes \
    encrypts escapes examines exchanges executes finds follows formats guesses handles has holds \
    identifies implements installs keeps launches lays limits lists loads makes manages measures \
    multiplies names notices opens packs parses plans predicts prepares provides puts queues ranks \
    reads receives records recovers reduces releases remembers renders replaces resolves restricts \
    rewrites runs says scores sends serves sets settles shows signs simulates splits starts states \
    stores summarises sums takes tests translates turns updates verifies watches wraps writes";

/// What is wrong with a file's head, if anything.
pub(crate) fn fault(text: &str) -> Option<&'static str> {
    let head: Vec<&str> = text.lines().map_while(|line| line.strip_prefix("//!")).collect();
    let paragraph: Vec<&str> =
        head.iter().map(|line| line.trim()).take_while(|line| !line.is_empty()).collect();
    let sentence = paragraph.join(" ");
    let mut words = sentence.split(' ').map(|word| word.trim_end_matches([',', ':']));
    let (first, second) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let is_capital = first.starts_with(|c: char| c.is_ascii_uppercase());
    let is_verb = VERBS.split_whitespace().any(|verb| verb == first.to_ascii_lowercase());
    match () {
        () if sentence.is_empty() => Some("no `//!` on top"),
        () if !sentence.ends_with(['.', '?']) => Some("its head does not end with a full stop"),
        () if (first, second) == ("This", "is") => None,
        () if !is_capital || !is_verb => Some("its head does not begin with what the module does"),
        // "Names of models." has no verb, whatever its first word could be.
        () if second == "of" => Some("its head begins with a noun"),
        () => None,
    }
}

#[test]
fn a_head_that_is_no_sentence_is_seen() {
    for head in [
        "//! Reads one line.",
        "//! Reads, signs and\n//! checks files.\n//!\n//! A second paragraph: without a rule",
        "//! Keeps what?",
        "//! This is a program.",
    ] {
        assert_eq!(fault(head), None, "{head}");
    }
    for (head, wanted) in [
        ("use std::fs;", "`//!`"),
        ("//!\n//! Reads one line.", "`//!`"),
        ("//! Reads one line", "full stop"),
        ("//! Reads one\n//! line:\n//!\n//! | a table |", "full stop"),
        ("//! reads one line.", "begin"),
        ("//! The twin of a kernel.", "begin"),
        ("//! Files that are read.", "begin"),
        ("//! What is read.", "begin"),
        ("//! `Line`: what is read.", "begin"),
        ("//! Names of models.", "noun"),
    ] {
        assert!(fault(head).is_some_and(|it| it.contains(wanted)), "{head}: {:?}", fault(head));
    }
}
