//! Limits the lists of models that validators, miners and the hub send each other.

/// Bytes of a list as JSON.
pub const LIST_BYTES_MAX: usize = 256 << 10;
/// Names of one list.
pub const LIST_MODELS_MAX: usize = 256;
/// Characters of a name.
pub const NAME_CHARS_MAX: usize = 200;
