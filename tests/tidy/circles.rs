//! Which file uses which: paths after `use`, and paths in code that begin with `crate`, `super`,
//! `self` or a child module. A name that a module's own file only hands on (`pub use child::Name`)
//! leads to the child, so such a file may stand above its children; one that also uses what they
//! hold, while they use what it defines, is part of a circle like any other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A path of the crate from its root, by segments.
type Segments = Vec<String>;

/// One `use`, or one path in code.
struct Used {
    path: Segments,
    /// The name that it has here.
    name: String,
    is_import: bool,
    is_handed_on: bool,
}

/// The files of a crate by module, and what each of them names.
pub(crate) struct Crate {
    files: BTreeMap<Segments, PathBuf>,
    used: BTreeMap<Segments, Vec<Used>>,
    words: BTreeMap<Segments, BTreeMap<String, usize>>,
}

impl Crate {
    /// Of `files`, each a path below `src` and its text.
    pub(crate) fn new(files: Vec<(PathBuf, String)>) -> Self {
        let texts: BTreeMap<Segments, (PathBuf, String)> =
            files.into_iter().map(|(path, text)| (module_of(&path), (path, text))).collect();
        let modules: BTreeSet<Segments> = texts.keys().cloned().collect();
        let mut all =
            Self { files: BTreeMap::new(), used: BTreeMap::new(), words: BTreeMap::new() };
        for (module, (path, text)) in texts {
            let tokens = tokens(&text);
            let mut words = BTreeMap::new();
            tokens.iter().for_each(|t| *words.entry(t.clone()).or_insert(0) += 1);
            all.used.insert(module.clone(), used(&tokens, &module, &modules));
            all.words.insert(module.clone(), words);
            all.files.insert(module, path);
        }
        all
    }

    /// The file that a path leads to, past names that were handed on.
    fn file_of(&self, path: &[String], depth: usize) -> Option<Segments> {
        let known = (0..=path.len()).rev().find(|n| self.files.contains_key(&path[..*n]))?;
        let module = path[..known].to_vec();
        let (Some(name), true) = (path.get(known), depth < 8) else { return Some(module) };
        let mut imports = self.used[&module].iter().filter(|u| u.is_import);
        match imports.find(|u| u.name == *name) {
            Some(import) => {
                let rest = path[known + 1..].iter().cloned();
                let whole: Segments = import.path.iter().cloned().chain(rest).collect();
                self.file_of(&whole, depth + 1)
            }
            None => Some(module),
        }
    }

    /// Every file with those that it uses, and by which path.
    fn edges(&self) -> BTreeMap<Segments, BTreeMap<Segments, String>> {
        let mut edges: BTreeMap<Segments, BTreeMap<Segments, String>> = BTreeMap::new();
        for (module, all) in &self.used {
            for one in all {
                let Some(target) = self.file_of(&one.path, 0) else { continue };
                let is_child = target.starts_with(module) && target != *module;
                let is_only_handed_on =
                    is_child && one.is_handed_on && self.words[module].get(&one.name) <= Some(&1);
                if target != *module && !target.is_empty() && !is_only_handed_on {
                    let from = edges.entry(module.clone()).or_default();
                    from.entry(target).or_insert_with(|| one.path.join("::"));
                }
            }
        }
        edges
    }

    /// Every circle: one way around it in words.
    pub(crate) fn circles(&self) -> Vec<String> {
        let edges = self.edges();
        let reach: BTreeMap<&Segments, _> = edges.keys().map(|m| (m, reached(&edges, m))).collect();
        let mut left: BTreeSet<&Segments> = edges.keys().collect();
        let mut circles = Vec::new();
        while let Some(first) = left.pop_first() {
            let comes_back =
                |other: &&Segments| reach.get(other).is_some_and(|all| all.contains_key(first));
            let together: BTreeSet<&Segments> =
                reach[first].keys().copied().filter(comes_back).collect();
            if together.is_empty() {
                continue;
            }
            let way = way_back(&edges, first);
            let shown = way.iter().map(|m| self.files[*m].display().to_string());
            let steps: Vec<String> =
                way.windows(2).map(|pair| format!("`{}`", edges[pair[0]][pair[1]])).collect();
            let words =
                format!("{} ({})", shown.collect::<Vec<_>>().join(" -> "), steps.join(", "));
            left.retain(|module| !together.contains(module));
            circles.push(words);
        }
        circles
    }
}

type Edges = BTreeMap<Segments, BTreeMap<Segments, String>>;

/// Everything that `first` leads to in one step or more, with the step before it.
fn reached<'a>(edges: &'a Edges, first: &'a Segments) -> BTreeMap<&'a Segments, &'a Segments> {
    let (mut before, mut open) = (BTreeMap::new(), std::collections::VecDeque::from([first]));
    while let Some(module) = open.pop_front() {
        for next in edges.get(module).into_iter().flatten().map(|(next, _)| next) {
            if !before.contains_key(next) {
                before.insert(next, module);
                open.push_back(next);
            }
        }
    }
    before
}

/// A shortest way from `first` back to it.
fn way_back<'a>(edges: &'a Edges, first: &'a Segments) -> Vec<&'a Segments> {
    let before = reached(edges, first);
    let mut way = vec![first];
    let mut at = first;
    while let Some(previous) = before.get(at) {
        way.push(previous);
        at = previous;
        if at == first {
            break;
        }
    }
    way.reverse();
    way
}

fn module_of(path: &Path) -> Segments {
    let path = path.with_extension("");
    let mut segments: Segments =
        path.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    match segments.last().map(String::as_str) {
        Some("mod") => drop(segments.pop()),
        Some("lib") if segments.len() == 1 => segments.clear(),
        _ => {}
    }
    segments
}

/// The code of a file without its unit tests.
fn without_tests(text: &str) -> String {
    let (mut code, mut lines) = (String::new(), text.lines());
    while let Some(line) = lines.next() {
        if line.trim() == "#[cfg(test)]" {
            match lines.next() {
                // One declaration; what follows is code again.
                Some(next) if next.trim_end().ends_with(';') => continue,
                _ => break,
            }
        }
        code.push_str(line);
        code.push('\n');
    }
    code
}

/// Words, `::` and single characters of the code, without comments, texts and tests.
fn tokens(text: &str) -> Vec<String> {
    let (code, mut tokens) = (without_tests(text), Vec::new());
    let mut rest = code.as_str();
    while let Some(c) = rest.chars().next() {
        let until = |end: &str| rest[1..].find(end).map_or(rest.len(), |at| 1 + at + end.len());
        let length = match c {
            '/' if rest.starts_with("//") => until("\n"),
            '"' => text_length(rest),
            'r' if rest.starts_with("r\"") => 2 + rest[2..].find('"').map_or(0, |at| at + 1),
            'r' if rest.starts_with("r#\"") => until("\"#"),
            // A character or a lifetime.
            '\'' if rest[1..].starts_with('\\') => 2 + rest[2..].find('\'').map_or(0, |at| at + 1),
            '\'' => match rest.char_indices().nth(2) {
                Some((at, '\'')) => at + 1,
                _ => 1,
            },
            'A'..='Z' | 'a'..='z' | '0'..='9' | '_' => {
                rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())
            }
            ':' if rest.starts_with("::") => 2,
            c => c.len_utf8(),
        };
        let token = &rest[..length];
        let is_code = !token.trim().is_empty() && !token.contains(['"', '\'', '/']);
        if is_code {
            tokens.push(token.to_owned());
        }
        rest = &rest[length..];
    }
    tokens
}

/// Bytes of the text that `rest` begins with, quotes included.
fn text_length(rest: &str) -> usize {
    let mut is_escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// What a file names, from its tokens.
fn used(tokens: &[String], module: &Segments, modules: &BTreeSet<Segments>) -> Vec<Used> {
    let is_child = |name: &str| {
        let child: Segments = module.iter().cloned().chain([name.to_owned()]).collect();
        !module.is_empty() && modules.contains(&child)
    };
    let is_root = |name: &str| matches!(name, "crate" | "super" | "self") || is_child(name);
    let (mut all, mut at) = (Vec::new(), 0);
    while at < tokens.len() {
        let before = at.checked_sub(1).map_or("", |at| tokens[at].as_str());
        // `pub(in crate::x)` says who sees a name, and uses nothing.
        if tokens[at] == "in" && before == "(" {
            at += tokens[at..].iter().position(|t| t == ")").unwrap_or(0);
        } else if tokens[at] == "use" {
            let end = at + tokens[at..].iter().position(|t| t == ";").unwrap_or(0);
            for (path, name) in expand(&tokens[at + 1..end]) {
                if let Some(path) = path.first().filter(|f| is_root(f)).map(|_| &path) {
                    let path = absolute(path, module, &is_child);
                    let is_handed_on = matches!(before, "pub" | ")");
                    all.push(Used { path, name, is_import: true, is_handed_on });
                }
            }
            at = end;
        } else if is_root(&tokens[at]) && !matches!(before, "::" | "." | "mod") {
            let mut path = vec![tokens[at].clone()];
            while tokens.get(at + 1).is_some_and(|t| t == "::") && at + 2 < tokens.len() {
                path.push(tokens[at + 2].clone());
                at += 2;
            }
            if path.len() > 1 {
                let (path, name) = (absolute(&path, module, &is_child), String::new());
                all.push(Used { path, name, is_import: false, is_handed_on: false });
            }
        }
        at += 1;
    }
    all
}

/// The paths of a `use`, each with the name that it gets.
fn expand(tree: &[String]) -> Vec<(Segments, String)> {
    let Some(open) = tree.iter().position(|t| t == "{") else {
        let words: Vec<&String> = tree.iter().filter(|t| *t != "::").collect();
        let alias = words.iter().position(|t| *t == "as");
        let path: Segments =
            words[..alias.unwrap_or(words.len())].iter().map(|w| (*w).clone()).collect();
        let name = words.last().map(|w| (*w).clone()).unwrap_or_default();
        // `x::{self}` names x.
        let is_self = path.len() > 1 && path.last().is_some_and(|last| last == "self");
        let path = if is_self { path[..path.len() - 1].to_vec() } else { path };
        let name = if is_self { path.last().cloned().unwrap_or_default() } else { name };
        return if path.is_empty() { Vec::new() } else { vec![(path, name)] };
    };
    let (mut all, mut depth, mut start) = (Vec::new(), 0, open + 1);
    for at in open..tree.len() {
        match tree[at].as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            _ => {}
        }
        if (tree[at] == "," && depth == 1) || depth == 0 {
            all.extend(expand(&[&tree[..open], &tree[start..at]].concat()));
            start = at + 1;
        }
        if depth == 0 {
            break;
        }
    }
    all
}

/// A path from the root of the crate.
fn absolute(path: &[String], module: &Segments, is_child: &dyn Fn(&str) -> bool) -> Segments {
    let supers = path.iter().take_while(|part| *part == "super").count();
    let base = match path[0].as_str() {
        "crate" => return path[1..].to_vec(),
        "super" => &module[..module.len().saturating_sub(supers)],
        _ => &module[..],
    };
    let skipped = if is_child(&path[0]) { 0 } else { supers.max(1) };
    [base, &path[skipped..]].concat()
}

#[test]
fn circles_are_found_and_what_is_handed_on_is_none() {
    let check = |files: &[(&str, &str)]| {
        let files = files.iter().map(|(path, text)| (PathBuf::from(path), (*text).to_owned()));
        Crate::new(files.collect()).circles()
    };
    let tree = [
        ("a/mod.rs", "#[cfg(test)]\nmod d;\nmod b;\nmod c;\npub use b::{B, D as E};\n"),
        ("a/b.rs", "use super::c::C;\npub(in crate::a) struct B; // crate::a::c\n"),
        ("a/c.rs", "use crate::clock;\n#[cfg(test)]\nuse super::b::B;\n"),
        ("clock.rs", "let x = \"\\\"\\\ncrate::a::b use\";\nlet y = r#\"crate::a \" \"#;"),
    ];
    assert_eq!(check(&tree), [""; 0]);
    let with = |path: &'static str, text: &'static str| {
        let mut tree = tree.to_vec();
        tree.retain(|(p, _)| *p != path);
        tree.push((path, text));
        check(&tree)
    };
    // Through the name that the folder hands on.
    let found = with("a/c.rs", "use super::{E, self as up};");
    assert_eq!(found, ["a/b.rs -> a/c.rs -> a/b.rs (`a::c::C`, `a::E`)"]);
    // A folder that uses its child, which uses what the folder defines.
    let found = with("a/mod.rs", "mod b;\nmod c;\nstruct F;\nfn f() { c::g() }");
    assert_eq!(found, [""; 0]);
    let found = check(&[
        ("a/mod.rs", "mod c;\nstruct F;\nfn f() { c::g() }"),
        ("a/c.rs", "fn g() -> super::F {}"),
    ]);
    assert_eq!(found, ["a/mod.rs -> a/c.rs -> a/mod.rs (`a::c::g`, `a::F`)"]);
    let found = check(&[
        ("a/mod.rs", "pub use c::G;\nstruct F;\nfn f(g: G) {}"),
        ("a/c.rs", "fn g() -> super::F {}"),
    ]);
    assert_eq!(found.len(), 1, "{found:?}");
    let found = check(&[("x.rs", "fn x() { crate::y::z::w() }"), ("y/z.rs", "use crate::x::x;")]);
    assert_eq!(found, ["x.rs -> y/z.rs -> x.rs (`y::z::w`, `x::x`)"]);
}
