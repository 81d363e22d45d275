// Kernels that try the emulator itself; test_cuda_emulator.py calls them.
#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "mma.cuh"

namespace {

constexpr int kShared = 1024;

// c [16, 8] = a [16, 16] b [16, 8], fragments loaded element by element
template <class Half>
__global__ void matmul_kernel(const Half* a, const Half* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto* pairs = reinterpret_cast<const uint32_t*>(a);
  const uint32_t a_fragment[4] = {pairs[g * 8 + t], pairs[(g + 8) * 8 + t], pairs[g * 8 + t + 4],
                                  pairs[(g + 8) * 8 + t + 4]};
  uint32_t b_fragment[2];
  for (int i = 0; i < 2; ++i) {
    const uint16_t low = b[(2 * t + 8 * i) * 8 + g].bits,
                   high = b[(2 * t + 8 * i + 1) * 8 + g].bits;
    b_fragment[i] = low | uint32_t(high) << 16;
  }
  float d[4] = {};
  clae_fast::mma_m16n8k16<Half>(d, a_fragment, b_fragment);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

// the same through cp.async and ldmatrix
__global__ void staged_matmul_kernel(const __half* a, const __half* b, float* c) {
  const int lane = threadIdx.x;
  auto* shared_a = reinterpret_cast<__half*>(clae_fast::dynamic_shared());  // [16, 16]
  auto* shared_b = shared_a + 256;                                          // [16, 8]
  clae_fast::cp_async(shared_a + lane * 8, a + lane * 8);
  if (lane < 16) clae_fast::cp_async(shared_b + lane * 8, b + lane * 8);
  clae_fast::cp_async_commit();
  clae_fast::cp_async_wait<0>();
  __syncwarp();
  uint32_t a_fragment[4], b_matrices[4];
  clae_fast::ldmatrix_x4(a_fragment, shared_a + lane % 16 * 16 + lane / 16 * 8);
  // b has two matrices of eight rows, which lanes from 16 on name again
  clae_fast::ldmatrix_x4_trans(b_matrices, shared_b + lane % 16 * 8);
  float d[4] = {};
  clae_fast::mma_m16n8k16<__half>(d, a_fragment, {b_matrices[0], b_matrices[1]});
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// the sum of all blocks, and of the own block's first warp: static shared memory, shuffles and the
// grid's barrier
__global__ void sums_kernel(const float* x, float* sums, float* out) {
  __shared__ float of_warp[4];
  float value = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int bits = 16; bits; bits /= 2) value += __shfl_xor_sync(0xffffffffu, value, bits);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += of_warp[warp];
    sums[blockIdx.x] = sum;
  }
  cooperative_groups::this_grid().sync();
  float total = of_warp[0];  // this block's, although others have run since
  for (unsigned block = 0; block < gridDim.x; ++block) total += sums[block];
  out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

__global__ void exit_kernel(float*) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void diverge_kernel(float* out) {
  if (threadIdx.x < 7) {
    __syncthreads();
  } else {
    out[0] = 1;
    __syncthreads();
  }
}

__global__ void overrun_kernel(float*) {
  if (threadIdx.x == 0) clae_fast::dynamic_shared()[kShared] = 0;
}

__global__ void racing_kernel(float* out) {
  auto* shared = reinterpret_cast<float*>(clae_fast::dynamic_shared());
  if (threadIdx.x == 16) shared[0] = 1;
  out[threadIdx.x] = shared[0];
}

template <class... Args>
const char* launch(void (*kernel)(Args...), int grid, int block, bool cooperative, Args... args) {
  void* arguments[] = {&args...};
  const cudaError_t error =
      cooperative ? cudaLaunchCooperativeKernel(kernel, grid, block, arguments, kShared)
                  : cudaLaunchKernel(kernel, grid, block, arguments, kShared);
  return cudaGetErrorString(error);
}

const char* message(const std::function<const char*()>& run) {
  static std::string text;
  try {
    return run();
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

}  // namespace

extern "C" {

const char* matmul_fp16(const __half* a, const __half* b, float* c) {
  return message([=] { return launch(matmul_kernel<__half>, 1, 32, false, a, b, c); });
}

const char* matmul_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  return message([=] { return launch(matmul_kernel<__nv_bfloat16>, 1, 32, false, a, b, c); });
}

const char* staged_matmul(const __half* a, const __half* b, float* c) {
  return message([=] { return launch(staged_matmul_kernel, 1, 32, false, a, b, c); });
}

const char* sums(const float* x, float* sums, float* out, int grid, int block, bool cooperative) {
  return message([=] { return launch(sums_kernel, grid, block, cooperative, x, sums, out); });
}

const char* exits(float* out) {
  return message([=] { return launch(exit_kernel, 1, 64, false, out); });
}

const char* diverges(float* out) {
  return message([=] { return launch(diverge_kernel, 1, 64, false, out); });
}

const char* overruns(float* out) {
  return message([=] { return launch(overrun_kernel, 1, 64, false, out); });
}

const char* races(float* out) {
  return message([=] { return launch(racing_kernel, 1, 32, false, out); });
}

}  // extern "C"
