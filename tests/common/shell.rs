//! The commands that README and guides show.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test uses its part")]

use std::path::{Path, PathBuf};

/// README, guides, and what is deployed by.
pub fn documents() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = vec![root.join("README.md"), root.join("deploy/README.md")];
    let guides = std::fs::read_dir(root.join("docs")).unwrap().map(|e| e.unwrap().path());
    found.extend(guides.filter(|p| p.extension().is_some_and(|e| e == "md")));
    found
}

/// The lines of shell blocks; a backslash at the end goes on with the next.
pub fn shell_lines(text: &str) -> Vec<String> {
    let (mut lines, mut is_shell, mut open) = (Vec::new(), false, String::new());
    for line in text.lines() {
        match line.trim_start().strip_prefix("```") {
            Some(language) => is_shell = !is_shell && language == "sh",
            None if !is_shell => {}
            None => match line.strip_suffix('\\') {
                Some(part) => open += part,
                None => lines.push(std::mem::take(&mut open) + line),
            },
        }
    }
    lines
}

/// The words of a command up to a pipe, a redirection, a comment or another command.
pub fn words(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in text.chars() {
        match (c, quote) {
            (c, Some(q)) if c == q => quote = None,
            ('"' | '\'', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            ('|' | '>' | '&' | ';', None) => break,
            ('#', None) if word.is_none() => break,
            (c, None) if c.is_whitespace() => words.extend(word.take()),
            (c, _) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// The commands of this program in a line, each with its arguments.
pub fn commands(line: &str) -> Vec<Vec<String>> {
    let starts = line.match_indices("targon-engine ").map(|(at, _)| at);
    let is_called = |at: &usize| {
        let before = &line[..*at];
        let before = before.strip_suffix("target/release/").unwrap_or(before).trim_end();
        before.is_empty() || before.ends_with("&&")
    };
    starts.filter(is_called).map(|at| words(&line[at..])).collect()
}
