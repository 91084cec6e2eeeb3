// norm.cu for the CPU.
#define CUDA_HOST_SHIM
#include "../norm.cu"
SHIM_DYN_SHARED(float, staged)
SHIM_EXPORT(add_norm)
SHIM_EXPORT(norm_add)
