// draw.cu for the CPU.
#define CUDA_HOST_SHIM
#include "../draw.cu"
SHIM_DYN_SHARED(float, chunk_sums)
SHIM_EXPORT(sum_exp)
SHIM_EXPORT(largest)
SHIM_EXPORT(draw)
SHIM_EXPORT(look_up)
