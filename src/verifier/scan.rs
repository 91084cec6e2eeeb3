//! Finds where values of a JSON text begin and end, whatever they are: the text was written by the
//! caller, values in it by a peer. Python writes `NaN` and halves of surrogate pairs for what a
//! peer can send, which no strict parser takes, and that must not make the whole text unreadable.

use std::ops::Range;

/// What is wrong with a text, and at which byte of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum ScanError {
    #[error("a key is expected at byte {0}")]
    Key(usize),
    #[error("`{0}` is expected at byte {1}")]
    Byte(char, usize),
    #[error("a whole value is expected at byte {0}")]
    Value(usize),
    #[error("the string at byte {0} has no end")]
    String(usize),
    #[error("nothing is expected after byte {0}")]
    More(usize),
}

/// The values of a JSON object by their keys, in order.
///
/// # Errors
/// Where the text is not one object and nothing else.
pub(super) fn members(text: &[u8]) -> Result<Vec<(String, Range<usize>)>, ScanError> {
    let mut at = Cursor { text, at: 0 };
    let mut members = Vec::new();
    at.expect(b'{')?;
    if at.peek() != Some(b'}') {
        loop {
            let key = at.value()?;
            let key: String = serde_json::from_slice(&text[key.clone()])
                .map_err(|_| ScanError::Key(key.start))?;
            at.expect(b':')?;
            members.push((key, at.value()?));
            if at.peek() != Some(b',') {
                break;
            }
            at.expect(b',')?;
        }
    }
    at.expect(b'}')?;
    match at.peek() {
        None => Ok(members),
        Some(_) => Err(ScanError::More(at.at)),
    }
}

/// The elements of a JSON array, one after the other, up to the first error.
pub(super) struct Elements<'a> {
    cursor: Cursor<'a>,
    is_first: bool,
    is_over: bool,
}

impl<'a> Elements<'a> {
    /// Of a text that must begin as an array.
    pub(super) fn new(text: &'a [u8]) -> Option<Self> {
        let mut cursor = Cursor { text, at: 0 };
        cursor.expect(b'[').ok()?;
        Some(Self { cursor, is_first: true, is_over: false })
    }
}

impl<'a> Iterator for Elements<'a> {
    type Item = Result<&'a [u8], ScanError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over || self.cursor.peek() == Some(b']') {
            return None;
        }
        let element = self.element();
        self.is_over = element.is_err();
        Some(element)
    }
}

impl<'a> Elements<'a> {
    fn element(&mut self) -> Result<&'a [u8], ScanError> {
        if !std::mem::replace(&mut self.is_first, false) {
            self.cursor.expect(b',')?;
        }
        self.cursor.value().map(|range| &self.cursor.text[range])
    }
}

struct Cursor<'a> {
    text: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    /// The next byte that is not a blank.
    fn peek(&mut self) -> Option<u8> {
        while self.text.get(self.at).is_some_and(|b| b" \t\r\n".contains(b)) {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    fn expect(&mut self, byte: u8) -> Result<(), ScanError> {
        match self.peek() == Some(byte) {
            true => self.at += 1,
            false => return Err(ScanError::Byte(char::from(byte), self.at)),
        }
        Ok(())
    }

    /// The value that begins here: to the bracket that closes it, to the end of its string, or to
    /// what may follow a number or word.
    fn value(&mut self) -> Result<Range<usize>, ScanError> {
        let first = self.peek();
        let start = self.at;
        let mut depth = 0_usize;
        while let Some(byte) = self.text.get(self.at) {
            match byte {
                b'"' => self.string()?,
                b'{' | b'[' => {
                    depth += 1;
                    self.at += 1;
                }
                b'}' | b']' if depth > 0 => {
                    depth -= 1;
                    self.at += 1;
                }
                b'}' | b']' | b',' | b':' if depth == 0 => break,
                b' ' | b'\t' | b'\r' | b'\n' if depth == 0 => break,
                _ => {
                    self.at += 1;
                    continue;
                }
            }
            if depth == 0 && matches!(first, Some(b'"' | b'{' | b'[')) {
                break;
            }
        }
        match self.at > start && depth == 0 {
            true => Ok(start..self.at),
            false => Err(ScanError::Value(start)),
        }
    }

    /// Goes behind the string that begins here.
    fn string(&mut self) -> Result<(), ScanError> {
        let start = self.at;
        self.at += 1;
        while let Some(byte) = self.text.get(self.at) {
            match byte {
                b'"' => {
                    self.at += 1;
                    return Ok(());
                }
                b'\\' => self.at += 2,
                _ => self.at += 1,
            }
        }
        self.at = self.text.len();
        Err(ScanError::String(start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn all(text: &str) -> Result<Vec<(String, &str)>, String> {
        let found = members(text.as_bytes()).map_err(|e| e.to_string())?;
        Ok(found.into_iter().map(|(key, range)| (key, &text[range])).collect())
    }

    fn elements(text: &str) -> Result<Vec<&str>, String> {
        let elements = Elements::new(text.as_bytes()).ok_or("no array")?;
        let text = |e: Result<_, ScanError>| {
            e.map(|b| std::str::from_utf8(b).unwrap()).map_err(|e| e.to_string())
        };
        elements.map(text).collect()
    }

    #[test]
    fn values_that_are_no_json_have_their_place_all_the_same() {
        let text = r#" {"a": NaN, "b\u0041" :[-Infinity,{"x":"]}\"["}, "\ud800"] , "c":1e999}"#;
        let found = all(text).unwrap();
        let want = [("a", "NaN"), ("bA", r#"[-Infinity,{"x":"]}\"["}, "\ud800"]"#), ("c", "1e999")];
        assert_eq!(found, want.map(|(key, value)| (key.to_owned(), value)));
        let parts = elements(found[1].1).unwrap();
        assert_eq!(parts, ["-Infinity", r#"{"x":"]}\"["}"#, r#""\ud800""#]);
        assert_eq!(all("{}").unwrap(), []);
        assert_eq!(elements(" [ ] ").unwrap(), [""; 0]);
    }

    #[test]
    fn what_is_no_object_is_refused_at_its_place() {
        let deep = "[".repeat(1 << 20);
        for (text, want) in [
            ("", "`{` is expected at byte 0"),
            ("[]", "`{` is expected at byte 0"),
            ("{\"a\" 1}", "`:` is expected at byte 5"),
            ("{\"a\":}", "a whole value is expected at byte 5"),
            ("{\"a\":1,}", "a whole value is expected at byte 7"),
            ("{a:1}", "a key is expected at byte 1"),
            ("{\"a\":[1}", "`}` is expected at byte 8"),
            ("{\"a\":\"x\\", "the string at byte 5 has no end"),
            ("{} {}", "nothing is expected after byte 3"),
            (&format!("{{\"a\":{deep}"), "a whole value is expected at byte 5"),
        ] {
            assert_eq!(all(text).unwrap_err(), want, "{text:.40}");
        }
        assert_eq!(elements("[1 2]").unwrap_err(), "`,` is expected at byte 3");
        assert_eq!(elements("[1,]").unwrap_err(), "a whole value is expected at byte 3");
        // An error is one element, and the last.
        for text in ["[1 2]", "[1,]", "[1,2", "[\"x"] {
            let all: Vec<_> = Elements::new(text.as_bytes()).unwrap().take(100).collect();
            let errors = all.iter().filter(|element| element.is_err()).count();
            assert!(errors == 1 && all.last().unwrap().is_err(), "{text}: {all:?}");
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map(any::<String>(), inner, 0..5)
                    .prop_map(|map| json!(map)),
            ]
        })
    }

    proptest! {
        #[test]
        fn whole_texts_come_apart_as_they_were_put_together(
            map in prop::collection::btree_map(any::<String>(), any_json(), 0..5),
            list in prop::collection::vec(any_json(), 0..5),
            pretty in any::<bool>(),
        ) {
            let write = |value: &Value| match pretty {
                true => serde_json::to_string_pretty(value).unwrap(),
                false => value.to_string(),
            };
            let read = |text: &str| serde_json::from_str::<Value>(text).unwrap();
            let text = write(&json!(map));
            let found: Vec<(String, Value)> =
                all(&text).unwrap().into_iter().map(|(key, text)| (key, read(text))).collect();
            prop_assert_eq!(found, map.into_iter().collect::<Vec<_>>());
            let text = write(&json!(list));
            let found: Vec<Value> = elements(&text).unwrap().into_iter().map(read).collect();
            prop_assert_eq!(found, list);
        }

        #[test]
        fn any_bytes_end(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = members(&bytes);
            if let Some(elements) = Elements::new(&bytes) {
                for element in elements.take(100) {
                    if element.is_err() {
                        break;
                    }
                }
            }
        }
    }
}
