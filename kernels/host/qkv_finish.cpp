// qkv_finish.cu for the CPU.
#define CUDA_HOST_SHIM
#include "../qkv_finish.cu"
SHIM_EXPORT(qkv_finish)
