//! The pass on NVIDIA cards: on the stand-in driver of `scripts/cuda-check`, which runs the kernels
//! on the CPU. Nothing here has run on a card.
