//! Writes addresses of other machines, and why they cannot be reached, for errors and logs.

use std::error::Error;

/// Characters of an address that are shown.
const SHOWN_CHARS_MAX: usize = 200;

/// An address without what may be a key: scheme, host and port.
pub fn shown(url: &str) -> String {
    let (scheme, rest) = match url.split_once("://") {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None => (String::new(), url),
    };
    let host = rest.split(['/', '?', '#', '\\']).next().unwrap_or_default();
    let host = host.rsplit('@').next().unwrap_or_default();
    format!("{scheme}{host}").chars().take(SHOWN_CHARS_MAX).collect()
}

/// Words of a library about `url`, with no more of it than [`shown`] shows.
pub fn scrubbed(words: &str, url: &str) -> String {
    let host = shown(url);
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let at = rest.find(['/', '?', '#', '\\']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(at);
    let user = authority.rfind('@').map_or("", |at| &authority[..=at]);
    let mut words = words.replace(url, &host);
    // A library may spell the address in another way, and repeat a part of it.
    for part in [user, path].into_iter().filter(|part| part.len() > 1) {
        words = words.replace(part, "");
    }
    words
}

/// An error and its sources, the deepest last: the reason is often only there.
pub fn reasons(error: &dyn Error) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        words = format!("{words}: {inner}");
        source = inner.source();
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_may_be_a_key_is_shown() {
        for (url, want) in [
            ("wss://user:key@host.example:443/v1/key?apikey=key#key", "wss://host.example:443"),
            ("https://host.example?key", "https://host.example"),
            ("http://[::1]:80/key", "http://[::1]:80"),
            ("ws://127.0.0.1:9944", "ws://127.0.0.1:9944"),
            ("host.example/key", "host.example"),
            ("https://host.example\\key", "https://host.example"),
            ("", ""),
        ] {
            assert_eq!(shown(url), want);
        }
        assert_eq!(shown(&"x".repeat(1000)).len(), SHOWN_CHARS_MAX);
    }

    #[test]
    fn words_of_a_library_are_scrubbed() {
        for url in ["wss://user:key@host.example/v1/key?k=key", "https://host.example/key"] {
            for words in [format!("{url} is bad"), format!("GET {}", &url[6..])] {
                let words = scrubbed(&words, url);
                assert!(!words.contains("key") && words.contains("host.example"), "{words}");
            }
        }
        assert_eq!(scrubbed("timed out / late", "http://[::1]:80/"), "timed out / late");
    }

    #[test]
    fn reasons_go_down_to_the_deepest() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("inner"));
        assert_eq!(reasons(&error), "outer: inner");
    }
}
