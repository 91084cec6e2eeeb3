// matmul_tensor.cu for the CPU.
#define CUDA_HOST_SHIM
#include "../matmul_tensor.cu"
SHIM_EXPORT(decode_mma_bf16_8)
SHIM_EXPORT(decode_mma_bf16_32)
SHIM_EXPORT(decode_mma_f16_8)
SHIM_EXPORT(decode_mma_f16_32)
SHIM_EXPORT(prefill_mma_bf16)
SHIM_EXPORT(prefill_mma_f16)
SHIM_EXPORT(expert_mma_bf16)
SHIM_EXPORT(expert_mma_f16)
SHIM_EXPORT(grouped_mma_bf16_32)
SHIM_EXPORT(grouped_mma_bf16_128)
SHIM_EXPORT(grouped_mma_f16_32)
SHIM_EXPORT(grouped_mma_f16_128)
