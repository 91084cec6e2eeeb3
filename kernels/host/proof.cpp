// proof.cu for the CPU.
#define CUDA_HOST_SHIM
#include "../proof.cu"
SHIM_EXPORT(sketch_rows)
