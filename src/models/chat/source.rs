//! Rewrites a template's source before it is compiled: it translates what Jinja2 has and minijinja
//! has not.
//!
//! `{% generation %}` marks the model's own words for training; here it is a block without
//! meaning. `%` and `~` mean Python's formatting and Python's `str`, so they become calls of
//! [`MODULO`] and [`TEXT`]; `*` and the operands of `+` become calls of [`PRODUCT`] and
//! [`OPERAND`], so that no text grows without a limit. No line is added or removed: errors name the
//! line of the file.

/// The function for `a % b`; a third argument says that `b` was written as a tuple.
pub(super) const MODULO: &str = "__modulo";
/// The function for an operand of `~`.
pub(super) const TEXT: &str = "__text";
/// The function for an operand of `+`, which counts what it makes.
pub(super) const OPERAND: &str = "__operand";
/// The function for `a * b`.
pub(super) const PRODUCT: &str = "__product";
/// Brackets within brackets; what is nested deeper stays as it is, and minijinja refuses it.
const DEPTH_MAX: usize = 64;

/// The source with these parts rewritten. A text that is not a template is left for the compiler
/// to refuse.
pub(super) fn rewrite(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let (text, tag) = rest.split_at(at);
        out.push_str(text);
        let end = match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}").map(|end| end + 2),
            Some(b'{') => expression_end(tag, "}}"),
            Some(b'%') => expression_end(tag, "%}"),
            _ => Some(1),
        };
        let Some(end) = end else {
            out.push_str(tag);
            return out;
        };
        let (tag, after) = tag.split_at(end);
        rest = after;
        if is_block(tag, "raw") {
            let verbatim = raw_end(rest);
            out.push_str(tag);
            out.push_str(&rest[..verbatim]);
            rest = &rest[verbatim..];
        } else if tag.len() > 3 && !tag.starts_with("{#") {
            out.push_str(&rewrite_tag(tag));
        } else {
            out.push_str(tag);
        }
    }
    out + rest
}

/// The length of a tag up to `close`, which counts only outside of quotes and brackets.
fn expression_end(tag: &str, close: &str) -> Option<usize> {
    let (mut at, mut depth) = (2, 0_usize);
    while at < tag.len() {
        let rest = &tag[at..];
        if depth == 0 && rest.starts_with(close) {
            return Some(at + close.len());
        }
        let token = token_len(rest);
        match &rest[..token] {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += token;
    }
    None
}

/// What lies between the marks of a tag, and the lengths of the marks (with `-` or `+`).
fn inside(tag: &str) -> (usize, &str, usize) {
    let signed = |byte: Option<&u8>| usize::from(matches!(byte, Some(b'-' | b'+')));
    let bytes = tag.as_bytes();
    let open = 2 + signed(bytes.get(2));
    let close = 2 + if tag.len() > open + 2 { signed(bytes.get(tag.len() - 3)) } else { 0 };
    (open, &tag[open..tag.len() - close], close)
}

fn is_block(tag: &str, name: &str) -> bool {
    tag.len() > 4 && tag.starts_with("{%") && tag.ends_with("%}") && inside(tag).1.trim() == name
}

/// Where `{% endraw %}` ends, or the text does.
fn raw_end(text: &str) -> usize {
    let mut at = 0;
    while let Some(start) = text[at..].find("{%").map(|found| at + found) {
        let Some(end) = text[start..].find("%}").map(|found| start + found + 2) else { break };
        if is_block(&text[start..end], "endraw") {
            return end;
        }
        at = start + 2;
    }
    text.len()
}

fn rewrite_tag(tag: &str) -> String {
    let (open, expression, close) = inside(tag);
    let (open, close) = (&tag[..open], &tag[tag.len() - close..]);
    let is_statement = open.starts_with("{%");
    if is_statement
        && let Some(name) =
            ["generation", "endgeneration"].iter().position(|n| expression.trim() == *n)
    {
        let block = ["with", "endwith"][name];
        return format!("{open}{}{close}", expression.replace(expression.trim(), block));
    }
    if !expression.contains(['%', '~', '+', '*']) {
        return tag.to_owned();
    }
    match Level::read(expression, &mut 0, is_statement, 0) {
        Some(text) => format!("{open}{text}{close}"),
        None => tag.to_owned(),
    }
}

/// Bytes of the token that `text` begins with: blanks, a word or number, a quoted text or an
/// operator.
fn token_len(text: &str) -> usize {
    let first = text.chars().next().unwrap_or(' ');
    let run = |test: fn(char) -> bool| text.find(|c| !test(c)).unwrap_or(text.len());
    match first {
        c if c.is_whitespace() => run(char::is_whitespace),
        c if is_word(c) => run(is_word),
        '\'' | '"' => quoted_len(text, first),
        _ if ["**", "//", "==", "!=", "<=", ">="].iter().any(|op| text.starts_with(op)) => 2,
        c => c.len_utf8(),
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn quoted_len(text: &str, quote: char) -> usize {
    let mut is_escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// An expression between two brackets (or marks of a tag), as far as it was read.
#[derive(Default)]
struct Level {
    out: String,
    /// Operands of `~` in the present term.
    joined: Vec<String>,
    /// The product so far, and the operator that waits for its right side.
    product: Option<(String, String)>,
    operand: String,
    is_tuple: bool, // the operand is one bracket with a comma in it
    is_added: bool, // the present term stands after a `+`
    is_test: bool,  // the present term is a test, not a value
}

impl Level {
    /// Reads from `at` to the end or past the bracket that closes; `None` when it is nested too
    /// deeply.
    fn read(text: &str, at: &mut usize, is_statement: bool, depth: usize) -> Option<String> {
        if depth > DEPTH_MAX {
            return None;
        }
        let mut level = Self::default();
        let mut is_name = is_statement; // the first word of a statement
        while *at < text.len() {
            let token = &text[*at..*at + token_len(&text[*at..])];
            *at += token.len();
            match token {
                ")" | "]" | "}" => {
                    level.end_term();
                    return Some(level.out + token);
                }
                "(" | "[" | "{" => {
                    let group = Self::read(text, at, false, depth + 1)?;
                    let is_whole = level.operand.trim().is_empty() && token == "(";
                    level.is_tuple = is_whole && has_comma(&group);
                    level.operand.push_str(token);
                    level.operand.push_str(&group);
                }
                "*" | "/" | "//" | "%" => level.end_factor(Some(token)),
                "~" => level.end_joined(),
                _ if token.trim().is_empty() => level.operand.push_str(token),
                _ if std::mem::take(&mut is_name) || level.separates(token) => {
                    level.is_added |= token == "+";
                    level.end_term();
                    level.out.push_str(token);
                    level.is_added = token == "+";
                    level.is_test = token == "is" || (token == "not" && level.is_test);
                }
                _ => {
                    level.is_tuple = false;
                    level.operand.push_str(token);
                }
            }
        }
        level.end_term();
        Some(level.out)
    }

    /// Whether a token binds less tightly than `~`.
    fn separates(&self, token: &str) -> bool {
        let operand = self.operand.trim_end();
        match token {
            // A sign belongs to what follows.
            "+" | "-" => !operand.trim().is_empty(),
            "," | ":" | "=" | "==" | "!=" | "<" | ">" | "<=" | ">=" => true,
            "and" | "or" | "not" | "in" | "is" | "if" | "else" | "recursive" => {
                !operand.ends_with(['.', '|'])
            }
            _ => false,
        }
    }

    /// Ends an operand of a product; `operator` comes next.
    fn end_factor(&mut self, operator: Option<&str>) {
        let right = std::mem::take(&mut self.operand);
        let is_tuple = std::mem::take(&mut self.is_tuple);
        let product = match self.product.take() {
            None => right,
            // Before the arguments of a call there is no left side.
            Some((left, op)) if op == "%" || (op == "*" && !left.trim().is_empty()) => {
                let function = if op == "%" { MODULO } else { PRODUCT };
                // Outer blanks stay outside, so that words do not grow together.
                let body = left.trim_start();
                let (before, after) =
                    (&left[..left.len() - body.len()], &right[right.trim_end().len()..]);
                let right = right.trim_end();
                let mark = if is_tuple && op == "%" { ", true" } else { "" };
                format!("{before}{function}({body},{right}{mark}){after}")
            }
            Some((left, op)) => left + &op + &right,
        };
        match operator {
            Some(operator) => self.product = Some((product, operator.to_owned())),
            None => self.operand = product,
        }
    }

    /// Ends an operand of `~`.
    fn end_joined(&mut self) {
        self.end_factor(None);
        self.joined.push(std::mem::take(&mut self.operand));
    }

    /// Ends what separators stand around.
    fn end_term(&mut self) {
        self.end_joined();
        let operands = std::mem::take(&mut self.joined);
        let is_counted = std::mem::take(&mut self.is_added) && !self.is_test;
        match operands.as_slice() {
            [only] if is_counted && !is_number(only) => self.out.push_str(&call(OPERAND, only)),
            [only] => self.out.push_str(only),
            many => {
                let many: Vec<String> = many.iter().map(|operand| call(TEXT, operand)).collect();
                self.out.push_str(&many.join("~"));
            }
        }
    }
}

/// An expression as the argument of a function; its outer blanks stay outside.
fn call(function: &str, expression: &str) -> String {
    let body = expression.trim();
    let start = expression.len() - expression.trim_start().len();
    let (before, after) = (&expression[..start], &expression[start + body.len()..]);
    format!("{before}{function}({body}){after}")
}

fn is_number(expression: &str) -> bool {
    expression.trim().bytes().all(|b| b.is_ascii_digit() || b == b'.')
}

/// Whether a closed group has a comma of its own.
fn has_comma(group: &str) -> bool {
    let (mut at, mut depth) = (0, 0_usize);
    while at < group.len() {
        let token = token_len(&group[at..]);
        match &group[at..at + token] {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            "," if depth == 0 => return true,
            _ => {}
        }
        at += token;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_needs_it_is_rewritten() {
        for (source, want) in [
            ("a {{ b }} {# % ~ #} {x % y}", "a {{ b }} {# % ~ #} {x % y}"),
            ("{%- generation -%}x{% endgeneration %}", "{%- with -%}x{% endwith %}"),
            (
                "{% raw %}{% generation %}{{ a % b }}{% endraw %}{{ a%b }}",
                "{% raw %}{% generation %}{{ a % b }}{% endraw %}{{ __modulo(a,b) }}",
            ),
            ("{{ '%s ~ }}' % x }}", "{{ __modulo('%s ~ }}' , x) }}"),
            (
                "{{ '%s %s' % (a, b) + c }}",
                "{{ __operand(__modulo('%s %s' , (a, b), true)) + __operand(c) }}",
            ),
            ("{{ f(*a) + 1 - 2 * b }}", "{{ __operand(f(*a)) + 1 - __product(2 , b) }}"),
            ("{% if x is not eq a + b and c %}", "{% if x is not eq a + __operand(b) and c %}"),
            ("{{ a % (b) }}", "{{ __modulo(a , (b)) }}"),
            (
                "{% if loop.index0 % 2 == 0 and not x %}",
                "{% if __modulo(loop.index0 , 2) == 0 and not x %}",
            ),
            ("{{ a * b % c % d }}", "{{ __modulo(__modulo(__product(a , b) , c) , d) }}"),
            ("{{ x - -a % b }}", "{{ x - __modulo(-a , b) }}"),
            (
                "{{ a ~ b.c|d('~') ~ [1 ~ 2] }}",
                "{{ __text(a) ~ __text(b.c|d('~')) ~ __text([__text(1) ~ __text(2)]) }}",
            ),
            ("{% set ns.a = x ~ '%' %}", "{% set ns.a = __text(x) ~ __text('%') %}"),
            ("{{ {'a': b ~ c}['a'] }}", "{{ {'a': __text(b) ~ __text(c)}['a'] }}"),
            (
                "{{ a if b ~ c else d.in ~ e -}}",
                "{{ a if __text(b) ~ __text(c) else __text(d.in) ~ __text(e) -}}",
            ),
            ("{{ a ~", "{{ a ~"),
        ] {
            assert_eq!(rewrite(source), want, "{source}");
        }
        let deep = format!("{{{{ {}1 ~ 2{} }}}}", "(".repeat(100_000), ")".repeat(100_000));
        assert_eq!(rewrite(&deep), deep);
    }
}
