// gate.cu for the CPU.
#define CUDA_HOST_SHIM
#include "../gate.cu"
SHIM_EXPORT(gate)
SHIM_EXPORT(softcap)
