//! Reads values in the looser forms that clients send, with errors that say what was expected.
//!
//! The servers that clients are written for read bodies by pydantic: `16.0` is an integer there,
//! and null stands for a field that is left out.

use serde::Deserialize;
use serde::de::{Deserializer, Error, Expected, SeqAccess, Unexpected, Visitor};
use serde_json::Value;
use std::fmt;

/// The `logprobs` field of either endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Logprobs {
    /// `true` or `false`.
    Flag(bool),
    /// How many alternatives.
    Count(i64),
}

/// An integer, also where it is written with a point.
#[derive(Clone, Copy)]
pub(super) struct Integer(pub(super) i64);

/// The rule that a number outside of i64 breaks.
const RANGE: &str = "an integer from -2^63 to 2^63 - 1";
/// 2^63, the first number above all of them.
const END: f64 = 9_223_372_036_854_775_808.0;

impl<'de> Deserialize<'de> for Integer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(IntegerVisitor)
    }
}

struct IntegerVisitor;

impl Visitor<'_> for IntegerVisitor {
    type Value = Integer;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an integer")
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Integer, E> {
        Ok(Integer(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Integer, E> {
        let integer = i64::try_from(value).map(Integer);
        integer.map_err(|_| E::invalid_value(Unexpected::Unsigned(value), &RANGE))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Integer, E> {
        match value {
            _ if value.fract() != 0.0 => Err(E::invalid_type(Unexpected::Float(value), &self)),
            _ if (-END..END).contains(&value) => Ok(Integer(value as i64)),
            _ => Err(E::invalid_value(Unexpected::Float(value), &RANGE)),
        }
    }
}

pub(super) fn integer<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    Ok(Option::<Integer>::deserialize(deserializer)?.map(|integer| integer.0))
}

pub(super) fn integers<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<i64>>, D::Error> {
    let list = Option::<Vec<Integer>>::deserialize(deserializer)?;
    Ok(list.map(numbers))
}

/// True or false; null is false.
pub(super) fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(false))
}

pub(super) fn string_or_list<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<String>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let wrong = || invalid(&value, &"a string or a list of strings");
    match &value {
        Value::Null => Ok(Vec::new()),
        Value::String(text) => Ok(vec![text.clone()]),
        Value::Array(list) => {
            let texts = list.iter().map(|text| text.as_str().map(str::to_owned));
            texts.collect::<Option<_>>().ok_or_else(wrong)
        }
        _ => Err(wrong()),
    }
}

pub(super) fn logprobs<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Logprobs>, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::Null => Ok(None),
        Value::Bool(flag) => Ok(Some(Logprobs::Flag(flag))),
        value => match Integer::deserialize(&value) {
            Ok(count) => Ok(Some(Logprobs::Count(count.0))),
            Err(_) => Err(invalid(&value, &"a boolean or an integer")),
        },
    }
}

/// An item of a prompt that is a list.
pub(super) enum PromptItem {
    Text(String),
    Id(Integer),
    Ids(Vec<Integer>),
}

impl<'de> Deserialize<'de> for PromptItem {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptItemVisitor)
    }
}

struct PromptItemVisitor;

impl<'de> Visitor<'de> for PromptItemVisitor {
    type Value = PromptItem;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a token id or a list of token ids")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<PromptItem, E> {
        Ok(PromptItem::Text(text.to_owned()))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<PromptItem, E> {
        IntegerVisitor.visit_i64(value).map(PromptItem::Id)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<PromptItem, E> {
        IntegerVisitor.visit_u64(value).map(PromptItem::Id)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<PromptItem, E> {
        IntegerVisitor.visit_f64(value).map(PromptItem::Id)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<PromptItem, A::Error> {
        match list.next_element()? {
            Some(first) => items(first, list).map(PromptItem::Ids),
            None => Ok(PromptItem::Ids(Vec::new())),
        }
    }
}

pub(super) fn numbers(list: Vec<Integer>) -> Vec<i64> {
    list.into_iter().map(|integer| integer.0).collect()
}

/// `first` and the other items of a list, all of one type.
pub(super) fn items<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(
    first: T,
    mut list: A,
) -> Result<Vec<T>, A::Error> {
    let mut items = vec![first];
    while let Some(item) = list.next_element()? {
        items.push(item);
    }
    Ok(items)
}

/// The error for a value of another type.
pub(super) fn invalid<E: Error>(value: &Value, expected: &dyn Expected) -> E {
    let got = match value {
        Value::Null => Unexpected::Unit,
        Value::Bool(flag) => Unexpected::Bool(*flag),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(number), ..) => Unexpected::Signed(number),
            (_, Some(number), _) => Unexpected::Unsigned(number),
            (.., number) => Unexpected::Float(number.unwrap_or(f64::NAN)),
        },
        Value::String(text) => Unexpected::Str(text),
        Value::Array(_) => Unexpected::Seq,
        Value::Object(_) => Unexpected::Map,
    };
    E::invalid_type(got, expected)
}
