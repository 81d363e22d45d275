#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace clae_fast {

__device__ inline float load(float value) { return value; }
__device__ inline float load(__half value) { return __half2float(value); }
__device__ inline float load(__nv_bfloat16 value) { return __bfloat162float(value); }

}  // namespace clae_fast
