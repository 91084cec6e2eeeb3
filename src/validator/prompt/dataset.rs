//! Provides the passages of prompts: our own, or those of an operator's file.

use super::ours;
use crate::chance::Chance;
use anyhow::{Context, bail};
use serde::Deserialize;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// Bytes of a file, and of one line.
const FILE_BYTES_MAX: u64 = 2 << 30;
const LINE_BYTES_MAX: u64 = 1 << 20;
/// Passages of a file that are used: 200 MB where all have four bytes a character.
const PASSAGES_MAX: usize = 100_000;
/// Characters of a passage that are used: the rest would only make prompts long.
const PASSAGE_CHARS_MAX: usize = 500;

/// Where passages come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Passages {
    /// The passages that this program brings.
    Ours,
    /// Those of a file; at least one.
    File(Vec<String>),
}

/// Why a source cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// It cannot be read.
    #[error("{}: {what}", path.display())]
    File {
        /// The file of passages.
        path: PathBuf,
        /// Why it cannot be read, in the system's words.
        what: String,
    },
    /// A line is not as it must be.
    #[error("{}:{line}: {what}", path.display())]
    Line {
        /// The file of passages.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// The rule for a line, and what stands there.
        what: String,
    },
    /// A data set of the Hub.
    #[error(
        "dataset `{name}`: downloads of data sets from the Hub are not built; give a file of JSON \
         lines with a `text` or `conversations` field"
    )]
    Hub {
        /// Name of the data set on the Hub.
        name: String,
    },
}

/// One line. Other fields are allowed: data sets have many.
#[derive(Deserialize)]
struct Row {
    text: Option<String>,
    conversations: Option<Vec<Turn>>,
}

#[derive(Deserialize)]
struct Turn {
    #[serde(alias = "content")]
    value: String,
}

impl Row {
    fn passage(self) -> anyhow::Result<String> {
        let first = |turns: Vec<Turn>| turns.into_iter().next().map(|turn| turn.value);
        let text = match (self.text, self.conversations) {
            (Some(_), Some(_)) => bail!("must have `text` or `conversations`, and has both"),
            (None, None) => bail!("must have `text` or `conversations`, and has neither"),
            (Some(text), None) => text,
            (None, Some(turns)) => first(turns).context("`conversations` must not be empty")?,
        };
        match text.trim() {
            "" => bail!("the passage must not be empty"),
            text => Ok(shortened(text)),
        }
    }
}

/// As many whole words as fit.
fn shortened(text: &str) -> String {
    let Some((end, _)) = text.char_indices().nth(PASSAGE_CHARS_MAX) else { return text.to_owned() };
    let cut = &text[..end];
    cut.rsplit_once(char::is_whitespace).map_or(cut, |(words, _)| words).trim_end().to_owned()
}

impl Passages {
    /// Opens what an operator has named: nothing, a file, or a data set of the Hub (`owner/name`
    /// where there is no such file).
    ///
    /// # Errors
    /// The file and line, and rule and fact.
    pub fn open(named: Option<&str>) -> Result<Self, DatasetError> {
        let Some(named) = named else { return Ok(Passages::Ours) };
        let path = Path::new(named);
        let parts: Vec<&str> = named.split('/').collect();
        let is_name =
            parts.len() == 2 && parts.iter().all(|p| !p.is_empty() && !p.starts_with('.'));
        if is_name && !path.exists() && path.extension().is_none_or(|e| e != "jsonl") {
            return Err(DatasetError::Hub { name: named.to_owned() });
        }
        Self::read(path)
    }

    /// Reads a file of JSON lines; empty lines are passed over.
    fn read(path: &Path) -> Result<Self, DatasetError> {
        let failed = |what: String| DatasetError::File { path: path.to_owned(), what };
        let metadata = std::fs::metadata(path).map_err(|e| failed(e.to_string()))?;
        // A pipe or device may never end.
        if !metadata.is_file() {
            return Err(failed("it is not a file".into()));
        }
        if metadata.len() > FILE_BYTES_MAX {
            return Err(failed(format!(
                "must have at most {FILE_BYTES_MAX} bytes, got {}",
                metadata.len()
            )));
        }
        let mut reader = BufReader::new(File::open(path).map_err(|e| failed(e.to_string()))?);
        let (mut passages, mut buffer) = (Vec::new(), Vec::new());
        for line in 1.. {
            let wrong = |what: String| DatasetError::Line { path: path.to_owned(), line, what };
            buffer.clear();
            let mut bounded = (&mut reader).take(LINE_BYTES_MAX + 1);
            let read = bounded.read_until(b'\n', &mut buffer).map_err(|e| wrong(e.to_string()))?;
            if read == 0 {
                break;
            }
            if buffer.len() as u64 > LINE_BYTES_MAX {
                return Err(wrong(format!("a line must have at most {LINE_BYTES_MAX} bytes")));
            }
            if buffer.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            if passages.len() == PASSAGES_MAX {
                return Err(wrong(format!("a file must have at most {PASSAGES_MAX} passages")));
            }
            let row: Row = serde_json::from_slice(&buffer).map_err(|e| wrong(e.to_string()))?;
            passages.push(row.passage().map_err(|e| wrong(e.to_string()))?);
        }
        match passages.is_empty() {
            true => Err(failed("must have at least one passage".into())),
            false => Ok(Passages::File(passages)),
        }
    }

    pub(super) fn passage(&self, chance: &mut Chance) -> &str {
        match self {
            Passages::Ours => ours::passage(chance),
            Passages::File(passages) => &passages[chance.below(passages.len() as u64) as usize],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8]) -> Result<Vec<String>, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rows.jsonl");
        std::fs::write(&path, text).unwrap();
        match Passages::open(path.to_str()) {
            Ok(Passages::File(passages)) => Ok(passages),
            Ok(Passages::Ours) => panic!("a file was given"),
            Err(e) => Err(e.to_string().replace(&format!("{}/", directory.path().display()), "")),
        }
    }

    #[test]
    fn rows_of_both_shapes_are_read() {
        let text = "{\"text\": \" one \", \"id\": 3}\r\n\n\
            {\"conversations\": [{\"from\": \"human\", \"value\": \"two\"}, {\"value\": \"no\"}]}\n\
            {\"conversations\": [{\"role\": \"user\", \"content\": \"three\"}]}";
        assert_eq!(read(text.as_bytes()).unwrap(), ["one", "two", "three"]);
        let long = format!("{{\"text\": \"{}\"}}", "w\u{f6}rd ".repeat(300));
        let passage = &read(long.as_bytes()).unwrap()[0];
        assert!(passage.chars().count() <= PASSAGE_CHARS_MAX && passage.ends_with("w\u{f6}rd"));
    }

    #[test]
    fn errors_name_file_and_line() {
        for (text, error) in [
            ("", "rows.jsonl: must have at least one passage"),
            ("{\"text\": \"a\"}\n{\"text\": 3}", "rows.jsonl:2: invalid type: integer `3`"),
            ("{\"text\": \"a\"}\n\nnope", "rows.jsonl:3: expected"),
            ("{\"id\": 3}", "rows.jsonl:1: must have `text` or `conversations`, and has neither"),
            ("{\"text\": \"a\", \"conversations\": []}", "rows.jsonl:1: must have `text` or"),
            ("{\"conversations\": []}", "rows.jsonl:1: `conversations` must not be empty"),
            ("{\"text\": \" \"}", "rows.jsonl:1: the passage must not be empty"),
        ] {
            let got = read(text.as_bytes()).unwrap_err();
            assert!(got.starts_with(error), "{got}");
        }
        assert!(read(b"{\"text\": \"\xff\"}").unwrap_err().starts_with("rows.jsonl:1: "));
        let long = vec![b'x'; LINE_BYTES_MAX as usize + 1];
        assert!(
            read(&long).unwrap_err().contains("rows.jsonl:1: a line must have at most 1048576")
        );
    }

    #[test]
    fn names_are_files_or_refused_by_name() {
        assert_eq!(Passages::open(None).unwrap(), Passages::Ours);
        let hub = Passages::open(Some("owner/set")).unwrap_err();
        assert!(matches!(&hub, DatasetError::Hub { name } if name == "owner/set"));
        assert!(
            hub.to_string().contains("`owner/set`: downloads of data sets from the Hub are not")
        );
        for missing in ["missing/rows.jsonl", "./missing", "/missing/rows"] {
            let error = Passages::open(Some(missing)).unwrap_err();
            assert!(matches!(error, DatasetError::File { .. }), "{missing}: {error}");
        }
        let directory = tempfile::tempdir().unwrap();
        let error = Passages::open(directory.path().to_str()).unwrap_err();
        assert!(error.to_string().ends_with("it is not a file"), "{error}");
    }
}
