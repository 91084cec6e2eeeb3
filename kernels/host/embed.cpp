// embed.cu for the CPU.
#define CUDA_HOST_SHIM
#include "../embed.cu"
SHIM_EXPORT(embed)
