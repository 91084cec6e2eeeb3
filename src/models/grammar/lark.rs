//! Reads the text of a Lark grammar far enough to know what compiling it may cost.
//!
//! A rule is compiled inside the rule that names it, and a terminal becomes one regular expression
//! with every terminal that it names written out. The lexemes are told apart exactly as the
//! compiler's own lexer does.

use super::blanks::bounded_blanks;
use super::check::{LARK_BYTES_MAX, at_most, repeats};
use super::error::GrammarError;
use super::schema;
use serde_json::{Deserializer, Value};
use std::collections::HashMap;

/// Names, texts, marks and repetitions of a grammar.
pub const ITEMS_MAX: usize = 5000;

/// Items of one terminal once those that it names are written out. Each may be left out of a match,
/// so the work for one character grows with the square of their number.
pub const TERMINAL_ITEMS_MAX: usize = 2000;

/// Items of all terminals together, written out.
pub const TERMINALS_ITEMS_MAX: usize = 16_000;

/// Brackets within brackets.
pub const BRACKETS_MAX: usize = 30;

/// `&` in a grammar: each multiplies the alternatives that are looked at for one character.
pub const CONJUNCTIONS_MAX: usize = 2;

/// Bytes of a grammar that has a `&`.
pub const CONJUNCTION_BYTES_MAX: usize = 4 << 10;

/// Checks a grammar and bounds the blanks of the JSON in it.
pub(super) fn check(text: &str) -> Result<String, GrammarError> {
    at_most("bytes of a grammar", text.len(), LARK_BYTES_MAX)?;
    let mut scan =
        Scan { text, at: 0, items: Vec::new(), spliced: String::new(), copied: 0, nodes: 0 };
    scan.run()?;
    let items = scan.items;
    let weight = items.iter().map(Item::weight).sum();
    at_most("names, texts, marks and repetitions of a grammar", weight, ITEMS_MAX)?;
    check_brackets(&items)?;
    let conjunctions = items.iter().filter(|i| matches!(i, Item::Mark('&'))).count();
    at_most("`&` in a grammar", conjunctions, CONJUNCTIONS_MAX)?;
    if conjunctions > 0 {
        at_most("bytes of a grammar with a `&`", text.len(), CONJUNCTION_BYTES_MAX)?;
    }
    check_terminals(&definitions(&items))?;
    Ok(scan.spliced)
}

enum Item<'a> {
    /// The name of a rule or a terminal.
    Name(&'a str),
    /// A text or a regular expression, and the repetitions in it.
    Text(usize),
    Mark(char),
    Newline,
}

impl Item<'_> {
    fn weight(&self) -> usize {
        match self {
            Item::Name(_) => 1,
            Item::Text(repeats) => 1 + repeats,
            Item::Mark('(' | '[' | '{' | '?' | '*' | '~' | '&' | '|') => 1,
            Item::Mark(_) | Item::Newline => 0,
        }
    }
}

struct Scan<'a> {
    text: &'a str,
    at: usize,
    items: Vec<Item<'a>>,
    /// The text with bounded JSON, as far as it was copied.
    spliced: String,
    copied: usize,
    /// Nodes of all schemas.
    nodes: u64,
}

impl<'a> Scan<'a> {
    fn run(&mut self) -> Result<(), GrammarError> {
        while let Some(first) = self.rest().chars().next() {
            let start = self.at;
            match first {
                ' ' | '\t' | '\r' => self.at += 1,
                '\n' => {
                    self.at += 1;
                    self.items.push(Item::Newline);
                }
                '#' => self.comment(),
                '/' if self.rest().starts_with("//") => self.comment(),
                '"' => {
                    self.closed('"', "a text")?;
                    self.items.push(Item::Text(0));
                }
                '/' => {
                    self.closed('/', "a regular expression")?;
                    self.items.push(Item::Text(repeats(&self.text[start..self.at])));
                }
                '<' => {
                    let end = self.rest().find('>').ok_or_else(|| self.unclosed("a token"))?;
                    self.at += end + 1;
                    self.items.push(Item::Text(0));
                }
                '%' => self.statement()?,
                c if c.is_ascii_alphabetic() || c == '_' => self.name(),
                // The mark of a parameter, not of a definition.
                ':' if self.rest().starts_with("::") => self.at += 2,
                c => {
                    self.at += c.len_utf8();
                    self.items.push(Item::Mark(c));
                }
            }
        }
        self.spliced.push_str(&self.text[self.copied..]);
        Ok(())
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn unclosed(&self, what: &str) -> GrammarError {
        let line = self.text[..self.at].lines().count().max(1);
        GrammarError::new(format!("it has {what} in line {line} that does not end"))
    }

    fn comment(&mut self) {
        self.at += self.rest().find('\n').unwrap_or(self.rest().len());
    }

    /// Moves behind the mark that ends what begins here.
    fn closed(&mut self, mark: char, what: &str) -> Result<(), GrammarError> {
        let mut is_escaped = false;
        for (i, c) in self.rest().char_indices().skip(1) {
            if c == mark && !is_escaped {
                self.at += i + 1;
                return Ok(());
            }
            is_escaped = c == '\\' && !is_escaped;
        }
        Err(self.unclosed(what))
    }

    /// A name has letters of one case: where the case changes, another begins.
    fn name(&mut self) {
        let rest = self.rest();
        let first = rest.chars().find(|c| *c != '_').unwrap_or('_');
        let belongs = |c: char| {
            let is_letter = match first.is_ascii_uppercase() {
                true => c.is_ascii_uppercase(),
                false => c.is_ascii_lowercase(),
            };
            is_letter || c.is_ascii_digit() || "_-".contains(c)
        };
        let end = rest.find(|c| !belongs(c)).unwrap_or(rest.len()).max(1);
        self.at += end;
        self.items.push(Item::Name(&rest[..end]));
    }

    /// JSON follows some keywords; other keywords are like names.
    fn statement(&mut self) -> Result<(), GrammarError> {
        let rest = self.rest();
        let keyword = ["%json", "%regex", "%llguidance"].into_iter().find(|k| rest.starts_with(k));
        let Some(keyword) = keyword else {
            self.at += 1;
            self.items.push(Item::Mark('%'));
            return Ok(());
        };
        self.at += keyword.len();
        let json = self.rest();
        let mut stream = Deserializer::from_str(json).into_iter::<Value>();
        let value = match stream.next() {
            Some(Ok(value)) => value,
            Some(Err(e)) => {
                return Err(GrammarError::new(format!("{keyword} needs JSON behind it: {e}")));
            }
            None => return Err(GrammarError::new(format!("{keyword} needs JSON behind it"))),
        };
        let end = stream.byte_offset();
        if keyword == "%json" {
            schema::check(&value, &mut self.nodes)?;
            self.splice(value, end);
        }
        self.at += end;
        // An automaton of all parts of a text has two states for each byte.
        self.items.push(Item::Text(if keyword == "%regex" { end / 8 } else { 0 }));
        Ok(())
    }

    /// Puts the schema with bounded blanks in the place of the next `length` bytes. It keeps their
    /// lines, so that errors name the right ones.
    fn splice(&mut self, schema: Value, length: usize) {
        let lines = self.rest()[..length].matches('\n').count();
        let schema = bounded_blanks(schema).to_string();
        self.spliced.push_str(&self.text[self.copied..self.at]);
        self.spliced.push(' ');
        self.spliced.push_str(&schema[..1]);
        self.spliced.extend(std::iter::repeat_n('\n', lines));
        self.spliced.push_str(&schema[1..]);
        self.copied = self.at + length;
    }
}

fn check_brackets(items: &[Item<'_>]) -> Result<(), GrammarError> {
    let mut depth = 0_usize;
    for item in items {
        match item {
            Item::Mark('(' | '[' | '{') => depth += 1,
            Item::Mark(')' | ']' | '}') => depth = depth.saturating_sub(1),
            _ => {}
        }
        at_most("brackets within brackets of a grammar", depth, BRACKETS_MAX)?;
    }
    Ok(())
}

/// A definition of a rule or a terminal, or a statement.
struct Definition<'a> {
    name: &'a str,
    /// It is compiled to one regular expression.
    is_regex: bool,
    /// Items of its own.
    items: usize,
    /// Terminals that it names.
    terminals: Vec<&'a str>,
}

fn is_terminal(name: &str) -> bool {
    name.trim_start_matches('_').starts_with(|c: char| c.is_ascii_uppercase())
}

/// A definition reaches from its name to the next one; statements begin with a `%`.
fn definitions<'a>(items: &[Item<'a>]) -> Vec<Definition<'a>> {
    let head = |i: usize| match items[i] {
        Item::Mark(':') => head(items, i),
        Item::Mark('%') => Some((i, "%", true)),
        _ => None,
    };
    let heads: Vec<_> = (0..items.len()).filter_map(head).collect();
    let ends = heads.iter().skip(1).map(|next| next.0).chain([items.len()]);
    let definition = |((from, name, has_attributes), end): ((usize, &'a str, bool), usize)| {
        let body = &items[from..end.max(from)];
        let named = body.iter().skip(1).filter_map(|item| match item {
            Item::Name(name) if is_terminal(name) => Some(*name),
            _ => None,
        });
        let is_negated = body.iter().any(|item| matches!(item, Item::Mark('~')));
        Definition {
            name,
            is_regex: has_attributes || is_negated || is_terminal(name),
            items: body.iter().map(Item::weight).sum(),
            terminals: named.collect(),
        }
    };
    heads.iter().copied().zip(ends).map(definition).collect()
}

/// Checks the regular expressions that terminals become.
fn check_terminals(definitions: &[Definition<'_>]) -> Result<(), GrammarError> {
    let named: HashMap<_, _> = definitions.iter().map(|d| (d.name, d)).collect();
    let mut known = HashMap::new();
    let mut all = 0_usize;
    for definition in definitions.iter().filter(|d| d.is_regex) {
        let items = written_out(definition, &named, &mut known);
        let shown: String = definition.name.chars().take(50).collect();
        let what = format!("items in `{shown}` with the terminals that it names written out");
        at_most(&what, items, TERMINAL_ITEMS_MAX)?;
        all += items;
    }
    at_most("items of all terminals written out", all, TERMINALS_ITEMS_MAX)
}

/// A name within itself counts nothing: the compiler refuses it.
fn written_out<'a>(
    definition: &Definition<'a>,
    named: &HashMap<&'a str, &Definition<'a>>,
    known: &mut HashMap<&'a str, usize>,
) -> usize {
    let mut items = definition.items;
    for name in &definition.terminals {
        let inner = match (known.get(name), named.get(name)) {
            (Some(inner), _) => *inner,
            (None, Some(inner)) => {
                known.insert(name, 0);
                written_out(inner, named, known)
            }
            (None, None) => 0,
        };
        known.insert(name, inner);
        items = items.saturating_add(inner);
    }
    items
}

/// The name before the colon at `colon`: its place, itself, and whether attributes follow it.
/// A priority and the mark of a parameter may stand there too.
fn head<'a>(items: &[Item<'a>], colon: usize) -> Option<(usize, &'a str, bool)> {
    let (mut depth, mut has_attributes) = (0_usize, false);
    for i in (0..colon).rev() {
        match items[i] {
            Item::Mark(']' | '}') => {
                depth += 1;
                has_attributes = true;
            }
            Item::Mark('[' | '{') if depth > 0 => depth -= 1,
            Item::Mark('[' | '{' | '(' | '|') | Item::Newline if depth == 0 => return None,
            Item::Name("_") => {}
            Item::Name(name) if depth == 0 => return Some((i, name, has_attributes)),
            _ => {}
        }
    }
    None
}
