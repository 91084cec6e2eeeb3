//! Counts what a JSON schema becomes when it is compiled: how many nodes there are once every
//! combination that `allOf`, `anyOf`, `oneOf`, `enum` and `$ref` ask for is written out.
//!
//! The compiler writes them out without a limit of its own on their size: thirty definitions that
//! each refer twice to the next become 2^30 nodes. `Estimate` walks the schema as the compiler
//! does, but keeps alternatives as counts, and stops at [`NODES_MAX`].

use super::check::{at_most, regex, repeats};
use super::decimal::{common_multiple, decimal};
use super::error::GrammarError;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap};

/// Nodes of a schema after every combination is written out.
pub const NODES_MAX: u64 = 20_000;

/// Regular expressions (`pattern`, `format`) that one string must match at once.
pub const PATTERNS_MAX: u64 = 2;

/// Bytes of one `pattern`, or of one key of `patternProperties`.
pub const PATTERN_BYTES_MAX: usize = 4 << 10;

/// References that are followed within each other while schemas are combined.
const COMBINED_DEPTH_MAX: usize = 128;

/// Keys that alone say nothing of the value.
const NOTES: [&str; 15] = [
    "$anchor",
    "$defs",
    "definitions",
    "$schema",
    "$id",
    "id",
    "$comment",
    "title",
    "description",
    "default",
    "readOnly",
    "writeOnly",
    "examples",
    "contentMediaType",
    "contentEncoding",
];

/// Checks a schema; `nodes` counts on over all schemas of a grammar.
pub(super) fn check(schema: &Value, nodes: &mut u64) -> Result<(), GrammarError> {
    let mut estimate = Estimate { root: schema, nodes: *nodes, known: HashMap::new() };
    if let Some(options) = schema.get("x-guidance").and_then(Value::as_object) {
        options.values().filter_map(Value::as_str).try_for_each(regex)?;
    }
    let shape = estimate.shape(schema)?;
    // A reference that is not combined with anything is compiled once, wherever it is used.
    let mut open = shape.references();
    while let Some(reference) = open.pop() {
        if !estimate.known.contains_key(reference) {
            open.extend(estimate.resolve(reference)?.references());
        }
    }
    *nodes = estimate.nodes;
    Ok(())
}

/// A place in the value.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part<'a> {
    Name(&'a str),
    Pattern(&'a str),
    Item(usize),
    /// All further properties or items.
    Rest,
}

/// What stands at one place: alternatives as a count, their parts merged.
#[derive(Clone, Default)]
struct Shape<'a> {
    /// Alternatives, each a node.
    options: u64,
    /// The most patterns that one alternative must match at once.
    patterns: u64,
    /// Significands and decimals of `multipleOf`.
    multiples: Vec<(u64, u32)>,
    /// The number of properties is bounded, which takes the square of it.
    is_counted: bool,
    /// Alternatives that are references, and how often each stands here.
    references: Vec<(&'a str, u64)>,
    parts: BTreeMap<Part<'a>, Shape<'a>>,
}

impl<'a> Shape<'a> {
    fn leaf() -> Self {
        Self { options: 1, ..Self::default() }
    }

    /// Nodes here and below.
    fn total(&self) -> u64 {
        let references: u64 = self.references.iter().map(|r| r.1).fold(0, u64::saturating_add);
        let below = self.parts.values().map(Self::total).fold(0, u64::saturating_add);
        self.options.saturating_add(references).saturating_add(below)
    }

    /// Every reference here and below.
    fn references(&self) -> Vec<&'a str> {
        let below = self.parts.values().flat_map(Self::references);
        self.references.iter().map(|r| r.0).chain(below).collect()
    }

    /// Every alternative `times` times.
    fn scale(&mut self, times: u64) {
        if times == 1 {
            return;
        }
        self.options = self.options.saturating_mul(times);
        self.references.iter_mut().for_each(|r| r.1 = r.1.saturating_mul(times));
        self.parts.values_mut().for_each(|part| part.scale(times));
    }

    /// The alternatives of both.
    fn or(&mut self, other: Self) {
        self.options = self.options.saturating_add(other.options);
        self.patterns = self.patterns.max(other.patterns);
        self.is_counted |= other.is_counted;
        self.multiples.extend(other.multiples);
        self.multiples.sort_unstable();
        self.multiples.dedup();
        self.references.extend(other.references);
        for (key, part) in other.parts {
            match self.parts.get_mut(&key) {
                Some(own) => own.or(part),
                None => drop(self.parts.insert(key, part)),
            }
        }
    }
}

/// The heaviest part that may speak of a property or an item that is not named here.
fn rest<'s, 'a>(parts: &'s BTreeMap<Part<'a>, Shape<'a>>, key: Part<'_>) -> Option<&'s Shape<'a>> {
    let speaks = |other: &Part<'_>| match key {
        Part::Name(_) => matches!(other, Part::Pattern(_) | Part::Rest),
        _ => matches!(other, Part::Rest),
    };
    let parts = parts.iter().filter(|(other, _)| **other != key && speaks(other));
    parts.map(|(_, part)| part).max_by_key(|part| part.total())
}

struct Estimate<'a> {
    root: &'a Value,
    nodes: u64,
    known: HashMap<&'a str, Shape<'a>>,
}

impl<'a> Estimate<'a> {
    fn pay(&mut self, nodes: u64) -> Result<(), GrammarError> {
        self.nodes = self.nodes.saturating_add(nodes);
        match self.nodes > NODES_MAX {
            true => Err(GrammarError::new(format!(
                "it must come to at most {NODES_MAX} nodes once `allOf`, `anyOf`, `oneOf`, `enum` \
                and `$ref` are written out, got more"
            ))),
            false => Ok(()),
        }
    }

    /// A schema at its own place.
    fn shape(&mut self, schema: &'a Value) -> Result<Shape<'a>, GrammarError> {
        self.pay(1)?;
        let Some(map) = schema.as_object() else { return Ok(Shape::leaf()) };
        if !std::ptr::eq(schema, self.root) {
            has_no_address(schema)?;
        }
        let mut met: Option<Shape<'a>> = None;
        for (key, value) in map {
            let shapes = match (key.as_str(), value) {
                ("allOf", Value::Array(all)) => {
                    all.iter().map(|s| self.shape(s)).collect::<Result<Vec<_>, _>>()?
                }
                ("anyOf" | "oneOf", Value::Array(any)) => vec![self.any(any)?],
                ("enum", Value::Array(values)) => vec![self.constants(values)?],
                ("const", value) => vec![self.constants(std::slice::from_ref(value))?],
                ("$ref", Value::String(reference)) => {
                    vec![Shape { references: vec![(reference, 1)], ..Shape::default() }]
                }
                _ => Vec::new(),
            };
            for shape in shapes {
                met = Some(match met.take() {
                    Some(met) => self.meet(met, shape, 0)?,
                    None => shape,
                });
            }
        }
        let is_plain = |key: &String| {
            let is_applied = matches!(
                key.as_str(),
                "allOf" | "anyOf" | "oneOf" | "enum" | "const" | "$ref" | "x-guidance"
            );
            !is_applied && !NOTES.contains(&key.as_str())
        };
        match met {
            Some(met) if !map.keys().any(is_plain) => Ok(met),
            Some(met) => {
                let plain = self.plain(map)?;
                self.meet(met, plain, 0)
            }
            None => self.plain(map),
        }
    }

    fn any(&mut self, schemas: &'a [Value]) -> Result<Shape<'a>, GrammarError> {
        let mut any = Shape::default();
        for schema in schemas {
            any.or(self.shape(schema)?);
        }
        Ok(any)
    }

    fn constants(&mut self, values: &'a [Value]) -> Result<Shape<'a>, GrammarError> {
        let mut any = Shape::default();
        for value in values {
            self.pay(1)?;
            let mut shape = Shape::leaf();
            match value {
                Value::Array(items) => {
                    for (i, item) in items.iter().enumerate() {
                        let part = self.constants(std::slice::from_ref(item))?;
                        shape.parts.insert(Part::Item(i), part);
                    }
                }
                Value::Object(fields) => {
                    for (name, field) in fields {
                        let part = self.constants(std::slice::from_ref(field))?;
                        shape.parts.insert(Part::Name(name), part);
                    }
                }
                _ => {}
            }
            any.or(shape);
        }
        Ok(any)
    }

    /// The keywords that are not combinations.
    fn plain(&mut self, map: &'a Map<String, Value>) -> Result<Shape<'a>, GrammarError> {
        let mut shape = Shape::leaf();
        for (key, value) in map {
            match (key.as_str(), value) {
                ("type", Value::Array(types)) => types_differ(types)?,
                ("pattern", Value::String(pattern)) => {
                    shape.patterns += 1;
                    self.pattern(pattern)?;
                }
                ("format", _) => shape.patterns += 1,
                ("multipleOf", Value::Number(_)) => shape.multiples.push(decimal(value)?),
                ("minProperties" | "maxProperties", _) => shape.is_counted = true,
                ("properties", Value::Object(properties)) => {
                    for (name, schema) in properties {
                        let part = self.shape(schema)?;
                        shape.parts.insert(Part::Name(name), part);
                    }
                }
                ("patternProperties", Value::Object(properties)) => {
                    for (pattern, schema) in properties {
                        self.pattern(pattern)?;
                        let part = self.shape(schema)?;
                        shape.parts.insert(Part::Pattern(pattern), part);
                    }
                }
                ("prefixItems" | "items", Value::Array(items)) => {
                    for (i, schema) in items.iter().enumerate() {
                        let part = self.shape(schema)?;
                        shape.parts.insert(Part::Item(i), part);
                    }
                }
                ("items" | "additionalItems" | "additionalProperties", schema) => {
                    let part = self.shape(schema)?;
                    shape.parts.entry(Part::Rest).or_default().or(part);
                }
                _ => {}
            }
        }
        self.meet_patterns(&mut shape)?;
        self.settle(&shape)?;
        Ok(shape)
    }

    /// A regular expression costs the square of its repetitions.
    fn pattern(&mut self, pattern: &str) -> Result<(), GrammarError> {
        at_most("bytes of a pattern", pattern.len(), PATTERN_BYTES_MAX)?;
        regex(pattern)?;
        let repeats = repeats(pattern) as u64;
        self.pay(repeats * repeats / 1000)
    }

    /// A named property must also satisfy the pattern that its name matches.
    fn meet_patterns(&mut self, shape: &mut Shape<'a>) -> Result<(), GrammarError> {
        let patterns = shape.parts.iter().filter(|(key, _)| matches!(key, Part::Pattern(_)));
        let Some(heaviest) = patterns.map(|(_, part)| part).max_by_key(|part| part.total()) else {
            return Ok(());
        };
        let heaviest = heaviest.clone();
        for (key, part) in &mut shape.parts {
            if matches!(key, Part::Name(_)) {
                self.pay(heaviest.total())?;
                *part = self.meet(std::mem::take(part), heaviest.clone(), 0)?;
            }
        }
        Ok(())
    }

    /// What a finished shape costs beside its parts.
    fn settle(&mut self, shape: &Shape<'a>) -> Result<(), GrammarError> {
        if shape.patterns > PATTERNS_MAX {
            let what = "patterns and formats for one string";
            return Err(GrammarError::limit(what, PATTERNS_MAX as usize, shape.patterns as usize));
        }
        let count = |is: fn(&Part<'_>) -> bool| shape.parts.keys().filter(|k| is(k)).count() as u64;
        let names = count(|key| matches!(key, Part::Name(_)));
        let patterns = count(|key| matches!(key, Part::Pattern(_)));
        let counted = if shape.is_counted { names * names } else { 0 };
        let multiples: u64 = shape.multiples.iter().map(|m| m.0 / 4).sum();
        let own = counted + patterns * patterns + multiples;
        self.pay(shape.options.max(1).saturating_mul(own))
    }

    /// What both allow.
    fn meet(
        &mut self,
        one: Shape<'a>,
        other: Shape<'a>,
        depth: usize,
    ) -> Result<Shape<'a>, GrammarError> {
        at_most("references combined within each other", depth, COMBINED_DEPTH_MAX)?;
        let (mut one, mut other) = (self.expand(one)?, self.expand(other)?);
        let mut parts = BTreeMap::new();
        for (key, part) in std::mem::take(&mut one.parts) {
            let met = match other.parts.remove(&key) {
                Some(same) => self.meet(part, same, depth + 1)?,
                None => self.meet_rest(part, rest(&other.parts, key), other.options, depth)?,
            };
            parts.insert(key, met);
        }
        for (key, part) in std::mem::take(&mut other.parts) {
            let met = self.meet_rest(part, rest(&parts, key), one.options, depth)?;
            parts.insert(key, met);
        }
        let met = Shape {
            options: one.options.saturating_mul(other.options),
            patterns: one.patterns + other.patterns,
            multiples: self.common(&one.multiples, &other.multiples)?,
            is_counted: one.is_counted || other.is_counted,
            references: Vec::new(),
            parts,
        };
        let is_copied = one.options.max(other.options) > 1;
        self.pay(if is_copied { met.total() } else { 1 })?;
        self.settle(&met)?;
        Ok(met)
    }

    /// A part that only one side names, with what the other says of all the rest.
    fn meet_rest(
        &mut self,
        mut part: Shape<'a>,
        rest: Option<&Shape<'a>>,
        options: u64,
        depth: usize,
    ) -> Result<Shape<'a>, GrammarError> {
        match rest {
            Some(rest) => {
                self.pay(rest.total())?;
                self.meet(part, rest.clone(), depth + 1)
            }
            None => {
                part.scale(options);
                Ok(part)
            }
        }
    }

    /// Puts what they refer to in the place of references.
    fn expand(&mut self, mut shape: Shape<'a>) -> Result<Shape<'a>, GrammarError> {
        while let Some((reference, times)) = shape.references.pop() {
            let mut referred = self.resolve(reference)?;
            self.pay(referred.total().saturating_mul(times))?;
            referred.scale(times);
            shape.or(referred);
        }
        Ok(shape)
    }

    /// The shape of a definition. Where it is combined with itself, the compiler refuses it.
    fn resolve(&mut self, reference: &'a str) -> Result<Shape<'a>, GrammarError> {
        if let Some(known) = self.known.get(reference) {
            return Ok(known.clone());
        }
        self.known.insert(reference, Shape::leaf());
        let shape = self.shape(target(self.root, reference)?)?;
        self.known.insert(reference, shape.clone());
        Ok(shape)
    }

    /// Numbers that are multiples of both.
    fn common(
        &mut self,
        one: &[(u64, u32)],
        other: &[(u64, u32)],
    ) -> Result<Vec<(u64, u32)>, GrammarError> {
        if one.is_empty() || other.is_empty() {
            return Ok([one, other].concat());
        }
        self.pay((one.len() as u64).saturating_mul(other.len() as u64))?;
        let pairs = one.iter().flat_map(|a| other.iter().map(move |b| (*a, *b)));
        pairs.map(|(a, b)| common_multiple(a, b)).collect()
    }
}

/// References are looked up from the root, so nothing below it may have an address of its own.
fn has_no_address(schema: &Value) -> Result<(), GrammarError> {
    match ["$id", "id"].into_iter().find(|key| schema[*key].is_string()) {
        Some(key) => {
            Err(GrammarError::new(format!("`{key}` may stand only at the root of a schema")))
        }
        None => Ok(()),
    }
}

/// The place in `root` that a reference names.
fn target<'a>(root: &'a Value, reference: &str) -> Result<&'a Value, GrammarError> {
    let refuse = |what: &str| {
        let shown: String = reference.chars().take(100).collect();
        GrammarError::new(format!("a `$ref` {what}, got {shown}"))
    };
    let own = root["$id"].as_str().map_or("", |id| id.trim_end_matches('#'));
    let place = reference.strip_prefix(own).unwrap_or(reference);
    let place = place.strip_prefix('#').ok_or_else(|| refuse("must begin with `#`"))?;
    if !place.is_empty() && !place.starts_with('/') {
        return Err(refuse("must be `#` or begin with `#/`"));
    }
    let place = unescape(place).ok_or_else(|| refuse("must be UTF-8"))?;
    let mut at = root;
    for segment in place.split('/').skip(1) {
        if !std::ptr::eq(at, root) {
            has_no_address(at)?;
        }
        at = at.pointer(&format!("/{segment}")).ok_or_else(|| refuse("must name what is there"))?;
    }
    Ok(at)
}

/// Text of a fragment, whose bytes may be written as `%` and two digits.
fn unescape(text: &str) -> Option<String> {
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let [first, tail @ ..] = rest {
        let escaped = tail.get(..2).filter(|_| *first == b'%');
        let digits = escaped.and_then(|d| std::str::from_utf8(d).ok());
        match digits.and_then(|d| u8::from_str_radix(d, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8(bytes).ok()
}

/// The compiler takes a type that is named twice for two alternatives.
fn types_differ(types: &[Value]) -> Result<(), GrammarError> {
    let is_repeated = |(i, name): (usize, &Value)| types[..i].contains(name);
    match types.iter().enumerate().any(is_repeated) {
        true => Err(GrammarError::new("a `type` must not name a type twice")),
        false => Ok(()),
    }
}
