// attend_tensor.cu for the CPU.
#define CUDA_HOST_SHIM
#include "../attend_tensor.cu"
SHIM_DYN_SHARED(uint4, attend_mma_memory)
SHIM_EXPORT(attend_mma_bf16_8)
SHIM_EXPORT(attend_mma_bf16_32)
SHIM_EXPORT(attend_mma_f16_8)
SHIM_EXPORT(attend_mma_f16_32)
