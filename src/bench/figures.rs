//! Collects the figures of a measurement: each has a name and the value of every repeat.

use super::stats::median;
use serde_json::{Map, Value};
use std::fmt;

/// Named values in the order in which they were measured. Shown as a table of medians and extremes.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Figures(Vec<(String, Vec<f64>)>);

impl Figures {
    /// Adds what was measured under `name`, one value a repeat.
    pub fn push(&mut self, name: impl Into<String>, values: Vec<f64>) {
        self.0.push((name.into(), values));
    }

    /// An object of medians; a figure without a value is null.
    pub fn json(&self) -> Value {
        let medians = self.0.iter().map(|(name, values)| (name.clone(), median(values).into()));
        Value::Object(medians.collect::<Map<String, Value>>())
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, (name, values)) in self.0.iter().enumerate() {
            let least = values.iter().copied().fold(f64::INFINITY, f64::min);
            let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let (end, middle) = (if place > 0 { "\n" } else { "" }, median(values));
            let middle = middle.unwrap_or(f64::NAN);
            write!(f, "{end}{name:24} {middle:14.3}   {least:.3} to {most:.3}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_extremes_are_shown() {
        let mut figures = Figures::default();
        figures.push("pp512", vec![3.0, 1.0, 2.0, 10.0]);
        figures.push("nothing", Vec::new());
        let text = figures.to_string();
        let first = text.lines().next().unwrap();
        assert_eq!(first, format!("{:24} {:14.3}   1.000 to 10.000", "pp512", 2.5));
        assert_eq!(figures.json(), serde_json::json!({"pp512": 2.5, "nothing": null}));
    }
}
