// The functions of csrc/mma.cuh, element by element, in the layout of the PTX ISA. It is included
// before that file and takes its place.
#pragma once
#define CLAE_FAST_MMA_CUH

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace cuda_emulator {

inline float decode(__half value) { return __half2float(value); }
inline float decode(__nv_bfloat16 value) { return __bfloat162float(value); }

// element `i` of the registers of a fragment of 16-bit numbers
template <class Half>
float element(const uint32_t* registers, int i) {
  return decode(Half{uint16_t(registers[i / 2] >> 16 * (i % 2))});
}

template <int count>
void load_matrices(const char* what,
                   uint32_t (&registers)[count],
                   const void* row,
                   bool transposed,
                   int line) {
  struct Operand {
    uint32_t* registers;
    const uint16_t* row;
  } operand{registers, static_cast<const uint16_t*>(row)};
  meet_warp(what, line, operand, [&](Operand** lanes, int threads) {
    if (threads != warpSize) fail("ldmatrix of a part of a warp");
    for (int matrix = 0; matrix < count; ++matrix) {
      for (int lane = 0; lane < warpSize; ++lane) {
        uint32_t pair = 0;
        for (int i = 0; i < 2; ++i) {
          const int along = lane % 4 * 2 + i;
          const int r = transposed ? along : lane / 4;
          const int c = transposed ? lane / 4 : along;
          const uint16_t* source = lanes[matrix * 8 + r]->row;
          if (reinterpret_cast<uintptr_t>(source) % 16) fail("ldmatrix of an unaligned row");
          pair |= uint32_t(source[c]) << 16 * i;
        }
        lanes[lane]->registers[matrix] = pair;
      }
    }
  });
}

}  // namespace cuda_emulator

namespace clae_fast {

inline unsigned char* dynamic_shared() { return cuda_emulator::current->block->dynamic_shared(); }

template <class Half>
void mma_m16n8k16(float (&d)[4],
                  const uint32_t (&a)[4],
                  const uint32_t (&b)[2],
                  int line = __builtin_LINE()) {
  struct Operand {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
  } operand{d, a, b};
  cuda_emulator::meet_warp("mma", line, operand, [](Operand** lanes, int threads) {
    if (threads != warpSize) cuda_emulator::fail("mma of a part of a warp");
    float A[16][16], B[16][8];
    for (int lane = 0; lane < warpSize; ++lane) {
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 8; ++i) {
        const int row = group + (i / 2 % 2) * 8, column = pair + i % 2 + (i / 4) * 8;
        A[row][column] = cuda_emulator::element<Half>(lanes[lane]->a, i);
      }
      for (int i = 0; i < 4; ++i) {
        B[pair + i % 2 + (i / 2) * 8][group] = cuda_emulator::element<Half>(lanes[lane]->b, i);
      }
    }
    float D[16][8] = {};
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) D[row][column] += A[row][k] * B[k][column];
      }
    }
    for (int lane = 0; lane < warpSize; ++lane) {
      for (int i = 0; i < 4; ++i) {
        lanes[lane]->d[i] += D[lane / 4 + (i / 2) * 8][lane % 4 * 2 + i % 2];
      }
    }
  });
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
  cuda_emulator::load_matrices("ldmatrix_x4", r, row, false, line);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
  cuda_emulator::load_matrices("ldmatrix_x4_trans", r, row, true, line);
}

inline void cp_async(void* shared, const void* global, bool valid = true) {
  constexpr int bytes = 16;
  const auto addresses = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global);
  if (addresses % bytes) cuda_emulator::fail("cp_async of an unaligned address");
  const cuda_emulator::Copy copy{shared, global, bytes, valid ? bytes : 0};
  if (!cuda_emulator::launch->late) copy.run();
  cuda_emulator::current->copies.back().push_back(copy);
}

inline void cp_async_commit() { cuda_emulator::current->copies.emplace_back(); }

template <int pending>
void cp_async_wait() {
  auto& groups = cuda_emulator::current->copies;
  while (groups.size() > pending + 1) {
    if (cuda_emulator::launch->late) {
      for (const auto& copy : groups.front()) copy.run();
    }
    groups.erase(groups.begin());
  }
}

inline float exp2_approx(float x) { return std::exp2(x); }

}  // namespace clae_fast
