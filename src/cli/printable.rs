//! Escapes control characters in text from untrusted peers, so that it cannot control a terminal.

/// A stranger's words for one line of a terminal: what would steer it, or begin a line of its own,
/// is shown as an escape.
pub(super) fn printable(text: &str) -> String {
    printable_lines(text).replace('\n', "\\n").replace('\t', "\\t")
}

/// The same where lines and tabs are welcome. The escapes are those of JSON, where such characters
/// stand in strings only, so a line of JSON stays one.
pub(super) fn printable_lines(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match steers(c) {
            true => shown.push_str(&format!("\\u{:04x}", u32::from(c))),
            false => shown.push(c),
        }
    }
    shown
}

/// Whether a character moves a cursor, changes a terminal, or turns the order of those around it.
fn steers(c: char) -> bool {
    let is_control = c.is_control() && !matches!(c, '\n' | '\t');
    let is_direction = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}'
        | '\u{2066}'..='\u{2069}');
    is_control || is_direction || matches!(c, '\u{2028}' | '\u{2029}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_steers_a_terminal() {
        let words = "a\u{1b}[2J\u{9b}31m\u{7f}\r\u{202e}é\t日\n\u{2028}b";
        let lines = "a\\u001b[2J\\u009b31m\\u007f\\u000d\\u202eé\t日\n\\u2028b";
        assert_eq!(printable_lines(words), lines);
        assert_eq!(printable(words), lines.replace('\n', "\\n").replace('\t', "\\t"));
        // What JSON leaves raw comes back from its escape.
        let json = serde_json::json!({ "text": words }).to_string();
        let read: serde_json::Value = serde_json::from_str(&printable_lines(&json)).unwrap();
        assert_eq!(read["text"], words);
    }
}
