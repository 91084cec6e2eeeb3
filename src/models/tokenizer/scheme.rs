//! Reads from the tokenizer file how tokens become text. It repeats the decoders of the
//! `tokenizers` crate token by token, so that text can be streamed.

use crate::models::error::LoadError;
use serde_json::Value;
use std::path::Path;
use tokenizers::Tokenizer;

const SUPPORTED: &str = "ByteLevel, or Replace (of a text) and Metaspace, then ByteFallback, Fuse \
    and Strip (at the start) are";

/// The decoder of a tokenizer.
pub(super) enum TokenDecoder {
    /// Every character of a token stands for a byte.
    ByteLevel,
    /// Tokens are pieces of text.
    Pieces {
        /// What happens to each token's text, in order.
        steps: Vec<TextChange>,
        /// Tokens such as `<0x0A>` are bytes.
        byte_fallback: bool,
    },
}

/// One change of a token's text.
pub(super) enum TextChange {
    /// One text for another.
    Replace(String, String),
    /// A blank for the mark; in the first token of a text nothing, where that is the rule.
    Metaspace {
        /// The character that stands for a blank.
        mark: String,
        /// The first token loses its marks.
        strips_first: bool,
    },
}

/// What the decoder takes off the start of a text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Strip {
    pub(super) character: char,
    pub(super) count: usize,
}

impl TokenDecoder {
    /// The scheme of a tokenizer, and what is taken off the start of a text.
    ///
    /// # Errors
    /// When its decoder is not one of those that are known here to the last blank.
    pub(super) fn of(path: &Path, tokenizer: &Tokenizer) -> Result<(Self, Strip), LoadError> {
        let json = serde_json::to_value(tokenizer.get_decoder())
            .map_err(|e| LoadError::invalid(path, format!("decoder: {e}")))?;
        let mut kinds = Vec::new();
        flatten(&json, &mut kinds);
        Self::read(&kinds).ok_or_else(|| {
            LoadError::invalid(path, format!("decoder {json} is not supported; {SUPPORTED}"))
        })
    }

    fn read(kinds: &[&Value]) -> Option<(Self, Strip)> {
        let mut strip = Strip { character: ' ', count: 0 };
        if let [only] = kinds
            && only["type"] == "ByteLevel"
        {
            return Some((Self::ByteLevel, strip));
        }
        let (mut steps, mut byte_fallback, mut is_fused) = (Vec::new(), false, false);
        for kind in kinds {
            let is_open = !byte_fallback && !is_fused;
            match kind["type"].as_str()? {
                "Replace" if is_open => {
                    let from =
                        kind["pattern"]["String"].as_str().filter(|from| !from.is_empty())?;
                    steps.push(TextChange::Replace(
                        from.to_owned(),
                        kind["content"].as_str()?.to_owned(),
                    ));
                }
                "Metaspace" if is_open => steps.push(TextChange::Metaspace {
                    mark: kind["replacement"].as_str()?.to_owned(),
                    strips_first: kind["prepend_scheme"] != "never",
                }),
                "ByteFallback" if is_open => byte_fallback = true,
                "Fuse" => is_fused = true,
                "Strip" if is_fused && strip.count == 0 && kind["stop"] == 0 => {
                    let mut characters = kind["content"].as_str()?.chars();
                    strip.character = characters.next()?;
                    strip.count = usize::try_from(kind["start"].as_u64()?).ok()?;
                }
                _ => return None,
            }
        }
        (!steps.is_empty() || byte_fallback)
            .then_some((Self::Pieces { steps, byte_fallback }, strip))
    }

    /// Whether the first token of a text has a text of its own.
    pub(super) fn strips_first(&self) -> bool {
        let strips =
            |step: &TextChange| matches!(step, TextChange::Metaspace { strips_first: true, .. });
        matches!(self, Self::Pieces { steps, .. } if steps.iter().any(strips))
    }

    /// Whether a token is a byte by its number.
    pub(super) fn is_byte(&self, token: &str) -> bool {
        matches!(self, Self::Pieces { byte_fallback: true, .. }) && byte_of(token).is_some()
    }

    /// The bytes that a token stands for; `is_first` in its text.
    pub(super) fn bytes(
        &self,
        unicode: &dyn Fn(char) -> Option<u8>,
        token: &str,
        is_first: bool,
    ) -> Box<[u8]> {
        match self {
            Self::ByteLevel => {
                let bytes: Option<Vec<u8>> = token.chars().map(unicode).collect();
                bytes.unwrap_or_else(|| token.as_bytes().to_vec()).into()
            }
            Self::Pieces { steps, byte_fallback } => {
                let mut text = token.to_owned();
                for step in steps {
                    text = match step {
                        TextChange::Replace(from, to) => text.replace(from.as_str(), to),
                        TextChange::Metaspace { mark, strips_first } => text.replace(
                            mark.as_str(),
                            if *strips_first && is_first { "" } else { " " },
                        ),
                    };
                }
                match byte_of(&text).filter(|_| *byte_fallback) {
                    Some(byte) => Box::new([byte]),
                    None => text.into_bytes().into(),
                }
            }
        }
    }
}

/// The byte that `<0xAB>` stands for.
fn byte_of(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}

/// The decoders of sequences within sequences, in order.
fn flatten<'a>(json: &'a Value, kinds: &mut Vec<&'a Value>) {
    match json["decoders"].as_array() {
        Some(list) => list.iter().for_each(|inner| flatten(inner, kinds)),
        None => kinds.push(json),
    }
}

/// The reverse of GPT-2's table that gives every byte a printable character.
pub(super) fn unicode_to_byte() -> impl Fn(char) -> Option<u8> {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut table = vec![None; 512];
    let mut next = 256;
    for byte in 0..=255_u8 {
        if printable(byte) {
            table[usize::from(byte)] = Some(byte);
        } else {
            table[next] = Some(byte);
            next += 1;
        }
    }
    move |c| table.get(c as usize).copied().flatten()
}
