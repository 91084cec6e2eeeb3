//! Reads a file of captured answers, one a line, each when its turn comes, and appends to one.
//!
//! A line that holds no captured answer, or is longer than [`LINE_BYTES_MAX`], is given as the
//! [`Rejection`] that says so, and the next one is read: it holds the peer's bytes. Only a file
//! that the system cannot read is an error.

use super::capture::Capture;
use super::{Reason, Rejection};
use crate::files;
use serde::Serialize;
use serde_json::Value;
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// Bytes of a line: more than `query` keeps of an answer, however it is escaped.
pub const LINE_BYTES_MAX: usize = 256 << 20;

/// A line of a file, written as `file:line`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    /// The file of captured answers.
    pub path: PathBuf,
    /// Number of the line, from 1 on.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.path.display(), self.line)
    }
}

/// Why a file of captured answers is not read, or not read on.
#[derive(Debug, thiserror::Error)]
pub enum CapturesError {
    /// It cannot be opened.
    #[error("{} cannot be read: {source}", path.display())]
    Open {
        /// The file of captured answers.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The system stopped in the middle of it.
    #[error("{place} cannot be read: {source}")]
    Line {
        /// The line that could not be read.
        place: Place,
        /// What the system says.
        source: io::Error,
    },
    /// Nothing can be added to it.
    #[error("{} cannot be written: {source}", path.display())]
    Write {
        /// The file that captures are added to.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// A streamed answer, as a line of a file.
#[derive(Serialize, Debug)]
pub struct CapturedStream<'a> {
    /// The body of the request.
    pub request: &'a Value,
    /// The events as they came.
    pub chunks: Vec<&'a Value>,
    /// When each of them was read, in milliseconds since the request was sent.
    pub at_ms: Vec<u64>,
    /// When it was asked, in milliseconds since 1970.
    pub asked_ms: u64,
    /// The hotkey that must have signed the proof, as SS58.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotkey: Option<String>,
}

impl CapturedStream<'_> {
    /// Adds the line to the file, which is made where there is none.
    ///
    /// # Errors
    /// When it cannot be opened or written; nothing of the line is then in it.
    pub fn append_to(&self, path: &Path) -> Result<(), CapturesError> {
        let failed = |source| CapturesError::Write { path: path.to_owned(), source };
        let line = serde_json::to_vec(self).map_err(|e| failed(e.into()))?;
        files::append_line(path, &line).map_err(failed)
    }
}

/// A line, and what was captured in it or why it is not a captured answer.
#[derive(Clone, Debug)]
pub struct CapturedLine {
    /// File and line.
    pub place: Place,
    /// What it holds.
    pub capture: Result<Capture, Rejection>,
}

/// A file of captured answers.
pub struct Captures {
    path: PathBuf,
    file: BufReader<File>,
    number: usize,
    line_bytes_max: usize,
}

impl Captures {
    /// Opens the file; reads nothing yet.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(path: &Path) -> Result<Self, CapturesError> {
        let file = File::open(path)
            .map_err(|source| CapturesError::Open { path: path.to_owned(), source })?;
        Ok(Self {
            path: path.to_owned(),
            file: BufReader::new(file),
            number: 0,
            line_bytes_max: LINE_BYTES_MAX,
        })
    }

    /// The next line that is not blank; `None` at the end.
    fn line(&mut self) -> Result<Option<CapturedLine>, CapturesError> {
        loop {
            self.number += 1;
            let place = Place { path: self.path.clone(), line: self.number };
            let capture = match self.read() {
                Ok(None) => return Ok(None),
                Ok(Some(Some(line))) if line.trim_ascii().is_empty() => continue,
                Ok(Some(Some(line))) => Capture::parse(&line),
                Ok(Some(None)) => {
                    let most = self.line_bytes_max;
                    let what = format!("a line has at most {most} bytes, this has more");
                    Err(Rejection::new(Reason::BadStream, what))
                }
                Err(source) => return Err(CapturesError::Line { place, source }),
            };
            return Ok(Some(CapturedLine { place, capture }));
        }
    }

    /// The next line, if there is one; nothing of it where it is too long.
    fn read(&mut self) -> io::Result<Option<Option<Vec<u8>>>> {
        let mut line = Vec::new();
        let limit = self.line_bytes_max as u64 + 1;
        if self.file.by_ref().take(limit).read_until(b'\n', &mut line)? == 0 {
            return Ok(None);
        }
        if line.len() <= self.line_bytes_max || line.ends_with(b"\n") {
            return Ok(Some(Some(line)));
        }
        loop {
            line.clear();
            let read = self.file.by_ref().take(limit).read_until(b'\n', &mut line)?;
            if read == 0 || line.ends_with(b"\n") {
                return Ok(Some(None));
            }
        }
    }
}

impl Iterator for Captures {
    type Item = Result<CapturedLine, CapturesError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.line().transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::fs;

    #[test]
    fn every_line_has_its_place_and_a_bad_one_ends_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.jsonl");
        let good = r#"{"request": {"model": "m"}, "response": {}}"#;
        let neither = r#"{"request": {}}"#;
        fs::write(&path, format!("{good}\n\n  \nno JSON\n{neither}\n{good}")).unwrap();
        let lines: Vec<_> = Captures::open(&path).unwrap().map(Result::unwrap).collect();
        let places: Vec<usize> = lines.iter().map(|line| line.place.line).collect();
        assert_eq!(places, [1, 4, 5, 6]);
        assert_eq!(lines[1].place.to_string(), format!("{}:4", path.display()));
        assert_eq!(lines[3].capture.as_ref().unwrap().model(), Some("m"));
        for (line, want) in [(1, "expected ident"), (2, "either `response` or `chunks`")] {
            let rejection = lines[line].capture.as_ref().unwrap_err();
            assert_eq!(rejection.reason, Reason::BadStream);
            assert!(rejection.what.contains(want), "{rejection}");
        }
    }

    #[test]
    fn what_is_appended_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.jsonl");
        let request = json!({"model": "m"});
        let chunks = [json!({"choices": []}), json!({"usage": null})];
        for hotkey in [None, Some("5F".to_owned())] {
            let (chunks, at_ms) = (chunks.iter().collect(), vec![3, 5]);
            let stream = CapturedStream { request: &request, chunks, at_ms, asked_ms: 7, hotkey };
            stream.append_to(&path).unwrap();
        }
        let captures = Captures::open(&path).unwrap().map(|line| line.unwrap().capture.unwrap());
        let read = captures.map(|c| (c.request.clone(), c.miner().map(str::to_owned)));
        assert_eq!(
            read.collect::<Vec<_>>(),
            [(request.clone(), None), (request, Some("5F".to_owned()))]
        );
        let absent = dir.path().join("absent/c.jsonl");
        let stream = CapturedStream {
            request: &json!({}),
            chunks: vec![],
            at_ms: vec![],
            asked_ms: 0,
            hotkey: None,
        };
        let error = stream.append_to(&absent).unwrap_err().to_string();
        assert!(error.contains("absent/c.jsonl cannot be written: "), "{error}");
    }

    #[test]
    fn a_line_that_is_too_long_is_skipped_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.jsonl");
        let (exact, good) = ("x".repeat(40), r#"{"request": {}, "chunks": []}"#);
        fs::write(&path, format!("{exact}\n{}\n{good}\n{exact}x", "x".repeat(1000))).unwrap();
        let captures = Captures { line_bytes_max: 40, ..Captures::open(&path).unwrap() };
        let lines: Vec<_> = captures.map(Result::unwrap).collect();
        let fault = |line: usize| lines[line].capture.as_ref().map_err(|e| e.what.as_str());
        assert_eq!(lines.len(), 4);
        assert!(fault(0).unwrap_err().contains("not a captured answer"));
        let long = "a line has at most 40 bytes, this has more";
        assert_eq!((fault(1).err(), fault(3).err()), (Some(long), Some(long)));
        assert!(fault(2).is_ok() && lines[2].place.line == 3);
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named_with_the_line() {
        let dir = tempfile::tempdir().unwrap();
        let absent = dir.path().join("absent");
        let error = Captures::open(&absent).err().unwrap().to_string();
        assert!(error.starts_with(&format!("{} cannot be read: ", absent.display())), "{error}");
        // A directory opens, but cannot be read.
        let error = Captures::open(dir.path()).unwrap().next().unwrap().unwrap_err().to_string();
        assert!(error.starts_with(&format!("{}:1 cannot be read: ", dir.path().display())));
    }
}
