//! Describes how a computation departs from the canon: the stacks that honest miners run, and the
//! cheats that a verifier can name. All of it is data; weights are changed when they are packed,
//! the rest is read by the decoder as it goes.

use super::grid::{Fp8Scale, Grid};
use crate::ops::rounding::Rounding;

/// How a pass departs from the canon; by default in nothing.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Departure {
    /// Where values between products are rounded.
    pub rounding: Rounding,
    /// The grid of each head of a key or value, at each position by itself.
    pub cache: Option<Grid>,
    /// The grid of each row that enters a product with weights; experts get theirs as they are.
    pub inputs: Option<Grid>,
}

/// A cheap stand-in for a model.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Recipe {
    /// Its name in reports.
    pub name: &'static str,
    /// The grid of the matrices of all layers; embedding, head and routers stay.
    pub weights: Option<Grid>,
    /// What else is different.
    pub departure: Departure,
}

const NONE: Departure = Departure { rounding: Rounding::Inputs, cache: None, inputs: None };
const BYTES: Grid = Grid::integers(8, 0);
const Q8_0: Grid = Grid::Integers { bits: 8, group: 32, half_scales: true };

/// Stand-ins that a verifier knows by name.
pub const RECIPES: [Recipe; 11] = [
    weights("int8 per channel", BYTES),
    weights("int8, groups of 32", Grid::integers(8, 32)),
    weights("Q8_0", Q8_0),
    weights("fp8 per tensor", Grid::Fp8(Fp8Scale::Tensor)),
    weights("fp8 per channel", Grid::Fp8(Fp8Scale::Row)),
    weights("int4, groups of 32", Grid::integers(4, 32)),
    weights("int4, groups of 128", Grid::integers(4, 128)),
    weights("int4 per channel", Grid::integers(4, 0)),
    Recipe {
        name: "W8A8",
        weights: Some(BYTES),
        departure: Departure { inputs: Some(BYTES), ..NONE },
    },
    cache("int8 KV cache", BYTES),
    cache("fp8 KV cache", Grid::Fp8(Fp8Scale::One)),
];

const fn weights(name: &'static str, grid: Grid) -> Recipe {
    Recipe { name, weights: Some(grid), departure: NONE }
}

const fn cache(name: &'static str, grid: Grid) -> Recipe {
    Recipe { name, weights: None, departure: Departure { cache: Some(grid), ..NONE } }
}
