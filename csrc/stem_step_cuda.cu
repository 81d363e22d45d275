#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "linf_step.cuh"
#include "mma.cuh"
#include "stem_step.h"

// The gradient is a matrix product on tensor cores, of which the sum over kernel rows is left to
// the accumulators.
//
// A position is a pair of neighbouring pixels of x in a row. What dY's row r adds to a position in
// all the rows of x that it reaches depends on a window of 4 dY pixels, so on 4 C numbers, the
// length of the product's sums; zero weights stand for taps that miss. The matrix of dY has a row
// for each position and serves kernels of 3 and 7 alike: windows of neighbouring positions are 2
// and 1 pixels apart.
//
// The product's columns are 6, a position's pixels by channels, for each row of x. As dY's row
// advances, rows of x enter and leave; each keeps its columns, one slot of a ring of kRows, until
// it has all of its kernel rows and its signs are taken. The weights turn instead: the columns of
// slot s hold kernel row (s - kStride r + const) mod kRows, of which the last is zeros.
//
// A warp walks down the rows with kPositions of the positions of all images, which lie side by
// side, zeros between them. No warp waits for another after the weights are packed.

namespace clae_fast {
namespace {

constexpr int kStages = 2;        // dY rows in shared memory, one of them on its way
constexpr int kWindow = 4;        // dY pixels that a position depends on in a row
constexpr int kChunk = 64;        // channels of a stage
constexpr int kPixelBytes = 128;  // of a chunk
constexpr int kSteps = kChunk / 16;
constexpr int kNowhere = -1;
constexpr int kFirstRow = 1;  // of dY, the first to end a row of x: kPadding / kStride

template <int kSize>
struct Stem {
  static constexpr int kStride = kSize == 3 ? 1 : 2;
  static constexpr int kPadding = kSize / 2;
  static constexpr int kMaxWarps = 8;         // of a block: what registers allow at kSize 7
  static constexpr int kApart = 2 / kStride;  // dY pixels from position to position
  // matrix tiles of a warp. Tile t has positions t, t + kTiles, ...: so a tile's window at an
  // offset is, but for that offset, another tile's, and a fragment serves both.
  static constexpr int kTiles = 4 / kApart;
  static constexpr int kFragments = kApart * (kTiles - 1) + kWindow;
  static constexpr int kPositions = 16 * kTiles;
  static constexpr int kPixels = kApart * (kPositions - kTiles) + kFragments;
  static constexpr int kRows = kSize + 1;  // the ring of rows of x
  static constexpr int kColumns = 6 * kRows;
  static constexpr int kColumnTiles = kColumns / 8;
  static constexpr int kNumbers = kPositions * 6 / 32;  // of a row of x, a lane's
  // dY rows that a row of x depends on above the one that ends it
  static constexpr int kReach = (kSize - 1) / kStride;
  static constexpr int kWeightBytes = kSteps * kWindow * kColumns * 4 * int(sizeof(uint2));
};

// A warp's part of shared memory.
template <int kSize>
struct alignas(128) Workspace {
  unsigned char stages[kStages][Stem<kSize>::kPixels * kPixelBytes];
  // offsets in row 0 of the images from the group's first one on, -1 between them: of the pixels
  // of dY, and of the numbers of x in the order of pixels and channels
  int pixels[Stem<kSize>::kPixels];
  int numbers[Stem<kSize>::kPositions * 6];
  signed char signs[Stem<kSize>::kStride][Stem<kSize>::kPositions * 6];
};

// [4, 3] on the device, else by value.
struct Bounds {
  const float* table;
  float values[4][3];
};

// A step of the walk ends kStride rows of x. The steps of all positions, group by group, are dealt
// out to the warps in runs of equal length.
struct Schedule {
  int dy_H;
  int dy_W;
  int pitch;  // dY pixels from image to image
  int steps;  // of a group of kPositions
  int all;    // steps of all groups
  int each;   // steps of a warp
};

template <class Half>
__device__ uint32_t pack(float a, float b) {
  if constexpr (std::is_same_v<Half, __half>) {
    return __half_as_ushort(__float2half_rn(a)) | __half_as_ushort(__float2half_rn(b)) << 16;
  } else {
    return __bfloat16_as_ushort(__float2bfloat16_rn(a)) |
           __bfloat16_as_ushort(__float2bfloat16_rn(b)) << 16;
  }
}

// packed [C / 16, kWindow, kColumns, 4]: the fragments of the 16 channels by 8 columns that a
// product takes, in kernel row order. A lane's four weights are one element.
template <class Half, class W, int kSize>
__device__ void pack_weights(const StemStepArgs& args, uint2* packed) {
  using S = Stem<kSize>;
  constexpr int kBatch = 4;  // elements whose weights are on their way at once
  const int* strides = args.strides.weight;
  const int count = args.C / 16 * kWindow * S::kColumns * 4;
  for (int begin = threadIdx.x; begin < count; begin += kBatch * blockDim.x) {
    W w[kBatch][4];
    bool hits[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = begin + b * blockDim.x;
      const int column = i / 4 % S::kColumns;
      const int offset = i / (4 * S::kColumns) % kWindow;
      const int channel = i / (4 * S::kColumns * kWindow) * 16 + i % 4 * 2;
      const int row = column / 6, phase = column % 6 / 3, c = column % 3;
      // of dY's pixel kApart p + offset - 1 and x's pixel 2 p + phase
      const int tap = phase + S::kPadding + S::kStride * (1 - offset);
      hits[b] = i < count && row < kSize && tap >= 0 && tap < kSize;
      const int at = channel * strides[0] + c * strides[1] + row * strides[2] + tap * strides[3];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int next = (k / 2 * 8 + k % 2) * strides[0];
        w[b][k] = static_cast<const W*>(args.weight)[hits[b] ? at + next : 0];
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = begin + b * blockDim.x;
      const auto weight = [&](int k) { return hits[b] ? load(w[b][k]) : 0.f; };
      if (i < count) {
        packed[i] = make_uint2(pack<Half>(weight(0), weight(1)), pack<Half>(weight(2), weight(3)));
      }
    }
  }
}

// copied [3]: alpha, eps, lo and hi of each channel.
__device__ void copy_bounds(const Bounds& bounds, float4* copied) {
  const int c = threadIdx.x;
  if (c >= 3) return;
  const auto bound = [&](int row) {
    if (bounds.table) return bounds.table[3 * row + c];
    const float* values = bounds.values[row];
    // selected, because arguments that are indexed at run time go through local memory
    return c == 0 ? values[0] : c == 1 ? values[1] : values[2];
  };
  copied[c] = make_float4(bound(0), bound(1), bound(2), bound(3));
}

// The image and the column of a pixel of dY, counted over all images and what is between them.
struct Pixel {
  int image;
  int column;
};

__device__ Pixel locate(const Schedule& schedule, int pixel) {
  const unsigned image = unsigned(pixel) / unsigned(schedule.pitch);
  return {int(image), int(pixel - image * schedule.pitch)};
}

// Finds a group's pixels and numbers. Returns its first image.
template <int kSize>
__device__ int locate_group(const StemStepArgs& args,
                            const Schedule& schedule,
                            int group,
                            Workspace<kSize>& work) {
  using S = Stem<kSize>;
  const int start = group * (S::kApart * S::kPositions);
  const int image = locate(schedule, start).image;
  const int* strides = args.strides.x;
  for (int i = threadIdx.x % 32; i < S::kPixels; i += 32) {
    // a window begins one pixel before its position
    const Pixel pixel = locate(schedule, start + i - 1);
    const bool inside = start + i > 0 && pixel.image < args.N && pixel.column < schedule.dy_W;
    const int rows = (pixel.image - image) * schedule.dy_H;
    work.pixels[i] = inside ? (rows * schedule.dy_W + pixel.column) * args.C : kNowhere;
  }
  for (int i = threadIdx.x % 32; i < S::kPositions * 6; i += 32) {
    const Pixel pixel = locate(schedule, start + i / 6 * S::kApart);
    const int column = S::kStride * pixel.column + i % 6 / 3;
    const bool inside = pixel.image < args.N && pixel.column < schedule.dy_W && column < args.W;
    work.numbers[i] =
        inside ? (pixel.image - image) * strides[0] + i % 3 * strides[1] + column * strides[3]
               : kNowhere;
  }
  __syncwarp();
  return image;
}

// Starts to copy a chunk of a row of dY, which begins at `dy` in the group's first image. The
// 16-byte parts of a pixel are permuted, so that the rows of a fragment, every fourth pixel, lie in
// different banks.
template <int kSize>
__device__ void start_copy(const uint16_t* dy, const Workspace<kSize>& work, unsigned char* stage) {
  constexpr int kCopies = (Stem<kSize>::kPixels + 3) / 4;
  const int part = threadIdx.x % 8, first = threadIdx.x % 32 / 8;
  int pixels[kCopies];
#pragma unroll
  for (int k = 0; k < kCopies; ++k) {
    const int i = k * 4 + first;
    pixels[k] = i < Stem<kSize>::kPixels ? work.pixels[i] : kNowhere;
  }
#pragma unroll
  for (int k = 0; k < kCopies; ++k) {
    const int i = k * 4 + first;
    if (i >= Stem<kSize>::kPixels) continue;
    cp_async<16>(stage + i * kPixelBytes + (part ^ k % 8) * 16, dy + max(pixels[k], 0) + part * 8,
                 pixels[k] != kNowhere);
  }
}

template <class Half, int kSize>
__device__ void multiply(const unsigned char* stage,
                         const uint2* weights,  // [kSteps, kWindow, kColumns, 4]
                         int turn,
                         float (&sums)[Stem<kSize>::kTiles][Stem<kSize>::kColumnTiles][4]) {
  using S = Stem<kSize>;
  const int lane = threadIdx.x % 32;
  const int row = lane % 16, half = lane / 16;
  int columns[S::kColumnTiles];
#pragma unroll
  for (int j = 0; j < S::kColumnTiles; ++j) {
    const int column = j * 8 + lane / 4 - turn * S::kStride * 6;
    columns[j] = (column < 0 ? column + S::kColumns : column) * 4 + lane % 4;
  }
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[S::kFragments][4];
#pragma unroll
    for (int f = 0; f < S::kFragments; ++f) {
      const int part = (2 * step + half) ^ (row + f / 4) % 8;
      ldmatrix_x4(a[f], stage + (4 * row + f) * kPixelBytes + part * 16);
    }
#pragma unroll
    for (int offset = 0; offset < kWindow; ++offset) {
#pragma unroll
      for (int j = 0; j < S::kColumnTiles; ++j) {
        const uint2 pair = weights[(step * kWindow + offset) * (S::kColumns * 4) + columns[j]];
        const uint32_t b[2] = {pair.x, pair.y};
#pragma unroll
        for (int t = 0; t < S::kTiles; ++t) {
          mma_m16n8k16<Half>(sums[t][j], a[S::kApart * t + offset], b);
        }
      }
    }
  }
}

// The signs of the rows of x that the step ends, in the order of x's pixels and channels.
template <int kSize>
__device__ void take_signs(
    int turn,
    const float (&sums)[Stem<kSize>::kTiles][Stem<kSize>::kColumnTiles][4],
    signed char (&signs)[Stem<kSize>::kStride][Stem<kSize>::kPositions * 6]) {
  using S = Stem<kSize>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < S::kColumnTiles; ++j) {
    // columns 2 pair and 2 pair + 1 of the step's rows
    const int pair = j * 4 + lane % 4 - turn * S::kStride * 3;
    if (pair < 0 || pair >= S::kStride * 3) continue;
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int position = (lane / 4 + i / 2 * 8) * S::kTiles + t;
        const float sum = sums[t][j][i];
        signs[pair / 3][position * 6 + pair % 3 * 2 + i % 2] = (sum > 0.f) - (sum < 0.f);
      }
    }
  }
}

// Empties the slots that rows of x enter with the next step. They are those before the slots of the
// rows that leave with this one, by one: what a zero weight added to them may be NaN.
template <int kSize>
__device__ void clear_slots(int turn,
                            float (&sums)[Stem<kSize>::kTiles][Stem<kSize>::kColumnTiles][4]) {
  using S = Stem<kSize>;
#pragma unroll
  for (int j = 0; j < S::kColumnTiles; ++j) {
    const int pair = j * 4 + int(threadIdx.x) % 4 - turn * S::kStride * 3 + 3;
    if ((pair + S::kColumns / 2) % (S::kColumns / 2) >= S::kStride * 3) continue;
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[t][j][i] = 0.f;
    }
  }
}

// Reads a lane's numbers of a row of x, for take_step.
template <class X, int kSize>
__device__ void read(const X* row, const Workspace<kSize>& work, X (&x)[Stem<kSize>::kNumbers]) {
#pragma unroll
  for (int k = 0; k < Stem<kSize>::kNumbers; ++k) {
    const int at = work.numbers[k * 32 + threadIdx.x % 32];
    if (at != kNowhere) x[k] = row[at];
  }
}

// Writes a row of out. Bounds are those of a lane's numbers 0, 1 and 2, and so of the later ones.
template <class X, int kSize>
__device__ void take_step(const X (&x)[Stem<kSize>::kNumbers],
                          const Workspace<kSize>& work,
                          const signed char* signs,
                          const float4 (&bounds)[3],
                          X* row) {
#pragma unroll
  for (int k = 0; k < Stem<kSize>::kNumbers; ++k) {
    const int i = k * 32 + threadIdx.x % 32;
    const int at = work.numbers[i];
    if (at == kNowhere) continue;
    const float4 bound = bounds[k % 3];
    const float centre = load(x[k]);
    const float moved = stepped(centre, signs[i], centre, bound.x, bound.y, bound.z, bound.w);
    store(row + at, moved, centre);
  }
}

template <class Half, class X, int kSize>
__global__ void __launch_bounds__(Stem<kSize>::kMaxWarps * 32, 1)
    stem_step_kernel(StemStepArgs args, Bounds given, Schedule schedule) {
  using S = Stem<kSize>;
  __shared__ float4 channels[3];
  unsigned char* shared = dynamic_shared();
  const int chunks = args.C / kChunk;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  auto& work = reinterpret_cast<Workspace<kSize>*>(shared + chunks * S::kWeightBytes)[warp];
  auto* weights = reinterpret_cast<uint2*>(shared);

  int begin = (int(blockIdx.x) * warps + warp) * schedule.each;
  const int end = min(begin + schedule.each, schedule.all);
  // of the group's first image
  const uint16_t* dy = nullptr;
  const X* x = nullptr;
  X* out = nullptr;
  const int64_t dy_row = int64_t(schedule.dy_W) * args.C;
  const auto enter = [&] {
    const int64_t image = locate_group(args, schedule, begin / schedule.steps, work);
    dy = static_cast<const uint16_t*>(args.dy) + image * schedule.dy_H * dy_row;
    x = static_cast<const X*>(args.x) + image * args.strides.x[0];
    out = static_cast<X*>(args.out) + image * args.strides.x[0];
    const int row = kFirstRow + begin % schedule.steps - S::kReach;
    if (row >= 0) start_copy(dy + row * dy_row, work, work.stages[0]);
    cp_async_commit();
  };
  if (begin < end) enter();
  if (args.weight_dtype == DType::fp32) {
    pack_weights<Half, float, kSize>(args, weights);
  } else {
    pack_weights<Half, Half, kSize>(args, weights);
  }
  copy_bounds(given, channels);
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const float4 bounds[3] = {channels[lane % 3], channels[(lane + 32) % 3],
                            channels[(lane + 64) % 3]};

  while (begin < end) {
    const int first = kFirstRow + begin % schedule.steps;
    const int count = min(end - begin, schedule.steps - begin % schedule.steps);
    float sums[S::kTiles][S::kColumnTiles][4] = {};
    X numbers[S::kStride][S::kNumbers];
    int stage = 0, turn = 0;
    for (int row = first - S::kReach; row < first + count; ++row) {
      // of the rows of x that end here
      const int top = S::kStride * row - S::kPadding;
      const auto ends = [&](int y) { return row >= first && y >= 0 && y < args.H; };
#pragma unroll
      for (int y = top; y < top + S::kStride; ++y) {
        // early, to have it when the signs are there
        if (ends(y)) read(x + int64_t(y) * args.strides.x[2], work, numbers[y - top]);
      }
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const bool last = chunk + 1 == chunks;
        const int next = last ? row + 1 : row;
        if (next >= 0 && next < schedule.dy_H && next < first + count) {
          const int channel = last ? 0 : (chunk + 1) * kChunk;
          start_copy(dy + next * dy_row + channel, work, work.stages[stage ^ 1]);
        }
        cp_async_commit();
        cp_async_wait<1>();
        __syncwarp();
        if (row >= 0 && row < schedule.dy_H) {
          multiply<Half, kSize>(work.stages[stage],
                                weights + chunk * (S::kWeightBytes / sizeof(uint2)), turn, sums);
        }
        __syncwarp();
        stage ^= 1;
      }
      if (row >= first) take_signs<kSize>(turn, sums, work.signs);
      __syncwarp();
#pragma unroll
      for (int y = top; y < top + S::kStride; ++y) {
        if (!ends(y)) continue;
        take_step(numbers[y - top], work, work.signs[y - top], bounds,
                  out + int64_t(y) * args.strides.x[2]);
      }
      __syncwarp();
      clear_slots<kSize>(turn, sums);
      turn = (turn + 1) % (S::kRows / S::kStride);
    }
    begin += count;
    if (begin < end) enter();
  }
}

template <class Half, class X, int kSize>
cudaError_t launch(const StemStepArgs& args, const Bounds& bounds, cudaStream_t stream) {
  using S = Stem<kSize>;
  int device, multiprocessors, shared;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;

  const int weight_bytes = args.C / kChunk * S::kWeightBytes;
  // the bounds and what the system takes
  const int left = shared - 1024 - weight_bytes;
  const int warps = std::min<int>(S::kMaxWarps, left / int(sizeof(Workspace<kSize>)));
  if (warps < 1) return cudaErrorInvalidConfiguration;

  Schedule schedule;
  schedule.dy_H = (args.H - 1) / S::kStride + 1;
  schedule.dy_W = (args.W - 1) / S::kStride + 1;
  // two pixels or more of zeros on each side of an image, for a window's
  const int pitch = (args.W + 1) / 2 + S::kStride;
  schedule.pitch = pitch * S::kApart;
  schedule.steps = (args.H - 1 + S::kPadding) / S::kStride;
  const int groups = (args.N * pitch + S::kPositions - 1) / S::kPositions;
  schedule.all = groups * schedule.steps;
  const int slots = multiprocessors * warps;
  schedule.each = (schedule.all + slots - 1) / slots;
  const int share = schedule.each * warps;

  auto* kernel = &stem_step_kernel<Half, X, kSize>;
  cudaLaunchConfig_t config = {};
  config.gridDim = unsigned((schedule.all + share - 1) / share);
  config.blockDim = unsigned(32 * warps);
  config.dynamicSmemBytes = weight_bytes + warps * sizeof(Workspace<kSize>);
  config.stream = stream;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(config.dynamicSmemBytes));
  if (error != cudaSuccess) return error;
  return cudaLaunchKernelEx(&config, kernel, args, bounds, schedule);
}

template <class Half, class X>
cudaError_t launch_for_size(const StemStepArgs& args, const Bounds& bounds, cudaStream_t stream) {
  return args.size == 3 ? launch<Half, X, 3>(args, bounds, stream)
                        : launch<Half, X, 7>(args, bounds, stream);
}

template <class Half>
cudaError_t launch_for_x(const StemStepArgs& args, const Bounds& bounds, cudaStream_t stream) {
  return args.x_dtype == DType::fp32 ? launch_for_size<Half, float>(args, bounds, stream)
                                     : launch_for_size<Half, __half>(args, bounds, stream);
}

}  // namespace

void stem_step_cuda(const StemStepArgs& args, bool bounds_on_device, void* stream) {
  Bounds bounds{bounds_on_device ? args.bounds : nullptr, {}};
  if (!bounds_on_device) std::copy_n(args.bounds, 12, bounds.values[0]);
  const auto queue = static_cast<cudaStream_t>(stream);
  const cudaError_t error = args.dy_dtype == DType::fp16
                                ? launch_for_x<__half>(args, bounds, queue)
                                : launch_for_x<__nv_bfloat16>(args, bounds, queue);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("stem_step: ") + cudaGetErrorString(error));
  }
}

}  // namespace clae_fast
