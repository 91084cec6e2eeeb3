//! Says what is asked of rows, and whether two answers are the same.

use crate::models::pass::RowResult;
use crate::models::sampler::Sampling;
use crate::models::spec::Spec;
use crate::proof::Scheme;
use crate::proof::commit::RowProver;
use crate::proof::residue::Calibration;
use std::sync::Arc;

/// Numbers are written so that they can be read back, signs of zeros included.
pub(super) fn is_same(got: &RowResult, want: &RowResult) -> bool {
    format!("{got:?}") == format!("{want:?}")
}

/// Greedy, drawn, and drawn from the most probable.
pub(super) fn samplings() -> [Sampling; 3] {
    let noisy = Sampling { temperature: 0.8, noise_key: 5, ..Sampling::greedy() };
    [Sampling::greedy(), noisy.clone(), Sampling { top_p: 0.9, ..noisy }]
}

/// A prover of any key.
pub(super) fn prover(spec: &Spec) -> RowProver {
    let (exponents, means) = (vec![0; spec.hidden], vec![0; spec.hidden]);
    let calibration = Arc::new(Calibration { exponents, means, shift: 4 });
    RowProver::new(Scheme::Residue, &[7; 32], calibration)
}
