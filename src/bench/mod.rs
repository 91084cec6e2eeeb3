//! Measurements that tell users what to expect. So far: what each verification scheme catches.

pub mod attack;
pub mod tamper;
