//! House rules as a test: ranks, circles, sizes, module heads, banned words, blobs.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

#[path = "tidy/circles.rs"]
mod circles;
#[path = "tidy/documents.rs"]
mod documents;
#[path = "tidy/heads.rs"]
mod heads;

use circles::Crate;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const FILE_LINES_MAX: usize = 500;
const FUNCTION_LINES_MAX: usize = 70;
const COLUMNS_MAX: usize = 100;
const BLOB_BYTES_MAX: u64 = 1 << 20;

/// The packages' sources. The arithmetic (`ops`) is a package below all modules of the program.
const SOURCES: [&str; 2] = ["src", "ops/src"];
/// All that is read for the rules of writing.
const ALL: [&str; 4] = ["src", "ops/src", "tests", "benches"];

/// A module uses `crate::` only what ranks lower; equals never import each other.
const RANKS: [(&str, u8); 28] = [
    ("main", 10),
    ("cli", 10),
    ("lifecycle", 9),
    ("config", 8),
    ("doctor", 9),
    ("miner", 7),
    ("overview", 7),
    ("verifier", 7),
    ("bench", 7),
    ("audit", 7),
    ("validator", 6),
    ("server", 6),
    ("store", 5),
    ("verify", 5),
    ("reply", 4),
    ("intake", 3),
    ("engine", 2),
    ("models", 1),
    ("chain", 1),
    ("chance", 1),
    ("update", 1),
    ("proof", 0),
    ("wire", 0),
    ("clock", 0),
    ("endpoint", 0),
    ("entropy", 0),
    ("files", 0),
    ("tls", 0),
];

/// Word, where it is allowed, and what to write instead.
const BANNED: [(&str, &[&str], &str); 13] = [
    ("dbg!", &[], "a log line, or nothing"),
    ("todo!", &[], "an error that says what is not built"),
    ("unimplemented!", &[], "an error that says what is not built"),
    ("FIXME", &[], "the fix"),
    ("XXX", &[], "the fix"),
    ("println!", &["benches/", "tests/"], "tracing, or the macros of `cli/out.rs`"),
    ("print!", &["benches/", "tests/"], "tracing, or the macros of `cli/out.rs`"),
    ("eprintln!", &["benches/", "tests/"], "tracing, or the macros of `cli/out.rs`"),
    ("Instant::now", &["src/clock.rs", "ops/src/pool.rs", "benches/", "tests/"], "a Clock"),
    ("unbounded_channel", &[], "a bounded channel"),
    ("thread_rng", &[], "a seeded generator"),
    (
        "Entropy::system",
        &["src/entropy.rs", "src/cli/", "src/server/state.rs", "tests/"],
        "a parameter",
    ),
    (
        "Uuid::new_v4",
        &["src/entropy.rs", "src/files.rs", "src/models/", "src/store/", "tests/"],
        "an \
      Entropy; names of temporary files need none",
    ),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(directory: &str, extensions: &[&str]) -> Vec<PathBuf> {
    let (mut found, mut open) = (Vec::new(), vec![root().join(directory)]);
    while let Some(directory) = open.pop() {
        let Ok(entries) = fs::read_dir(directory) else { continue };
        for path in entries.map(|e| e.unwrap().path()) {
            if path.is_dir() {
                open.push(path);
            } else if extensions.iter().any(|e| path.extension().is_some_and(|x| x == *e)) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn name(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().display().to_string()
}

fn is_test_file(path: &Path) -> bool {
    path.ends_with("tests.rs") || name(path).starts_with("tests/")
}

/// The lines before the unit tests. A declaration that is for tests alone (`mod tests;`) does not
/// end them: code may follow.
fn code_lines(text: &str) -> Vec<&str> {
    let (mut code, mut lines) = (Vec::new(), text.lines());
    while let Some(line) = lines.next() {
        if line.trim() != "#[cfg(test)]" {
            code.push(line);
        } else if !lines.next().is_some_and(|next| next.trim_end().ends_with(';')) {
            break;
        }
    }
    code
}

fn report(faults: Vec<String>) {
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn modules_depend_on_lower_ranks_only() {
    let ranks: BTreeMap<&str, u8> = RANKS.into_iter().collect();
    let mut faults = Vec::new();
    for path in files("src", &["rs"]) {
        let own = name(&path)["src/".len()..].split(['/', '.']).next().unwrap().to_owned();
        if own == "lib" {
            continue;
        }
        let Some(rank) = ranks.get(own.as_str()) else {
            faults.push(format!("{}: module `{own}` has no rank", name(&path)));
            continue;
        };
        let text = fs::read_to_string(&path).unwrap();
        for (number, line) in text.lines().enumerate() {
            for used in line.split("crate::").skip(1) {
                let used = used.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
                let Some(other) = ranks.get(used) else { continue };
                if used != own && other >= rank {
                    let place = format!("{}:{}", name(&path), number + 1);
                    faults.push(format!("{place}: `{own}` must not use `{used}`"));
                }
            }
        }
    }
    report(faults);
}

#[test]
fn files_do_not_use_each_other_in_circles() {
    let mut faults = Vec::new();
    for directory in SOURCES {
        let source = root().join(directory);
        let read = |path: PathBuf| {
            let text = fs::read_to_string(&path).unwrap();
            (path.strip_prefix(&source).unwrap().to_owned(), text)
        };
        let files = files(directory, &["rs"]).into_iter().map(read).collect();
        let circles = Crate::new(files).circles();
        faults.extend(circles.iter().map(|way| format!("{directory}: a circle of files: {way}")));
    }
    report(faults);
}

#[test]
fn files_functions_and_lines_are_short() {
    let mut faults = Vec::new();
    for path in ALL.iter().flat_map(|d| files(d, &["rs"])) {
        let text = fs::read_to_string(&path).unwrap();
        for (number, line) in text.lines().enumerate() {
            let is_literal = line.contains("Split(") || line.contains("_SPLIT: &str");
            if line.chars().count() > COLUMNS_MAX && !is_literal {
                faults.push(format!("{}:{}: over {COLUMNS_MAX} columns", name(&path), number + 1));
            }
        }
        let lines = code_lines(&text);
        if lines.len() > FILE_LINES_MAX && !is_test_file(&path) {
            faults.push(format!(
                "{}: {} lines, at most {FILE_LINES_MAX}",
                name(&path),
                lines.len()
            ));
        }
        faults.extend(long_functions(&path, &lines));
    }
    report(faults);
}

/// A function reaches from its `fn` line to the closing brace of the same indentation.
fn long_functions(path: &Path, lines: &[&str]) -> Vec<String> {
    let mut faults = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let trimmed = line.trim_start();
        let is_function = trimmed.starts_with("fn ")
            || ["pub fn ", "pub async fn ", "async fn ", "unsafe fn ", "pub unsafe fn "]
                .iter()
                .any(|p| trimmed.starts_with(p))
            || (trimmed.starts_with("pub(") && trimmed.contains(" fn "));
        if !is_function || trimmed.ends_with(';') {
            continue;
        }
        let indent = line.len() - trimmed.len();
        let end = lines[start..].iter().position(|l| {
            l.len() - l.trim_start().len() == indent && l.trim_start().starts_with('}')
        });
        let count = end.map_or(1, |end| end + 1);
        if count > FUNCTION_LINES_MAX {
            let place = format!("{}:{}", name(path), start + 1);
            faults.push(format!(
                "{place}: a function of {count} lines, at most {FUNCTION_LINES_MAX}"
            ));
        }
    }
    faults
}

#[test]
fn every_module_says_what_it_does() {
    let mut faults = Vec::new();
    let all = SOURCES.iter().flat_map(|d| files(d, &["rs"]));
    for path in all.filter(|path| !is_test_file(path)) {
        let fault = heads::fault(&fs::read_to_string(&path).unwrap());
        faults.extend(fault.map(|fault| format!("{}: {fault}", name(&path))));
    }
    report(faults);
}

#[test]
fn banned_words_stay_out() {
    let mut faults = Vec::new();
    for path in ALL.iter().flat_map(|d| files(d, &["rs"])) {
        let place = name(&path);
        if place == "tests/tidy.rs" {
            continue;
        }
        for (number, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            for (word, allowed, instead) in BANNED {
                let inside_word =
                    |at: usize| line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
                let found = line.match_indices(word).any(|(at, _)| !inside_word(at));
                if found && !allowed.iter().any(|a| place.starts_with(a)) {
                    faults.push(format!("{place}:{}: `{word}`; write {instead}", number + 1));
                }
            }
        }
    }
    report(faults);
}

/// Whether a type is a bare text, or a tuple that ends in one.
fn is_text(error: &str) -> bool {
    let last = match error.strip_prefix('(').and_then(|inside| inside.strip_suffix(')')) {
        Some(inside) => inside.rsplit(',').next().unwrap_or("").trim(),
        None => error,
    };
    matches!(last, "String" | "&str" | "&'static str")
}

/// Whether a line names a `Result` whose error is a bare text.
fn has_text_for_error(line: &str) -> bool {
    line.match_indices("Result<").any(|(at, name)| {
        let (mut depth, mut last, mut before) = (0, None, ' ');
        let inside = &line[at + name.len()..];
        for (place, c) in inside.char_indices() {
            match c {
                '<' | '(' | '[' => depth += 1,
                '>' if before == '-' => {} // the arrow of a function's type
                '>' if depth == 0 => {
                    let error = last.map(|from: usize| inside[from..place].trim());
                    return error.is_some_and(is_text);
                }
                '>' | ')' | ']' => depth -= 1,
                ',' if depth == 0 => last = Some(place + 1),
                _ => {}
            }
            before = c;
        }
        false
    })
}

#[test]
fn errors_are_types() {
    let mut faults = Vec::new();
    let all = SOURCES.iter().flat_map(|d| files(d, &["rs"]));
    for path in all.filter(|path| !is_test_file(path)) {
        let text = fs::read_to_string(&path).unwrap();
        for (number, line) in code_lines(&text).into_iter().enumerate() {
            if has_text_for_error(line) {
                let place = format!("{}:{}", name(&path), number + 1);
                faults.push(format!("{place}: an error is a type, or `anyhow` above rank 3"));
            }
        }
    }
    report(faults);
}

#[test]
fn a_text_for_an_error_is_seen() {
    for line in [
        "fn read(text: &str) -> Result<u64, String> {",
        "fn read() -> Result<Vec<(u8, String)>, &'static str>;",
        "    Done(Result<Option<Box<dyn Fn(u8) -> bool>>, String>),",
        "fn f() -> impl Future<Output = Result<(), String>> + Send;",
        "fn check(&self) -> Result<(), (&'static str, String)> {",
    ] {
        assert!(has_text_for_error(line), "{line}");
    }
    for line in [
        "fn read(text: &str) -> Result<String, ReadError> {",
        "fn f() -> Result<BTreeMap<u16, String>, StoreError>;",
        "fn f() -> Result<(u8, String), (String, ReadError)>;",
        "fn f() -> anyhow::Result<String> {",
    ] {
        assert!(!has_text_for_error(line), "{line}");
    }
}

#[test]
fn no_large_file_is_tracked() {
    let output = std::process::Command::new("git").arg("ls-files").current_dir(root()).output();
    // A source archive has no git; there is nothing to check in it.
    let Some(output) = output.ok().filter(|o| o.status.success()) else { return };
    let large = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .filter(|f| fs::metadata(root().join(f)).is_ok_and(|m| m.len() > BLOB_BYTES_MAX))
        .collect::<Vec<_>>();
    report(large.into_iter().map(|f| format!("{f}: above {BLOB_BYTES_MAX} bytes")).collect());
}

#[test]
fn what_documents_name_is_there() {
    let guides = files("docs", &["md"]);
    let others = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "deploy/README.md"];
    let mut faults = Vec::new();
    for document in guides.into_iter().chain(others.map(|file| root().join(file))) {
        let text = fs::read_to_string(&document).unwrap();
        let benches = documents::benches(&text).into_iter().map(|b| format!("benches/{b}.rs"));
        let named = documents::paths(&text).into_iter().chain(benches);
        let missing = named.filter(|path| !root().join(path).exists());
        faults.extend(missing.map(|path| format!("{}: there is no {path}", name(&document))));
    }
    report(faults);
}
