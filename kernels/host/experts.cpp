// experts.cu for the CPU.
#define CUDA_HOST_SHIM
#include "../experts.cu"
SHIM_EXPORT(route)
SHIM_EXPORT(group_slots)
SHIM_EXPORT(expert_bf16)
SHIM_EXPORT(expert_f16)
SHIM_EXPORT(combine)
