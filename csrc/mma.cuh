// The PTX instructions that the kernels of csrc/ need, one function for each. Without a GPU, tests
// replace this file by an emulation: so all inline assembly and dynamic shared memory stay here.
//
// A matrix operand is spread over the lanes of a warp in fragments. With g = lane / 4 and
// t = lane % 4, the registers of a lane hold these (row, column) elements:
//
// clang-format off
//
//     a[0]  (g,     2t), (g,     2t + 1)        a[2]  (g,     2t + 8), (g,     2t + 9)
//     a[1]  (g + 8, 2t), (g + 8, 2t + 1)        a[3]  (g + 8, 2t + 8), (g + 8, 2t + 9)
//
//     b[0]  (2t, g), (2t + 1, g)                b[1]  (2t + 8, g), (2t + 9, g)
//
//     d[0]  (g, 2t)    d[1]  (g, 2t + 1)        d[2]  (g + 8, 2t)    d[3]  (g + 8, 2t + 1)
//
// clang-format on
#ifndef CLAE_FAST_MMA_CUH
#define CLAE_FAST_MMA_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace clae_fast {

// The dynamic shared memory of the launch, aligned to 128 bytes.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char clae_fast_dynamic_shared[];
  return clae_fast_dynamic_shared;
}

// d [16, 8] += a [16, 16] b [16, 8]. Half is __half or __nv_bfloat16.
template <class Half>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<Half, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<Half, __nv_bfloat16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

__device__ inline unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// These two load 8 x 8 matrices of 16-bit numbers from shared memory, one into each register. A
// lane passes the address of row lane % 8 of matrix lane / 8: 16 bytes, aligned to 16. Register i
// gets columns 2t and 2t + 1 of row g of matrix i, and with _trans rows 2t and 2t + 1 of column g.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Starts to copy 16 aligned bytes from global to shared memory, past L1: nobody reads the same
// bytes again. If not `valid`, it writes zeros and does not read `global`.
__device__ inline void cp_async(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

// Closes a group: the copies that this thread has started since it closed the last one.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all of this thread's groups have arrived but the last `pending` ones.
template <int pending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// 2^x with a relative error of about 2^-22. Where the result would be subnormal, it is 0.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace clae_fast

#endif  // CLAE_FAST_MMA_CUH
