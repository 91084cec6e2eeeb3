// attend.cu for the CPU.
#define CUDA_HOST_SHIM
#include "../attend.cu"
SHIM_DYN_SHARED(float4, attend_memory)
SHIM_EXPORT(attend_bf16_1)
SHIM_EXPORT(attend_bf16_4)
SHIM_EXPORT(attend_bf16_8)
SHIM_EXPORT(attend_f16_1)
SHIM_EXPORT(attend_f16_4)
SHIM_EXPORT(attend_f16_8)
SHIM_EXPORT(attend_merge)
