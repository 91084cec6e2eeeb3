//! Measures how far rounding to 16 bits moves the rows of a model, which its default limits of
//! energies follow.
//!
//! Honest rows of other stacks are about as far from ours as the twin's (`docs/verification.md`),
//! and how far that is differs from model to model. So the twin of the calibration text says what
//! the limits must be that were measured on honest miners of [one model](MEASURED).

use super::Stop;
use super::limits::Limits;
use super::prefill::hidden_rows;
use super::statistic::trimmed_mean;
use crate::models::Model;
use crate::models::calibration;
use crate::models::departure::Departure;
use crate::models::error::LoadError;
use crate::models::identity::Identity;
use crate::models::remembered::{Remembered, cache_dir};
use crate::ops::pool::Pool;
use crate::ops::rounding::Rounding;
use crate::proof::apart::Apart;
use crate::proof::residue::ResidueBits;
use std::path::Path;

/// The rounding energy of SmolLM2-135M-Instruct in bf16, on whose honest answers the default
/// limits were measured.
pub const MEASURED: f64 = 90.361_739_309_210_52;

/// The default limits for a model: those of energies in proportion to its rounding energy, and
/// others as they are, because they are in other units. Where that is not known, they are those of
/// the model that they were measured on.
///
/// # Errors
/// As for [`of_model`].
pub fn default_limits(model: &Model, own: &Identity, pool: &Pool) -> Result<Limits, LoadError> {
    let Some(energy) = of_model(model, own, pool)? else {
        tracing::warn!(
            "the weights are on {}, where rounding is not measured: the limits of energies are \
             those of SmolLM2-135M, and may be far from what this model needs; `calibrate` \
             measures it once, on the processor",
            model.weights.device()
        );
        return Ok(Limits::default());
    };
    Ok(Limits::default().scaled(energy / MEASURED))
}

/// The rounding energy of a model: the trimmed mean, over the rows of the calibration text, of the
/// energy between a row and its twin, in squared steps of an eight-bit residue. It is computed once
/// and remembered. Nothing where the weights are not on the processor and it was not computed
/// before.
///
/// # Errors
/// When the text cannot be tokenised or a pass fails.
pub fn of_model(model: &Model, own: &Identity, pool: &Pool) -> Result<Option<f64>, LoadError> {
    let cache = cache_dir()?;
    let remembered = Remembered(&cache);
    let inputs = calibration::inputs(model, &own.weights_root)?;
    if let Some(energy) = remembered.rounding(&inputs) {
        return Ok(Some(energy));
    }
    let energy = compute(model, own, pool)?;
    if let Some(energy) = energy {
        remembered.keep_rounding(&inputs, energy);
    }
    Ok(energy)
}

/// The same, computed now.
///
/// # Errors
/// As for [`of_model`].
pub fn compute(model: &Model, own: &Identity, pool: &Pool) -> Result<Option<f64>, LoadError> {
    let Some(decoder) = model.weights.cpu() else { return Ok(None) };
    let rounding = Rounding::Everywhere(model.dtype);
    let stepwise = Departure { rounding, ..Departure::default() };
    let widen = |bits: &Vec<u16>| bits.iter().map(|b| model.dtype.widen(*b)).collect::<Vec<f32>>();
    let mut squares = Vec::new();
    for piece in calibration::pieces(model)? {
        let Some((first, rest)) = piece.split_first() else { continue };
        let by = |departure| {
            let pass = |blocks| Model::departing(decoder, departure, (pool, blocks));
            hidden_rows(pass, &[*first], rest).map_err(fault)
        };
        let (rows, twins) = (by(Departure::default())?, by(stepwise)?);
        // The square does not depend on the signs, so any key will do.
        let measure = (&*own.calibration, ResidueBits::U8);
        let apart = |(row, twin)| Apart::new(measure, (0, 0), &widen(row), &widen(twin));
        squares.extend(rows.iter().zip(&twins).filter_map(apart).map(|apart| apart.square()));
    }
    Ok(trimmed_mean(&squares))
}

fn fault(stop: Stop) -> LoadError {
    let what = match stop {
        Stop::Fault(what) => what,
        Stop::Rejected(rejection) => rejection.to_string(),
    };
    LoadError::invalid(Path::new("calibration text"), what)
}
