//! Finds what documents name of this repository, so that it can be looked for.

use std::collections::BTreeSet;

/// Directories whose files documents name by their whole paths.
const DIRECTORIES: [&str; 10] = [
    ".ci/", ".github/", "benches/", "deploy/", "docs/", "kernels/", "ops/", "scripts/", "src/",
    "tests/",
];

/// Paths between backticks and in links, without what follows them: an item, an argument.
pub(super) fn paths(text: &str) -> BTreeSet<String> {
    let quoted = text.split('`').skip(1).step_by(2);
    let linked = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
    let named = quoted.chain(linked).filter_map(|words| words.split_whitespace().next());
    let paths = named.map(|path| path.split("::").next().unwrap_or(path));
    let is_path = |path: &&str| {
        DIRECTORIES.iter().any(|directory| path.starts_with(directory))
            && !path.contains(['*', '{', '<'])
    };
    paths.filter(is_path).map(str::to_owned).collect()
}

/// Benches that lines tell the reader to run.
pub(super) fn benches(text: &str) -> BTreeSet<String> {
    let after = text.split("--bench ").skip(1);
    let word = |rest: &str| {
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(rest.len());
        rest[..end].to_owned()
    };
    after.map(word).collect()
}

#[test]
fn paths_and_benches_are_found() {
    let text = "`src/a.rs::item` and [docs](docs/b.md#c), `scripts/x --y`, `models/z`, `src/*.rs`";
    let found: Vec<String> = paths(text).into_iter().collect();
    assert_eq!(found, ["docs/b.md", "scripts/x", "src/a.rs"]);
    let benches: Vec<String> =
        benches("`cargo bench --bench gate`, --bench ops  # x").into_iter().collect();
    assert_eq!(benches, ["gate", "ops"]);
}
