// CUDA's number types of the dtypes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dtype.h"

namespace clae_fast {

__device__ inline float load(float value) { return value; }
__device__ inline float load(__half value) { return __half2float(value); }
__device__ inline float load(__nv_bfloat16 value) { return __bfloat162float(value); }

// Calls visit(T{}), where T is the type of the dtype.
template <class Visit>
void with_type(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::fp32:
      return visit(float{});
    case DType::fp16:
      return visit(__half{});
    case DType::bf16:
      return visit(__nv_bfloat16{});
  }
}

}  // namespace clae_fast
