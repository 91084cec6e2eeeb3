// ceiling.cu for the CPU.
#define CUDA_HOST_SHIM
#include "../ceiling.cu"
SHIM_EXPORT(read_ceiling)
SHIM_EXPORT(fma_ceiling)
SHIM_EXPORT(mma_ceiling_bf16)
SHIM_EXPORT(mma_ceiling_f16)
