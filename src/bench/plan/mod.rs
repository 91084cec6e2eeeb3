//! Predicts without a load what a roofline allows a model on a device, in time and money.
//!
//! [`work`] counts the bytes and operations of a step from a model's shape, [`devices`] holds what
//! datasheets say, [`predict`] divides one by the other, [`prices`] adds money.

pub mod devices;
pub mod predict;
pub mod prices;
pub mod work;
