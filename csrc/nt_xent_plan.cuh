// How a launch of nt_xent's kernel shares the work and the memory; for nt_xent_cuda.cu alone.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda_check.cuh"
#include "nt_xent.h"

namespace clae_fast {
namespace {

constexpr char kOp[] = "nt_xent";

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 64;                           // rows of a unit, 16 of them for a warp
constexpr int kRowGroups = kRows / 16;              // warps that have different rows
constexpr int kColumnGroups = kWarps / kRowGroups;  // warps that share the same rows
constexpr int kAhead = 2;                           // tiles of columns that are being copied

constexpr float kLn2 = 0.693147180559945309f;
// From this temperature on exp(-2 / T) is a normal number, and the shift is the same for all rows.
constexpr float kFixedShiftTemperature = 0.023f;

// kWidth is the length of a row, padded.
template <int kWidth>
constexpr int kColumns = kWidth <= 128 ? 64 : 32;  // columns of a tile

// The number value 2^shift.
struct Sum {
  float shift;
  float value;
};

struct Plan {
  int width;      // D, padded
  int row_tiles;  // of kRows rows
  int splits;     // parts of the columns
  int part;       // tiles of columns in a part; the last part may have less
  int slots;      // tiles of columns that shared memory has room for
  int blocks;
  int shared_bytes;
};

// What blocks tell each other between the grid's barriers.
struct Workspace {
  __half* u;            // [2N, width] unit rows times a power of two
  float* scale;         // [2N] what u is multiplied with to have a length of kUnit
  float* norm;          // [2N] of the raw rows
  float* pos2;          // [N] base-2 logits of the positives
  Sum* sums;            // [2N, splits] over the negatives
  float* q;             // [2N] the share of the negatives
  float* loss_of_tile;  // [row_tiles]
  float* du;            // [splits, 2N, width]
  int64_t bytes;
};

// The arguments of the kernel.
struct Problem {
  NtXentCudaArgs args;
  Plan plan;
  Workspace workspace;
  int n;             // 2N
  float scale2;      // 1 / (T ln 2)
  float grad_scale;  // 1 / (n T)
};

// The shared memory of a block.
struct Shared {
  __half* own;      // [kRows, width] the unit's rows, swizzled
  __half* slots;    // [slots, kColumns, width] tiles of its columns, swizzled
  float2* columns;  // [part * kColumns] scale and offset, see Unit::fill()
  float2* rows;     // [kRows] likewise
  Sum* sums;        // [kColumnGroups, kRows]
  float* losses;    // [kRows]
};

// Takes an array from the memory at `at`, which advances.
template <class T, class Address>
__host__ __device__ T* take(Address& at, int64_t count) {
  T* const taken = reinterpret_cast<T*>(at);
  at += (count * sizeof(T) + 127) / 128 * 128;
  return taken;
}

template <class Address>
__host__ __device__ Shared shared_layout(Address& at, const Plan& plan, int columns) {
  Shared shared;
  shared.own = take<__half>(at, kRows * plan.width);
  shared.slots = take<__half>(at, plan.slots * columns * plan.width);
  shared.columns = take<float2>(at, plan.part * columns);
  shared.rows = take<float2>(at, kRows);
  shared.sums = take<Sum>(at, kColumnGroups * kRows);
  shared.losses = take<float>(at, kRows);
  return shared;
}

int padded_width(int64_t D) { return D <= 64 ? 64 : D <= 128 ? 128 : 256; }

int shared_bytes(const Plan& plan, int columns) {
  uintptr_t at = 0;
  shared_layout(at, plan, columns);
  return int(at);
}

Plan make_plan(int64_t N, int64_t D) {
  const int n = int(2 * N);
  const int multiprocessors = device_attribute(kOp, cudaDevAttrMultiProcessorCount);
  const int limit = device_attribute(kOp, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  Plan plan;
  plan.width = padded_width(D);
  const int columns = plan.width <= 128 ? kColumns<128> : kColumns<256>;
  const int column_tiles = (n + columns - 1) / columns;
  plan.row_tiles = (n + kRows - 1) / kRows;
  const int most = std::max(1, std::min(column_tiles, multiprocessors / plan.row_tiles));
  plan.part = (column_tiles + most - 1) / most;
  plan.splits = (column_tiles + plan.part - 1) / plan.part;
  // enough blocks for all units and for a warp for each row; the grid's barrier needs all blocks to
  // be resident, which one block for each multiprocessor always is
  plan.blocks =
      std::min(std::max(plan.row_tiles * plan.splits, (n + kWarps - 1) / kWarps), multiprocessors);
  // one tile at work and those on their way fit into 99 KB at every size that nt_xent_cuda_takes()
  // accepts, and the exchange of du needs no more
  plan.slots = kAhead + 1;
  const int free = limit - shared_bytes(plan, columns);
  plan.slots += std::clamp(free / int(columns * plan.width * sizeof(__half)), 0,
                           std::max(0, plan.part - plan.slots));
  plan.shared_bytes = shared_bytes(plan, columns);
  return plan;
}

Workspace make_workspace(const NtXentCudaArgs& args, const Plan& plan) {
  const int64_t n = 2 * args.N;
  const auto begin = reinterpret_cast<uintptr_t>(args.workspace);
  uintptr_t at = begin;
  Workspace workspace;
  workspace.u = take<__half>(at, n * plan.width);
  workspace.scale = take<float>(at, n);
  workspace.norm = take<float>(at, n);
  workspace.pos2 = take<float>(at, n / 2);
  workspace.sums = take<Sum>(at, n * plan.splits);
  workspace.q = take<float>(at, n);
  workspace.loss_of_tile = take<float>(at, plan.row_tiles);
  workspace.du = take<float>(at, args.dz ? plan.splits * n * plan.width : 0);
  workspace.bytes = int64_t(at - begin);
  return workspace;
}

}  // namespace
}  // namespace clae_fast
