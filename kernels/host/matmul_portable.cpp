// matmul_portable.cu for the CPU.
#define CUDA_HOST_SHIM
#include "../matmul_portable.cu"
SHIM_EXPORT(decode_bf16_1)
SHIM_EXPORT(decode_bf16_4)
SHIM_EXPORT(decode_bf16_8)
SHIM_EXPORT(decode_f16_1)
SHIM_EXPORT(decode_f16_4)
SHIM_EXPORT(decode_f16_8)
SHIM_EXPORT(prefill_bf16)
SHIM_EXPORT(prefill_f16)
SHIM_EXPORT(grouped_bf16_8)
SHIM_EXPORT(grouped_bf16_64)
SHIM_EXPORT(grouped_f16_8)
SHIM_EXPORT(grouped_f16_64)
SHIM_EXPORT(pack)
