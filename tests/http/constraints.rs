//! Constraints of the output: what they allow, and that none can stall or end the process.

use crate::common;
use crate::common::budget::resident_bytes;
use crate::common::site::{COMPLETION, completion, post, site};
use axum::http::StatusCode;
use serde_json::{Map, Value, json};
use std::time::Duration;
use targon_engine::clock::Clock;
use targon_engine::engine::Engine;
use targon_engine::intake::error::{FaultKind, RequestError};
use targon_engine::models::grammar::Grammar;
use targon_engine::wire::openai::ChatRequest;

/// Longest time for one constraint, of which the machine's other work may take most.
const SECONDS_MAX: u64 = 5;

/// Memory that one constraint may take.
const MEMORY_MAX: usize = 600 << 20;

const END: u32 = 260;

fn lines(count: usize, line: impl Fn(usize) -> String) -> String {
    (0..count).map(line).collect::<Vec<_>>().join("\n")
}

fn list(count: usize, item: impl Fn(usize) -> String) -> String {
    (0..count).map(item).collect::<Vec<_>>().join(",")
}

fn lark(text: String) -> Value {
    json!({"structured_outputs": {"grammar": text}})
}

fn schema(text: String) -> Value {
    json!({"structured_outputs": {"json": text}})
}

fn regex(text: String) -> Value {
    json!({"structured_outputs": {"regex": text}})
}

/// A constraint with its name, and what the refusal says, or nothing where it can be had.
type Attack = (&'static str, Value, &'static str);

const WRITTEN_OUT: &str = "with the terminals that it names written out";

fn chained(definitions: &str, last: usize) -> Value {
    let definitions = format!("{definitions},\"{last}\":{{}}");
    schema(format!("{{\"$ref\":\"#/$defs/0\",\"$defs\":{{{definitions}}}}}"))
}

fn nested(levels: usize) -> String {
    let open = "{\"properties\":{\"a\":".repeat(levels);
    format!("{open}{{}}{}", "}}".repeat(levels))
}

fn parts(count: usize) -> String {
    list(count, |i| format!("\"p{i}\":{{\"type\":\"null\"}}"))
}

fn all_of(schemas: &str) -> Value {
    schema(format!("{{\"allOf\":[{schemas}]}}"))
}

/// Grammars and regular expressions that ended or stalled a process, or would.
fn grammars() -> Vec<Attack> {
    let chain = |of: &str| lines(1000, |i| format!("{of}{i}: \"a\" {of}{}", i + 1));
    let double = lines(18, |i| format!("T{i}: T{0} T{0}", i + 1));
    let conjuncts = (0..22).map(|i| format!("/(.|\\n)*a{i}(.|\\n)*/"));
    let both = conjuncts.collect::<Vec<_>>().join(" & ");
    let long = lines(15_000, |i| format!("T{i}: \"t{i}\""));
    let short = lines(4000, |i| format!("T{i}:\"{i}\""));
    vec![
        ("rules in a chain", lark(format!("start: r0\n{}\nr1000: \"x\"", chain("r"))), ""),
        ("terminals", lark(format!("start: T0\n{long}")), "at most 65536 bytes of a grammar"),
        (
            "short terminals",
            lark(format!("start: T0\n{short}")),
            "at most 5000 names, texts, marks and repetitions",
        ),
        (
            "terminals in a chain",
            lark(format!("start: T0\n{}\nT1000: \"x\"", chain("T"))),
            WRITTEN_OUT,
        ),
        ("terminals that double", lark(format!("start: T0\n{double}\nT18: \"a\"?")), WRITTEN_OUT),
        (
            "ignored terminals that double",
            lark(format!("start: \"a\"\n%ignore T0\n{double}\nT18: \"a\"?")),
            WRITTEN_OUT,
        ),
        ("conjunctions", lark(format!("start: T\nT: {both}")), "at most 2 `&` in a grammar"),
        (
            "nested properties in Lark",
            lark(format!("start: %json {}", nested(2200))),
            "%json needs JSON behind it: recursion limit exceeded",
        ),
        ("optional letters", regex("a?".repeat(100_000)), "at most 65536 bytes of a regular"),
        (
            "fewer of them",
            regex("a?".repeat(20_000)),
            "at most 1000 groups, repetitions and classes",
        ),
        ("an open group", regex("(a".into()), "unclosed group"),
        ("a rule of itself alone", lark("start: start".into()), "no text can satisfy it"),
    ]
}

/// Schemas that ended or stalled a process, or would, by their references and their numbers.
fn references() -> Vec<Attack> {
    let refs = list(1000, |i| format!("\"{i}\":{{\"$ref\":\"#/$defs/{}\"}}", i + 1));
    let within = list(1000, |i| {
        format!("\"{i}\":{{\"items\":{{\"anyOf\":[{{\"$ref\":\"#/$defs/{}\"}}]}}}}", i + 1)
    });
    let doubled = list(30, |i| {
        let next = format!("{{\"type\":\"object\",\"$ref\":\"#/$defs/{}\"}}", i + 1);
        format!("\"{i}\":{{\"type\":\"object\",\"properties\":{{\"a\":{next},\"b\":{next}}}}}")
    });
    let tree = |name: &str| {
        format!("\"{name}\":{{\"properties\":{{\"c\":{{\"$ref\":\"#/$defs/{name}\"}}}}}}")
    };
    let trees = schema(format!(
        "{{\"allOf\":[{{\"$ref\":\"#/$defs/a\"}},{{\"$ref\":\"#/$defs/b\"}}],\"$defs\":{{{},{}}}}}",
        tree("a"),
        tree("b")
    ));
    vec![
        ("references in a chain", chained(&refs, 1000), ""),
        ("references in a chain, below others", chained(&within, 1000), ""),
        ("references that double", chained(&doubled, 30), "at most 20000 nodes"),
        ("a value of itself alone", schema("{\"$ref\":\"#\"}".into()), "no text can satisfy it"),
        ("an endless combination", trees, "at most 128 references combined within each other"),
        (
            "a large multiple",
            schema("{\"type\":\"integer\",\"multipleOf\":1000003}".into()),
            "without its point must be at most 10000, got 1000003",
        ),
        (
            "large common multiples",
            all_of("{\"multipleOf\":9973},{\"multipleOf\":9967}"),
            "common multiple of its `multipleOf` must be at most 10000",
        ),
    ]
}

/// Schemas that ended or stalled a process, or would, by what they combine.
fn combinations() -> Vec<Attack> {
    let objects = list(3000, |_| "{\"type\":\"object\"}".into());
    let strings = list(25, |i| format!("{{\"type\":\"string\",\"pattern\":\"a{i}\"}}"));
    let patterns = list(1000, |i| format!("\"^p{i}_[a-z]*$\":{{}}"));
    let copied = format!(
        "{{\"anyOf\":[{objects}],\"additionalProperties\":{{\"properties\":{{{}}}}}}}",
        parts(1000)
    );
    let counted = format!(
        "{{\"minProperties\":1,\"additionalProperties\":false,\"properties\":{{{}}}}}",
        parts(1000)
    );
    vec![
        ("allOf", all_of(&objects), ""),
        ("nested properties", schema(nested(2200)), "at most 100 levels of nesting"),
        ("patterns", all_of(&strings), "at most 2 patterns and formats"),
        ("copies for each alternative", schema(copied), "at most 20000 nodes"),
        ("a bounded number of properties", schema(counted), "at most 20000 nodes"),
        (
            "patterns of properties",
            schema(format!("{{\"patternProperties\":{{{patterns}}}}}")),
            "at most 20000 nodes",
        ),
    ]
}

/// The costliest grammars and regular expressions that the limits let through.
fn costly_grammars() -> Vec<(&'static str, Value)> {
    let group = |i: usize| format!("r{i}:{}r{}{}", "(".repeat(28), i + 1, ")".repeat(28));
    let letters = lines(8, |i| format!("T{i}: {} \"{i}\"", ["L"; 480].join(" ")));
    let names = (0..8).map(|i| format!("T{i}")).collect::<Vec<_>>().join(" | ");
    vec![
        ("groups", lark(format!("start: r0\n{}\nr165:\"x\"", lines(165, group)))),
        ("optional letters in terminals", lark(format!("start: {names}\nL: \"a\"?\n{letters}"))),
        ("optional parts", lark(format!("start: {}", "[\"a\"] ".repeat(1600)))),
        ("an ambiguous rule", lark("start: s\ns: s s s s | \"a\" | \"\"".into())),
        ("optional letters", regex("a?".repeat(1000))),
        ("repeated letters", regex("[a-z]*".repeat(500))),
        ("optional groups", regex(format!("(({}){{500}}b?){{500}}", "a?".repeat(400)))),
        ("classes of letters", regex("(?i)".to_owned() + &"\\pL".repeat(990))),
    ]
}

/// The costliest schemas that the limits let through.
fn costly_schemas() -> Vec<(&'static str, Value)> {
    let beside =
        list(5300, |i| format!("\"{i}\":{{\"type\":\"null\",\"$ref\":\"#/$defs/{}\"}}", i + 1));
    let within = list(180, |i| {
        let reference = format!("{{\"$ref\":\"#/$defs/{}\"}}", i + 1);
        format!("\"{i}\":{}{reference}{}", "{\"items\":".repeat(90), "}".repeat(90))
    });
    let objects = list(130, |_| "{\"type\":\"object\"}".into());
    let copied = format!(
        "{{\"anyOf\":[{objects}],\"additionalProperties\":{{\"properties\":{{{}}}}}}}",
        parts(130)
    );
    let counted = format!(
        "{{\"minProperties\":1,\"additionalProperties\":false,\"properties\":{{{}}}}}",
        parts(135)
    );
    let patterns = list(130, |i| format!("\"^p{i}_[a-z]*$\":{{}}"));
    let multiples =
        list(7, |i| format!("\"{i}\":{{\"type\":\"number\",\"multipleOf\":{}}}", 9900 + i));
    let words = |from: usize| {
        let words = (from..from + 300).map(|i| format!("[a-z{i}]x")).collect::<Vec<_>>();
        format!("{{\"type\":\"string\",\"pattern\":{:?}}}", words.join("|"))
    };
    vec![
        ("references with more beside them", chained(&beside, 5300)),
        ("references below", chained(&within, 180)),
        ("a value list", schema(format!("{{\"enum\":[{}]}}", list(6000, |i| i.to_string())))),
        ("copies for each alternative", schema(copied)),
        ("a bounded number of properties", schema(counted)),
        ("patterns of properties", schema(format!("{{\"patternProperties\":{{{patterns}}}}}"))),
        ("multiples", schema(format!("{{\"properties\":{{{multiples}}}}}"))),
        ("two patterns", all_of(&format!("{},{}", words(100), words(400)))),
    ]
}

#[tokio::test]
async fn the_costliest_constraints_take_seconds() {
    let site = site(common::options());
    let clock = Clock::system();
    for (name, extra) in [costly_grammars(), costly_schemas()].concat() {
        let (began, before) = (clock.elapsed(), resident_bytes());
        let mut body = completion(extra);
        body["max_tokens"] = json!(8);
        let (status, answer) = post(&site.app, COMPLETION, body).await;
        let (took, grew) = (clock.elapsed() - began, resident_bytes().saturating_sub(before));
        let said = answer["error"]["message"].as_str().unwrap_or_default();
        println!("{name}: {took:?}, {} MiB, {status} {said}", grew >> 20);
        assert!([StatusCode::OK, StatusCode::BAD_REQUEST].contains(&status), "{name}: {answer}");
        assert!(took < Duration::from_secs(SECONDS_MAX), "{name}: {took:?}");
        assert!(grew < MEMORY_MAX, "{name}: {grew} bytes");
    }
}

#[tokio::test]
async fn no_constraint_stalls_or_ends_the_process() {
    let site = site(common::options());
    let clock = Clock::system();
    for (name, extra, refusal) in [grammars(), references(), combinations()].concat() {
        let (began, before) = (clock.elapsed(), resident_bytes());
        let mut body = completion(extra);
        body["max_tokens"] = json!(2);
        let (status, answer) = post(&site.app, COMPLETION, body).await;
        let (took, grew) = (clock.elapsed() - began, resident_bytes().saturating_sub(before));
        println!("{name}: {took:?}, {} MiB", grew >> 20);
        if refusal.is_empty() {
            assert_eq!(status, StatusCode::OK, "{name}: {answer}");
        } else {
            assert_eq!(status, StatusCode::BAD_REQUEST, "{name}: {answer}");
            let message = answer["error"]["message"].as_str().unwrap();
            assert!(message.contains(refusal), "{name}: {message}");
            assert_eq!(answer["error"]["param"], "structured_outputs", "{name}");
        }
        assert!(took < Duration::from_secs(SECONDS_MAX), "{name}: {took:?}");
        assert!(grew < MEMORY_MAX, "{name}: {grew} bytes");
    }
}

/// 200 properties, 50 definitions, 12 objects within each other.
fn large_schema() -> Value {
    let mut properties = Map::new();
    for i in 0..200 {
        let property = match i % 5 {
            0 => json!({"type": "string", "pattern": "^[a-z]+-\\d{2,4}$", "description": "a code"}),
            1 => json!({"type": "integer", "minimum": -5, "maximum": 100_000}),
            2 => json!({"enum": ["red", "green", "blue", null]}),
            3 => json!({"type": "array", "items": {"$ref": format!("#/$defs/d{}", i % 50)}}),
            _ => json!({"anyOf": [{"type": "number"}, {"type": "string", "format": "date"}]}),
        };
        properties.insert(format!("property_{i}"), property);
    }
    let mut definitions = Map::new();
    for i in 0..50 {
        let mut inner = json!({"type": "boolean"});
        for _ in 0..12 {
            inner = json!({
                "type": "object", "additionalProperties": false, "required": ["next"],
                "properties": {"next": inner, "note": {"type": "string", "maxLength": 80}},
            });
        }
        if i > 0 {
            inner["properties"]["other"] = json!({"$ref": format!("#/$defs/d{}", i - 1)});
        }
        definitions.insert(format!("d{i}"), inner);
    }
    json!({
        "type": "object", "additionalProperties": false, "required": ["property_0"],
        "properties": properties, "$defs": definitions,
    })
}

/// Calls of methods as JSON-RPC has them, in 60 kB.
fn rpc_schema() -> Value {
    let method = |i: usize| {
        json!({
            "type": "object", "additionalProperties": false,
            "required": ["jsonrpc", "method", "params", "id"],
            "description": "a call of one method, described at some length ".repeat(2),
            "properties": {
                "jsonrpc": {"const": "2.0"},
                "id": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
                "method": {"const": format!("method.number_{i}")},
                "params": {
                    "type": "object", "required": ["account"],
                    "properties": {
                        "account": {"$ref": "#/$defs/account"},
                        "amount": {"type": "number", "multipleOf": 0.01},
                        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
                    },
                },
            },
        })
    };
    json!({
        "anyOf": (0..115).map(method).collect::<Vec<_>>(),
        "$defs": {"account": {"allOf": [
            {"type": "object", "properties": {"name": {"type": "string"}}},
            {"properties": {"kind": {"enum": ["a", "b"]}}, "required": ["name"]},
        ]}},
    })
}

/// A language of 64 rules.
fn large_lark() -> String {
    let statement = |i: usize| {
        format!(
            "s{i}: \"do{i}\" NAME (\"=\" expr)? [\"with\" expr (\",\" expr)*] \";\" | s{}",
            i + 1
        )
    };
    let operators = (0..10).map(|i| format!("e{i}: e{} | e{i} \"op{i}\" e{}", i + 1, i + 1));
    format!(
        "start: block+\nblock: \"{{\" s0* \"}}\"\n{}\ns48: \"end\" \";\"\nexpr: e0\n{}\n\
        e10: NUMBER | NAME | STRING | \"(\" expr \")\"\nNAME: /[a-zA-Z_][a-zA-Z_0-9]*/\n\
        DIGITS: /[0-9]+/\nNUMBER: DIGITS (\".\" DIGITS)?\nSTRING: /\"([^\"\\\\]|\\\\.)*\"/\n\
        %ignore /[ \\t\\n]+/",
        lines(48, statement),
        operators.collect::<Vec<_>>().join("\n"),
    )
}

#[tokio::test]
async fn honest_constraints_of_some_size_can_be_had() {
    let site = site(common::options());
    let clock = Clock::system();
    let rpc = rpc_schema().to_string();
    assert!(rpc.len() > 60_000, "{}", rpc.len());
    let cases = [
        ("200 properties", schema(large_schema().to_string())),
        ("60 kB of methods", schema(rpc)),
        ("64 rules", lark(large_lark())),
        (
            "2,000 choices",
            json!({"structured_outputs": {
            "choice": (0..2000).map(|i| format!("choice (number {i})?")).collect::<Vec<_>>()}}),
        ),
    ];
    for (name, extra) in cases {
        let began = clock.elapsed();
        let mut body = completion(extra);
        body["max_tokens"] = json!(2);
        let (status, answer) = post(&site.app, COMPLETION, body).await;
        println!("{name}: {:?}", clock.elapsed() - began);
        assert_eq!(status, StatusCode::OK, "{name}: {answer}");
        assert!(clock.elapsed() - began < Duration::from_secs(SECONDS_MAX), "{name}");
    }
}

#[tokio::test]
async fn more_constraints_than_may_wait_are_refused() {
    let site = site(common::options());
    let ask = |i: usize| {
        let mut body = completion(regex(format!("[a-z]{{{}}}", i + 1)));
        body["max_tokens"] = json!(1);
        post(&site.app, COMPLETION, body)
    };
    // Some are compiled while the others are still read.
    let answers = futures_util::future::join_all((0..200).map(ask)).await;
    let busy = answers.iter().filter(|a| a.0 == StatusCode::TOO_MANY_REQUESTS);
    let busy: Vec<_> = busy.collect();
    assert!((1..=200 - 64).contains(&busy.len()), "{}", busy.len());
    let message = busy[0].1["error"]["message"].as_str().unwrap();
    assert!(message.contains("64 grammars wait to be compiled already"), "{message}");
    assert_eq!(answers.iter().filter(|a| a.0 == StatusCode::OK).count(), 200 - busy.len());
}

/// The grammar that a chat with these fields asks for.
async fn read(engine: &Engine, extra: Value) -> Result<Option<Grammar>, RequestError> {
    let mut body = json!({"messages": [{"role": "user", "content": "hello"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    let request: ChatRequest = serde_json::from_value(body).unwrap();
    let understood = common::reader(engine.text()).chat(&request).await;
    understood.map(|understood| understood.requests[0].grammar.clone())
}

/// Whether a whole output may be this text; the tiny model's first ids are the bytes.
fn takes(grammar: &Grammar, text: &str) -> bool {
    let mut grammar = grammar.clone();
    for byte in text.bytes().map(u32::from) {
        if !grammar.allowed().is_ok_and(|mask| mask.is_allowed(byte)) {
            return false;
        }
        grammar.push(byte).unwrap();
    }
    grammar.allowed().is_ok_and(|mask| mask.is_allowed(END))
}

async fn check(extra: Value, texts: &[(&str, bool)]) {
    let engine = common::tiny_engine(3, common::options());
    let grammar = read(&engine, extra.clone()).await.unwrap().unwrap();
    for (text, is_taken) in texts {
        assert_eq!(takes(&grammar, text), *is_taken, "{text} in {extra}");
    }
}

#[tokio::test]
async fn classes_of_a_regular_expression_are_ascii() {
    let phone = regex(r"\d{3}-[\d]\w".into());
    check(phone, &[("123-4a", true), ("123-4_", true), ("１２３-4a", false), ("123-4é", false)])
        .await;
    check(regex(r"a\sb\D".into()), &[("a bx", true), ("a\u{a0}bx", false), ("a b1", false)]).await;
    check(regex(r"\\d".into()), &[(r"\d", true), ("1", false)]).await;
    let pattern = json!({"type": "string", "pattern": r"^\d\w$"}).to_string();
    check(schema(pattern), &[("\"1a\"", true), ("\"１a\"", false), ("\"1é\"", false)]).await;
}

#[tokio::test]
async fn blanks_between_parts_of_a_value_have_a_bound() {
    let object = json!({"type": "object", "required": ["a", "b"], "properties": {
        "a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "null"}}}});
    let in_lark = format!("start: \"x\" %json {object}");
    let format = json!({"type": "json_schema", "json_schema": {"schema": object}});
    for extra in [json!({"response_format": format}), lark(in_lark)] {
        let engine = common::tiny_engine(3, common::options());
        let mut grammar = read(&engine, extra).await.unwrap().unwrap();
        let (mut text, mut is_whole) = (Vec::new(), false);
        // One that always writes a blank where it may, and else as little as it can.
        while !is_whole && text.len() < 1000 {
            let mask = grammar.allowed().unwrap();
            let wished = [b' ', b'\n', b'}', b']', b'1', b':', b',', b'"'];
            let wished = wished.into_iter().map(u32::from).find(|id| mask.is_allowed(*id));
            let id = match mask.is_allowed(END) {
                true => END,
                false => wished.or_else(|| mask.iter().next()).unwrap(),
            };
            text.push(id as u8);
            is_whole = grammar.push(id).unwrap();
        }
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(is_whole, "{text}");
        assert!(text.contains(&" ".repeat(32)) && !text.contains(&" ".repeat(33)), "{text}");
    }
    let own = json!({"type": "null", "x-guidance": {"whitespace_flexible": false}});
    check(schema(own.to_string()), &[("null", true)]).await;
    let pretty = format!("{{\n{}\"a\": 1, \"b\": [\n\tnull\n]}}", " ".repeat(31));
    check(schema(object.to_string()), &[(&pretty, true)]).await;
}

fn tool(name: &str, parameters: Value) -> Value {
    json!({"type": "function", "function": {"name": name, "parameters": parameters}})
}

#[tokio::test]
async fn definitions_of_a_tool_are_its_own() {
    let item = |item: Value| {
        json!({"type": "object", "required": ["item"], "additionalProperties": false,
            "properties": {"item": {"$ref": "#/$defs/Item"}}, "$defs": {"Item": item}})
    };
    let tools = [
        tool("f", item(json!({"type": "integer", "minimum": 1, "maximum": 9}))),
        tool("g", item(json!({"enum": ["red"]}))),
    ];
    let call = |name: &str, item: &str| {
        format!("[{{\"name\":\"{name}\",\"parameters\":{{\"item\":{item}}}}}]")
    };
    check(
        json!({"tools": tools, "tool_choice": "required"}),
        &[
            (&call("f", "7"), true),
            (&call("f", "\"red\""), false),
            (&call("g", "\"red\""), true),
            (&call("g", "7"), false),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_tools_reference_to_its_root_is_to_its_own() {
    let node = json!({
        "$id": "https://example.com/node.json", "type": "object", "required": ["v"],
        "additionalProperties": false,
        "properties": {
            "v": {"type": "boolean"},
            "child": {"$ref": "#"},
            "twin": {"$ref": "https://example.com/node.json#"},
            "$ref": {"const": {"$ref": "#"}},
        },
    });
    let tools = [tool("f", node)];
    let bare = "{\"v\":true,\"child\":{\"v\":false},\"twin\":{\"v\":true}}";
    let value = "{\"v\":true,\"$ref\":{\"$ref\":\"#\"}}";
    let call = |parameters: &str| format!("[{{\"name\":\"f\",\"parameters\":{parameters}}}]");
    let calls = call("{\"v\":true,\"child\":[]}");
    check(
        json!({"tools": tools, "tool_choice": "required"}),
        &[(&call(bare), true), (&call(value), true), (&calls, false)],
    )
    .await;
    let named = json!({"type": "function", "function": {"name": "f"}});
    check(json!({"tools": tools, "tool_choice": named}), &[(bare, true), (&call(bare), false)])
        .await;
}

#[tokio::test]
async fn arguments_are_an_object_whatever_the_schema_says() {
    let untyped = json!({"properties": {"a": {"type": "null"}}, "required": ["a"]});
    let named = json!({"type": "function", "function": {"name": "f"}});
    let tools = [tool("f", untyped.clone())];
    let texts = [("{\"a\":null}", true), ("{}", false), ("\"a\"", false), ("7", false)];
    check(json!({"tools": tools, "tool_choice": named}), &texts).await;
    let format = json!({"type": "json_object", "schema": untyped});
    check(json!({"response_format": format}), &texts).await;
    let any = json!({"type": "json_object"});
    check(json!({"response_format": any}), &[("{\"b\":[1]}", true), ("[]", false)]).await;
}

#[tokio::test]
async fn what_cannot_constrain_is_refused_by_name() {
    let engine = common::tiny_engine(3, common::options());
    let f = tool("f", json!({"type": "object"}));
    let at = |id: &str| json!({"items": {"$id": id, "type": "null"}}).to_string();
    let cases = [
        (
            json!({"structured_outputs": {"choice": []}}),
            "`structured_outputs.choice` must hold at least one text",
        ),
        (json!({"tools": [f]}), "`tools` cannot be offered to this model"),
        (json!({"tools": [f], "tool_choice": "auto"}), "`tools` cannot be offered to this model"),
        (schema("{".into()), "it is not JSON"),
        (schema(at("x")), "`$id` may stand only at the root of a schema"),
        (schema("{\"$ref\":\"other.json\"}".into()), "a `$ref` must begin with `#`"),
        (schema("{\"$ref\":\"#/a\"}".into()), "a `$ref` must name what is there, got #/a"),
        (schema("{\"type\":[\"null\",\"null\"]}".into()), "must not name a type twice"),
        (schema("{\"multipleOf\":0}".into()), "a `multipleOf` must not be 0, got 0"),
        (lark("start: \"a".into()), "it has a text in line 1 that does not end"),
        (lark("start: a".into()), "unknown name"),
    ];
    for (extra, message) in cases {
        let error = read(&engine, extra.clone()).await.unwrap_err();
        assert!(error.message.contains(message), "{extra}: {}", error.message);
        assert!(
            !error.message.contains('\n') && error.kind == FaultKind::Wrong,
            "{}",
            error.message
        );
    }
    let none = json!({"tools": [f], "tool_choice": "none"});
    assert!(read(&engine, none).await.unwrap().is_none());
}
