//! Resolves models.toml, flags and environment into options for each part of the program.

pub mod models_toml;
pub mod server_toml;
pub mod units;

/// Where a TOML text is wrong, and how: the line, its key where a value is at fault, and the rule.
pub fn toml_fault(text: &str, error: &toml::de::Error) -> String {
    let before = error.span().map_or("", |span| &text[..span.start]);
    let (number, message) = (before.matches('\n').count() + 1, error.message());
    let line = text.lines().nth(number - 1).unwrap_or_default();
    match line.split_once('=') {
        Some((key, _)) if message.starts_with("invalid ") => {
            format!("line {number}: `{}`: {message}", key.trim())
        }
        _ => format!("line {number}: {message}"),
    }
}

/// The known word nearest to `word`, for "did you mean" hints.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(word, candidate), candidate))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}
