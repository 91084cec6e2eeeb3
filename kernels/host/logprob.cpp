// logprob.cu for the CPU.
#define CUDA_HOST_SHIM
#include "../logprob.cu"
SHIM_DYN_SHARED(u64, heap)
SHIM_EXPORT(reduce_logits)
